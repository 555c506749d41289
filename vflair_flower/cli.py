"""The command line `vflair`: plan a job before anything runs, rebuild the report of one that has run."""

from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from vflair_flower.errors import VflairError

app = typer.Typer(help="Split learning of large language models on Flower.", no_args_is_help=True, add_completion=False)
_console = Console()


@app.callback()
def _group() -> None:
    """Split learning of large language models on Flower."""


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="A local folder, a hub id, or minilm-l6.")] = "minilm-l6",
    mode: Annotated[str, typer.Option(help="HBT (Head-Body-Tail) or HT (Head-Tail).")] = "HBT",
    head: Annotated[int, typer.Option(help="First blocks that stay with the data party.")] = 1,
    tail: Annotated[int, typer.Option(help="Last blocks that stay with the data party; 0 in HT.")] = 1,
    parties: Annotated[int, typer.Option(help="Data parties.")] = 4,
    task: Annotated[str, typer.Option(help="sequence-classification or causal-lm.")] = "sequence-classification",
    classes: Annotated[int, typer.Option(help="Classes of the task.")] = 2,
    lora_rank: Annotated[int, typer.Option(help="0 trains all parameters.")] = 8,
    batch_size: Annotated[int, typer.Option(help="Rows per party and step.")] = 8,
    max_tokens: Annotated[int, typer.Option(help="Tokens per row, at most.")] = 64,
    wire_dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Show who will hold what, its memory and the bytes per step, before anything is loaded or run."""
    from vflair_flower.partition import PartitionPlan, resolve_model
    from vflair_flower.partition.footprint import footprint
    from vflair_flower.partition.plan import parse_mode
    from vflair_flower.settings import LoraSettings, TaskKind, TaskSettings, TrainingSettings, one_of
    from vflair_flower.spec import SplitSpec

    try:
        one_of("task", task, tuple(TaskKind))
        if parties < 1:
            typer.secho(f"parties is {parties}; a job needs at least one.", err=True, fg=typer.colors.RED)
            raise typer.Exit(1)
        kind = TaskKind(task)
        labels = tuple(f"class {i}" for i in range(classes)) if kind is TaskKind.SEQUENCE_CLASSIFICATION else ()
        spec = SplitSpec(
            model=model,
            plan=PartitionPlan(mode=parse_mode(mode), head_blocks=head, tail_blocks=tail),
            task=TaskSettings(kind=kind, label_names=labels),
            tuning=LoraSettings(rank=lora_rank) if lora_rank else None,
            training=TrainingSettings(batch_size=batch_size, max_tokens=max_tokens),
            wire_dtype=wire_dtype,
        )
        numbers = footprint(resolve_model(model), spec)
    except VflairError as error:
        _fail(error)
    title = f"{numbers.model} ({numbers.family}, {numbers.num_blocks} blocks), {spec.plan.mode}"
    table = Table("", f"each of {parties} data parties", "model party", title=title)
    shares = (numbers.data_party, numbers.model_party)
    table.add_row("owns", *(share.owns for share in shares))
    table.add_row("parameters", *(f"{share.parameters:,}" for share in shares))
    table.add_row("of the model", *(f"{share.parameters / numbers.whole_parameters:.0%}" for share in shares))
    table.add_row("trained", *(f"{share.trained:,}" for share in shares))
    table.add_row("weights", *(_size(share.parameter_bytes) for share in shares))
    table.add_row("gradients + optimiser", *(_size(share.training_bytes) for share in shares))
    _console.print(table)
    up, down = numbers.up_bytes_per_step, numbers.down_bytes_per_step
    _console.print(
        f"Per party and step, at most ({batch_size} rows of {max_tokens} tokens, {wire_dtype}): "
        f"{_size(up)} up, {_size(down)} down; all {parties} parties: {_size(parties * (up + down))}."
    )
    _console.print("Activations come on top and are measured in a run. Adapters travel once per round and party.")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, such as runs/latest.")],
) -> None:
    """Rebuild the report of a run from its result.json."""
    from vflair_flower.report import Result, build_report, summary_lines

    try:
        page = build_report(run)
        lines = summary_lines(Result.read(run / "result.json"), report=page)
    except VflairError as error:
        _fail(error)
    for line in lines:
        typer.echo(line)


def _fail(error: VflairError) -> NoReturn:
    typer.secho(str(error), err=True, fg=typer.colors.RED)
    raise typer.Exit(1)


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


if __name__ == "__main__":
    app()
