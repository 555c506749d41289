"""The unsplit baseline: the whole model, trained in one place on the joined rows for the same number of passes.

It starts from the very same parameters (drawn by global name), runs the same loop with the same settings, and takes at
every step the batch that the batches of evenly dealt parties make together.  How the job's own rows are skewed makes no
difference to it.  It exists to be compared with; in a deployment nobody could run it.
"""

import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from logging import INFO

import torch
from flwr.common.logger import log

from simulations.rows import JobData
from simulations.settings import JobSettings
from vflair_flower.memory import ActivationMeter
from vflair_flower.partition import (
    Segment,
    checkpoint_blocks,
    freeze_part,
    load_config,
    load_segment,
    load_tokenizer,
    make_trainable,
    resolve_model,
)
from vflair_flower.partition.ranks import RankBudget
from vflair_flower.partition.structure import num_blocks
from vflair_flower.settings import TrainingSettings
from vflair_flower.spec import SplitSpec
from vflair_flower.tasks import BatchOrder, DealSettings, Encoded, Example, deal, encode_task
from vflair_flower.training import Evaluated, evaluate, train_steps


@dataclass(frozen=True, kw_only=True)
class UnsplitRound:
    """One round's worth of the baseline's training."""

    loss: float
    score: float


@dataclass(frozen=True, kw_only=True)
class Unsplit:
    """What the baseline reached."""

    rounds: tuple[UnsplitRound, ...]
    final: Evaluated
    seconds: float


class JoinedOrder:
    """Which of the joined rows are in a step: those that every party's own order takes, one party after another.

    Parameters
    ----------
    sizes : list[int]
        Rows, or windows, of each party.
    joined : sequence of Encoded
        Party 0's rows (of long contexts, their windows), then party 1's, and so on.
    training, seed
        As of the parties' own orders.
    """

    def __init__(self, sizes: list[int], joined: Sequence[Encoded], training: TrainingSettings, seed: int) -> None:
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]
        lengths = [len(row.input_ids) for row in joined]
        self._orders = [
            BatchOrder(
                num_rows=size,
                batch_size=training.batch_size,
                seed=seed,
                party=f"party-{i}",
                lengths=tuple(lengths[start : start + size]) if training.group_by_length else (),
            )
            for i, (start, size) in enumerate(zip(self._starts, sizes, strict=True))
        ]

    def indices(self, step: int) -> list[int]:
        """Return the rows of a step."""
        pairs = zip(self._starts, self._orders, strict=True)
        return [start + i for start, order in pairs for i in order.indices(step)]


def train_unsplit(settings: JobSettings, spec: SplitSpec, data: JobData, *, final_split: str) -> Unsplit:
    """Train and evaluate the baseline; `final_split` names the rows of the final figure."""
    torch.set_num_threads(os.cpu_count() or 1)
    started, training = time.monotonic(), spec.training
    source = resolve_model(spec.model, settings.base)
    blocks = num_blocks(load_config(source, spec.task))
    weights = spec.weights
    loaded = load_segment(source, Segment.whole(blocks), spec.task, weights=weights, seed=spec.seed)
    model = make_trainable(loaded, spec.tuning, spec.task, seed=spec.seed)
    if spec.scope == "local":
        freeze_part(loaded.model, spec.plan.model_party(blocks))
    if training.gradient_checkpointing:
        checkpoint_blocks(loaded)
    tokenizer = load_tokenizer(source)
    pad = int(tokenizer.pad_token_id)
    dealt = deal(data.splits["train"], settings.parties, DealSettings(kind="iid", seed=settings.seed))
    kind = spec.task.kind

    def encoded(rows: Sequence[Example]) -> list[Encoded]:
        return list(encode_task(kind, rows, tokenizer, max_tokens=training.max_tokens))

    def measured(rows: Sequence[Example]) -> Evaluated:
        size = training.evaluation_batch_size
        return evaluate(model, encoded(rows), kind=kind, rows=rows, batch_size=size, pad_token_id=pad)

    parts = [encoded(rows) for rows in dealt]
    joined = [row for part in parts for row in part]
    order = JoinedOrder([len(part) for part in parts], joined, training, spec.seed)
    total = training.total_steps(max(len(part) for part in parts))
    trained_parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = spec.optimizer.build(trained_parameters)
    ranks, counted = RankBudget.of(model), itertools.count()

    def before_step(*_: object) -> None:
        if spec.optimizer.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained_parameters, spec.optimizer.max_grad_norm)
        if ranks is not None:
            ranks.add_penalty()

    def after_step(*_: object) -> None:
        if ranks is not None:
            ranks.after_step(next(counted), total)

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)
    meter = ActivationMeter(model)
    rounds = []
    for index in range(training.rounds):
        model.train()
        trained = train_steps(
            model,
            joined,
            kind=kind,
            steps=range(total * index // training.rounds, total * (index + 1) // training.rounds),
            total_steps=total,
            order=order,
            optimizer=optimizer,
            settings=spec.optimizer,
            pad_token_id=pad,
            seed=spec.seed,
            name="joined",
            meter=meter,
            micro_batch_size=training.micro_batch_size or training.batch_size,
        )
        held_out = measured(data.splits["validation"])
        rounds.append(UnsplitRound(loss=trained.loss, score=held_out.score))
        figures = (index + 1, training.rounds, trained.loss, held_out.metric, held_out.score)
        log(INFO, "unsplit %d/%d  loss %.3f  %s %.3f", *figures)
    return Unsplit(rounds=tuple(rounds), final=measured(data.splits[final_split]), seconds=time.monotonic() - started)
