"""Audits of a finished run: by the command, as a Flower job, and with an attack from the documentation."""

import json
import re
from pathlib import Path

import pytest
from flwr.clientapp import ClientApp
from typer.testing import CliRunner

from simulations.local_grid import LocalGrid
from vflair_flower.audit import GridSettings, Subject, run_cell
from vflair_flower.audit.cells import Cell
from vflair_flower.audit.page import write_audit_page
from vflair_flower.cli import app as cli
from vflair_flower.clients import Auditor
from vflair_flower.errors import ConfigurationError
from vflair_flower.strategies import LeakageAudit

DOCS = Path(__file__).resolve().parents[2] / "docs" / "audits.md"
BROKEN = """
from vflair_flower.attacks import Goal, SplitView, attack


@attack("breaks", goal=Goal.TEXT, sees=SplitView, paper="none")
def breaks(view, knows, *, seed=0):
    raise RuntimeError("as it must")
"""


@pytest.fixture
def example(tmp_path) -> Path:
    """The documentation's attack, as a file."""
    (code,) = re.findall(r"```python\n# nearest_neighbour.py\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    file = tmp_path / "nearest_neighbour.py"
    file.write_text(code)
    return file


def run(*arguments: object):
    return CliRunner().invoke(cli, ["audit", *map(str, arguments)])


class TestCommand:
    def test_prints_a_row_per_cell_and_does_none_twice(self, finished_run, tmp_path):
        asked = (
            finished_run,
            "--attacks",
            "vmi:steps=30",
            "--rows",
            9,
            "--knowledge",
            "exact public",
            "--out",
            tmp_path,
        )
        first = run(*asked, "--json")
        assert first.exit_code == 0, first.output
        rows = [json.loads(line) for line in first.stdout.splitlines()]
        assert [row["knowledge"] for row in rows] == ["exact", "public"]
        exact = rows[0]
        assert exact["n"] == 9
        assert exact["cut"] == "HBT 1|2|1"
        assert exact["metrics"]["position_accuracy"] > 0.9 > exact["chance"]["position_accuracy"]
        assert exact["secrets"]["planted"] >= exact["secrets"]["found"] > 0
        assert run(*asked, "--json").stdout == first.stdout  # seconds included: nothing was run again

    def test_is_a_gate(self, finished_run, tmp_path):
        asked = (finished_run, "--attacks", "vmi:steps=30", "--rows", 6, "--knowledge", "exact", "--out", tmp_path)
        assert run(*asked, "--max-token-recall", "1.0").exit_code == 0
        closed = run(*asked, "--max-token-recall", "0.2")
        assert closed.exit_code == 1
        assert "is above 0.2" in closed.output
        unmeasured = run(*asked, "--max-label-accuracy", "0.9")
        assert unmeasured.exit_code == 1

    def test_says_what_is_wrong_before_it_begins(self, finished_run, tmp_path):
        for arguments, said in (
            ((tmp_path,), "no finished run"),
            ((finished_run, "--attacks", "telepathy"), "known are"),
            ((finished_run, "--max-token-recall", "20"), "a share in 0..1"),
            ((finished_run, "--rows", "0"), "choose 1 or more"),
            ((finished_run, "--load", tmp_path / "none.py"), "does not exist"),
            ((finished_run, "--cuts", "HT 4|0"), "would hold none"),
        ):
            found = run(*arguments)
            assert found.exit_code == 2, arguments
            assert said in found.output, arguments

    def test_runs_the_documentations_attack_and_outlives_one_that_breaks(self, finished_run, example, tmp_path):
        (tmp_path / "broken.py").write_text(BROKEN)
        found = run(
            finished_run, "--load", example, "--load", tmp_path / "broken.py", "--attacks", "nearest-neighbour breaks",
            "--knowledge", "exact", "--rows", 12, "--out", tmp_path / "audit", "--json",
        )  # fmt: skip
        (row,) = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
        assert row["attack"] == "nearest-neighbour"
        assert row["metrics"]["position_accuracy"] > row["chance"]["position_accuracy"] + 0.3
        assert "as it must" in found.output
        assert found.exit_code == 0  # without a bound a failed cell is reported, no more


class TestJob:
    def grid(self, tmp_path) -> LocalGrid:
        app = ClientApp()
        Auditor(threads=1).register(app)
        return LocalGrid(app, [{"partition-id": i} for i in range(2)])

    def test_runs_cells_at_nodes_and_goes_on_where_it_was(self, finished_run, tmp_path):
        settings = GridSettings(attacks="vmi:steps=20", cuts="all", knowledge="exact")
        subject = Subject(run=str(finished_run), rows=4)
        audit = LeakageAudit(subject=subject, settings=settings, folder=tmp_path, cells_at_once=2)
        assert len(audit.book.missing) == 6
        outcome = audit.start(self.grid(tmp_path))
        assert not outcome.failed
        assert [one.cell for one in outcome.results] == list(audit.book.cells)
        lines = (tmp_path / "cells.jsonl").read_text().splitlines()
        (tmp_path / "cells.jsonl").write_text("\n".join(lines[:4]) + "\n" + lines[4][:50])  # it broke off while writing
        again = LeakageAudit(subject=subject, settings=settings, folder=tmp_path)
        assert len(again.book.missing) == 2
        again.start(self.grid(tmp_path))
        assert not LeakageAudit(subject=subject, settings=settings, folder=tmp_path).book.missing
        page = write_audit_page(
            tmp_path / "report.html", subject, outcome.results, {"a cell": "<b>why</b>"}
        ).read_text()
        assert "Head-Body-Tail" in page
        assert "&lt;b&gt;why" in page
        assert "<script" not in page

    def test_does_not_take_the_cells_of_another_audit(self, finished_run, tmp_path):
        settings = GridSettings(attacks="vmi:steps=5")
        first = LeakageAudit(subject=Subject(run=str(finished_run), rows=2), settings=settings, folder=tmp_path)
        first.start(self.grid(tmp_path))
        for rows, missing in ((2, 0), (3, 1)):
            subject = Subject(run=str(finished_run), rows=rows)
            assert len(LeakageAudit(subject=subject, settings=settings, folder=tmp_path).book.missing) == missing

    def test_a_cell_gives_the_same_figures_wherever_it_is_run(self, finished_run):
        cell = Cell(attack="vmi:steps=20", adversary="model-party", cut="HT 1|3", knowledge="public", epoch="start")
        subject = Subject(run=str(finished_run), rows=5)
        first, second = run_cell(cell, subject), run_cell(cell, subject)
        assert first.figures == second.figures
        assert first.examples == second.examples

    def test_without_a_fitting_attack_says_why(self, finished_run, tmp_path, monkeypatch):
        from vflair_flower.attacks import registry

        odd = registry._ATTACKS.by_name["vmi"]
        monkeypatch.setitem(registry._ATTACKS.by_name, "vmi", type(odd)(**{**vars(odd), "kinds": ()}))
        with pytest.raises(ConfigurationError, match="does not work on sequence-classification"):
            LeakageAudit(subject=Subject(run=str(finished_run)), settings=GridSettings(attacks="vmi"), folder=tmp_path)
