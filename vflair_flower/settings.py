"""Settings of a job that concern more than one room: task, tuning, optimiser, length.  Frozen, valid from birth.

Steps count optimiser steps over the whole job, from 0; rounds count from 1.
"""

import functools
import math
from collections.abc import Callable
from enum import StrEnum
from typing import Any, TypeVar, cast, dataclass_transform

import torch
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from vflair_flower.errors import ConfigurationError

SettingsClass = TypeVar("SettingsClass")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(cls: type[SettingsClass]) -> type[SettingsClass]:
    """Make `cls` a frozen, keyword-only dataclass that refuses what is unknown, mistyped or out of range.

    pydantic wraps what `__post_init__` raises into an error of its own; here it comes out as ConfigurationError.
    """
    made = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))(cls)
    unwrapped: Callable[..., None] = made.__init__

    @functools.wraps(unwrapped)
    def checked(self: object, *args: Any, **kwargs: Any) -> None:
        try:
            unwrapped(self, *args, **kwargs)
        except ValidationError as error:
            raise ConfigurationError(f"{cls.__name__}: {in_words(error)}") from error

    made.__init__ = checked  # type: ignore[method-assign]
    return cast("type[SettingsClass]", made)


def in_words(error: ValidationError) -> str:
    """Say what pydantic refused: our own words where the error is ours."""
    said = []
    for one in error.errors(include_url=False):
        own = one.get("ctx", {}).get("error")
        where = ".".join(str(part) for part in one["loc"]) or "it"
        seen = "missing" if one["type"] == "missing" else repr(one["input"])
        said.append(str(own) if own else f"{where} is {seen}: {one['msg'].lower()}.")
    return " ".join(said)


class TaskKind(StrEnum):
    """Which transformers task class every party builds."""

    SEQUENCE_CLASSIFICATION = "sequence-classification"
    CAUSAL_LM = "causal-lm"


@settings
class TaskSettings:
    """The task.

    Parameters
    ----------
    kind : TaskKind
        Sequence classification or causal language modelling.
    label_names : tuple[str, ...]
        Names of the classes, in order of their index; empty where the task has none.
    """

    kind: TaskKind = TaskKind.SEQUENCE_CLASSIFICATION
    label_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind is TaskKind.SEQUENCE_CLASSIFICATION and len(self.label_names) < 2:
            raise ConfigurationError(
                f"label_names has {len(self.label_names)} entries; a classifier needs at least two classes. "
                "Name every class of the data."
            )
        twice = sorted({name for name in self.label_names if self.label_names.count(name) > 1})
        if twice:
            raise ConfigurationError(
                f"label_names names {', '.join(map(repr, twice))} more than once; two outputs would mean the same "
                "class. Name every class once."
            )


@settings
class LoraSettings:
    """LoRA (Hu et al., arXiv 2106.09685) on every segment, by PEFT.

    Parameters
    ----------
    rank, alpha, dropout
        As in `peft.LoraConfig`.
    target_modules : tuple[str, ...]
        Modules that get adapters; empty for PEFT's own choice for the family.
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigurationError(f"the LoRA rank is {self.rank}; choose 1 or more, or no LoRA to train everything.")
        if self.alpha < 1:
            raise ConfigurationError(
                f"the LoRA alpha is {self.alpha}; adapters are scaled by alpha / rank. Choose 1 or more."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigurationError(f"the LoRA dropout is {self.dropout}; choose 0 <= dropout < 1.")


@settings
class OptimizerSettings:
    """The optimiser of every segment; each party runs its own over what it owns.

    Parameters
    ----------
    name : str
        ``"adamw"`` or ``"sgd"`` (without momentum).
    learning_rate : float
        At its highest.
    weight_decay : float
        Decoupled for AdamW.
    schedule : str
        ``"linear"`` falls from `learning_rate` to 0 over the job, ``"constant"`` does not.
    warmup_fraction : float
        Part of the job's steps in which the rate rises from 0.
    """

    name: str = "adamw"
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    schedule: str = "linear"
    warmup_fraction: float = 0.0

    def __post_init__(self) -> None:
        one_of("optimizer", self.name, ("adamw", "sgd"))
        one_of("schedule", self.schedule, ("linear", "constant"))
        if not 0.0 < self.learning_rate < math.inf:
            raise ConfigurationError(f"learning_rate is {self.learning_rate}; choose a number above 0.")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ConfigurationError(f"weight_decay is {self.weight_decay}; choose 0 (none) or more.")
        if not 0.0 <= self.warmup_fraction < 1.0:
            raise ConfigurationError(f"warmup_fraction is {self.warmup_fraction}; choose 0 <= warmup_fraction < 1.")

    def rate(self, step: int, total_steps: int) -> float:
        """Return the learning rate of step `step` (from 0); a pure function, so that a resume repeats it."""
        warmup = self.warmup_fraction * total_steps
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * max(0.0, (total_steps - step) / max(1.0, total_steps - warmup))

    def build(self, parameters: "list[torch.nn.Parameter]") -> torch.optim.Optimizer:
        """Return a torch optimiser over `parameters`."""
        if self.name == "sgd":
            return torch.optim.SGD(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        return torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)


@settings
class TrainingSettings:
    """How long and in what portions `DataParty` trains.

    Parameters
    ----------
    rounds : int
        Flower rounds of the whole job.
    passes : float
        How often each party goes over its own rows in the whole job.  Ignored when `local_steps` is set.
    local_steps : int
        Optimiser steps per round and party; 0 divides `passes` evenly over the rounds.
    batch_size : int
        Rows per party and step.
    evaluation_batch_size : int
        Rows per forward pass in evaluation.
    max_tokens : int
        Texts are cut off after this many tokens.
    group_by_length : bool
        Whether batches are made of rows of like length, which saves padding.
    """

    rounds: int = 6
    passes: float = 3.0
    local_steps: int = 0
    batch_size: int = 8
    evaluation_batch_size: int = 32
    max_tokens: int = 64
    group_by_length: bool = False

    def __post_init__(self) -> None:
        for name in ("rounds", "batch_size", "evaluation_batch_size", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; choose 1 or more.")
        if self.local_steps < 0:
            raise ConfigurationError(f"local_steps is {self.local_steps}; choose 0 (by passes) or more.")
        if self.local_steps == 0 and not 0.0 < self.passes < math.inf:
            raise ConfigurationError(f"passes is {self.passes}; choose a number above 0, or set local_steps.")

    def total_steps(self, num_rows: int) -> int:
        """Return the optimiser steps that a party of `num_rows` rows takes in the whole job."""
        if self.local_steps:
            return self.rounds * self.local_steps
        return max(1, round(self.passes * -(-num_rows // self.batch_size)))

    def steps_of_round(self, server_round: int, num_rows: int) -> range:
        """Return the steps, counted over the whole job, that round `server_round` (from 1) takes."""
        total = self.total_steps(num_rows)
        return range(total * (server_round - 1) // self.rounds, total * server_round // self.rounds)


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ConfigurationError unless `value` is known."""
    if value not in known:
        raise ConfigurationError(f"{name} is {value!r}; known are {', '.join(map(repr, known))}.")
