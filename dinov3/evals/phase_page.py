"""The phases side by side for people: one self-contained HTML page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dinov3.evals.baselines import MAJORITY, MODEL
from dinov3.evals.dense_pictures import legend
from dinov3.evals.phase_findings import comparisons, headline_measures, measure_of
from dinov3.evals.phase_pictures import Exhibit
from dinov3.evals.template import HEAD, MISSING, PROVENANCE, STYLE
from dinov3.release.record import Edge

Row = Mapping[str, Any]


@dataclass(frozen=True)
class PhasePieces:
    """What the page shows beside the figures."""

    exhibits: Sequence[Exhibit]
    classes: Sequence[str]  # of the scenes
    edges: Sequence[Edge]


def render_phases(report: Mapping[str, Any], pieces: PhasePieces) -> bytes:
    """The page as UTF-8; everything that comes from data is escaped.

    Args:
        report: The content of `report.json`.
        pieces: Pictures and inputs.
    """
    measures = list(headline_measures(report))
    shown = {measure for _, measure in measures}
    others = dict.fromkeys(measure_of(row) for row in report["rows"])
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    text = environment.from_string(_PAGE).render(
        title=f"Evaluation: {report['stage']}",
        style=Markup(STYLE.replace("{columns}", "6") + _OWN_STYLE),
        report=report,
        names=[model["name"] for model in report["models"]],
        pairs=comparisons(report),
        main=_lines(report, measures),
        more=_lines(report, [(_title(one), one) for one in others if one not in shown]),
        pieces=pieces,
        legend=legend(pieces.classes),
    )
    return text.encode("utf-8")


def _title(measure: tuple[str, str, int]) -> str:
    protocol, metric, k = measure
    return f"{protocol} {metric}" + (f", k = {k}" if k else "")


def _lines(
    report: Mapping[str, Any], measures: Sequence[tuple[str, tuple[str, str, int]]]
) -> list[dict[str, Any]]:
    """Rows of the tables: a measure, its figures by model, its differences by pair."""
    cells: dict[tuple[str, str, int], dict[str, Row]] = {}
    guesses: dict[tuple[str, str, int], Row] = {}
    for row in report["rows"]:
        if row["subject"] == MODEL:
            cells.setdefault(measure_of(row), {})[row["model"]] = row
        elif row["subject"] == MAJORITY:
            guesses[measure_of(row)] = row
    changes: dict[tuple[str, str, int], dict[tuple[str, str], Row]] = {}
    for row in report["differences"]:
        changes.setdefault(measure_of(row), {})[row["model"], row["against"]] = row
    return [
        {
            "title": title,
            "cells": cells.get(measure, {}),
            "guess": guesses.get(measure),
            "changes": changes.get(measure, {}),
        }
        for title, measure in measures
    ]


_OWN_STYLE = """
main { max-width: 76rem; }
.exhibit { display: grid; gap: 4px; align-items: center; font-size: .78rem; overflow-x: auto;
  grid-template-columns: 8.5rem repeat(var(--columns), minmax(4.5rem, 9rem));
  margin: .4rem 0 1.6rem; }
h3 { font-size: .85rem; margin: 1.2rem 0 0; overflow-wrap: anywhere; }
.exhibit b { font-weight: 600; color: var(--soft); }
.exhibit img { width: 100%; aspect-ratio: 1; display: block; border-radius: 4px; }
.exhibit img.patches { image-rendering: pixelated; }
"""

_PAGE = (
    HEAD
    + """<p class="soft">{{ names | length }} models on the same pictures:
{{ report.dataset.num_train }} labelled ones to look at, {{ report.dataset.num_test }} held out and
judged, {{ report.dataset.num_scenes }} scenes. Contamination: {{ report.dataset.contamination }}.
All intervals are bootstrap 95 %.</p>
</header>

{%- macro figure(row) -%}
{{ '%.3f' | format(row.value) }}<small>{{ '%.3f' | format(row.low) }} &ndash;
{{ '%.3f' | format(row.high) }}</small>
{%- endmacro %}
{%- macro change(row) -%}
<span class="{{ {'better': 'good', 'worse': 'bad'}.get(row.verdict, 'soft') }}">
{{- '%+.3f' | format(row.value) }}{% if row.verdict %} {{ row.verdict }}{% endif -%}
<small>{{ '%+.3f' | format(row.low) }} … {{ '%+.3f' | format(row.high) }}</small></span>
{%- endmacro %}
{%- macro figures(lines) %}
<div class="scroll"><table>
<thead><tr><th></th>{% for name in names %}<th>{{ name }}</th>{% endfor %}
<th>constant guess</th></tr></thead>
<tbody>
{%- for line in lines %}
<tr><th>{{ line.title }}</th>
{%- for name in names %}
<td class="figure">{% if name in line.cells %}{{ figure(line.cells[name]) }}
{%- else %}&ndash;{% endif %}</td>
{%- endfor %}
<td class="figure">{% if line.guess %}{{ figure(line.guess) }}{% else %}&ndash;{% endif %}</td></tr>
{%- endfor %}
</tbody></table></div>
{%- endmacro %}
{%- macro changes(lines) %}
<div class="scroll"><table>
<thead><tr><th></th>{% for name, against in pairs %}
<th>{{ name }}<br>&minus; {{ against }}</th>{% endfor %}</tr></thead>
<tbody>
{%- for line in lines %}
<tr><th>{{ line.title }}</th>
{%- for pair in pairs %}
<td class="figure">{% if pair in line.changes %}{{ change(line.changes[pair]) }}
{%- else %}&ndash;{% endif %}</td>
{%- endfor %}</tr>
{%- endfor %}
</tbody></table></div>
{%- endmacro %}

{% if main -%}
<section id="changes">
<h2>What each phase did</h2>
<p class="soft">Differences on the same pictures and scenes, against the model a phase began from;
for students against their teacher, and against {{ report.num_random_inits }} untrained copies,
where the interval includes how far one more copy could lie. A word stands only where the interval
leaves 0 out; of many such intervals some do by chance. Intervals are over pictures and scenes for
these very weights: another run of the same training could lie further away.</p>
{{ changes(main) }}
</section>

<section id="figures">
<h2>Every model</h2>
{{ figures(main) }}
{%- if more %}
<details><summary>All other figures</summary>{{ figures(more) }}{{ changes(more) }}</details>
{%- endif %}
</section>
{%- endif %}

{% if report.nearness -%}
<section id="nearness">
<h2>Students and teachers</h2>
<p class="soft">The share of each held-out picture's nearest other pictures that a model has in
common with the teacher, by cosine of CLS; intervals are over pictures, that of the difference
includes how far one more untrained copy could lie.</p>
<div class="scroll"><table>
<thead><tr><th></th><th>the student</th><th>untrained copies</th><th>chance</th>
<th>student &minus; untrained</th></tr></thead>
<tbody>
{%- for row in report.nearness %}
<tr><th>{{ row.model }} and {{ row.teacher }}<small>of the {{ row.k }} nearest,
{{ row.num_samples }} pictures</small></th>
<td class="figure model">{{ figure(row.student) }}</td>
<td class="figure">{{ figure(row.random_init) }}</td>
<td>{{ '%.3f' | format(row.chance) }}</td>
<td class="figure">{{ change(row.difference) }}</td></tr>
{%- endfor %}
</tbody></table></div>
</section>
{%- endif %}

"""
    + MISSING
    + """
{% if pieces.exhibits -%}
<section id="exhibits">
<h2>Patch features</h2>
<p class="soft">Held-out pictures drawn by the seed and the first scenes, not selected. Components:
the first three principal components of a model's patches over all pictures and sizes shown here, as
red, green and blue, turned to be as like the first model's as they can. Similarity: cosine of each
patch with the one in the circle, bright at 1, dark at the smallest of each map. Sizes are the
recipe's pixels; a model that sees pictures larger sees the same cut.</p>
{%- if legend %}
<p class="legend">{% for name, colour in legend %}<span class="swatch"
 style="background: {{ colour }}"></span>{{ name }} {% endfor %}</p>
{%- endif %}
{%- for exhibit in pieces.exhibits %}
<h3>{{ exhibit.name }}</h3>
<div class="exhibit" style="--columns: {{ names | length + 1 }}">
<span></span><span></span>{% for name in names %}<b>{{ name }}</b>{% endfor %}
{%- for strip in exhibit.strips %}
<span>{{ strip.title }}</span>
<img src="{{ strip.shown }}" alt="{{ exhibit.name }} as seen">
{%- for cell in strip.cells %}
<img class="patches" src="{{ cell }}" alt="{{ strip.title }}, {{ names[loop.index0] }}">
{%- endfor %}
{%- endfor %}
</div>
{%- endfor %}
</section>
{%- endif %}

<section id="provenance">
<h2>Provenance</h2>
<div class="scroll"><table><tbody>
{%- for model in report.models %}
<tr><th>{{ model.name }}{% if model.against %}<small>after {{ model.against }}</small>{% endif %}
</th><td><code>{{ model.sha256 }}</code></td></tr>
{%- endfor %}
"""
    + PROVENANCE
)
