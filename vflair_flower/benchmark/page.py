"""The leaderboard as files: `results.jsonl` with a row per cell, a page, and the same table as Markdown.

No script, nothing fetched; all names are escaped by jinja2.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from vflair_flower.benchmark.leaderboard import RANKED, Entry, Scored, rank, score_cells
from vflair_flower.benchmark.matrix import NONE, Matrix
from vflair_flower.benchmark.results import BenchResult
from vflair_flower.benchmark.template import PAGE
from vflair_flower.report import numbers
from vflair_flower.report.figures import quiet, style, svg_of
from vflair_flower.report.files import write_atomically
from vflair_flower.report.page import STYLE
from vflair_flower.report.pages import page_environment

RESULTS, LEADERBOARD, TABLE = "results.jsonl", "leaderboard.html", "leaderboard.md"
_COLORS = ("#1f5fbf", "#b5453a", "#e0a23c", "#5aa88f", "#7a6bb8", "#2f8f9d", "#8a4b08", "#c8657b", "#1f6f4f", "#8fb6ea")
_GOALS = {"text": "the text", "labels": "the labels"}


def write_leaderboard(
    folder: Path, matrix: Matrix, results: Sequence[BenchResult], failed: Mapping[str, str] | None = None
) -> Path:
    """Write rows, page and table; returns the page's path.

    Parameters
    ----------
    folder : pathlib.Path
        Where.
    matrix : Matrix
        What was run; its anchors are those of the scores.
    results : sequence of BenchResult
        Finished cells.
    failed : mapping of str to str, optional
        Cells that failed, and why.

    Raises
    ------
    DataError
        A cell has nothing to be compared with.
    """
    scored = score_cells(results, matrix.anchors)
    write_atomically(folder / RESULTS, "".join(json.dumps(one.to_row()) + "\n" for one in scored))
    entries = rank(scored)
    write_atomically(folder / TABLE, table_of(entries))
    colors = _colors(entries)
    by_setting = _by_setting(scored)
    page = (
        page_environment()
        .from_string(PAGE)
        .render(
            style=Markup(STYLE),
            matrix=matrix,
            entries=entries,
            headline=headline(entries),
            attacks=list(dict.fromkeys(attack for entry in entries for attack in entry.ap)),
            by_setting=[{"name": name, "entries": own} for name, own in by_setting.items()],
            plots=_plots(by_setting, colors),
            colors=colors,
            places=_places(colors),
            failed=dict(failed or {}),
            cells=len(scored),
        )
    )
    write_atomically(folder / LEADERBOARD, page)
    return folder / LEADERBOARD


def headline(entries: Sequence[Entry]) -> str:
    """Say in one sentence who is first, and what without a defence is read."""
    plain = next((entry for entry in entries if entry.defence == NONE), None)
    first = next((entry for entry in entries if entry.defence != NONE), None)
    said = []
    if first is not None:
        said.append(
            f"{first.defences} is first (C-DCS {first.c_dcs:.3f}): it costs {100 * first.mp_lost:.1f} points of the "
            f"task, and at most {numbers.percent(max(first.ap.values()))} is read"
        )
    if plain is not None:
        said.append(f"without a defence, up to {numbers.percent(max(plain.ap.values()))} is (C-DCS {plain.c_dcs:.3f})")
    return "; ".join(said) + "." if said else "Nothing could be ranked."


def table_of(entries: Sequence[Entry]) -> str:
    """Return the leaderboard as a Markdown table."""
    head = (
        "",
        "defence",
        "C-DCS (95 %)",
        "T-DCS text",
        "T-DCS labels",
        "MP",
        "lost",
        "text read",
        "labels read",
        "time",
    )
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    place = 0
    for entry in entries:
        place += entry.complete
        cells = (
            f"{place}" if entry.complete else "incomplete",
            f"`{entry.defences or NONE}`" + (" ★" if entry.best and entry.defence != NONE else ""),
            f"{entry.c_dcs:.3f} ({entry.low:.3f}–{entry.high:.3f})",
            *(f"{entry.t_dcs[goal]:.3f}" if goal in entry.t_dcs else "" for goal in RANKED),
            f"{100 * entry.mp:.1f}",
            f"{100 * entry.mp_lost:+.1f}",
            *(_worst(entry, goal) for goal in ("text", "labels")),
            f"{entry.seconds_ratio:.2f}×",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _worst(entry: Entry, goal: str) -> str:
    """Return what the best attack of a type gets, on average over settings and seeds."""
    values = [value for attack, value in entry.ap.items() if entry.goals.get(attack) == goal]
    return f"{100 * max(values):.1f}" if values else ""


def _colors(entries: Sequence[Entry]) -> dict[str, str]:
    names = list(dict.fromkeys(entry.defence for entry in entries if entry.defence != NONE))
    return {NONE: "#5a6473", **dict(zip(names, _COLORS * (1 + len(names) // len(_COLORS)), strict=False))}


def _places(colors: Mapping[str, str]) -> dict[str, int]:
    """Return the number of each defence in pictures, whose colours may repeat; no defence is 0."""
    return {name: place for place, name in enumerate(colors)}


def _by_setting(scored: Sequence[Scored]) -> dict[str, list[Entry]]:
    """Return the ranking within each setting."""
    names = dict.fromkeys(one.result.cell.setting for one in scored)
    return {name: rank([one for one in scored if one.result.cell.setting == name]) for name in names}


def _plots(by_setting: Mapping[str, list[Entry]], colors: Mapping[str, str]) -> list[dict[str, object]]:
    """Return a picture per setting and type of attack: what is left of the task over what is read at worst."""
    plots: list[dict[str, object]] = []
    for goal, words in _GOALS.items():
        panels = []
        for place, (name, entries) in enumerate(by_setting.items()):
            points = [
                (entry, max(value for attack, value in entry.ap.items() if entry.goals[attack] == goal))
                for entry in entries
                if goal in entry.goals.values()
            ]
            if points:
                panels.append({"name": name, "svg": Markup(_pareto(points, colors, f"{goal}-{place}", words))})
        if panels:
            plots.append({"words": words, "panels": panels})
    return plots


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the places of points (read, task) that no other beats in both: less read and more of the task left."""
    return [
        place
        for place, (read, task) in enumerate(points)
        if not any(
            other_read <= read and other_task >= task and (other_read, other_task) != (read, task)
            for other_read, other_task in points
        )
    ]


def _pareto(points: Sequence[tuple[Entry, float]], colors: Mapping[str, str], ident: str, words: str) -> str:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    numbers_of = _places(colors)
    with style():
        figure = Figure(figsize=(4.7, 3.0))
        axes = figure.add_axes((0.11, 0.16, 0.86, 0.8))
        for entry, read in points:
            plain = entry.defence == NONE
            axes.plot(
                [read],
                [entry.mp],
                marker="D" if plain else "o",
                markersize=7 if entry.best or plain else 4,
                color=colors[entry.defence],
                alpha=1.0 if entry.best or plain else 0.55,
                linestyle="none",
                zorder=3,
            )
            if entry.best and not plain:
                axes.annotate(
                    str(numbers_of[entry.defence]),
                    (read, entry.mp),
                    xytext=(4, 3),
                    textcoords="offset points",
                    fontsize=7,
                    color="#5a6473",
                )
        places = [(read, entry.mp) for entry, read in points]
        front = sorted(places[place] for place in pareto(places))
        axes.plot([x for x, _ in front], [y for _, y in front], color="#b8bfca", linewidth=1.0, zorder=2)
        axes.set_xlim(-0.03, 1.03)
        axes.set_xlabel(f"share of {words} that the best attack reads")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(xmax=1, decimals=0, symbol=" %"))
        quiet(axes)
        return svg_of(figure, ident)
