"""`vflair advise`: from what a company has and accepts to a job file, with the evidence."""

import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vflair_flower.errors import ConfigurationError, VflairError
from vflair_flower.project import run_job

if TYPE_CHECKING:
    from vflair_flower.advise import Advice, Candidate, Company, Evidence

_ERRORS = Console(stderr=True)
_MEASURED_CUTS = 2


def advise(
    company: Annotated[Path, typer.Argument(help="A TOML file that describes the company (docs/advise.md).")],
    results: Annotated[
        list[Path] | None, typer.Option(help="results.jsonl of a benchmark; repeatable. By default the project's own.")
    ] = None,
    measure: Annotated[
        str, typer.Option(help="Defences to measure at the cheapest cuts that fit, with blanks between; or 'none'.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Write the proposed job here, for --run-config.")] = None,
) -> None:
    """Propose a cut, a tuning, a codec and a defence; exits with 1 if nothing measured keeps all limits."""
    from vflair_flower.advise import Company, candidates, read_evidence
    from vflair_flower.advise import advise as search
    from vflair_flower.partition import resolve_model

    try:
        about = Company.read(company)
        source = resolve_model(about.model)
        files = list(results or _own_results())
        with _ERRORS.status("working out memory and bytes of every cut"):
            found = list(candidates(about, source))
        evidence = read_evidence(files)
        if measure:
            evidence += _measured(about, found, measure)
        advice = search(about, found, evidence)
        _show(advice, out)
    except VflairError as error:
        typer.secho(str(error), err=True, fg=typer.colors.RED)
        raise typer.Exit(2) from None
    if not advice.within:
        raise typer.Exit(1)


def _show(advice: "Advice", out: Path | None) -> None:
    for line in advice.lines():
        typer.echo(line)
    if out is not None:
        out.write_text(advice.job_file())
        typer.echo(f"\nJob      {out}   (make run CONFIG={out}, or flwr run . --run-config {out})")


def _own_results() -> list[Path]:
    """Return the results that the project's documentation shows, where the project is here."""
    file = Path(__file__).resolve().parents[1] / "docs" / "benchmark" / "results.jsonl"
    return [file] if file.is_file() else []


def _measured(company: "Company", found: "list[Candidate]", defences: str) -> "list[Evidence]":
    """Run a small matrix at the cheapest cuts that fit, and read what it gave; the run stays in ``runs``."""
    from vflair_flower.advise import read_evidence
    from vflair_flower.benchmark.page import RESULTS

    fit = sorted((one for one in found if not one.unfit(company)), key=lambda one: one.step_seconds)
    if not fit:
        raise ConfigurationError(
            f"no way to run the job fits the means of {company.name!r}, so there is nothing to measure. Give more "
            "memory, a faster link, or more time per step."
        )
    cuts = list({(one.plan.mode, one.plan.head_blocks): one for one in reversed(fit)}.values())[-_MEASURED_CUTS:]
    runs, run_id = Path.cwd() / "runs", f"advise-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    with tempfile.TemporaryDirectory(prefix="vflair-advise-") as folder:
        matrix = Path(folder) / "measure.toml"
        matrix.write_text(_matrix(company, cuts, defences))
        if run_job({"job": "bench", "bench-matrix": str(matrix), "runs": str(runs), "run-id": run_id}):
            raise ConfigurationError("measuring failed; what went wrong stands above. Correct the company's data.")
    return read_evidence([runs / run_id / RESULTS])


def _matrix(company: "Company", cuts: "list[Candidate]", defences: str) -> str:
    """Return a matrix of cuts and defences, one seed, few rows."""
    lines = ["seeds = [0]", 'attacks = "vmi:steps=40,choices=1 sip norm-scoring direction-scoring"', "audit-rows = 16"]
    for one in cuts:
        lines += ["", "[[settings]]", f"name = {json.dumps(one.cut)}"]
        job = one.to_job(company, "")
        lines += [f"{key} = {json.dumps(value)}" for key, value in job.items() if key != "defences"]
        lines += [f"{key} = {value}" for key, value in _SHORT.items()]
    for text in defences.split():
        if text != "none":
            lines += ["", "[[defences]]", f'name = "{text.partition(":")[0]}"', f"sweep = [{json.dumps(text)}]"]
    return "\n".join(lines) + "\n"


_SHORT = {"rounds": 1, "local-steps": 40}
