"""Metrics against values worked out by hand, and honest intervals where the data are too uniform for a bootstrap."""

import math

import numpy as np
import pytest

from vflair_flower.errors import DataError
from vflair_flower.tasks import (
    Interval,
    accuracy,
    bootstrap_interval,
    majority_accuracy,
    paired_bootstrap_difference,
    seed_interval,
)


def test_accuracy_and_majority() -> None:
    assert accuracy([0, 1, 1, 2], [0, 1, 2, 2]) == 0.75
    assert majority_accuracy([2, 2, 0], [2, 0, 1, 0]) == 0.25
    # Of equally frequent labels the smallest is answered, whichever comes first.
    assert majority_accuracy([3, 1], [3, 3, 1]) == pytest.approx(1 / 3)
    # A majority label that the test rows do not have.
    assert majority_accuracy([5, 5, 0], [0, 1]) == 0.0


def test_a_bootstrap_interval_of_a_share_is_near_the_normal_one() -> None:
    correct = [True] * 300 + [False] * 100
    found = bootstrap_interval(correct, seed=0)
    half_width = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert found.estimate == 0.75
    assert found.low == pytest.approx(0.75 - half_width, abs=0.008)
    assert found.high == pytest.approx(0.75 + half_width, abs=0.008)
    assert found == bootstrap_interval(correct, seed=0)
    narrower = bootstrap_interval(correct, seed=0, confidence=0.5)
    assert found.low < narrower.low < narrower.high < found.high


@pytest.mark.parametrize(("value", "low", "high"), [(True, 0.025**0.1, 1.0), (False, 0.0, 1 - 0.025**0.1)])
def test_ten_equal_answers_are_not_certainty(value: bool, low: float, high: float) -> None:
    found = bootstrap_interval([value] * 10, seed=0)
    assert (found.estimate, found.low, found.high) == pytest.approx((float(value), low, high))
    assert found.method.startswith("Clopper-Pearson")


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    rng = np.random.default_rng(0)
    correct_a = rng.random(500) < 0.8
    correct_b = correct_a.copy()
    correct_b[:25] = False
    found = paired_bootstrap_difference(correct_a.tolist(), correct_b.tolist(), seed=1)
    difference = float(correct_a.mean() - correct_b.mean())
    half_width = 1.96 * math.sqrt(difference * (1 - difference) / 500)
    assert found.estimate == pytest.approx(difference)
    assert found.low == pytest.approx(difference - half_width, abs=0.006)
    assert 0 < found.low < found.estimate < found.high
    mirrored = paired_bootstrap_difference(correct_b.tolist(), correct_a.tolist(), seed=1)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))


@pytest.mark.parametrize(("a", "b", "estimate"), [(True, True, 0.0), (True, False, 1.0), (False, True, -1.0)])
def test_models_that_differ_alike_on_every_row_get_an_interval_with_width(a: bool, b: bool, estimate: float) -> None:
    found = paired_bootstrap_difference([a] * 100, [b] * 100, seed=0)
    others = 1 - 0.025**0.01
    expected = {0.0: (-others, others), 1.0: (1 - 2 * others, 1.0), -1.0: (-1.0, -1 + 2 * others)}[estimate]
    assert (found.estimate, found.low, found.high) == pytest.approx((estimate, *expected))


def test_a_seed_interval_is_students() -> None:
    found = seed_interval([1.0, 2.0, 3.0])
    half_width = 4.302653 / math.sqrt(3)  # t for 2 degrees of freedom, standard deviation 1
    assert (found.estimate, found.low, found.high) == pytest.approx((2, 2 - half_width, 2 + half_width), rel=1e-6)
    same = seed_interval([0.1, 0.1, 0.1])
    assert (same.estimate, same.low, same.high) == (0.1, 0.1, 0.1)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: accuracy([], []), "0 predictions and 0 labels"),
        (lambda: accuracy([1], [1, 2]), "1 predictions and 2 labels"),
        (lambda: majority_accuracy([], [1]), "no train labels"),
        (lambda: majority_accuracy([1], []), "no test labels"),
        (lambda: bootstrap_interval([], seed=0), "correct is empty"),
        (lambda: bootstrap_interval([2, 1], seed=0), r"correct has shape \(2,\) and dtype int64"),
        (lambda: bootstrap_interval([True, False], seed=0, confidence=95), "confidence is 95"),
        (lambda: bootstrap_interval([True, True], seed=0, confidence=95), "confidence is 95"),
        (lambda: bootstrap_interval([True, False], seed=0, resamples=0), "resamples is 0"),
        (lambda: bootstrap_interval([True, False], seed=-1), "seed is -1"),
        (lambda: paired_bootstrap_difference([True], [], seed=0), "1 answers of a and 0 answers of b"),
        (lambda: seed_interval([0.5]), "There are 1 values"),
        (lambda: seed_interval([0.5, float("nan")]), "One of the values is nan"),
        (lambda: Interval(estimate=0, low=0, high=0, confidence=1, method=""), "confidence is 1"),
    ],
)
def test_what_cannot_be_estimated_is_refused(call, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        call()
