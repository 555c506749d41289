"""One cell: the main job with one defence and seed, in this process, and then all attacks of the matrix on it."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from simulations.in_process import run_main_job
from simulations.settings import JobSettings
from vflair_flower.audit import CellResult, Subject, cells_of, run_cell
from vflair_flower.benchmark import AttackFigure, BenchCell, BenchResult, Matrix
from vflair_flower.errors import ConfigurationError
from vflair_flower.partition import resolve_model
from vflair_flower.report import Result

_JOB = "cell"
_SAID = ("data", "task", "model", "parties", "mode", "head-blocks", "tail-blocks", "lora-rank", "quantization")
"""Keys that a result says, whether or not the matrix does."""


def job_config(cell: BenchCell, matrix: Matrix, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run configuration of a cell's job; noise is repeatable, as the whole cell is."""
    own = {"defences": cell.defences, "defence-seed": cell.seed + 1, "seed": cell.seed}
    fixed = {"job": "split", "run-id": _JOB, "resume": "", "unsplit": False, "audit": "", "hub-bind": "inproc"}
    return {**defaults, **matrix.settings[cell.setting], **fixed, **own}


def check_matrix(matrix: Matrix, defaults: Mapping[str, Any]) -> None:
    """Find what is wrong with the settings of all cells before anything is trained; raises ConfigurationError."""
    unknown = sorted({key for keys in matrix.settings.values() for key in keys} - set(defaults))
    if unknown:
        raise ConfigurationError(
            f"the matrix {matrix.name!r} sets {unknown[0]!r}, which is no key of the main job. Correct the name."
        )
    for cell in matrix.cells:
        settings = JobSettings.from_run_config(job_config(cell, matrix, defaults))
        resolve_model(settings.model, settings.base)


def run_bench_cell(cell: BenchCell, matrix: Matrix, defaults: Mapping[str, Any], *, threads: int = 1) -> BenchResult:
    """Train a cell's job and attack it.

    Parameters
    ----------
    cell, matrix
        What is run.
    defaults : mapping
        The main job's run configuration, where the matrix says nothing else.
    threads : int
        CPU threads.
    """
    torch.set_num_threads(threads)
    work_dir = Path(tempfile.mkdtemp(prefix="vflair-bench-"))
    try:
        config = {**job_config(cell, matrix, defaults), "runs": str(work_dir), "threads": 0, "body-threads": 0}
        run_main_job(config)
        folder = work_dir / _JOB
        result = Result.read(folder / "result.json")
        subject = Subject(run=str(folder), rows=matrix.audit_rows, auxiliary_rows=matrix.auxiliary)
        figures: list[AttackFigure] = []
        failed: dict[str, str] = {}
        for one in cells_of(matrix.grid, subject):
            try:
                found = run_cell(one, subject)
            except Exception as error:  # whatever an attack raises, the others shall run
                failed[one.attack] = f"{type(error).__name__}: {error}"
                continue
            if found.figure is not None:
                figures.append(_figure(found))
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)
    return BenchResult(
        cell=cell,
        mp=result.metric.split,
        metric=result.metric.name,
        rows=result.metric.n,
        attacks=tuple(figures),
        failed=failed,
        seconds=result.duration_s,
        sent_bytes=result.traffic.total_bytes,
        settings={key: config[key] for key in sorted({*_SAID, *matrix.settings[cell.setting]})},
    )


def _figure(found: CellResult) -> AttackFigure:
    figure = found.figure
    assert figure is not None
    return AttackFigure(
        attack=found.cell.attack,
        adversary=found.cell.adversary,
        cut=found.cell.cut,
        knowledge=found.cell.knowledge,
        goal=found.cell.which.goal.value,
        metric=found.metric,
        value=figure.value,
        low=figure.low,
        high=figure.high,
        chance=figure.chance,
        n=found.n,
        seconds=found.seconds,
    )
