"""Dealing: every row to exactly one party, the same way each time, and skewed where skew was asked for."""

import sys
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.tasks import DealSettings, Row, deal

pytest.importorskip("flwr_datasets", reason="the extra 'simulation' is not installed")

KINDS = ("iid", "label-skew", "quantity-skew")


def make_rows(count: int, num_labels: int = 4) -> list[Row]:
    return [Row(f"text {index}", index % num_labels, str(index)) for index in range(count)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from(KINDS),
    num_parties=st.integers(1, 6),
    rows_per_party=st.integers(1, 12),
    num_labels=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_row_is_dealt_exactly_once_and_repeatably(
    kind: str, num_parties: int, rows_per_party: int, num_labels: int, seed: int
) -> None:
    rows = make_rows(num_parties * rows_per_party + 3, num_labels)
    how = DealSettings(kind=kind, alpha=2.0, min_rows=1, seed=seed)
    try:
        dealt = deal(rows, num_parties, how)
    except DataError:
        assert kind != "iid"  # few rows can be too few for a skew, never for equal parts
        return
    assert len(dealt) == num_parties
    assert sorted(row.id for party in dealt for row in party) == sorted(row.id for row in rows)
    assert min(len(party) for party in dealt) >= 1
    assert deal(rows, num_parties, how) == dealt


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_parties", [1, 2, 5])
def test_enough_rows_are_always_dealt(kind: str, num_parties: int) -> None:
    rows = make_rows(400)
    dealt = deal(rows, num_parties, DealSettings(kind=kind, seed=3))
    assert sorted(row.id for party in dealt for row in party) == sorted(row.id for row in rows)
    assert min(len(party) for party in dealt) >= 8


def test_equal_parts_differ_by_one_row_at_most_and_are_shuffled_by_the_seed() -> None:
    rows = make_rows(101)
    dealt = deal(rows, 4, DealSettings(seed=1))
    assert sorted(map(len, dealt)) == [25, 25, 25, 26]
    assert deal(rows, 4, DealSettings(seed=2)) != dealt
    assert [row.id for row in dealt[0]] != [str(index) for index in range(len(dealt[0]))]


def test_a_small_alpha_skews_labels_and_a_large_one_does_not() -> None:
    rows = make_rows(2000)

    def largest_share(alpha: float) -> float:
        parties = deal(rows, 4, DealSettings(kind="label-skew", alpha=alpha, seed=5))
        return float(np.mean([np.bincount([row.label for row in party]).max() / len(party) for party in parties]))

    assert largest_share(1000.0) < 0.3
    assert largest_share(0.1) > 0.5


def test_quantity_skew_gives_the_last_party_most() -> None:
    sizes = [len(party) for party in deal(make_rows(1000), 4, DealSettings(kind="quantity-skew"))]
    assert sizes == [100, 200, 300, 400]


@pytest.mark.parametrize(
    ("how", "count", "num_parties", "expected"),
    [
        (DealSettings(min_rows=30), 100, 4, "min_rows = 30 each"),
        (DealSettings(kind="label-skew", alpha=0.01, min_rows=20), 100, 4, r"With alpha = 0\.01 and seed 0"),
        (
            DealSettings(kind="quantity-skew", min_rows=20),
            100,
            4,
            r"party 0 of 4 would get 10 of 100 rows.*min_rows = 20",
        ),
        (DealSettings(kind="quantity-skew", min_rows=1), 10, 10, r"With kind 'quantity-skew'"),
        (DealSettings(), 0, 1, "0 rows cannot give"),
    ],
)
def test_too_few_rows_for_a_party_name_the_setting(
    how: DealSettings, count: int, num_parties: int, expected: str
) -> None:
    with pytest.raises(DataError, match=expected):
        deal(make_rows(count), num_parties, how)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("kind", "even"), ("alpha", 0.0), ("alpha", float("nan")), ("min_rows", 0), ("seed", -1), ("seed", 2**32)],
)
def test_settings_validate_at_birth(setting: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"{setting} is {value!r}"):
        DealSettings(**{setting: value})


def test_no_party_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="num_parties is 0"):
        deal(make_rows(10), 0, DealSettings())


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr_datasets.partitioner", None)
    with pytest.raises(ConfigurationError, match=r"vflair-flower\[simulation\]"):
        deal(make_rows(10), 1, DealSettings())


@pytest.mark.parametrize("kind", KINDS)
def test_eight_thousand_rows_take_seconds_at_most(kind: str) -> None:
    start = time.perf_counter()
    deal(make_rows(8000, 77), 4, DealSettings(kind=kind))
    assert time.perf_counter() - start < 10
