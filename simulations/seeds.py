"""`make seeds`: the main job over several seeds, and what they have in common: means with 95 % intervals.

Each seed is a whole run of its own (deal of the rows, initialisation, batch order); nothing is shared but the settings.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from simulations.launch import ROOT, read_settings
from simulations.settings import JobSettings, new_run_id
from vflair_flower.report import Result
from vflair_flower.tasks import Interval, seed_interval


def main(
    seeds: Annotated[str, typer.Option(help="Seeds, separated by blanks.")] = "0 1 2",
    run_config: Annotated[list[str] | None, typer.Option(help="As for `make run`.")] = None,
) -> None:
    """Run the job once per seed, then print and write the summary."""
    numbers = [int(seed) for seed in seeds.split()]
    if len(numbers) < 2:
        raise typer.BadParameter(f"seeds is {seeds!r}; an interval over seeds needs two or more.")
    settings = read_settings(run_config or [])
    if not isinstance(settings, JobSettings):
        raise typer.BadParameter("the PC-MoE job has several seeds in one run: set moe-seeds.")
    runs = (Path(settings.base_dir or Path.cwd()) / settings.runs).resolve()
    name = settings.run_id or f"seeds-{new_run_id()}"
    results = []
    for seed in numbers:
        own = f'seed={seed} run-id="{name}-{seed}"'
        command = [sys.executable, "-m", "simulations.launch"]
        command += [part for config in [*(run_config or []), own] for part in ("--run-config", config)]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            typer.secho(f"seed {seed} failed; see above.", err=True, fg=typer.colors.RED)
            raise typer.Exit(1)
        results.append(Result.read(runs / f"{name}-{seed}" / "result.json"))
    summary = summarise(results)
    path = runs / f"{name}.json"
    path.write_text(json.dumps(summary, indent=2))
    _show(results, summary)
    typer.echo(f"Written to {path}")


def summarise(results: list[Result]) -> dict[str, object]:
    """Return figures per seed, and means with Student's t intervals over the seeds."""
    figures: dict[str, object] = {
        "data": results[0].data.name,
        "partition": results[0].data.partition,
        "evaluated_on": results[0].data.evaluated_on,
        "n": results[0].metric.n,
        "seeds": [result.seed for result in results],
        "majority": [result.metric.majority for result in results],
        "split": [result.metric.split for result in results],
        "split_mean": _interval(seed_interval([result.metric.split for result in results])),
    }
    pairs = [(r.metric.unsplit, r.metric.difference) for r in results if r.metric.unsplit is not None]
    if len(pairs) == len(results):
        unsplit = [float(whole) for whole, _ in pairs if whole is not None]
        difference = [float(gap) for _, gap in pairs if gap is not None]
        figures |= {
            "unsplit": unsplit,
            "unsplit_mean": _interval(seed_interval(unsplit)),
            "difference": difference,
            "difference_mean": _interval(seed_interval(difference)),
        }
    return figures


def _interval(found: Interval) -> dict[str, float]:
    return {"mean": found.estimate, "low": found.low, "high": found.high}


def _show(results: list[Result], summary: dict[str, object]) -> None:
    table = Table("seed", "split", "unsplit", "difference", "majority", title=f"{summary['data']}, {summary['n']} rows")
    for result in results:
        metric = result.metric
        unsplit = "" if metric.unsplit is None else f"{metric.unsplit:.2%}"
        gap = "" if metric.difference is None else f"{100 * metric.difference:+.2f} points"
        table.add_row(str(result.seed), f"{metric.split:.2%}", unsplit, gap, f"{metric.majority:.2%}")
    means = [summary.get(f"{name}_mean") for name in ("split", "unsplit", "difference")]
    table.add_row("mean", *(_words(mean) for mean in means), "")
    Console().print(table)


def _words(mean: object) -> str:
    if not isinstance(mean, dict):
        return ""
    return f"{100 * mean['mean']:.2f} ({100 * mean['low']:.2f} to {100 * mean['high']:.2f})"


if __name__ == "__main__":
    typer.run(main)
