"""Cells, grids and bounds."""

import pytest

from vflair_flower.attacks.scoring import Figure
from vflair_flower.audit import Bounds, Cell, CellResult, GridSettings, Subject, cells_of, exceeded
from vflair_flower.audit.cells import cut_text, parse_cut, plans_of
from vflair_flower.errors import ConfigurationError, PartitionError
from vflair_flower.partition import Mode, PartitionPlan

OWN = PartitionPlan(mode=Mode.HBT, head_blocks=1, tail_blocks=1)


def result(value: float, *, metric: str = "token_recall") -> CellResult:
    cell = Cell(attack="vmi", adversary="model-party", cut="HBT 1|2|1", knowledge="public", epoch="end")
    figure = Figure(value=value, low=max(0, value - 0.1), high=min(1, value + 0.1), chance=0.02, n=7)
    return CellResult(cell=cell, n=7, figures={metric: figure}, seconds=1.5, memory_bytes=3, examples=(("a", "b"),))


class TestCuts:
    @pytest.mark.parametrize("text", ["HBT 1|4|1", "HT 2|4", "HBT 3|3|0"])
    def test_are_written_as_they_are_read(self, text):
        assert cut_text(parse_cut(text), 6) == text

    @pytest.mark.parametrize("text", ["HBT 1|4", "HT 1|4|1", "deep", "HBT a|b|c", "HT -1|7", ""])
    def test_refuse_what_is_none(self, text):
        with pytest.raises(ConfigurationError, match="'HBT 1"):
            parse_cut(text)

    def test_all_are_1_to_n_minus_1_in_both_modes(self):
        plans = [cut_text(plan, 4) for plan in plans_of("all", own=OWN, num_blocks=4)]
        assert plans == ["HBT 1|2|1", "HBT 2|1|1", "HBT 3|1|0", "HT 1|3", "HT 2|2", "HT 3|1"]

    def test_too_deep_is_refused(self):
        with pytest.raises(PartitionError, match="the model party would hold none"):
            plans_of("HT 4|0", own=OWN, num_blocks=4)


class TestGrid:
    def test_has_a_cell_for_every_choice(self, finished_run):
        settings = GridSettings(attacks="vmi vmi:steps=3", cuts="all", knowledge="public exact", seeds="0 1")
        cells = cells_of(settings, Subject(run=str(finished_run)))
        assert len(cells) == len(set(cells)) == 2 * 6 * 2 * 2
        assert {cell.adversary for cell in cells} == {"model-party"}

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ({"attacks": "telepathy"}, "known are"),
            ({"knowledge": "all"}, "exact"),
            ({"epochs": "middle"}, "start"),
            ({"seeds": "one"}, "whole numbers"),
            ({"attacks": " "}, "empty"),
        ],
    )
    def test_refuses_what_is_unknown(self, wrong, said):
        with pytest.raises(ConfigurationError, match=said):
            GridSettings(**wrong)


class TestBounds:
    def test_are_broken_by_what_is_above_them_only(self):
        bounds = Bounds(token_recall=0.2)
        assert exceeded(bounds, [result(0.2)], {}) == []
        (said,) = exceeded(bounds, [result(0.1), result(0.7)], {})
        assert "0.700" in said
        assert "chance 0.020" in said

    def test_are_not_passed_by_what_was_not_measured(self):
        assert exceeded(Bounds(token_recall=0.2), [result(0.1)], {"vmi/x": "it broke"})
        assert exceeded(Bounds(label_accuracy=0.2), [result(0.1)], {})
        assert exceeded(Bounds(), [result(1.0)], {"vmi/x": "it broke"}) == []

    def test_are_shares(self):
        with pytest.raises(ConfigurationError, match="20"):
            Bounds(token_recall=20)


def test_a_result_comes_back_as_it_was():
    one = result(0.25)
    assert CellResult.from_json(one.to_json()) == one


def test_a_row_holds_no_text_of_the_victims():
    row = result(0.25).to_row()
    assert row["metrics"] == {"token_recall": 0.25}
    assert row["interval"] == {"token_recall": [0.15, 0.35]}
    assert set(row) >= {
        "attack",
        "adversary",
        "cut",
        "defence",
        "seed",
        "n",
        "metrics",
        "chance",
        "interval",
        "seconds",
    }
    assert "examples" not in row
