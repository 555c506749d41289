"""A figure as it is reported: its value, how many rows it is from, its interval, and what guessing would get.

The interval is a percentile bootstrap over rows.  Figures that are means of one value per row resample the values;
figures of a whole corpus (a correlation, BLEU) are computed afresh on every resample.

Invariant: the same values and seed give the same score.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vflair_flower.errors import DataError
from vflair_flower.tasks.metrics import Interval, bootstrap_interval, mean_interval

Places = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One figure.

    Parameters
    ----------
    name : str
        The metric's name in `METRICS`.
    value : float
        Shares are in 0..1, BLEU in 0..100 as sacrebleu gives it, perplexities from 1.
    count : int
        How many rows it is from.
    interval : Interval
        95 % unless said otherwise; its estimate is `value`.
    chance : float, optional
        What an answer without looking gets, where that means something.
    majority : float, optional
        What always answering the most frequent label gets.
    note : str
        What a reader has to know, such as how many answers were read by a fallback.
    """

    name: str
    value: float
    count: int
    interval: Interval
    chance: float | None = None
    majority: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.count < 1 or not math.isfinite(self.value):
            raise DataError(
                f"{self.name} is {self.value} from {self.count} rows, which says nothing. Check the predictions."
            )


def share_score(name: str, correct: Sequence[bool], *, seed: int, note: str = "") -> Score:
    """Return the share of rows that are right."""
    interval = bootstrap_interval(correct, seed=seed)
    return Score(name=name, value=interval.estimate, count=len(correct), interval=interval, note=note)


def mean_score(name: str, values: Sequence[float], *, seed: int, note: str = "") -> Score:
    """Return the mean of one value in 0..1 per row."""
    interval = mean_interval(values, seed=seed)
    return Score(name=name, value=interval.estimate, count=len(values), interval=interval, note=note)


def corpus_score(
    name: str,
    statistic: Callable[[Places], float],
    *,
    count: int,
    seed: int,
    value: float | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    chance: float | None = None,
    majority: float | None = None,
    note: str = "",
) -> Score:
    """Return a figure of a whole corpus with a percentile bootstrap over its rows.

    Parameters
    ----------
    name : str
        Of the metric.
    statistic : callable
        Takes the places of `count` rows, some of them more than once, and returns the figure of these.
    count : int
        How many rows there are.
    value : float, optional
        The figure of all rows, where a library gives it and `statistic` is a faster way to the same.
    seed, resamples, confidence
        Of the bootstrap; resamples for which the figure is not defined are left out.
    chance, majority, note
        As in `Score`.

    Raises
    ------
    DataError
        There are no rows, or the figure is not defined.
    """
    if count < 1:
        raise DataError(f"{name} was asked of 0 rows, and nothing can be estimated. Pass at least one.")
    generator = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries warn of every resample in which all rows are alike
        value = statistic(np.arange(count)) if value is None else value
        drawn = [statistic(generator.integers(count, size=count)) for _ in range(resamples)]
    defined = [figure for figure in drawn if math.isfinite(figure)] or [value]
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    interval = Interval(
        estimate=value,
        low=float(low),
        high=float(high),
        confidence=confidence,
        method=f"percentile bootstrap ({len(defined)} resamples)",
    )
    return Score(name=name, value=value, count=count, interval=interval, chance=chance, majority=majority, note=note)
