"""How much faster model inversion is when all rows are optimised at once: `python -m simulations.attack_speed`.

Both sides run in one process with the same model, rows, steps and threads, in turns, without early stop, and every row
is run on both sides: nothing is scaled up.  Where other work loads the machine, the ratio of CPU time is the one to
read (on a GPU it means nothing).  Every place takes its nearest token, without a choice.  The rows are random tokens:
time does not depend on which they are.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from vflair_flower.attacks import (
    Exchange,
    HeadKnowledge,
    Knowledge,
    SplitView,
    Surrogate,
    find_attack,
    random_checkpoint,
    run_attack,
)
from vflair_flower.errors import ConfigurationError
from vflair_flower.partition import ModelSource, PartitionPlan, resolve_model
from vflair_flower.settings import TaskKind, TaskSettings

TINY = "tiny-llama"
_MIB = 2**20


def main(
    rows: Annotated[int, typer.Option(help="Samples.")] = 100,
    steps: Annotated[int, typer.Option(help="Steps of the optimiser for each.")] = 100,
    tokens: Annotated[int, typer.Option(help="Tokens of each sample.")] = 16,
    turns: Annotated[
        int, typer.Option(help="How often the two sides take turns; each turn has its share of rows.")
    ] = 2,
    threads: Annotated[int, typer.Option(help="Threads to compute with.")] = 1,
    model: Annotated[
        list[str] | None, typer.Option(help=f"A model's name or folder, or {TINY!r}; may be given again.")
    ] = None,
) -> None:
    """Compare 100 samples at once with one sample at a time."""
    for name, value in (("rows", rows), ("steps", steps), ("tokens", tokens), ("turns", turns), ("threads", threads)):
        if value < 1:
            raise ConfigurationError(f"{name} is {value}, and at least 1 is needed. Raise it.")
    if turns > rows:
        raise ConfigurationError(f"turns is {turns} with {rows} rows; a turn would have no row. Lower it.")
    torch.set_num_threads(threads)
    columns = ("model", "at once, s", "one by one, s", "ratio", "ratio of CPU time", "memory at once", "one by one")
    table = Table(*columns)
    for name in model or [TINY, "minilm-l6"]:
        with source_of(name) as source:
            together, alone = compare(source, task_of(name), rows=rows, steps=steps, tokens=tokens, turns=turns)
        at_once, one_by_one = together.seconds / turns, alone.seconds
        cpu_ratio = alone.cpu_seconds / together.cpu_seconds * turns
        cells = (f"{at_once:.2f}", f"{one_by_one:.2f}", f"{one_by_one / at_once:.1f}", f"{cpu_ratio:.1f}")
        table.add_row(name, *cells, *(f"{one.memory_bytes / _MIB:.0f} MiB" for one in (together, alone)))
    table.title = f"{rows} samples of {tokens} tokens, {steps} steps, {threads} threads, {_device()}"
    Console().print(table)


@dataclass(kw_only=True)
class Side:
    """What one side took, over all its turns."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory_bytes: int = 0


def compare(
    source: ModelSource, task: TaskSettings, *, rows: int, steps: int, tokens: int, turns: int
) -> tuple[Side, Side]:
    """Run both sides in turns.

    Parameters
    ----------
    source, task
        The model, cut after its first block.
    rows, steps, tokens : int
        Samples, steps for each, and tokens of each.
    turns : int
        Every turn runs all rows at once, and then its share of the rows one by one.

    Returns
    -------
    Side
        All rows at once, once for each turn.
    Side
        One by one, all rows once.
    """
    plan = PartitionPlan(head_blocks=1, tail_blocks=1)
    knows = Knowledge(head=HeadKnowledge.EXACT, surrogate=Surrogate(source, plan, task, device=_device()))
    vocabulary = len(knows.surrogate.embedding)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(vocabulary, (rows, tokens), generator=generator).to(knows.surrogate.device)
    with torch.no_grad():
        hidden_BTD = knows.surrogate.head_of_ids(ids_BT, torch.ones_like(ids_BT)).cpu()
    exchange = Exchange(party="victim", hidden_BTD=hidden_BTD, attention_mask_BT=torch.ones(rows, tokens).long())

    def run(side: Side, places: slice, batch_rows: int, steps: int = steps) -> None:
        part = Exchange(
            party=exchange.party,
            hidden_BTD=exchange.hidden_BTD[places],
            attention_mask_BT=exchange.attention_mask_BT[places],
        )
        view = SplitView(plan=plan, num_blocks=knows.surrogate.num_blocks, task=task, exchanges=(part,))
        settings = {"steps": steps, "batch_rows": batch_rows, "tolerance": 0.0, "choices": 1}
        cpu_before = time.process_time()
        attempt = run_attack(find_attack("vmi"), view, knows, settings=settings)
        side.cpu_seconds += time.process_time() - cpu_before
        side.seconds += attempt.seconds
        side.memory_bytes = max(side.memory_bytes, attempt.memory_bytes)

    run(Side(), slice(0, 2), 2, 2)  # the first call of everything is slow
    together, alone = Side(), Side()
    for turn in range(turns):
        run(together, slice(0, rows), rows)
        run(alone, slice(turn * rows // turns, (turn + 1) * rows // turns), 1)
    return together, alone


@contextmanager
def source_of(name: str) -> Iterator[ModelSource]:
    """Give a model by its name or folder; the tiny one is made here, with random weights."""
    if name != TINY:
        yield resolve_model(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
        )
        config.save_pretrained(folder)
        with random_checkpoint(ModelSource(name=TINY, location=folder), task_of(TINY), seed=0) as source:
            yield source


def task_of(name: str) -> TaskSettings:
    """Return what a model is run as."""
    if name == "minilm-l6":
        return TaskSettings(label_names=("negative", "positive"))
    return TaskSettings(kind=TaskKind.CAUSAL_LM)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    typer.run(main)
