"""The report's page, as a jinja2 template.

It is Python source because a Flower App Bundle carries no HTML or template files.
"""

STYLE = r"""<style>
:root { --ink:#1d2530; --soft:#5a6473; --line:#e1e5eb; --wash:#f5f7fa; --blue:#1f5fbf; --blue-wash:#e8f0fb;
  --plum:#6a4fa3; --plum-wash:#f0ecf8; --amber:#f0b866; --warn:#8a4b08; --warn-wash:#fdf5e6; --good:#1f6f4f; }
* { box-sizing:border-box; }
html { -webkit-text-size-adjust:100%; }
body { margin:0; background:#fff; color:var(--ink); font:16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
  Arial, sans-serif; font-variant-numeric:tabular-nums; overflow-wrap:break-word;
  -webkit-print-color-adjust:exact; print-color-adjust:exact; }
main { max-width:940px; margin:0 auto; padding:44px 24px 64px; }
header p.kicker { max-width:none; margin:0 0 10px; color:var(--soft); font-size:13.5px; }
h1 { font-size:29px; line-height:1.28; font-weight:650; letter-spacing:-.012em; margin:0 0 6px; text-wrap:balance; }
h2 { font-size:20px; line-height:1.3; font-weight:650; letter-spacing:-.005em; margin:52px 0 6px; }
h3 { font-size:15px; margin:0 0 6px; font-weight:600; }
p { margin:0 0 12px; max-width:44em; }
p.note, figcaption, .small { color:var(--soft); font-size:14px; line-height:1.5; }
.num, .mem b { white-space:nowrap; }

.scores { margin:26px 0 18px; }
.score { display:grid; grid-template:"name track value" / 148px 1fr 104px; gap:0 16px; align-items:center; min-height:46px; }
.score .track { grid-area:track; } .score .name { grid-area:name; } .score .value { grid-area:value; }
.scores .name { font-weight:550; white-space:nowrap; }
.scores .track { position:relative; height:24px; background:var(--wash); border-radius:4px; }
.scores .fill { position:absolute; inset:0 auto 0 0; border-radius:4px; background:var(--c); }
.scores .whisker { position:absolute; top:11px; height:2px; background:var(--ink); min-width:2px; }
.scores .whisker::before, .scores .whisker::after { content:""; position:absolute; top:-4px; width:2px; height:10px; background:var(--ink); }
.scores .whisker::before { left:0; } .scores .whisker::after { right:0; }
.scores .value { text-align:right; white-space:nowrap; }
.scores .value b { font-size:18px; font-weight:650; }
.scores .value span { display:block; color:var(--soft); font-size:12.5px; line-height:1.2; }

.diagram { display:flex; align-items:stretch; margin:20px 0 12px; }
.part { flex:1 1 0; min-width:0; border-radius:8px; padding:14px 16px 16px; background:var(--w); border-top:4px solid var(--c); }
.part.data { --c:var(--blue); --w:var(--blue-wash); } .part.model { --c:var(--plum); --w:var(--plum-wash); }
.part h3 { margin:0; color:var(--c); font-size:17px; }
.part .by { font-size:14px; line-height:1.4; margin:0 0 12px; }
.part .holds { font-size:13px; color:var(--soft); margin:10px 0 0; line-height:1.4; }
.cells { display:flex; gap:2px; }
.cells span { flex:1 1 0; min-width:0; height:30px; border-radius:3px; background:var(--c); color:#fff; font-size:12px; line-height:30px;
  text-align:center; white-space:nowrap; overflow:visible; }
.cells.many { gap:1px; } .cells.many span { font-size:10px; }
.cells span.word { flex:0 0 auto; padding:0 8px; background:#fff; color:var(--c); box-shadow:inset 0 0 0 1px var(--c); }
.cut { flex:0 0 112px; display:flex; flex-direction:column; justify-content:center; gap:10px; padding:0 8px; font-size:12.5px;
  line-height:1.25; text-align:center; color:var(--soft); }
.cut b { display:block; color:var(--ink); font-weight:400; font-size:19px; line-height:1; }

.plots { display:grid; grid-template-columns:1fr 1fr; gap:28px; margin:18px 0 0; }
figure { margin:0; min-width:0; } figure svg { width:100%; height:auto; display:block; }
ul.legend { list-style:none; margin:0 0 4px; padding:0; display:flex; flex-wrap:wrap; gap:2px 16px; font-size:13px; color:var(--soft); }
ul.legend li { display:flex; align-items:center; gap:6px; }
ul.legend i { width:14px; height:10px; border-radius:2px; background:var(--c); flex:none; }
ul.legend i.line { height:3px; } ul.legend i.wide { height:8px; border-radius:4px; }
ul.legend i.dashed { height:0; background:none; border-top:2px dashed var(--c); border-radius:0; width:18px; }

table { border-collapse:collapse; width:100%; font-size:14px; line-height:1.45; margin:14px 0 8px; }
th { text-align:left; font-weight:550; color:var(--soft); font-size:13px; padding:6px 14px 6px 0; border-bottom:1px solid #b8bfca; vertical-align:bottom; }
td { padding:9px 14px 9px 0; border-bottom:1px solid var(--line); vertical-align:top; }
th:last-child, td:last-child { padding-right:0; }
th.n, td.n { text-align:right; white-space:nowrap; }
td .small { display:block; font-size:12.5px; }
tbody.group th { padding:22px 0 6px; color:var(--ink); font-size:15px; font-weight:650; }
tbody.group:first-of-type th { padding-top:12px; }
i.dot { display:inline-block; width:10px; height:10px; border-radius:5px; margin-right:7px; }
td.open { color:var(--warn); } td.covered { color:var(--good); }
.bar { display:flex; height:12px; border-radius:3px; overflow:hidden; background:var(--wash); min-width:110px; margin:5px 0 3px; }
.bar i { display:block; background:var(--c); flex:none; }
.bar.thin { height:8px; margin:7px 0; }
table.read td { width:50%; } table.read .right { background:#f6d5d0; border-radius:3px; padding:0 2px; } table.read .wrong { color:var(--soft); }

.warning, .calm { border-left:4px solid; border-radius:4px; padding:14px 20px 8px; margin:16px 0 20px; }
.warning { background:var(--warn-wash); border-color:#d98a1f; } .calm { background:#eef7f2; border-color:var(--good); }
.warning h3 { color:var(--warn); font-size:16px; } .calm h3 { color:var(--good); font-size:16px; }
.warning ul, .calm ul { margin:0 0 10px; padding-left:20px; } .warning li, .calm li { margin:0 0 6px; }
details { border-top:1px solid var(--line); padding:12px 0; } details:last-of-type { border-bottom:1px solid var(--line); }
summary { cursor:pointer; font-weight:550; } summary:focus-visible { outline:2px solid var(--blue); outline-offset:3px; }
.pairs { columns:2; column-gap:36px; margin:12px 0 4px; font-size:13.5px; }
.pairs div { display:flex; justify-content:space-between; gap:16px; break-inside:avoid; padding:3px 0; border-bottom:1px solid var(--line); }
.pairs dt { color:var(--soft); } .pairs dd { margin:0; text-align:right; min-width:0; overflow-wrap:anywhere; }
footer { margin-top:28px; color:var(--soft); font-size:13px; }

@media (max-width:700px) {
  main { padding:26px 16px 48px; } h1 { font-size:23px; } h2 { margin-top:42px; }
  .score { grid-template:"name value" "track track" / 1fr max-content; gap:2px 12px; margin-bottom:14px; align-items:end; }
  .diagram { flex-direction:column; } .cut { flex:none; flex-direction:row; padding:10px 0; gap:22px; }
  .cut b { display:inline-block; transform:rotate(90deg); margin-right:4px; }
  .plots, .pairs { grid-template-columns:1fr; columns:1; gap:24px; }
  table.cards thead { display:none; } table.cards, table.cards tbody, table.cards tr, table.cards td, table.cards th { display:block; }
  table.cards tr { padding:10px 0; border-bottom:1px solid var(--line); }
  table.cards td { display:grid; grid-template-columns:104px minmax(0, 1fr); gap:0 12px; border:0; padding:3px 0; text-align:left; white-space:normal; }
  table.cards td::before { content:attr(data-label); color:var(--soft); font-size:13px; grid-row:1 / span 4; }
  table.cards td > * { grid-column:2; }
  table.cards tbody.group tr:first-child { padding:18px 0 4px; } table.cards tbody.group th { padding:0; border:0; }
  .scroll { overflow-x:auto; }
}
@media print {
  body { font-size:10.5pt; } main { max-width:none; padding:0; } h1 { font-size:19pt; } h2 { font-size:14pt; margin-top:24pt; break-after:avoid; }
  .part, figure, tr, .warning, .calm, .scores { break-inside:avoid; } details::details-content { content-visibility:visible; display:block; height:auto; }
  @page { margin:16mm; }
}
</style>"""
"""The looks of all pages."""

PAGE = r"""{# The page of one run. No script, no outside resource; every value is escaped (autoescape). #}
{% macro cell(label, kind="") %}<td data-label="{{ label }}"{% if kind %} class="{{ kind }}"{% endif %}>{{ caller() }}</td>{% endmacro %}
{% macro swatch(color, text, kind="") %}<li><i class="{{ kind }}" style="--c:{{ color }}"></i>{{ text }}</li>{% endmacro %}
{% set metric = result.metric %}
{% set model = result.model %}
{% set not_recorded %}<p class="note">Not recorded in this run.</p>{% endset %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ model.name }}, trained split: run {{ result.run_id }}</title>
{{ style }}
</head>
<body>
<main>
<header>
<p class="kicker">Run {{ result.run_id }}, {{ result.created[:10] }} {{ result.created[11:16] }} UTC, took {{ result.duration_s|duration }}, seed {{ result.seed }}{% if one_machine %}; all parties simulated on one machine{% endif %}</p>
<h1>{{ headline }}</h1>
</header>

<section>
<div class="scores" role="group" aria-label="{{ metric_name|capitalize }}">
  {% for name, value, span, color in [
      ("Trained split", metric.split, metric.split_interval, colors.split),
      ("Trained unsplit", metric.unsplit, metric.unsplit_interval, colors.unsplit),
      (commonest|capitalize, metric.majority, none, "#c3c9d2")] if value is not none %}
  <div class="score">
    <div class="name">{{ name }}</div>
    <div class="track" style="--c:{{ color }}"><div class="fill" style="width:{{ "%.2f"|format(100 * value) }}%"></div>
      {%- if span %}<div class="whisker" style="left:{{ "%.2f"|format(100 * span.low) }}%;width:{{ "%.2f"|format(100 * (span.high - span.low)) }}%"></div>{% endif %}</div>
    <div class="value"><b>{{ value|percent }}</b>{% if span %}<span>{{ span|interval }}</span>{% endif %}</div>
  </div>
  {% endfor %}
</div>
<p>{{ verdict }}</p>
<p class="note">{{ metric_name[0]|upper }}{{ metric_name[1:] }} on {{ metric.n|counted("row") }} of “{{ result.data.name }}” ({{ result.data.evaluated_on }}), which no one trained on.
{% if result.data.classes %}{{ result.data.classes }} classes, {% endif %}{% if metric.chance is not none %}blind chance {{ metric.chance|percent }}. {% endif %}Lines in the bars are
{{ (100 * metric.split_interval.confidence)|round|int }}{{ "\u00a0" }}% intervals, {{ metric.split_interval.method }}.</p>
</section>

<section>
<h2>Who holds which part</h2>
<p>{{ model.name }} has {{ model.num_blocks|counted("block") }} and {{ model.parameters|large }} parameters; {{ model.trainable_parameters|large }} of them were trained ({{ model.tuning }}).
{% if model.partition == "HBT" %}Text, labels and the first and last blocks stay with the data parties; the model party computes what lies between.
{% else %}Text, labels and the first blocks stay with the data parties; the model party computes the rest, answers included.{% endif %}</p>
<div class="diagram">
  {% for part in parts %}
  <div class="part {{ "data" if part.role == "data party" else "model" }}">
    <h3>{{ part.title }}</h3>
    <p class="by">{{ part.held_by }}</p>
    <div class="cells{% if part.cells|length > 12 %} many{% endif %}" aria-hidden="true">{% for text in part.cells %}<span{% if " " in text %} class="word"{% endif %}>{{ text }}</span>{% endfor %}</div>
    <p class="holds">{{ part.text }}</p>
  </div>
  {% if not loop.last %}
  <div class="cut">
    <div><b>→</b>hidden states</div>
    <div><b>←</b>{{ "gradients" if model.partition == "HBT" else "answers, gradients" }}</div>
  </div>
  {% endif %}
  {% endfor %}
</div>
</section>

<section>
<h2>Training</h2>
{% if result.rounds %}
<div class="plots">
  <figure role="img" aria-label="Training loss per round">
    <h3>Training loss</h3>
    <ul class="legend">{{ swatch(colors.split, "split", "line") }}{% if has_unsplit_loss %}{{ swatch(colors.unsplit, "unsplit", "wide") }}{% endif %}</ul>
    {{ loss_figure or not_recorded }}
  </figure>
  <figure role="img" aria-label="Validation {{ metric_name }} per round">
    <h3>Validation {{ metric_name }}</h3>
    <ul class="legend">{{ swatch(colors.split, "split", "line") }}{% if has_unsplit_metric %}{{ swatch(colors.unsplit, "unsplit", "wide") }}{% endif %}{% if metric.majority is not none %}{{ swatch(colors.majority, commonest, "dashed") }}{% endif %}</ul>
    {{ metric_figure or not_recorded }}
  </figure>
</div>
{% else %}<p class="note">The run had no training round.</p>{% endif %}
{% if losses %}
<div class="warning"><h3>Parties were lost on the way</h3><ul>
{% for summary in losses %}<li>Round {{ summary.round }} went on without {{ summary.lost_parties|join(", ") }}.</li>{% endfor %}
</ul></div>
{% endif %}
</section>

<section>
<h2>Parties</h2>
<ul class="legend" aria-label="Peak memory by kind">{% for name, color in memory_parts %}{{ swatch(color, name) }}{% endfor %}</ul>
<table class="cards">
<thead><tr><th>Party</th><th class="n">Rows</th><th>Holds</th><th class="n">Parameters held</th><th>Peak memory</th><th class="n">Held-out right</th></tr></thead>
<tbody>
{% for party in result.parties %}
<tr>
{% call cell("Party") %}<div><b>{{ party.name }}</b><span class="small">{{ party.role }}</span></div>{% endcall %}
{% call cell("Rows", "n") %}<span>{{ party.rows|count if party.rows is not none else "–" }}</span>{% endcall %}
{% call cell("Holds") %}<span>{{ party.owns }}</span>{% endcall %}
{% call cell("Parameters", "n") %}<div>{{ party.parameters_held|large }}<span class="small">{{ share(party.parameters_held, model.parameters) }} of the model</span><span class="small">{{ party.parameters_trained|large }} trained</span></div>{% endcall %}
{% call cell("Peak memory", "mem") %}<div><div class="bar">{% for name, color in memory_parts %}<i style="--c:{{ color }};width:{{ "%.2f"|format(100 * party.peak_memory[name] / largest_memory) }}%"></i>{% endfor %}</div>{{ party.peak_memory_bytes|size }}{% if party.process_peak_bytes is not none %}<span class="small">whole process {{ party.process_peak_bytes|size }}</span>{% endif %}</div>{% endcall %}
{% call cell("Held-out right", "n") %}<span>{{ party.metric|percent if party.metric is not none else "–" }}</span>{% endcall %}
</tr>
{% endfor %}
</tbody>
</table>
<p class="note">Parameters held by several parties are counted at each of them.</p>
</section>

<section>
<h2>Traffic</h2>
<p>{{ result.traffic.total_bytes|size }} crossed between the parties in {{ result.traffic.messages|counted("message") }}{% if result.tokens %}: {{ (result.traffic.total_bytes / result.tokens)|size }} for each of {{ result.tokens|count }} tokens trained on{% endif %}.
Beside that, {{ result.traffic.control.messages|counted("Flower message") }} with adapters, settings and metrics took {{ result.traffic.control.bytes|size }}.</p>
{% if flows %}
<table class="cards">
<thead><tr><th>What</th><th>Direction</th><th>Largest tensor</th><th class="n">Messages</th><th class="n">Size</th><th class="wide"></th></tr></thead>
<tbody>
{% for flow in flows %}
<tr>
{% call cell("What") %}<span>{{ flow.name }}</span>{% endcall %}
{% call cell("Direction") %}<span class="num">{{ flow.way }}</span>{% endcall %}
{% call cell("Largest") %}<span>{{ flow.layout or "–" }}</span>{% endcall %}
{% call cell("Messages", "n") %}<span>{{ flow.messages|count }}</span>{% endcall %}
{% call cell("Size", "n") %}<span>{{ flow.bytes|size }}</span>{% endcall %}
{% call cell("") %}<div class="bar thin"><i style="--c:{{ "var(--blue)" if flow.up else "var(--plum)" }};width:{{ "%.2f"|format(100 * flow.share) }}%"></i></div>{% endcall %}
</tr>
{% endfor %}
</tbody>
</table>
{% endif %}
</section>

{% if result.rounds %}
<section>
<h2>Time</h2>
<div class="plots">
<figure role="img" aria-label="Seconds per round by activity">
  <h3>Seconds per round</h3>
  <ul class="legend">{% for name, color in time_parts %}{{ swatch(color, name) }}{% endfor %}</ul>
  {{ time_figure or not_recorded }}
</figure>
{% set folded = result.rounds|length > 10 %}
<div class="scroll">
{% if folded %}<details class="rounds"><summary>All {{ result.rounds|length }} rounds, figure by figure</summary>{% endif %}
<table>
<thead><tr><th>Round</th><th class="n">Steps</th><th class="n">Loss</th><th class="n">Tokens/s</th><th class="n">Sent</th><th class="n">Time</th></tr></thead>
<tbody>
{% for summary in result.rounds %}
<tr><td>{{ summary.round }}</td><td class="n">{{ summary.steps|count }}</td><td class="n">{{ "%.3f"|format(summary.loss) if summary.loss is not none else "–" }}</td><td class="n">{{ summary.tokens_per_s|round|int|count }}</td><td class="n">{{ summary.sent_bytes|size }}</td><td class="n">{{ summary.seconds.values()|sum|duration }}</td></tr>
{% endfor %}
</tbody>
</table>
{% if folded %}</details>{% endif %}
</div>
</div>
</section>
{% endif %}

{% if audits %}
<section>
<h2>What attacks made of it</h2>
{% for audit in audits %}
<h3>{{ audit.title }}</h3>
<div class="scores" role="group" aria-label="{{ audit.title }}">
  {% for name, value, span, color in [("Guessed right", audit.row.value, audit.row.interval, "#b5453a"), ("By chance", audit.row.chance, none, "#c3c9d2")] %}
  <div class="score">
    <div class="name">{{ name }}</div>
    <div class="track" style="--c:{{ color }}"><div class="fill" style="width:{{ "%.2f"|format(100 * value) }}%"></div>
      {%- if span %}<div class="whisker" style="left:{{ "%.2f"|format(100 * span.low) }}%;width:{{ "%.2f"|format(100 * (span.high - span.low)) }}%"></div>{% endif %}</div>
    <div class="value"><b>{{ value|percent }}</b>{% if span %}<span>{{ span|interval }}</span>{% endif %}</div>
  </div>
  {% endfor %}
</div>
<p>{{ audit.verdict }}</p>
{% if audit.sentences %}
<table class="read">
<thead><tr><th>The text, which never left its owner</th><th>What the adversary made of what it saw</th></tr></thead>
<tbody>{% for sentence in audit.sentences %}<tr><td>{{ sentence.true }}</td><td>{% for word, right in sentence.words %}<span class="{{ "right" if right else "wrong" }}">{{ word }}</span>{{ " " }}{% else %}<span class="wrong">nothing</span>{% endfor %}</td></tr>{% endfor %}</tbody>
</table>
{% endif %}
<p class="note">{{ audit.note }}</p>
{% endfor %}
</section>
{% endif %}

<section>
<h2>Who saw what</h2>
{% if graves %}
<div class="warning">
<h3>What is not protected</h3>
<p>That a text is never sent does not mean that it stays unknown. In this run no defence covered the following:</p>
<ul>
{% for row in graves %}<li>The <b>{{ row.observer }}</b> can {{ row.allows }}. <span class="small">From: {{ row.tensor }}.</span></li>{% endfor %}
</ul>
</div>
{% elif result.observers %}
<div class="calm"><h3>A mechanism covers every sensitive tensor</h3><p>What each of them leaves open is in the last column.</p></div>
{% else %}
<div class="warning"><h3>Nobody wrote down who saw what</h3><p>This result has no observer table. Treat everything that was sent as known to all.</p></div>
{% endif %}
{% if hidden_from_all %}
<div class="calm">
<h3>What was never sent</h3>
<ul>
{% for row in hidden_from_all %}<li><b>{{ row.tensor }}</b>: {{ row.covered_by }}. <span class="small">What remains: {{ row.uncovered }}.</span></li>{% endfor %}
</ul>
</div>
{% endif %}
{% if observer_groups %}
<table class="cards">
<thead><tr><th style="width:25%">What was seen</th><th class="n">How much</th><th style="width:25%">What it allows to do</th><th style="width:15%">Covered by</th><th style="width:22%">What stays open</th></tr></thead>
{% for observer, rows in observer_groups %}
<tbody class="group">
<tr><th colspan="5" scope="rowgroup">{{ observer|capitalize }}</th></tr>
{% for row in rows %}
<tr>
{% call cell("Seen") %}<span>{{ row.tensor }}</span>{% endcall %}
{% call cell("How much", "n") %}{% if row.seen is none %}<span>not counted</span>{% else %}<div>{{ row.seen.bytes|size }}<span class="small">{{ row.seen.messages|counted("message") }}</span></div>{% endif %}{% endcall %}
{% call cell("Allows to") %}<span>{{ row.allows }}</span>{% endcall %}
{% call cell("Covered by", "covered" if row.covered_by else "open") %}<span>{{ row.covered_by or "nothing" }}</span>{% endcall %}
{% call cell("Stays open") %}<span>{{ row.uncovered }}</span>{% endcall %}
</tr>
{% endfor %}
</tbody>
{% endfor %}
</table>
{% endif %}
</section>

<section>
<h2>How it was done</h2>
<details><summary>Settings</summary>
<dl class="pairs">{% for name, value in result.settings.items() %}<div><dt>{{ name }}</dt><dd>{{ value|setting }}</dd></div>{% endfor %}</dl></details>
<details><summary>Data and model</summary>
<dl class="pairs">
<div><dt>data</dt><dd>{{ result.data.name }}</dd></div>
<div><dt>dealt out</dt><dd>{{ result.data.partition }}</dd></div>
{% for name, rows in result.data.rows.items() %}<div><dt>rows, {{ name }}</dt><dd>{{ rows|count }}</dd></div>{% endfor %}
<div><dt>model</dt><dd>{{ model.name }} ({{ model.family }})</dd></div>
<div><dt>partition</dt><dd>{{ model.partition }} {{ model.head_blocks }}/{{ model.body_blocks }}/{{ model.tail_blocks }}</dd></div>
<div><dt>parameters</dt><dd>{{ model.parameters|count }}</dd></div>
<div><dt>trained</dt><dd>{{ model.trainable_parameters|count }}</dd></div>
</dl></details>
<details><summary>Versions</summary>
<dl class="pairs">{% for name, value in result.versions.items() %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl></details>
</section>

<footer>Every figure is read from result.json (schema {{ result.schema_version }}) beside this page. 1{{ "\u00a0" }}MB is 1,000,000 bytes.</footer>
</main>
</body>
</html>
"""
