"""The page of the PC-MoE job: what was measured from near, the table, and plots; no script, nothing fetched.

Colours are one per method throughout; names are escaped by jinja2.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from simulations.moe.table import TITLES
from simulations.moe.template import PAGE
from vflair_flower.report import numbers
from vflair_flower.report.figures import quiet, style, svg_of
from vflair_flower.report.page import STYLE
from vflair_flower.report.pages import page_environment

COLORS = {
    "centralised": "#6b7482",
    "isolated": "#c8657b",
    "fedavg": "#e0a23c",
    "fedavg-experts": "#5aa88f",
    "pc-moe": "#1f5fbf",
    "pc-moe-round-robin": "#7a6bb8",
    "pc-moe-hand-off": "#b5539c",
    "pc-moe-averaged": "#1f6f4f",
    "pc-moe-int8": "#8fb6ea",
    "pc-moe-coactivation": "#2f8f9d",
    "pc-moe-local": "#8a4b08",
    "pc-moe-opt-out": "#1d2530",
}
_PARTS = (("parameters", "#1f5fbf"), ("gradients", "#8fb6ea"), ("optimizer", "#e0a23c"), ("activations", "#7a6bb8"))


def write_page(result: dict[str, Any], path: Path) -> Path:
    """Write the page of a `result.json` and return its path."""
    environment = page_environment()
    environment.filters["spread"] = _spread
    compared = [line for line in result["table"] if line["method"] != "centralised"]
    partitions = sorted({line["partition"] for line in compared or result["table"]})
    page = environment.from_string(PAGE).render(
        result=result,
        moe=result["moe"],
        style=Markup(STYLE),
        titles=TITLES,
        colors=COLORS,
        parts=_PARTS,
        partitions=[_partition(result, name) for name in partitions],
        headline=_headline(result),
        largest=max(line["peak_memory_bytes"] for line in result["table"]),
        memory=_memory(result["moe"]),
    )
    path.write_text(page, encoding="utf-8")
    return path


def _headline(result: dict[str, Any]) -> str:
    moe = result["moe"]
    best = [line for line in result["table"] if line["method"] == "pc-moe" and line["recovered"]]
    memory = moe["peak_memory_reduction"]
    what = (
        "computes what the whole model does, bit for bit"
        if moe["exact"]
        else "does NOT compute what the whole model does"
    )
    words = [f"With its experts spread over companies, the model {what}"]
    if memory:
        parties = max(memory, key=int)
        words.append(f"a company needs {100 * memory[parties]:.0f}{numbers.NBSP}% less memory ({parties} parties)")
    if best:
        line = max(best, key=lambda one: one["parties"])
        words.append(
            f"{100 * line['recovered']['mean']:.0f}{numbers.NBSP}% of what training alone loses is won back "
            f"({line['parties']} parties, {line['partition']})"
        )
    return "; ".join(words) + "."


def _partition(result: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the lines and plots of one partition, with the centralised line of the same seeds."""
    lines = [line for line in result["table"] if line["partition"] == name or line["method"] == "centralised"]
    most = max(line["parties"] for line in lines)
    shown = [line for line in lines if line["parties"] == most or line["method"] == "centralised"]
    return {
        "name": name,
        "lines": sorted(lines, key=lambda line: (line["parties"], list(TITLES).index(line["method"]))),
        "parties": most,
        "methods": [line["method"] for line in shown],
        "curve": Markup(_curves(shown, f"curve-{name}")),
        "by_parties": Markup(_by_parties(lines, f"n-{name}")),
    }


def _curves(lines: Sequence[dict[str, Any]], ident: str) -> str:
    """Draw held-out perplexity over tokens."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(4.7, 2.8))
        axes = figure.add_axes((0.13, 0.17, 0.84, 0.78))
        for line in lines:
            tokens, values = zip(*line["curve"], strict=True)
            dashes = "--" if line["method"] == "centralised" else "-"
            axes.plot(
                [t / 1000 for t in tokens],
                values,
                dashes,
                color=COLORS[line["method"]],
                linewidth=1.8,
                marker="o",
                markersize=3,
            )
        axes.set_xlabel("thousand tokens trained on, all parties")
        axes.set_ylabel("held-out perplexity")
        axes.set_yscale("log")
        _plain_ticks(axes, [value for line in lines for _, value in line["curve"]])
        quiet(axes)
        return svg_of(figure, ident)


def _by_parties(lines: Sequence[dict[str, Any]], ident: str) -> str:
    """Draw final perplexity over the number of parties, with intervals over seeds."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(4.7, 2.8))
        axes = figure.add_axes((0.13, 0.17, 0.84, 0.78))
        values = []
        counts = sorted({line["parties"] for line in lines})
        for method, color in COLORS.items():
            own = [line for line in lines if line["method"] == method]
            if not own:
                continue
            means = [line["perplexity"]["mean"] for line in own]
            values += means
            if method == "centralised":
                axes.axhline(means[0], color=color, linewidth=1.2, linestyle=(0, (4, 3)))
                continue
            places = [counts.index(line["parties"]) + 0.05 * (list(COLORS).index(method) - 3) for line in own]
            below = [m - (line["perplexity"]["low"] or m) for m, line in zip(means, own, strict=True)]
            above = [(line["perplexity"]["high"] or m) - m for m, line in zip(means, own, strict=True)]
            axes.errorbar(
                places, means, yerr=[below, above], color=color, marker="o", markersize=4, linewidth=1.4, capsize=2
            )
        axes.set_xticks(range(len(counts)), [str(count) for count in counts])
        axes.set_xlabel("parties")
        axes.set_ylabel("held-out perplexity")
        axes.set_yscale("log")
        _plain_ticks(axes, values)
        quiet(axes)
        return svg_of(figure, ident)


def _plain_ticks(axes: Any, values: Sequence[float]) -> None:
    """Mark a logarithmic axis by plain numbers."""
    low, high = min(values), max(values)
    marks = sorted({float(f"{low * (high / low) ** (i / 4):.2g}") for i in range(5)})
    axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
    axes.minorticks_off()
    axes.set_ylim(low / 1.05, high * 1.05)


def _memory(moe: dict[str, Any]) -> list[dict[str, Any]]:
    if not moe["memory"]:
        return []
    whole, split = moe["memory"]["whole"], moe["memory"]["split"]
    lines = [{"name": "unsplit", **whole, "reduction": None}]
    for one in split:
        lines.append({"name": f"{one['parties']} parties", **one, "reduction": 1 - one["measured"] / whole["measured"]})
    return [{**line, "share": line["measured"] / whole["measured"]} for line in lines]


def _spread(value: dict[str, float | None] | None, digits: int = 1, factor: float = 1.0, unit: str = "") -> Markup:
    """Return a mean, and beneath it its interval where there is one."""
    if value is None or value["mean"] is None or not math.isfinite(value["mean"]):
        return Markup(numbers.DASH)
    text = Markup("{}{}").format(f"{factor * value['mean']:.{digits}f}", unit)
    if value["low"] is None or value["high"] is None:
        return text
    low, high = (f"{factor * value[end]:.{digits}f}" for end in ("low", "high"))  # type: ignore[operator]
    return text + Markup('<span class="small">{} to {}</span>').format(low, high)
