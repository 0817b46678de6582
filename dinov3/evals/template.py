"""Markup of the report page (jinja2, everything escaped); one file, no external reference.

It is a module and not a data file so that the code digest of a record covers it.
"""

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #16191d; --soft: #5b636e; --line: #dfe3e8;
  --model: #0b5fd0; --other: #8a94a1; --good: #13753c; --bad: #b3261e; --wash: #eaf1fb; }
@media (prefers-color-scheme: dark) { :root {
  --page: #101317; --card: #181c22; --ink: #e8ebef; --soft: #9aa4b1; --line: #2c333c;
  --model: #6cabff; --other: #7d8896; --good: #5cc98a; --bad: #ff8a80; --wash: #1b2736; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 0 0 .35rem; }
p { max-width: 46rem; margin: .3rem 0 .8rem; }
.soft, figcaption, td small, th small { color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 1.25rem 1.35rem; margin-top: 1.1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .45rem .7rem .45rem 0; border-top: 1px solid var(--line);
  vertical-align: top; }
thead th { border-top: 0; font-weight: 600; color: var(--soft); white-space: nowrap; }
tbody th { font-weight: 500; }
td.figure { white-space: nowrap; }
td small, tbody th small { display: block; font-size: .78rem; white-space: nowrap; }
td.model { color: var(--model); font-weight: 600; }
td.model small { font-weight: 400; }
.good { color: var(--good); } .bad { color: var(--bad); }
.headline { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem;
  margin: 1rem 0 .4rem; }
.tile { border: 1px solid var(--line); border-radius: 10px; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.75rem; line-height: 1.2; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.tile.model { background: var(--wash); border-color: var(--model); }
.tile.model b { color: var(--model); }
.tile span { font-size: .85rem; color: var(--soft); }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr));
  gap: 1rem; }
figure { margin: 0; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; display: block; }
.curve { fill: none; stroke: var(--model); stroke-width: 1.6; stroke-linejoin: round; }
.frame { fill: none; stroke: var(--line); }
.grid-line { stroke: var(--line); } .axis { fill: var(--soft); font-size: 11px; }
.dot-model { fill: var(--model); } .bar-model { stroke: var(--model); }
.dot-other { fill: var(--other); } .bar-other { stroke: var(--other); }
.label { fill: var(--ink); font-size: 12.5px; }
.group { fill: var(--ink); font-size: 13px; font-weight: 600; }
.neighbours { display: grid; gap: .8rem; }
.row { display: grid; grid-template-columns: repeat({columns}, minmax(0, 7rem)); gap: .6rem;
  align-items: start; }
.row figure img { width: 100%; border-radius: 8px; border: 3px solid var(--line); background: #fff;
  display: block; }
.row figure.query { margin-right: .5rem; }
.row figure.query img { border-color: var(--ink); }
.row figure.right img { border-color: var(--good); }
.row figure.wrong img { border-color: var(--bad); border-style: dashed; }
.row figcaption { font-size: .76rem; line-height: 1.3; margin-top: .25rem; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 3px; border-radius: 8px;
  overflow: hidden; }
.pair img { width: 100%; aspect-ratio: 1; display: block; background: #fff; }
.pair img.patches { image-rendering: pixelated; }
.strips { display: grid; grid-template-columns: repeat(var(--columns), 1fr); font-size: .8rem;
  color: var(--soft); }
.strips img { grid-column: 1 / -1; width: 100%; image-rendering: pixelated; border-radius: 8px; }
.legend { font-size: .85rem; max-width: none; }
.swatch { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 .7em;
  border-radius: 2px; }
code { font: .82rem/1.5 ui-monospace, "Cascadia Mono", "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; }
details { margin-top: .8rem; } summary { cursor: pointer; color: var(--soft); }
ul { padding-left: 1.2rem; margin: .4rem 0; }
@media (max-width: 40rem) { .row { grid-template-columns: repeat(3, minmax(0, 1fr)); } }
"""

# what every page begins with; takes `title` and `style`
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header>
<h1>{{ title }}</h1>
"""

# protocols that could not run; takes `report`
MISSING = """{% if report.missing -%}
<section id="missing">
<h2>Not judged</h2>
<ul>{% for item in report.missing %}<li>{{ item.protocol }}: {{ item.reason }}</li>{% endfor %}</ul>
</section>
{%- endif %}
"""

# what a page of one or several models ends with; takes `report` and the edges of `pieces`
PROVENANCE = """<tr><th>dataset</th><td><code>{{ report.dataset.sha256 }}</code></td></tr>
<tr><th>code</th><td><code>{{ report.code }}</code></td></tr>
<tr><th>config</th><td><code>{{ report.config }}</code></td></tr>
{%- for edge in pieces.edges %}
<tr><th>read {{ edge.role }}</th><td><code>{{ edge.name }} {{ edge.sha256 }},
{{ 'made by record ' ~ edge.record if edge.record else 'the chain begins here' }}</code></td></tr>
{%- endfor %}
</tbody></table></div>
<p class="soft"><code>python -m dinov3 lineage</code> with any of these digests prints the chain of
records down to the pictures.</p>
</section>
</main>
</body>
</html>
"""

PAGE = (
    HEAD
    + """<p class="soft">{{ report.dataset.num_train }} labelled pictures to look at,
{{ report.dataset.num_test }} held out and judged, {{ report.dataset.classes | length }} classes.
Contamination: {{ report.dataset.contamination }}. All intervals are bootstrap 95 %.</p>
</header>

{%- macro figure(row) -%}
{{ '%.3f' | format(row.value) }}<small>{{ '%.3f' | format(row.low) }} &ndash;
{{ '%.3f' | format(row.high) }}</small>
{%- endmacro %}
{%- macro signed(row) -%}
{{ '%+.3f' | format(row.value) }}<small>{{ '%+.3f' | format(row.low) }} …
{{ '%+.3f' | format(row.high) }}</small>
{%- endmacro %}
{%- macro verdict(row) -%}
{{ 'good' if row.low > 0 else 'bad' if row.high < 0 else 'soft' }}
{%- endmacro %}
{%- macro figures(measures) %}
<div class="scroll"><table>
<thead><tr><th>protocol</th>
{%- for subject in subjects %}<th>{{ subject }}</th>{% endfor -%}
<th>model &minus; random init</th><th>model &minus; raw pixels</th></tr></thead>
<tbody>
{%- for measure in measures %}
<tr><th>{{ measure.protocol }}<small>{{ measure.metric }}
{%- if measure.k %}, k = {{ measure.k }}{% endif %}</small></th>
{%- for subject in subjects %}
<td class="figure{{ ' model' if subject == 'model' }}">
{%- if subject in measure.cells %}{{ figure(measure.cells[subject]) }}
{%- else %}&ndash;{% endif %}</td>
{%- endfor %}
{%- for against in ('random init', 'raw pixels') %}
<td class="figure">{% if against in measure.differences -%}
{%- set row = measure.differences[against] -%}
<span class="{{ verdict(row) }}">{{ signed(row) }}</span>
{%- else %}&ndash;{% endif %}</td>
{%- endfor %}</tr>
{%- endfor %}
</tbody></table></div>
{%- endmacro %}

<section id="headline">
<h2>{{ headline.title }}</h2>
{%- if headline.tiles %}
<div class="headline">
{%- for tile in headline.tiles %}
<div class="tile {{ 'model' if tile.subject == 'model' }}"><span>{{ tile.subject }}</span>
<b>{{ '%.3f' | format(tile.value) }}</b>
<span>{{ '%.3f' | format(tile.low) }} &ndash; {{ '%.3f' | format(tile.high) }}</span></div>
{%- endfor %}
</div>
{%- endif %}
{%- for sentence in headline.sentences %}
<p>{{ sentence }}</p>
{%- endfor %}
</section>

{% if main or more -%}
<section id="figures">
<h2>All protocols</h2>
{%- if forest %}
<svg viewBox="0 0 {{ forest.width }} {{ forest.height }}" role="img"
 aria-label="Figures with intervals">
{%- for tick in forest.ticks %}
<line class="grid-line" x1="{{ tick.x }}" x2="{{ tick.x }}" y1="8" y2="{{ forest.height - 22 }}"/>
<text class="axis" x="{{ tick.x }}" y="{{ forest.height - 6 }}"
 text-anchor="middle">{{ tick.text }}</text>
{%- endfor %}
{%- for group in forest.groups %}
<text class="group" x="0" y="{{ group.y }}">{{ group.name }}</text>
{%- for mark in group.marks %}
<text class="label" x="12" y="{{ mark.y + 4 }}">{{ mark.subject }}</text>
<line class="bar-{{ mark.kind }}" x1="{{ mark.low }}" x2="{{ mark.high }}"
 y1="{{ mark.y }}" y2="{{ mark.y }}" stroke-width="2"/>
<circle class="dot-{{ mark.kind }}" cx="{{ mark.x }}" cy="{{ mark.y }}" r="4.5"/>
{%- endfor %}
{%- endfor %}
</svg>
{%- endif %}
{{ figures(main) }}
<p class="soft">Green: the interval of the difference lies above 0; red: below; grey: it contains 0.
The random initialisation is the mean of {{ num_inits }} seeds; the interval of the difference
includes how far one more such seed could lie. The majority class is the constant
guess; in retrieval it is one fixed order of the pictures. In “leave one out” every labelled
picture is judged by all others, and the pictures of the training half were seen,
unlabelled, in training.
{%- if report.scenes %} Segmentation: a linear layer on patches, of the classes or of any object
against the background, trained on {{ report.scenes.num_train }} scenes of training pictures and
judged on {{ report.scenes.num_test }} of held-out ones; there raw pixels are those of a patch.
{%- endif %}</p>
{%- if more %}
<details><summary>Top-5, mean per class, pixel accuracy</summary>{{ figures(more) }}</details>
{%- endif %}
</section>
{%- endif %}

"""
    + MISSING
    + """
{% if report.per_class -%}
<section id="classes">
<h2>Class by class</h2>
<p class="soft">{{ headline.title }}; the test pictures of one class are few, so single rows say
little.</p>
<div class="scroll"><table>
<thead><tr><th>class</th><th>training half</th><th>test half</th>
{%- for subject in subjects %}<th>{{ subject }}</th>{% endfor %}</tr></thead>
<tbody>
{%- for row in report.per_class %}
<tr><th>{{ row.label }}</th><td>{{ row.num_train }}</td><td>{{ row.num_test }}</td>
{%- for subject in subjects %}
<td class="{{ 'model' if subject == 'model' }}">
{%- if subject in row %}{{ '%.3f' | format(row[subject]) }}{% else %}&ndash;{% endif %}</td>
{%- endfor %}</tr>
{%- endfor %}
</tbody></table></div>
</section>
{%- endif %}

{% if neighbours -%}
<section id="neighbours">
<h2>Nearest neighbours</h2>
<p class="soft">Held-out queries drawn by the seed, not selected; then the most similar pictures the
model found{{ ' in the training half' if has_labels else ' among the other held-out pictures' }}, by
cosine of the CLS feature.
{%- if has_labels %} Solid green: the same class; dashed red: another.{% endif %}</p>
<div class="neighbours">
{%- for row in neighbours %}
<div class="row">
<figure class="query"><img src="{{ row.query.uri }}" alt="query {{ row.query.name }}">
<figcaption>query{% if row.query.label %}: {{ row.query.label }}{% endif %}</figcaption></figure>
{%- for shown in row.neighbours %}
<figure class="{{ '' if shown.right is none else 'right' if shown.right else 'wrong' }}">
<img src="{{ shown.uri }}" alt="{{ shown.name }}">
<figcaption>{% if shown.right is not none %}{{ '✓' if shown.right else '✗' }} {% endif %}
{%- if shown.label %}{{ shown.label }} {% endif %}
{{- '%.2f' | format(shown.similarity) }}</figcaption></figure>
{%- endfor %}
</div>
{%- endfor %}
</div>
</section>
{%- endif %}

{% if scenes -%}
<section id="scenes">
<h2>Segmentation of scenes</h2>
<p class="soft">The first scenes, not selected: cut-out held-out pictures on photographs. Black:
background; white in the mask: ignored; grey: only the probe of any object sees something.</p>
<div class="strips" style="--columns: {{ scenes.columns | length }}">
{%- for name in scenes.columns %}<span>{{ name }}</span>{% endfor %}
<img src="{{ scenes.uri }}" alt="scenes, their masks and predictions"></div>
<p class="legend">{% for name, colour in scenes.classes %}<span class="swatch"
 style="background: {{ colour }}"></span>{{ name }} {% endfor %}</p>
<details><summary>Intersection over union, class by class</summary><div class="scroll"><table>
<thead><tr><th>class</th>
{%- for subject in subjects %}<th>{{ subject }}</th>{% endfor %}</tr></thead>
<tbody>
{%- for row in report.scenes.per_class %}
<tr><th>{{ row.label }}</th>
{%- for subject in subjects %}
<td class="{{ 'model' if subject == 'model' }}">
{%- if subject in row %}{{ '%.3f' | format(row[subject]) }}{% else %}&ndash;{% endif %}</td>
{%- endfor %}</tr>
{%- endfor %}
</tbody></table></div></details>
</section>
{%- endif %}

{% if patches -%}
<section id="patches">
<h2>Patch features</h2>
<p class="soft">The first three principal components of the patch features of these pictures
together, as red, green and blue; each square is one patch. Pictures are shown to the model at
several times the resolution of the evaluation.</p>
<div class="pairs">
{%- for pair in patches %}
<figure><div class="pair"><img src="{{ pair.picture.uri }}" alt="{{ pair.picture.name }}">
<img class="patches" src="{{ pair.colours }}" alt="patch features of {{ pair.picture.name }}"></div>
<figcaption>{{ pair.picture.name }}</figcaption></figure>
{%- endfor %}
</div>
</section>
{%- endif %}

<section id="features">
<h2>Feature health</h2>
<p>On {{ report.features.num_samples }} pictures: participation ratio
<b>{{ '%.1f' | format(report.features.participation_ratio) }}</b>, RankMe
<b>{{ '%.1f' | format(report.features.rankme) }}</b>, mean cosine between pictures
<b>{{ '%.3f' | format(report.features.mean_cosine) }}</b>.</p>
</section>

{% if curves -%}
<section id="curves">
<h2>Training</h2>
<div class="panels">
{%- for curve in curves %}
<figure><svg viewBox="0 0 {{ size.0 }} {{ size.1 }}" role="img" aria-label="{{ curve.name }}">
<rect class="frame" x="0.5" y="0.5" width="{{ size.0 - 1 }}" height="{{ size.1 - 1 }}" rx="6"/>
<polyline class="curve" points="{{ curve.points }}"/></svg>
<figcaption><b>{{ curve.name }}</b> {{ '%.4g' | format(curve.last) }} at step {{ curve.last_step }}
<br><span class="soft">between {{ '%.4g' | format(curve.low) }} and 
{{ '%.4g' | format(curve.high) }} since step {{ curve.first_step }}</span></figcaption></figure>
{%- endfor %}
</div>
</section>
{%- endif %}

<section id="provenance">
<h2>Provenance</h2>
<div class="scroll"><table><tbody>
{%- for row in provenance %}
<tr><th>{{ row.name }}</th><td><code>{{ row.value }}</code></td></tr>
{%- endfor %}
</tbody></table></div>
<p class="soft"><code>python -m dinov3 lineage</code> with any of these digests prints the chain of
records down to the pictures.</p>
</section>
</main>
</body>
</html>
"""
)
