"""One training loop for all: a data party's model with holes and the unsplit baseline run these very lines.

B rows per batch, T tokens, C classes.  Steps count over the whole job.
Invariant: batches, learning rate and dropout depend on (seed, name, step) alone; a resumed run repeats itself.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from vflair_flower.memory import ActivationMeter
from vflair_flower.settings import OptimizerSettings
from vflair_flower.tasks import EncodedRow, collate


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What some training steps gave: the mean loss per row and the number of rows."""

    loss: float
    rows: int


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What an evaluation gave: the mean loss per row and, for each row in order, whether it was right."""

    loss: float
    correct: tuple[bool, ...]

    @property
    def accuracy(self) -> float:
        """The share of rows that were right."""
        return sum(self.correct) / len(self.correct)


class Order(Protocol):
    """Chooses the rows of each step, as `vflair_flower.tasks.BatchOrder` does."""

    def indices(self, step: int) -> list[int]:
        """Return the indices of a step's rows; a pure function of the step."""


def train_steps(
    model: nn.Module,
    encoded: Sequence[EncodedRow],
    *,
    steps: range,
    total_steps: int,
    order: Order,
    optimizer: torch.optim.Optimizer,
    settings: OptimizerSettings,
    pad_token_id: int,
    seed: int,
    name: str,
    meter: ActivationMeter,
    micro_batch_size: int | None = None,
) -> Trained:
    """Take optimiser steps.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers classifier, in training mode.
    encoded : sequence of EncodedRow
        The rows that `order` chooses from.
    steps : range
        Which steps of the job's `total_steps`.
    order : Order
        Chooses each step's rows.
    optimizer, settings
        The optimiser, and the schedule of its rate.
    pad_token_id : int
        Fills rows up to the longest of their batch.
    seed, name
        Dropout's randomness depends on them and the step.
    meter : ActivationMeter
        Measures what the forward passes keep.
    micro_batch_size : int, optional
        Rows per forward pass: a step's rows are then taken in portions of like length, whose gradients add up to the
        step's.  By default a step is one forward pass.
    """
    total, rows = 0.0, 0
    for step in steps:
        batch = [encoded[i] for i in order.indices(step)]
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step, total_steps)
        _seed_dropout(seed, name, step)
        for portion in _portions(batch, micro_batch_size):
            made = collate(portion, pad_token_id=pad_token_id)
            with meter.measure(made.input_ids.shape, step):
                output = model(input_ids=made.input_ids, attention_mask=made.attention_mask, labels=made.labels)
            loss = output.loss
            (loss if len(portion) == len(batch) else loss * (len(portion) / len(batch))).backward()
            meter.release(step)
            total += float(loss.detach()) * len(portion)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rows += len(batch)
    return Trained(loss=total / max(1, rows), rows=rows)


def evaluate(model: nn.Module, encoded: Sequence[EncodedRow], *, batch_size: int, pad_token_id: int) -> Evaluated:
    """Classify rows, most likely class first, batched by length; the model is left in evaluation mode."""
    model.eval()
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i].input_ids))
    correct = [False] * len(encoded)
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(by_length), batch_size):
            chosen = by_length[start : start + batch_size]
            made = collate([encoded[i] for i in chosen], pad_token_id=pad_token_id)
            output = model(input_ids=made.input_ids, attention_mask=made.attention_mask, labels=made.labels)
            total += float(output.loss) * len(chosen)
            for i, predicted in zip(chosen, output.logits.argmax(-1).tolist(), strict=True):
                correct[i] = predicted == encoded[i].label
    return Evaluated(loss=total / len(encoded), correct=tuple(correct))


def _portions(batch: list[EncodedRow], size: int | None) -> list[list[EncodedRow]]:
    if size is None or size >= len(batch):
        return [batch]
    by_length = sorted(batch, key=lambda row: len(row.input_ids))
    return [by_length[i : i + size] for i in range(0, len(batch), size)]


def _seed_dropout(seed: int, name: str, step: int) -> None:
    digest = hashlib.sha256(f"{seed}|{name}|{step}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
