"""`result.json` to `report.html`: one file, no script, nothing fetched from anywhere.

The template decides how things look, this module what is shown.  Every name in a result is foreign text: jinja2 escapes
all of it, and only pictures drawn by `figures` are let through as they are.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from vflair_flower.report import figures, numbers
from vflair_flower.report.audits import shown_audit
from vflair_flower.report.files import write_atomically
from vflair_flower.report.observers import NO_ONE, grave_rows, is_second_leg, on_one_machine, tensor_name, turn
from vflair_flower.report.page import PAGE, STYLE
from vflair_flower.report.pages import page_environment
from vflair_flower.report.result import ObserverRow, PartySummary, Result, RoundSummary, TrafficEntry
from vflair_flower.report.wording import commonest, headline, shown_name, verdict

RESULT_NAME = "result.json"
REPORT_NAME = "report.html"

_MEMORY_PARTS = ("parameters", "gradients", "optimizer", "activations")


def build_report(run_dir: Path) -> Path:
    """Write the page of a finished run.

    Parameters
    ----------
    run_dir : Path
        Folder of the run; holds ``result.json``.

    Returns
    -------
    Path
        ``run_dir / "report.html"``.

    Raises
    ------
    ConfigurationError
        ``result.json`` is missing or is not a result of this version.

    Examples
    --------
    >>> build_report(Path("runs/2025-01-31"))                                      # doctest: +SKIP
    PosixPath('runs/2025-01-31/report.html')
    """
    page = render(Result.read(run_dir / RESULT_NAME))
    path = run_dir / REPORT_NAME
    write_atomically(path, page)
    return path


def render(result: Result) -> str:
    """Return the page of `result` as HTML."""
    return (
        page_environment()
        .from_string(PAGE)
        .render(
            result=result,
            style=Markup(STYLE),
            headline=headline(result),
            verdict=verdict(result.metric),
            metric_name=shown_name(result.metric),
            commonest=commonest(result.metric),
            parts=_parts(result),
            loss_figure=_loss_figure(result.rounds),
            metric_figure=_metric_figure(result),
            time_figure=_time_figure(result.rounds),
            time_parts=_legend(_second_parts(result.rounds)),
            has_unsplit_loss=any(summary.unsplit_loss is not None for summary in result.rounds),
            has_unsplit_metric=any(summary.unsplit_metric is not None for summary in result.rounds),
            losses=[summary for summary in result.rounds if summary.lost_parties],
            memory_parts=list(zip(_MEMORY_PARTS, figures.PARTS, strict=False)),
            largest_memory=max(1, *(party.peak_memory_bytes for party in result.parties)),
            flows=_flows(result),
            one_machine=on_one_machine(result.observers),
            graves=grave_rows(result.observers),
            audits=[shown_audit(row) for row in result.audit],
            observer_groups=_by_observer(row for row in result.observers if row.observer != NO_ONE),
            hidden_from_all=[row for row in result.observers if row.observer == NO_ONE],
            colors={"split": figures.BLUE, "unsplit": figures.AMBER, "majority": figures.GREY},
        )
    )


@dataclass(frozen=True, kw_only=True)
class Part:
    """One box of the diagram: which stretch of the model, and who holds it."""

    title: str
    held_by: str
    role: str
    cells: tuple[str, ...]
    text: str


def _parts(result: Result) -> list[Part]:
    """Return head, body and tail, from left to right."""
    model = result.model
    owners = _names(result.data_parties)
    hosts = _names([party for party in result.parties if party.role == "model party"]) or "model party"
    each = "each of " if len(result.data_parties) > 1 else ""
    head = model.head_blocks
    first_of_tail = model.num_blocks - model.tail_blocks if model.partition == "HBT" else model.num_blocks
    data, host = "data party", "model party"
    parts = [
        Part(
            title="Head",
            held_by=f"{each}{owners}",
            role=data,
            cells=("text in", *_blocks(0, head)),
            text=_stretch("embedding", 0, head),
        )
    ]
    if model.partition == "HT":
        cells = (*_blocks(head, model.num_blocks), "task head")
        parts.append(
            Part(
                title="Tail",
                held_by=hosts,
                role=host,
                cells=cells,
                text=_stretch("", head, model.num_blocks, "task head"),
            )
        )
        return parts
    parts.append(
        Part(
            title="Body",
            held_by=hosts,
            role=host,
            cells=_blocks(head, first_of_tail),
            text=_stretch("", head, first_of_tail),
        )
    )
    parts.append(
        Part(
            title="Tail",
            held_by=f"{each}{owners}",
            role=data,
            cells=(*_blocks(first_of_tail, model.num_blocks), "task head"),
            text=_stretch("", first_of_tail, model.num_blocks, "task head, loss, labels"),
        )
    )
    return parts


def _blocks(start: int, stop: int) -> tuple[str, ...]:
    """Name each block by its number; many are too narrow for one."""
    return tuple(str(index) if stop - start <= 8 else "" for index in range(start, stop))


def _stretch(before: str, start: int, stop: int, after: str = "") -> str:
    blocks = f"blocks {start}{numbers.DASH}{stop - 1}" if stop - start > 1 else f"block {start}" if stop > start else ""
    return ", ".join(text for text in (before, blocks, after) if text) or "no block"


def _names(parties: Sequence[PartySummary]) -> str:
    """Name the parties, or count them where names would not fit the box."""
    names = ", ".join(party.name for party in parties)
    return names if len(names) <= 90 or len(parties) == 1 else f"the {len(parties)} parties below"


def _loss_figure(rounds: Sequence[RoundSummary]) -> Markup:
    if all(summary.loss is None and summary.unsplit_loss is None for summary in rounds):
        return Markup("")
    lines = [
        figures.Curve(values=[summary.unsplit_loss for summary in rounds], color=figures.AMBER, style="wide"),
        figures.Curve(values=[summary.loss for summary in rounds], color=figures.BLUE, style="thin"),
    ]
    return Markup(figures.curves(lines, ident="loss", rounds=_numbers(rounds), fractions=False))


def _metric_figure(result: Result) -> Markup:
    rounds = result.rounds
    if all(summary.metric is None and summary.unsplit_metric is None for summary in rounds):
        return Markup("")
    level = result.metric.majority
    lines = [
        *([] if level is None else [figures.Curve(values=[level], color=figures.GREY, style="dashed")]),
        figures.Curve(values=[summary.unsplit_metric for summary in rounds], color=figures.AMBER, style="wide"),
        figures.Curve(values=[summary.metric for summary in rounds], color=figures.BLUE, style="thin"),
    ]
    return Markup(figures.curves(lines, ident="metric", rounds=_numbers(rounds), fractions=True))


def _time_figure(rounds: Sequence[RoundSummary]) -> Markup:
    if not _second_parts(rounds):
        return Markup("")
    parts = {name: [summary.seconds.get(name, 0.0) for summary in rounds] for name in _second_parts(rounds)}
    return Markup(figures.stacked_bars(parts, ident="time", rounds=_numbers(rounds)))


def _numbers(rounds: Sequence[RoundSummary]) -> list[int]:
    return [summary.round for summary in rounds]


def _second_parts(rounds: Sequence[RoundSummary]) -> list[str]:
    """Return what time was spent on, in the order in which rounds name it."""
    return list(dict.fromkeys(name for summary in rounds for name in summary.seconds))


def _legend(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, figures.PARTS[index % len(figures.PARTS)]) for index, name in enumerate(names)]


@dataclass(frozen=True, kw_only=True)
class Flow:
    """One kind of tensor on one leg of its way, summed over parties."""

    up: bool
    way: str
    name: str
    layout: str
    messages: int
    bytes: int
    share: float


def _flows(result: Result) -> list[Flow]:
    """Sum the ledger over parties, largest first."""
    model = result.model
    hosts = {party.name for party in result.parties if party.role == "model party"}
    groups: dict[tuple[bool, bool, str], list[TrafficEntry]] = {}
    for entry in result.traffic.entries:
        relayed = is_second_leg(entry, hosts)
        seen = turn(entry) if relayed else entry
        name = tensor_name(
            seen,
            partition=model.partition,
            num_blocks=model.num_blocks,
            head_blocks=model.head_blocks,
            tail_blocks=model.tail_blocks,
        )
        groups.setdefault((seen.direction == "up", relayed, name), []).append(entry)
    sums = {key: sum(entry.bytes for entry in group) for key, group in groups.items()}
    largest = max([1, *sums.values()])
    return [
        Flow(
            up=key[0],
            way=_way(up=key[0], relayed=key[1], averaged=groups[key][0].operation == "average"),
            name=key[2],
            layout=_layout(groups[key]),
            messages=sum(entry.messages for entry in groups[key]),
            bytes=sums[key],
            share=sums[key] / largest,
        )
        for key in sorted(groups, key=lambda key: -sums[key])
    ]


def _way(*, up: bool, relayed: bool, averaged: bool) -> str:
    """Name the leg; what goes to a node of its own is passed on by the hub, and crosses twice."""
    if relayed:
        return "passed on by the hub" if up else "back to the hub"
    if averaged and up:
        return "to the hub"
    return "to model party" if up else "to data party"


def _layout(group: Sequence[TrafficEntry]) -> str:
    """Return the largest shape and the dtypes of one kind of tensor; nothing for headers."""
    shape = max((entry.max_shape for entry in group), key=math.prod)
    dtypes = sorted({entry.dtype for entry in group})
    return f"{' × '.join(map(str, shape))} {', '.join(dtypes)}".strip()


def _by_observer(rows: Iterable[ObserverRow]) -> list[tuple[str, list[ObserverRow]]]:
    """Group rows under their observer, in the order in which observers first occur."""
    groups: dict[str, list[ObserverRow]] = {}
    for row in rows:
        groups.setdefault(row.observer, []).append(row)
    return list(groups.items())
