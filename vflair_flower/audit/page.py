"""The page of an audit: leakage by cut, every cell beside its chance, and what adversaries made of texts.

No script, nothing fetched; all names and texts are escaped by jinja2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vflair_flower.audit.cells import Cell, CellResult, parse_cut
from vflair_flower.audit.subjects import AnySubject
from vflair_flower.audit.template import PAGE
from vflair_flower.audit.views import HOSTS, MODEL_PARTY
from vflair_flower.partition import Mode
from vflair_flower.report import numbers
from vflair_flower.report.audits import metric_in_words, shown_sentence
from vflair_flower.report.figures import quiet, style, svg_of
from vflair_flower.report.files import write_atomically
from vflair_flower.report.page import STYLE
from vflair_flower.report.pages import page_environment
from vflair_flower.report.result import Sentence
from vflair_flower.tasks import seed_interval

COLORS = ("#b5453a", "#1f5fbf", "#e0a23c", "#5aa88f", "#7a6bb8", "#2f8f9d", "#8a4b08", "#c8657b", "#6b7482", "#1f6f4f")


def write_audit_page(
    path: Path, subject: AnySubject, results: Sequence[CellResult], failed: Mapping[str, str] | None = None
) -> Path:
    """Write the page of an audit and return its path.

    Parameters
    ----------
    path : pathlib.Path
        Of the page.
    subject : Subject or ExpertSubject
        The run that was attacked.
    results : sequence of CellResult
        What came out.
    failed : mapping of str to str, optional
        Cells that failed, and why.
    """
    lines = lines_of(results)
    planted = max((one.planted_secrets for one in results), default=0)
    found = {secret for one in results for secret in one.found_secrets}
    page = (
        page_environment()
        .from_string(PAGE)
        .render(
            style=Markup(STYLE),
            subject=subject,
            headline=headline(lines, planted=planted, found=len(found)),
            plots=_plots(lines),
            lines=lines,
            texts=_texts(results),
            failed=dict(failed or {}),
            planted=planted,
            found=len(found),
        )
    )
    write_atomically(path, page)
    return path


@dataclass(frozen=True, kw_only=True)
class Line:
    """All seeds of a cell as one line of the table: means, and an interval over seeds or, of one seed, over rows."""

    cell: Cell
    metric: str
    words: str
    value: float
    low: float
    high: float
    chance: float
    n: int
    seeds: int
    seconds: float
    memory_bytes: int
    more: dict[str, float]


def lines_of(results: Sequence[CellResult]) -> list[Line]:
    """Join cells that differ in their seed alone."""
    groups: dict[tuple[str, ...], list[CellResult]] = {}
    for one in results:
        cell = one.cell
        key = (cell.adversary, cell.attack, cell.cut, cell.knowledge, cell.epoch, cell.defence)
        groups.setdefault(key, []).append(one)
    lines = []
    for own in groups.values():
        metric = own[0].metric
        figures = [one.figures[metric] for one in own if metric in one.figures]
        if not figures:
            continue
        value = sum(f.value for f in figures) / len(figures)
        low, high = figures[0].low, figures[0].high
        if len(figures) > 1:
            spread = seed_interval([f.value for f in figures])
            low, high = max(0.0, spread.low), min(1.0, spread.high)
        shared = set.intersection(*(set(one.figures) for one in own)) - {metric}
        lines.append(
            Line(
                cell=own[0].cell,
                metric=metric,
                words=metric_in_words(metric),
                value=value,
                low=low,
                high=high,
                chance=sum(f.chance for f in figures) / len(figures),
                n=sum(f.n for f in figures),
                seeds=len(figures),
                seconds=sum(one.seconds for one in own) / len(own),
                memory_bytes=max(one.memory_bytes for one in own),
                more={name: sum(one.figures[name].value for one in own) / len(own) for name in sorted(shared)},
            )
        )
    return lines


def headline(lines: Sequence[Line], *, planted: int, found: int) -> str:
    """Say in one sentence how bad it is."""
    texts = [line for line in lines if line.metric in ("position_accuracy", "token_f1")]
    said = []
    if texts:
        worst = max(texts, key=lambda line: line.value)
        said.append(
            f"The {worst.cell.adversary.replace('-', ' ')} reads {numbers.percent(worst.value)} {worst.words} "
            f"({worst.cell.attack}, {worst.cell.cut}; by chance {numbers.percent(worst.chance)})"
        )
    labels = [line for line in lines if line.metric == "label_accuracy"]
    if labels:
        worst = max(labels, key=lambda line: line.value)
        said.append(f"it reads {numbers.percent(worst.value)} {worst.words} ({worst.cell.attack})")
    members = [line for line in lines if line.metric == "auc" and line.cell.which.goal == "members"]
    if members:
        worst = max(members, key=lambda line: line.value)
        said.append(f"who was trained on is told with an area under the curve of {worst.value:.2f}")
    if planted:
        said.append(f"{found} of {numbers.counted(planted, 'planted secret')} came out word for word")
    return "; ".join(said) + "." if said else "Nothing could be measured."


def _plots(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Return a picture per mode, knowledge and metric, where there are several cuts."""
    plots = []
    split = [line for line in lines if line.cell.adversary == MODEL_PARTY]
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for line in split:
        groups.setdefault((line.metric, line.cell.knowledge, line.cell.epoch), []).append(line)
    for (metric, knowledge, epoch), chosen in sorted(groups.items()):
        if len({line.cell.cut for line in chosen}) < 2:
            continue
        names = sorted({line.cell.attack for line in chosen})
        colors = dict(zip(names, COLORS * 3, strict=False))
        panels = []
        for mode in Mode:
            own = [line for line in chosen if parse_cut(line.cell.cut).mode is mode]
            if own:
                ident = f"{metric}-{knowledge}-{epoch}-{mode.value}"
                panels.append({"mode": mode.value, "svg": Markup(_by_cut(own, colors, ident))})
        about = {"words": metric_in_words(metric), "knowledge": knowledge, "epoch": epoch}
        plots.append({**about, "colors": colors, "panels": panels})
    return plots + _layer_plots(lines)


def _layer_plots(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Return a picture per attack on hosts of experts: over layers, a line per coalition."""
    hosts = [line for line in lines if line.cell.adversary.startswith(HOSTS)]
    groups: dict[tuple[str, str, str, str], list[Line]] = {}
    for line in hosts:
        key = (line.metric, line.cell.knowledge, line.cell.epoch, line.cell.attack)
        groups.setdefault(key, []).append(line)
    plots = []
    for (metric, knowledge, epoch, attack), chosen in sorted(groups.items()):
        if len({line.cell.cut for line in chosen}) < 2:
            continue
        names = sorted({line.cell.adversary for line in chosen}, key=lambda name: (name.count("+"), name))
        colors = dict(zip(names, COLORS * 3, strict=False))
        svg = Markup(_by_layer(chosen, colors, f"{metric}-{knowledge}-{epoch}-{attack}".replace(":", "-")))
        about = {"words": metric_in_words(metric), "knowledge": knowledge, "epoch": epoch}
        plots.append({**about, "colors": colors, "panels": [{"mode": attack, "svg": svg}]})
    return plots


def _by_layer(lines: Sequence[Line], colors: Mapping[str, str], ident: str) -> str:
    """Draw what hosts get over the layers whose experts they hold."""
    series = {
        name: sorted((int(line.cell.cut.split()[1]), line.value, line.low, line.high) for line in own)
        for name in colors
        if (own := [line for line in lines if line.cell.adversary == name])
    }
    return _drawn(series, colors, ident, chance=max(line.chance for line in lines), axis="layer of experts")


def _by_cut(lines: Sequence[Line], colors: Mapping[str, str], ident: str) -> str:
    """Draw what attacks get over the number of blocks that stay with the data party."""
    series = {
        name: sorted((parse_cut(line.cell.cut).head_blocks, line.value, line.low, line.high) for line in own)
        for name in colors
        if (own := [line for line in lines if line.cell.attack == name])
    }
    axis = "first blocks that stay with the data party"
    return _drawn(series, colors, ident, chance=max(line.chance for line in lines), axis=axis)


def _drawn(
    series: Mapping[str, Sequence[tuple[int, float, float, float]]],
    colors: Mapping[str, str],
    ident: str,
    *,
    chance: float,
    axis: str,
) -> str:
    """Draw lines with their bands, of place, value, low and high, beside chance."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    with style():
        figure = Figure(figsize=(4.7, 2.8))
        axes = figure.add_axes((0.11, 0.17, 0.86, 0.78))
        for name, points in series.items():
            places, values, low, high = (list(column) for column in zip(*points, strict=True))
            axes.fill_between(places, low, high, color=colors[name], alpha=0.13, linewidth=0)
            axes.plot(places, values, color=colors[name], linewidth=1.8, marker="o", markersize=4)
        axes.axhline(chance, color="#6b7482", linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xticks(sorted({point[0] for points in series.values() for point in points}))
        axes.set_xlabel(axis)
        axes.set_ylim(-0.02, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0, symbol=" %"))
        quiet(axes)
        return svg_of(figure, ident)


def _texts(results: Sequence[CellResult]) -> list[dict[str, Any]]:
    """Return sentences beside what was made of them: of each attack, at the first cut."""
    shown: dict[str, dict[str, Any]] = {}
    for one in results:
        if one.examples and one.cell.attack not in shown:
            sentences = [shown_sentence(Sentence(true=true, found=found)) for true, found in one.examples]
            shown[one.cell.attack] = {"cell": one.cell, "sentences": sentences}
    return list(shown.values())
