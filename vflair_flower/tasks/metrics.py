"""How good a model is and how sure we are: accuracy, its chance level, and intervals.

The formulas are scikit-learn's and scipy's; what is decided here is which one to use, and what is said when the data
are too uniform for it.  A bootstrap over answers that are all right has width 0, which would claim certainty from ten
rows; an exact binomial bound is given instead, and `Interval.method` says so.

Invariant: the same values and seed give the same interval.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score

from vflair_flower.errors import DataError

_RESAMPLED_VALUES_AT_ONCE = 2_000_000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate and the interval around it.

    Parameters
    ----------
    estimate : float
        The value itself.
    low, high : float
        The interval's ends.
    confidence : float
        In (0, 1), for instance 0.95.
    method : str
        How it was computed, for reports.
    """

    estimate: float
    low: float
    high: float
    confidence: float
    method: str

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise DataError(
                f"confidence is {self.confidence}, but it is a share. Choose 0 < confidence < 1, such as 0.95."
            )


def accuracy(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Return the share of predictions that equal their label.

    Raises
    ------
    DataError
        There are no predictions, or not as many as labels.

    Examples
    --------
    >>> accuracy([0, 1, 1, 2], [0, 1, 2, 2])
    0.75
    """
    _check_pairs(len(predictions), len(labels), "predictions", "labels")
    return float(accuracy_score(labels, predictions))


def majority_accuracy(train_labels: Sequence[int], test_labels: Sequence[int]) -> float:
    """Return the accuracy of always answering the label most frequent in train; of equals, the smallest label.

    Raises
    ------
    DataError
        Either is empty.

    Examples
    --------
    >>> majority_accuracy([0, 0, 1], [0, 1, 1, 1])
    0.25
    """
    for name, labels in (("train", train_labels), ("test", test_labels)):
        if len(labels) == 0:
            raise DataError(f"There are no {name} labels, so no majority can be measured. Pass at least one.")
    # DummyClassifier looks at the number of rows only, not at what is in them.
    always = DummyClassifier(strategy="most_frequent").fit(np.zeros((len(train_labels), 1)), list(train_labels))
    return float(always.score(np.zeros((len(test_labels), 1)), list(test_labels)))


def bootstrap_interval(
    correct: Sequence[bool], *, confidence: float = 0.95, seed: int, resamples: int = 2000
) -> Interval:
    """Return the accuracy with a percentile bootstrap interval over test rows.

    Parameters
    ----------
    correct : sequence of bool
        Per test row, whether the answer was right.
    confidence : float
        Between 0 and 1.
    seed : int
        Of the resampling.
    resamples : int
        How many.

    Returns
    -------
    Interval
        By Clopper and Pearson if all answers are right or all are wrong.

    Raises
    ------
    DataError
        There are no rows, or a setting is out of range.
    """
    right = _as_bools(correct, "correct")
    num_right = int(right.sum())
    if num_right in (0, right.size):
        low, high = _exact_bounds(num_right, right.size, confidence)
        return Interval(
            estimate=num_right / right.size,
            low=low,
            high=high,
            confidence=confidence,
            method="Clopper-Pearson (all rows equal)",
        )
    return _percentile_bootstrap(right.astype(np.float64), confidence=confidence, seed=seed, resamples=resamples)


def mean_interval(values: Sequence[float], *, confidence: float = 0.95, seed: int, resamples: int = 2000) -> Interval:
    """Return the mean of values in 0..1, one per test row, with a percentile bootstrap interval.

    Parameters
    ----------
    values : sequence of float
        Such as the overlap of each answer with its reference.
    confidence, seed, resamples
        As for `bootstrap_interval`.

    Returns
    -------
    Interval
        By Clopper and Pearson if all values are 0 or all are 1, and by Hoeffding if all are another value.

    Raises
    ------
    DataError
        There are no values, one is outside of 0..1, or a setting is out of range.

    Examples
    --------
    >>> found = mean_interval([0.5] * 8, seed=0)
    >>> found.estimate, round(found.low, 2), found.method
    (0.5, 0.02, 'Hoeffding (all rows equal)')
    """
    shares = np.asarray(values, dtype=np.float64)
    if shares.ndim != 1 or shares.size == 0 or not ((shares >= 0) & (shares <= 1)).all():
        raise DataError(
            f"There are {shares.size} values, of which {list(values)[:3]} are the first; a mean of shares needs one or "
            "more, all in 0..1. Pass one value per test row."
        )
    if np.isin(shares, (0, 1)).all():
        return bootstrap_interval([bool(v) for v in shares], confidence=confidence, seed=seed, resamples=resamples)
    if (shares == shares[0]).all():
        _check_confidence(confidence)
        width = math.sqrt(math.log(2 / (1 - confidence)) / (2 * shares.size))
        mean = float(shares[0])
        return Interval(
            estimate=mean,
            low=max(0.0, mean - width),
            high=min(1.0, mean + width),
            confidence=confidence,
            method="Hoeffding (all rows equal)",
        )
    return _percentile_bootstrap(shares, confidence=confidence, seed=seed, resamples=resamples)


def paired_bootstrap_difference(
    correct_a: Sequence[float],
    correct_b: Sequence[float],
    *,
    confidence: float = 0.95,
    seed: int,
    resamples: int = 2000,
) -> Interval:
    """Return mean a minus mean b on the same test rows, with a paired percentile bootstrap interval.

    Parameters
    ----------
    correct_a, correct_b : sequence of bool or float
        Per test row, whether each model's answer was right, or its figure in 0..1; in the same order of rows.
    confidence : float
        Between 0 and 1.
    seed : int
        Of the resampling.
    resamples : int
        How many.

    Returns
    -------
    Interval
        If the two differ alike on every row, from exact bounds on how many other rows there may be.

    Raises
    ------
    DataError
        There are no rows, not as many of each, or a setting is out of range.
    """
    _check_pairs(len(correct_a), len(correct_b), "answers of a", "answers of b")
    difference = _as_shares(correct_a, "correct_a") - _as_shares(correct_b, "correct_b")
    always = float(difference[0])
    if not np.all(difference == always):
        return _percentile_bootstrap(difference, confidence=confidence, seed=seed, resamples=resamples)
    # At most `others` of all rows can be different from the n that were seen, each by |1 - 0| or |1 - (-1)|.
    others = _exact_bounds(0, difference.size, confidence)[1]
    furthest = others if always == 0 else 2 * others
    return Interval(
        estimate=always,
        low=max(-1.0, always - furthest),
        high=min(1.0, always + furthest),
        confidence=confidence,
        method="Clopper-Pearson (all rows equal)",
    )


def seed_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Return the mean over seeds with Student's t interval.

    Parameters
    ----------
    values : sequence of float
        One figure per seed; at least two.
    confidence : float
        Between 0 and 1.

    Raises
    ------
    DataError
        There are fewer than two values, or one is not finite.

    Examples
    --------
    >>> found = seed_interval([0.8, 0.9])
    >>> round(found.estimate, 3), round(found.low, 3)
    (0.85, 0.215)
    """
    _check_confidence(confidence)
    if len(values) < 2:
        raise DataError(
            f"There are {len(values)} values, but a spread over seeds needs two. Run more seeds, or report the figure "
            "without this interval."
        )
    unusable = [value for value in values if not math.isfinite(value)]
    if unusable:
        raise DataError(f"One of the values is {unusable[0]}, so there is no mean. Leave that run out, and say so.")
    mean = float(np.mean(values))
    spread = float(stats.sem(values))
    if max(values) == min(values):
        low = high = mean = float(values[0])
    else:
        low, high = (float(end) for end in stats.t.interval(confidence, len(values) - 1, loc=mean, scale=spread))
    return Interval(
        estimate=mean, low=low, high=high, confidence=confidence, method=f"Student's t over {len(values)} seeds"
    )


def _percentile_bootstrap(values: npt.NDArray[np.float64], *, confidence: float, seed: int, resamples: int) -> Interval:
    _check_confidence(confidence)
    if resamples < 1 or seed < 0:
        raise DataError(
            f"resamples is {resamples} and seed is {seed}. Choose resamples >= 1 (2000 is usual), seed >= 0."
        )
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        batch=max(1, _RESAMPLED_VALUES_AT_ONCE // values.size),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(
        estimate=float(values.mean()),
        low=float(found.low),
        high=float(found.high),
        confidence=confidence,
        method=f"percentile bootstrap ({resamples} resamples)",
    )


def _exact_bounds(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    _check_confidence(confidence)
    found = stats.binomtest(successes, trials).proportion_ci(confidence_level=confidence, method="exact")
    return float(found.low), float(found.high)


def _as_shares(values: Sequence[float], name: str) -> npt.NDArray[np.float64]:
    shares = np.asarray(values, dtype=np.float64)
    if shares.ndim != 1 or not ((shares >= 0) & (shares <= 1)).all():
        raise DataError(
            f"{name} has shape {shares.shape} and the values {list(values)[:3]}...; it must be one bool, or one number "
            "in 0..1, per test row. Pass predictions == labels, or each row's figure."
        )
    return shares


def _as_bools(correct: Sequence[bool], name: str) -> npt.NDArray[np.bool_]:
    values = np.asarray(correct)
    if values.size == 0:
        raise DataError(f"{name} is empty, so nothing can be estimated. Pass one bool per test row.")
    if values.ndim != 1 or not np.isin(values, (0, 1)).all():
        raise DataError(
            f"{name} has shape {values.shape} and dtype {values.dtype}; it must be one bool per test row. "
            "Pass predictions == labels."
        )
    return values.astype(np.bool_)


def _check_pairs(num_first: int, num_second: int, first: str, second: str) -> None:
    if num_first != num_second or num_first == 0:
        raise DataError(
            f"There are {num_first} {first} and {num_second} {second}; they must be of the same rows, one or more. "
            "Pass one of each per test row."
        )


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise DataError(f"confidence is {confidence}, but it is a share. Choose 0 < confidence < 1, such as 0.95.")
