"""The book of an audit: which cells there are, which are done, and where that is written.

Invariant: a cell that stands in ``cells.jsonl`` is not run again, so an audit that broke off goes on with what is
missing.
"""

from collections.abc import Sequence
from pathlib import Path

from vflair_flower.audit.cells import Cell, CellResult, main_metric
from vflair_flower.audit.subject import Subject
from vflair_flower.errors import CheckpointError

CELLS, SUBJECT = "cells.jsonl", "subject.json"


class AuditBook:
    """Keep an audit's results in a folder.

    Parameters
    ----------
    folder : pathlib.Path
        Made if it does not exist.
    subject : Subject
        The run.
    cells : sequence of Cell
        The grid.

    Raises
    ------
    CheckpointError
        `folder` has cells of another run, or with other numbers of rows.
    """

    def __init__(self, folder: Path, subject: Subject, cells: Sequence[Cell]) -> None:
        self.cells = tuple(cells)
        self._file = folder / CELLS
        folder.mkdir(parents=True, exist_ok=True)
        about = folder / SUBJECT
        if about.is_file() and about.read_text() != subject.to_json():
            raise CheckpointError(
                f"{folder} holds an audit of {about.read_text()}, and asked for is one of {subject.to_json()}. Take "
                "another folder, or the same settings."
            )
        about.write_text(subject.to_json())
        lines = self._file.read_text().splitlines() if self._file.is_file() else []
        found = [CellResult.from_json(line) for line in lines if line.endswith("}")]
        wanted = set(self.cells)
        self._done = {one.cell: one for one in found if one.cell in wanted}

    @property
    def missing(self) -> list[Cell]:
        """Cells that are still to be run."""
        return [cell for cell in self.cells if cell not in self._done]

    @property
    def results(self) -> tuple[CellResult, ...]:
        """What is done, in the order of the grid."""
        return tuple(self._done[cell] for cell in self.cells if cell in self._done)

    def keep(self, result: CellResult) -> str:
        """Write a finished cell down; returns a line that says so."""
        self._done[result.cell] = result
        with self._file.open("a") as file:
            file.write(result.to_json() + "\n")
        metric = main_metric(result.cell.which.goal, list(result.figures))
        figure = result.figures.get(metric)
        said = "nothing to score" if figure is None else f"{metric} {figure.value:.3f} (chance {figure.chance:.3f})"
        return f"{len(self._done)}/{len(self.cells)}  {result.cell.name}  {said}  {result.seconds:.1f} s"
