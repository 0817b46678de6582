"""The report of a re-evaluation for people: one self-contained HTML page."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dinov3.evals.template import HEAD, STYLE

_OWN_STYLE = """
.verdict { font-size: 1.15rem; font-weight: 600; }
.history { overflow-x: auto; } .history svg { max-width: 48rem; }
"""


def render_reevaluation(report: Mapping[str, Any], history: bytes) -> bytes:
    """The page as UTF-8; everything that comes from data is escaped.

    Args:
        report: Content of the JSON beside it.
        history: The picture of `draw_history`, trusted.
    """
    release = report["release"]
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    text = environment.from_string(_PAGE).render(
        title=f"Re-evaluation: {release['model']}@{release['version']}",
        style=Markup(STYLE.replace("{columns}", "1") + _OWN_STYLE),
        report=report,
        release=release,
        benchmark=report["benchmark"],
        regressions=[row for row in report["metrics"] if row["regressed"]],
        history=Markup(history.decode()),
    )
    return text.encode("utf-8")


_PAGE = (
    HEAD
    + """<p class="soft">{{ report.date }} &middot; {{ benchmark.num_train }} labelled pictures to
look at, {{ benchmark.num_test }} held out and judged, {{ benchmark.classes | length }} classes.
Contamination: {{ benchmark.contamination }}. Intervals are bootstrap 95 %.</p>
</header>

<section id="verdict">
{%- if regressions %}
<p class="verdict bad">{{ regressions | length }} of {{ report.metrics | length }} figures fell
below the released value by more than their tolerance.</p>
{%- else %}
<p class="verdict good">All {{ report.metrics | length }} figures hold within their tolerance.</p>
{%- endif %}
<p>{% if benchmark.as_released -%}
The pictures are those that the release was evaluated on.
{%- else -%}
The pictures are others than those that the release was evaluated on: a difference may come from
them.{% endif %} Weights, released figures and settings of the protocols come from the release,
whose signature was checked.</p>
</section>

<section id="figures">
<h2>Figures</h2>
<div class="scroll"><table>
<thead><tr><th>protocol</th><th>released</th><th>now</th><th>change</th><th>may fall by</th>
<th></th></tr></thead>
<tbody>
{%- for row in report.metrics %}
<tr><th>{{ row.protocol }}<small>{{ row.metric }}
{%- if row.k is defined %}, k = {{ row.k }}{% endif %}</small></th>
<td class="figure">{{ '%.3f' | format(row.released) }}</td>
<td class="figure model">{{ '%.3f' | format(row.value) }}<small>{{ '%.3f' | format(row.low) }}
&ndash; {{ '%.3f' | format(row.high) }}</small></td>
<td class="figure">{{ '%+.3f' | format(row.value - row.released) }}</td>
<td class="figure">{{ '%.3f' | format(row.tolerance) }}</td>
<td>{% if row.regressed %}<span class="bad">regression</span>
{%- else %}<span class="good">holds</span>{% endif %}</td></tr>
{%- endfor %}
</tbody></table></div>
{%- if report.uncompared %}
<p class="soft">Not released, so not compared:
{% for row in report.uncompared %}{{ row.protocol }} {{ row.metric }}
{%- if row.k is defined %}, k = {{ row.k }}{% endif %} ({{ '%.3f' | format(row.value) }})
{%- if not loop.last %}; {% endif %}{% endfor %}.</p>
{%- endif %}
</section>

<section id="history">
<h2>Each metric by release</h2>
<p class="soft">A dashed line is what the release claims, the band below it how far the figure may
fall; dots are measurements by date, red ones regressions.</p>
<div class="history">{{ history }}</div>
</section>

<section id="provenance">
<h2>What was judged</h2>
<div class="scroll"><table><tbody>
<tr><th>release digest</th><td><code>{{ release.digest }}</code></td></tr>
<tr><th>signed by</th><td><code>{{ release.signer }}</code></td></tr>
<tr><th>tensors</th><td><code>{{ release.tensors }}</code></td></tr>
<tr><th>pictures</th><td><code>{{ benchmark.sha256 }}</code></td></tr>
<tr><th>settings of the protocols</th><td><code>{{ report.settings }}</code></td></tr>
<tr><th>recipe</th><td><code>{{ report.recipe }}</code></td></tr>
<tr><th>code</th><td><code>{{ report.code }}</code></td></tr>
</tbody></table></div>
</section>
</main>
</body>
</html>
"""
)
