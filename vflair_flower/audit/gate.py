"""Bounds that leakage may not exceed, for anybody's CI.

Invariant: what could not be measured is not passed; a cell that failed counts as exceeding every bound.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from vflair_flower.attacks import Goal
from vflair_flower.audit.cells import CellResult
from vflair_flower.errors import ConfigurationError

_METRIC = {
    "token_recall": (Goal.TEXT, "token_recall"),
    "label_accuracy": (Goal.LABELS, "label_accuracy"),
    "membership_auc": (Goal.MEMBERS, "auc"),
}


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The most that any cell may reach; None is no bound.

    Parameters
    ----------
    token_recall : float or None
        Share of a text's tokens that are guessed, each as often as it occurs.
    label_accuracy : float or None
        Share of labels that are guessed.
    membership_auc : float or None
        Area under the curve of a guess at who was trained on.

    Raises
    ------
    ConfigurationError
        A bound is not in 0..1.
    """

    token_recall: float | None = None
    label_accuracy: float | None = None
    membership_auc: float | None = None

    def __post_init__(self) -> None:
        for name, bound in self.items():
            if not 0 <= bound <= 1:
                raise ConfigurationError(f"the bound on {name} is {bound}; give a share in 0..1.")

    def items(self) -> list[tuple[str, float]]:
        """Return the bounds that there are."""
        return [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not None]


def exceeded(bounds: Bounds, results: Sequence[CellResult], failed: Mapping[str, str]) -> list[str]:
    """Return what broke a bound, in words; empty if nothing did."""
    said = []
    for name, bound in bounds.items():
        goal, metric = _METRIC[name]
        what = name.replace("_", " ")
        measured = [one for one in results if one.cell.which.goal is goal and metric in one.figures]
        for one in measured:
            figure = one.figures[metric]
            if figure.value > bound:
                said.append(
                    f"{one.cell.name}: {what} {figure.value:.3f} ({figure.low:.3f} to {figure.high:.3f}, chance "
                    f"{figure.chance:.3f}) is above {bound:g}"
                )
        if not measured:
            said.append(f"no cell measured {what}, so its bound of {bound:g} is not shown to hold")
    if bounds.items():
        said += [f"{name} failed ({why}), and what was not measured is not passed" for name, why in failed.items()]
    return said
