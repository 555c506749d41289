"""From cells to one table: means over seeds with intervals, and how much of what isolation loses is won back."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from simulations.moe.cells import CellResult
from simulations.moe.settings import METHODS
from vflair_flower.tasks import seed_interval

TITLES = {
    "centralised": "Centralised",
    "isolated": "Isolated",
    "fedavg": "FedAvg",
    "fedavg-experts": "FedAvg of experts",
    "pc-moe": "PC-MoE",
    "pc-moe-round-robin": "PC-MoE, round-robin",
    "pc-moe-hand-off": "PC-MoE, hand-off",
    "pc-moe-averaged": "PC-MoE, own models averaged",
    "pc-moe-int8": "PC-MoE, int8",
    "pc-moe-coactivation": "PC-MoE, placed by co-activation",
    "pc-moe-local": "PC-MoE, own experts preferred",
    "pc-moe-opt-out": "PC-MoE, one opted out",
}


def table_of(results: Sequence[CellResult]) -> list[dict[str, Any]]:
    """Return one line per method, number of parties and partition, over all seeds.

    `recovered` is (log isolated - log own) / (log isolated - log centralised) of the perplexities, by seed: 0 is as bad
    as alone, 1 as good as centralised; None where one of these is missing, or isolation loses nothing.
    """
    groups: dict[tuple[str, int, str], list[CellResult]] = {}
    for one in results:
        groups.setdefault((one.partition, one.parties, one.method), []).append(one)
    central = {one.seed: one.perplexity for one in results if one.method == "centralised"}
    alone = {(o.partition, o.parties, o.seed): o.perplexity for o in results if o.method == "isolated"}
    lines = []
    for (partition, parties, method), own in sorted(groups.items(), key=_place):
        recovered = [
            share
            for one in own
            if (share := _recovered(one.perplexity, alone.get((partition, parties, one.seed)), central.get(one.seed)))
            is not None
        ]
        choices = [_mean(s["accuracy"] for s in one.choices.values()) for one in own if one.choices]
        chance = [_mean(s["chance"] for s in one.choices.values()) for one in own if one.choices]
        lines.append(
            {
                "method": method,
                "parties": parties,
                "partition": partition,
                "seeds": len(own),
                "perplexity": over_seeds([one.perplexity for one in own]),
                "own_perplexity": over_seeds([one.own_perplexity for one in own]),
                "recovered": over_seeds(recovered) if method not in ("centralised", "isolated") and recovered else None,
                "choices": over_seeds(choices) if choices else None,
                "choices_by_set": _by_set(own),
                "chance": _mean(chance) if chance else None,
                "peak_memory_bytes": max(one.memory["total"] for one in own),
                "memory": max((one.memory for one in own), key=lambda memory: memory["total"]),
                "bytes_per_token": _mean(one.bytes_per_token for one in own),
                "bytes_per_token_and_layer": _mean(one.bytes_per_token_and_layer for one in own),
                "step_seconds": _mean(one.seconds / one.steps for one in own),
                "curve": _curve(own),
            }
        )
    return lines


def over_seeds(values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean with a 95 % Student's t interval; without one for a single seed."""
    if len(values) < 2:
        return {"mean": values[0], "low": None, "high": None}
    found = seed_interval(list(values))
    return {"mean": found.estimate, "low": found.low, "high": found.high}


def summary_lines(result: dict[str, Any], page: Path) -> list[str]:
    """Return the figures that matter, as lines for the end of a run."""
    moe = result["moe"]
    lines = [f"Exact    {'bit for bit the whole model' if moe['exact'] else 'NOT equal to the whole model'}"]
    for parties, reduction in moe["peak_memory_reduction"].items():
        lines.append(f"Memory   {100 * reduction:.1f} % less per party, {parties} parties")
    for one in moe["speed"]:
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in one["tokens_per_s"].items())
        lines.append(f"Speed    tokens/s, {1000 * one['delay_s']:g} ms away: {rates} (x{one['ratio']:.2f})")
    if moe["bytes_per_token"]:
        lines.append(f"Traffic  {moe['bytes_per_token'] / 1000:.1f} kB per token")
    for line in result["table"]:
        mean, low, high = (line["perplexity"][key] for key in ("mean", "low", "high"))
        spread = f" ({low:.1f} to {high:.1f})" if low is not None else ""
        lines.append(f"{line['partition']:<8} {TITLES[line['method']]:<20} n={line['parties']}  {mean:.1f}{spread}")
    return [*lines, f"Report   {page}"]


def _place(item: tuple[tuple[str, int, str], list[CellResult]]) -> tuple[str, int, int]:
    partition, parties, method = item[0]
    return partition, parties, METHODS.index(method)


def _recovered(own: float, alone: float | None, central: float | None) -> float | None:
    if alone is None or central is None or alone <= central:
        return None
    return (math.log(alone) - math.log(own)) / (math.log(alone) - math.log(central))


def _by_set(own: Sequence[CellResult]) -> dict[str, dict[str, Any]]:
    names = own[0].choices if own else {}
    return {
        name: {
            "accuracy": over_seeds([one.choices[name]["accuracy"] for one in own]),
            "chance": own[0].choices[name]["chance"],
            "n": own[0].choices[name]["n"],
        }
        for name in names
    }


def _curve(own: Sequence[CellResult]) -> list[list[float]]:
    """Return tokens and the geometric mean of perplexities over seeds, round by round."""
    rounds = zip(*(one.curve for one in own), strict=True)
    return [
        [_mean(tokens for tokens, _ in points), math.exp(_mean(math.log(value) for _, value in points))]
        for points in (list(entry) for entry in rounds)
    ]


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return math.fsum(known) / len(known)
