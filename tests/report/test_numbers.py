"""Figures as people read them."""

import pytest

from vflair_flower.report import Interval, numbers


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (numbers.count(2400), "2,400"),
        (numbers.counted(1, "row"), "1 row"),
        (numbers.counted(0, "row"), "0 rows"),
        (numbers.large(22_861_959), "22.9 M"),
        (numbers.large(70_553_706_496), "70.6 B"),
        (numbers.large(999_999), "1.0 M"),
        (numbers.large(12), "12"),
        (numbers.size(0), "0 B"),
        (numbers.size(999), "999 B"),
        (numbers.size(54_000_000), "54.0 MB"),
        (numbers.size(999_960), "1.0 MB"),
        (numbers.percent(0.9605), "96.0 %"),
        (numbers.share(0, 5), "0 %"),
        (numbers.share(1, 5000), "< 0.1 %"),
        (numbers.share(1, 4), "25 %"),
        (numbers.share(1, 0), "0 %"),
        (numbers.setting(None), "–"),
        (numbers.setting(True), "yes"),
        (numbers.setting(""), "(empty)"),
        (numbers.setting(0.001), "0.001"),
        (numbers.duration(4.23), "4.2 s"),
        (numbers.duration(59.7), "1 min 00 s"),
        (numbers.duration(163.4), "2 min 43 s"),
        (numbers.duration(7260), "2 h 01 min"),
        (numbers.interval(Interval(low=0.943, high=0.974, confidence=0.95, method="")), "94.3–97.4 %"),
        (
            numbers.interval_of_difference(Interval(low=-0.011, high=0.0, confidence=0.95, method="")),
            "−1.1 to ±0.0 points",
        ),
    ],
)
def test_figures(shown, expected):
    assert shown.replace(numbers.NBSP, " ") == expected
