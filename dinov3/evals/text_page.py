"""The report of a model of pictures and texts for people: one self-contained HTML page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dinov3.evals.baselines import MODEL
from dinov3.evals.template import HEAD, MISSING, PROVENANCE, STYLE
from dinov3.evals.text_findings import TEXT_SUBJECTS
from dinov3.evals.text_pictures import Query, SceneRow, class_colours
from dinov3.release.record import Edge

Row = Mapping[str, Any]

_COLUMNS = 5  # pictures beside each other


@dataclass(frozen=True)
class TextPieces:
    """What the page shows beside the figures."""

    picture_queries: Sequence[Query]
    text_queries: Sequence[Query]
    scenes: Sequence[SceneRow]
    scene_classes: Sequence[str]
    edges: Sequence[Edge]


def render_text_page(report: Mapping[str, Any], pieces: TextPieces) -> bytes:
    """The page as UTF-8; everything that comes from data is escaped.

    Args:
        report: The content of `report.json`.
        pieces: Pictures and inputs.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    colours = [f"rgb{colour}" for colour in class_colours(len(pieces.scene_classes))]
    text = environment.from_string(_PAGE).render(
        title=f"Evaluation: {report['stage']}",
        style=Markup(STYLE.replace("{columns}", str(_COLUMNS)) + _OWN_STYLE),
        report=report,
        model=MODEL,
        measures=_measures(report),
        pieces=pieces,
        legend=list(zip(pieces.scene_classes, colours, strict=True)),
    )
    return text.encode("utf-8")


def _measures(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table: one per measure, with its subjects and its differences."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in report["rows"]:
        names = {"protocol": row["protocol"], "metric": row["metric"]}
        measure = found.setdefault(tuple(names.values()), {**names, "cells": {}, "over": []})
        measure["cells"][row["subject"]] = row
    for row in report["differences"]:
        found[row["protocol"], row["metric"]]["over"].append(row)
    order = {subject: place for place, subject in enumerate(TEXT_SUBJECTS)}
    for measure in found.values():
        measure["cells"] = sorted(
            measure["cells"].values(), key=lambda row: order[str(row["subject"])]
        )
    return list(found.values())


_OWN_STYLE = """
.said { display: grid; grid-template-columns: 7rem 1fr; gap: .8rem; margin: .6rem 0; }
.said img, .found img { width: 100%; border-radius: 8px; border: 3px solid var(--line); }
.said ol { margin: .2rem 0; padding-left: 1.2rem; }
.found { display: grid; grid-template-columns: repeat(5, minmax(0, 7rem)); gap: .6rem; }
.found figure.right img { border-color: var(--good); }
.found figure.wrong img { border-color: var(--bad); border-style: dashed; }
.found figcaption { font-size: .76rem; line-height: 1.3; }
.scene { display: grid; grid-template-columns: repeat(3, minmax(0, 10rem)); gap: .5rem;
  margin: .5rem 0; }
.scene img { width: 100%; image-rendering: pixelated; }
.swatch { display: inline-block; width: .8em; height: .8em; margin: 0 .25em 0 .8em; }
"""

_PAGE = (
    HEAD
    + """\
<p class="soft">Pictures against texts, on held-out pictures alone; no label and no mask was trained
on. {{ report.dataset.num_test }} labelled held-out pictures of
{{ report.dataset.classes | length }} classes, {{ report.dataset.num_test_pairs }} held-out pairs of
picture and caption.
Contamination: {{ report.dataset.contamination }};
{{ report.dataset.captions_seen_in_training }} of {{ report.dataset.num_test_captions }} held-out
captions also stand beside another, trained-on picture. All intervals are bootstrap 95 %.</p>
</header>

{%- macro number(row) -%}
{{ '%.3f' | format(row.value) }} <small>{{ '%.3f' | format(row.low) }} &ndash;
{{ '%.3f' | format(row.high) }}</small>
{%- endmacro %}

{% if measures -%}
<section id="figures">
<h2>All protocols</h2>
<div class="scroll"><table>
<thead><tr><th>protocol</th><th>{{ model }}</th><th>baselines</th>
<th>{{ model }} &minus; baseline</th></tr></thead>
<tbody>
{%- for measure in measures %}
<tr><th>{{ measure.protocol }}<small>{{ measure.metric }}, n =
{{ measure.cells[0].num_samples }}</small></th>
<td class="figure model">{{ number(measure.cells[0]) }}</td>
<td class="figure">{% for row in measure.cells[1:] %}<div>{{ row.subject }} {{ number(row) }}</div>
{%- endfor %}</td>
<td class="figure">{% for row in measure.over %}<div class="
{{- 'good' if row.low > 0 else 'bad' if row.high < 0 else 'soft' }}">
{{- '%+.3f' | format(row.value) }} <small>{{ '%+.3f' | format(row.low) }} …
{{ '%+.3f' | format(row.high) }} against {{ row.against }}</small></div>{% endfor %}</td></tr>
{%- endfor %}
</tbody></table></div>
<p class="soft">Green: the interval of the difference lies above 0; red: below; grey: it contains 0.
Shuffled text: the same embeddings, but every class answers to another's names, every picture to
another's captions. Majority class: the most frequent class of the training half, in segmentation
that of the judged scenes themselves. Chance: a random order. Texts that differ in upper case alone
are one text, right for every picture it describes.</p>
</section>
{%- endif %}

"""
    + MISSING
    + """
{% if report.per_class -%}
<section id="classes">
<h2>Class by class</h2>
<div class="scroll"><table>
<thead><tr><th>class</th><th>named</th><th>pictures</th><th>zero-shot top-1</th>
<th>IoU, whole</th></tr></thead>
<tbody>
{%- for row in report.per_class %}
<tr><th>{{ row.label }}</th><td>{{ row.names | join(', ') }}</td><td>{{ row.num_test }}</td>
{%- for name in ('zero_shot_top_1', 'segmentation_iou') %}
<td class="model">{% if name in row %}{{ '%.3f' | format(row[name]) }}{% else %}&ndash;{% endif %}
</td>{% endfor %}</tr>
{%- endfor %}
</tbody></table></div>
</section>
{%- endif %}

{% if pieces.picture_queries -%}
<section id="image-to-text">
<h2>Nearest captions</h2>
<p class="soft">Held-out pictures drawn by the seed, not selected.</p>
{%- for query in pieces.picture_queries %}
<div class="said"><img src="{{ query.uri }}" alt="{{ query.text }}">
<div>{{ query.text }}<ol>
{%- for answer in query.answers %}
<li class="{{ 'good' if answer.right else 'soft' }}">{{ '✓' if answer.right else '✗' }}
{{ answer.text }} <small>{{ '%.2f' | format(answer.similarity) }}</small></li>
{%- endfor %}</ol></div></div>
{%- endfor %}
</section>
{%- endif %}

{% if pieces.text_queries -%}
<section id="text-to-image">
<h2>Nearest pictures</h2>
<p class="soft">Captions of held-out pictures drawn by the seed, not selected.</p>
{%- for query in pieces.text_queries %}
<p>{{ query.text }}</p>
<div class="found">
{%- for answer in query.answers %}
<figure class="{{ 'right' if answer.right else 'wrong' }}">
<img src="{{ answer.uri }}" alt="{{ answer.text }}">
<figcaption>{{ '✓' if answer.right else '✗' }} {{ answer.text }}
{{ '%.2f' | format(answer.similarity) }}</figcaption></figure>
{%- endfor %}</div>
{%- endfor %}
</section>
{%- endif %}

{% if pieces.scenes -%}
<section id="segmentation">
<h2>Segmentation by names</h2>
<p class="soft">The first scenes, not selected: the scene, its mask, the names found with the
picture seen whole. White: background; grey: ignored.</p>
<p>{% for name, colour in legend %}<span class="swatch" style="background: {{ colour }}"></span>
{{- name }}{% endfor %}</p>
{%- for row in pieces.scenes %}
<div class="scene"><img src="{{ row.picture }}" alt="scene"><img src="{{ row.truth }}" alt="mask">
<img src="{{ row.found }}" alt="names found"></div>
{%- endfor %}
</section>
{%- endif %}

<section id="provenance">
<h2>Provenance</h2>
<div class="scroll"><table><tbody>
{%- for name in ('name', 'sha256', 'tensors', 'record') %}
<tr><th>model {{ name }}</th><td><code>{{ report.model[name] }}</code></td></tr>
{%- endfor %}
"""
    + PROVENANCE
)
