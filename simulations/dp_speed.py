"""What DP-SGD costs per step: `python -m simulations.dp_speed`.

A data party and a model party in one process, joined by a real hub; each step is a batch's forward and backward pass
through the cut and both parties' optimiser steps.  The same rows, the same number of them, with DP and without, in
turns, so that whatever else the machine does falls on both.  Where other work loads the machine, the ratio of CPU time
is the one to read.  Noise, clipping and the account are in the measured time; the oracle, once per session, is not.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from vflair_flower.dp_settings import DpSettings
from vflair_flower.errors import ConfigurationError
from vflair_flower.partition import PartitionPlan, load_config, load_segment, make_trainable, resolve_model
from vflair_flower.partition.structure import num_blocks
from vflair_flower.privacy import Secret, Shield
from vflair_flower.privacy.dpsgd import Accountant, PrivateTraining, StandIn
from vflair_flower.remote import MODEL_PARTY, BodyMode, RemoteSegment, SegmentServer, agreement_for
from vflair_flower.session import Hub
from vflair_flower.settings import LoraSettings, TaskKind, TaskSettings, TrainingSettings
from vflair_flower.spec import SplitSpec
from vflair_flower.tasks import Encoded, EncodedRow, collate
from vflair_flower.training.row_losses import losses_per_row

_PARTY, _DEADLINE_S, _CLASSES, _NUM_ROWS = "party-0", 120.0, 3, 512


@dataclass
class Side:
    """A data party in an open session, with DP or without."""

    spec: SplitSpec
    model: nn.Module
    remote: RemoteSegment
    optimizer: torch.optim.Optimizer
    private: PrivateTraining | None

    def step(self, rows: list[Encoded]) -> None:
        """Take one step of both parties on these very rows."""
        if self.private is not None:
            self.private.expect_drawn(len(rows))
        batch = collate(rows, pad_token_id=0)
        output = self.model(**batch.inputs)
        if self.private is None:
            output.loss.backward()
        else:
            self.private.backward(losses_per_row(output, batch.inputs, self.spec.task.kind))
            self.private.release()
            self.remote.rows_since_step = self.private.expected_rows
        self.optimizer.step()
        self.remote.step(step=0, total_steps=0)
        self.optimizer.zero_grad(set_to_none=True)


def main(
    model: Annotated[str, typer.Option(help="A model's name or folder.")] = "minilm-l6",
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens per row.")] = 32,
    rank: Annotated[int, typer.Option(help="Of LoRA; 0 trains all parameters.")] = 8,
    steps: Annotated[int, typer.Option(help="Per turn and side.")] = 5,
    turns: Annotated[int, typer.Option(help="How often the two sides take turns.")] = 6,
    threads: Annotated[int, typer.Option(help="Threads to compute with.")] = 2,
) -> None:
    """Compare a step of LoRA under DP-SGD with one without."""
    for name, value in (("batch_size", batch_size), ("tokens", tokens), ("steps", steps), ("turns", turns)):
        if value < 1:
            raise ConfigurationError(f"{name} is {value}, and at least 1 is needed. Raise it.")
    torch.set_num_threads(threads)
    spec = SplitSpec(
        model=model,
        plan=PartitionPlan(head_blocks=1, tail_blocks=1),
        task=TaskSettings(
            kind=TaskKind.SEQUENCE_CLASSIFICATION, label_names=tuple(f"class {i}" for i in range(_CLASSES))
        ),
        tuning=LoraSettings(rank=rank) if rank else None,
        training=TrainingSettings(batch_size=batch_size, max_tokens=tokens),
    )
    privately = replace(spec, privacy=DpSettings(noise_multiplier=1.0, delta=1e-4))
    rows = _rows(spec, tokens)
    generator = torch.Generator().manual_seed(1)
    took: dict[str, list[tuple[float, float]]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        account = Path(folder) / "dp-sgd.json"
        sides = {
            "without": stack.enter_context(_side(spec, rows, account)),
            "with": stack.enter_context(_side(privately, rows, account)),
        }
        for turn in range(turns + 1):
            chosen = [torch.randperm(len(rows), generator=generator)[:batch_size].tolist() for _ in range(steps)]
            order = list(sides) if turn % 2 else list(reversed(sides))
            for name in order:
                began, began_cpu = time.perf_counter(), time.process_time()
                for one in chosen:
                    sides[name].step([rows[i] for i in one])
                seconds = (time.perf_counter() - began, time.process_time() - began_cpu)
                if turn:  # the first one warms up
                    took[name].append((seconds[0] / steps, seconds[1] / steps))
    _print(took, spec, turns)


def _print(took: dict[str, list[tuple[float, float]]], spec: SplitSpec, turns: int) -> None:
    what = f"LoRA r={spec.tuning.rank}" if spec.tuning else "all parameters"
    table = Table("", "without DP, ms", "with DP, ms", "ratio (median of pairs)", "lowest", "highest")
    for index, name in enumerate(("wall clock", "CPU time")):
        pairs = [(a[index], b[index]) for a, b in zip(took["without"], took["with"], strict=True)]
        ratios = sorted(b / a for a, b in pairs)
        middle = [statistics.median(one) * 1000 for one in zip(*pairs, strict=True)]
        table.add_row(
            name,
            *(f"{one:.1f}" for one in middle),
            f"{statistics.median(ratios):.3f}",
            f"{ratios[0]:.3f}",
            f"{ratios[-1]:.3f}",
        )
    console = Console()
    training = spec.training
    console.print(
        f"{spec.model}, {what}, {training.batch_size} x {training.max_tokens} tokens, {turns} pairs in turns, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    console.print(table)


@contextmanager
def _side(spec: SplitSpec, rows: list[Encoded], account: Path) -> Iterator[Side]:
    source = resolve_model(spec.model)
    blocks = num_blocks(load_config(source, spec.task))
    own = load_segment(source, spec.plan.data_party(blocks), spec.task, seed=spec.seed)
    body = load_segment(source, spec.plan.model_party(blocks), spec.task, seed=spec.seed)
    model = make_trainable(own, spec.tuning, spec.task, seed=spec.seed).train()
    server = SegmentServer(body, spec, body_mode=BodyMode.SYNCHRONOUS, deadline_s=_DEADLINE_S)
    agreement = agreement_for(spec, own.model.config)
    with (
        Hub(bind="inproc") as hub,
        hub.open_session([_PARTY], agreement, hosts={MODEL_PARTY: server}, deadline_s=_DEADLINE_S) as session,
    ):
        server.begin([_PARTY], server_round=1, training=True)
        with hub.connect(session, _PARTY) as link:
            remote = RemoteSegment(link, spec, shield=Shield())
            private = None
            if spec.privacy is not None:
                private = PrivateTraining(
                    model,
                    spec.privacy,
                    accountant=Accountant(spec.privacy, account),
                    secret=Secret.fresh(),
                    occasion="speed",
                    body_trained=True,
                )

                def loss_of(some: object) -> torch.Tensor:
                    batch = collate(list(some), pad_token_id=0)  # type: ignore[call-overload]
                    with own.channel.joined(StandIn(spec, own.model.config)):
                        return losses_per_row(model(**batch.inputs), batch.inputs, spec.task.kind)

                private.begin(rows, batch_size=spec.training.batch_size, total_steps=1000, loss_of=loss_of)
                remote.privacy = private
            optimizer = spec.optimizer.build([p for p in model.parameters() if p.requires_grad])
            with own.channel.joined(remote):
                yield Side(spec, model, remote, optimizer, private)


def _rows(spec: SplitSpec, tokens: int) -> list[Encoded]:
    """Make up rows of random tokens: time does not depend on which they are."""
    vocabulary = int(load_config(resolve_model(spec.model), spec.task).get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids_NT = torch.randint(5, vocabulary, (_NUM_ROWS, tokens), generator=generator).tolist()
    return [EncodedRow(tuple(ids), i % _CLASSES, f"row-{i}") for i, ids in enumerate(ids_NT)]


if __name__ == "__main__":
    typer.run(main)
