"""`vflair bench`: run a matrix of settings, defences and seeds as a Flower job, and rank the defences."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from vflair_flower.errors import ConfigurationError, VflairError
from vflair_flower.project import project_root, run_job


def bench(
    matrix: Annotated[Path, typer.Argument(help="A matrix file (docs/benchmark.md).")],
    cells_at_once: Annotated[int, typer.Option(help="Nodes that train and attack.")] = 1,
    gpus_per_cell: Annotated[float, typer.Option(help="0.5: two cells at once on each GPU.")] = 0.0,
    resume: Annotated[str, typer.Option(help="Id of a run that broke off: what is missing is run.")] = "",
    rank: Annotated[Path | None, typer.Option(help="Folder of a run: rank what it has, and run nothing.")] = None,
) -> None:
    """Train and attack every cell of a matrix, then write results.jsonl and a leaderboard."""
    try:
        if rank is not None:
            _rank(matrix, rank)
            return
        project_root()
        from vflair_flower.benchmark import Matrix

        Matrix.read(matrix)
    except VflairError as error:
        typer.secho(str(error), err=True, fg=typer.colors.RED)
        raise typer.Exit(2) from None
    keys = {
        "job": "bench",
        "bench-matrix": str(matrix.resolve()),
        "bench-cells-at-once": cells_at_once,
        "bench-gpus-per-cell": float(gpus_per_cell),
        "resume": resume,
    }
    raise typer.Exit(run_job(keys))


def _rank(matrix: Path, folder: Path) -> None:
    from vflair_flower.benchmark import Matrix
    from vflair_flower.benchmark.page import TABLE, write_leaderboard
    from vflair_flower.benchmark.results import BenchBook

    read = Matrix.read(matrix)
    book = BenchBook(folder, read.cells, read.about)
    if not book.results:
        raise ConfigurationError(f"{folder} has no finished cell of {matrix}. Name the folder of a run of this matrix.")
    page = write_leaderboard(folder, read, book.results)
    console = Console()
    console.print(Markdown((folder / TABLE).read_text()))
    console.print(f"Leaderboard  {page}", soft_wrap=True)
