"""The page of the PC-MoE job, as a jinja2 template; the looks are those of all pages."""

PAGE = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>PC-MoE beside its baselines: run {{ result.run_id }}</title>
{{ style }}
</head>
<body>
<main>
<header>
<p class="kicker">Run {{ result.run_id }}, {{ result.created[:10] }} {{ result.created[11:16] }} UTC, took {{ result.duration_s|duration }}; all parties simulated on one machine</p>
<h1>{{ headline }}</h1>
</header>

<section>
<h2>From near</h2>
<p>One party trains three AdamW steps beside hosts that hold the experts, over gRPC: logits, gradients and parameters
are compared with the whole model's bit by bit.</p>
<table>
<thead><tr><th>Parties</th><th>Logits</th><th>Gradients of its own model</th><th>Parameters after three steps, experts included</th></tr></thead>
<tbody>{% for one in moe.exactness %}<tr><td>{{ one.parties }}</td>{% for name in ("logits", "gradients", "parameters") %}<td class="{{ "covered" if one[name] else "open" }}">{{ "equal" if one[name] else "different" }}</td>{% endfor %}</tr>{% endfor %}</tbody>
</table>
{% if memory %}
<h3>Peak memory of the party that needs most</h3>
<p class="note">Of its process, beyond an idle one's; training an OLMoE-shaped model, every party in a process of its own, gradients checkpointed. Formula: 16 (B + X/n) + 8 M/n + A bytes, for B parameters outside experts, X in experts, M in their largest tensor, n parties and activations A as counted.</p>
<table class="cards">
<thead><tr><th></th><th class="n">Measured</th><th class="n">By formula</th><th class="n">Less than unsplit</th><th></th></tr></thead>
<tbody>{% for one in memory %}<tr><td>{{ one.name }}</td><td class="n">{{ one.measured|size }}</td><td class="n">{{ one.formula|size }}</td><td class="n">{{ one.reduction|percent if one.reduction is not none else "–" }}</td><td><div class="bar thin"><i style="--c:var(--blue);width:{{ "%.1f"|format(100 * one.share) }}%"></i></div></td></tr>{% endfor %}</tbody>
</table>
{% endif %}
{% if moe.speed %}
<h3>Speed of the two schedules, {{ moe.speed[0].parties }} parties</h3>
<table class="cards">
<thead><tr><th>Link between parties</th><th class="n">Round-robin, tokens/s</th><th class="n">Concurrent, tokens/s</th><th class="n">Times as many</th><th class="n">At most</th><th class="n">Cores used, of {{ moe.speed[0].cores }}</th></tr></thead>
<tbody>{% for one in moe.speed %}<tr><td>{{ "one machine" if not one.delay_s else "%g ms each way"|format(1000 * one.delay_s) }}</td><td class="n">{{ "%.0f"|format(one.tokens_per_s["round-robin"]) }}</td><td class="n">{{ "%.0f"|format(one.tokens_per_s["concurrent"]) }}</td><td class="n">{{ "%.2f"|format(one.ratio) }}</td><td class="n">{{ "%.2f"|format(one.bound) }}</td><td class="n">{{ "%.2f"|format(one.cores_used["round-robin"]) }}; {{ "%.2f"|format(one.cores_used["concurrent"]) }}</td></tr>{% endfor %}</tbody>
</table>
<p class="note">Each party in a process with one thread, medians of {{ moe.speed[0].repeats }} runs in turns. At most: what the ratio would be if concurrent training kept all cores busy, at the CPU time per token that it was measured to need.</p>
{% endif %}
</section>

{% for part in partitions %}
<section>
<h2>Quality, {{ "rows dealt evenly" if part.name == "iid" else "every party with kinds of text of its own" }}</h2>
<ul class="legend">{% for method in part.methods %}<li><i class="line" style="--c:{{ colors[method] }}"></i>{{ titles[method] }}</li>{% endfor %}</ul>
<div class="plots">
<figure role="img" aria-label="Held-out perplexity over tokens"><h3>Convergence, {{ part.parties }} parties</h3>{{ part.curve }}</figure>
<figure role="img" aria-label="Held-out perplexity by number of parties"><h3>At the end, by number of parties</h3>{{ part.by_parties }}</figure>
</div>
<div class="scroll"><table>
<thead><tr><th>Method</th><th class="n">Parties</th><th class="n">Perplexity</th><th class="n">On own kinds</th><th class="n">Won back</th><th class="n">Questions right</th><th class="n">Peak memory</th><th class="n">Sent per token</th><th class="n">s per step</th></tr></thead>
<tbody>{% for line in part.lines %}<tr><td><i class="dot" style="background:{{ colors[line.method] }}"></i>{{ titles[line.method] }}</td><td class="n">{{ line.parties }}</td><td class="n">{{ line.perplexity|spread }}</td><td class="n">{{ line.own_perplexity|spread }}</td><td class="n">{{ line.recovered|spread(0, 100, " %") }}</td><td class="n">{{ line.choices|spread(1, 100, " %") }}</td><td class="n">{{ line.peak_memory_bytes|size }}</td><td class="n">{{ line.bytes_per_token|size }}<span class="small">{{ line.bytes_per_token_and_layer|size }} per layer</span></td><td class="n">{{ "%.2f"|format(line.step_seconds) }}</td></tr>{% endfor %}</tbody>
</table></div>
<p class="note">Means over {{ part.lines[-1].seeds }} seed{{ "" if part.lines[-1].seeds == 1 else "s" }}{% if part.lines[-1].seeds > 1 %} with 95 % Student’s t intervals{% endif %}. Perplexity per token of all held-out texts, and of those of a party’s own kinds; geometric mean over parties’ models. Won back: of the log-perplexity that isolated training loses to centralised, 0 % is as bad as alone. Peak memory and seconds are of simulated parties in one process: bytes counted by part, seconds for comparison within this run only.</p>
{% set asked = part.lines|selectattr("choices")|list %}
{% if asked %}
<details><summary>Questions, set by set</summary><div class="scroll"><table>
<thead><tr><th>Method</th><th class="n">Parties</th>{% for name, one in asked[0].choices_by_set.items() %}<th class="n">{{ name }}<span class="small">chance {{ one.chance|percent(digits=0) }}, n {{ one.n|int }}</span></th>{% endfor %}</tr></thead>
<tbody>{% for line in asked %}<tr><td>{{ titles[line.method] }}</td><td class="n">{{ line.parties }}</td>{% for one in line.choices_by_set.values() %}<td class="n">{{ one.accuracy|spread(0, 100) }}</td>{% endfor %}</tr>{% endfor %}</tbody></table></div></details>
{% endif %}
<details><summary>Peak memory, part by part</summary>
<ul class="legend">{% for name, color in parts %}<li><i style="--c:{{ color }}"></i>{{ name }}</li>{% endfor %}</ul>
<table><tbody>{% for line in part.lines %}<tr><td>{{ titles[line.method] }}, {{ line.parties }}</td><td><div class="bar">{% for name, color in parts %}<i style="--c:{{ color }};width:{{ "%.2f"|format(100 * line.memory[name] / largest) }}%"></i>{% endfor %}</div></td><td class="n">{{ line.memory.total|size }}</td></tr>{% endfor %}</tbody></table></details>
</section>
{% endfor %}

<section>
<h2>Settings</h2>
<p class="note">Model {{ result.model.name }} ({{ result.model.family }}){% if result.model.pretraining %}, {{ result.model.pretraining.parameters|large }} parameters, pretrained on {{ result.model.pretraining.tokens|count }} tokens to a perplexity of {{ "%.1f"|format(result.model.pretraining.perplexity) }}{% endif %}.</p>
<dl class="pairs">{% for name, value in result.settings.items() %}<div><dt>{{ name }}</dt><dd>{{ value if value != "" else "–" }}</dd></div>{% endfor %}</dl>
<footer>{% for name, version in result.versions.items() %}{{ name }} {{ version }}{% if not loop.last %}, {% endif %}{% endfor %}</footer>
</section>
</main>
</body>
</html>
"""
