"""Settings of a job that concern more than one room: task, tuning, optimiser, length.  Frozen, valid from birth.

Steps count optimiser steps over the whole job, from 0; rounds count from 1.
"""

import functools
import math
import tomllib
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any, Self, TypeVar, cast, dataclass_transform

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from vflair_flower.errors import ConfigurationError

SettingsClass = TypeVar("SettingsClass")
Checked = TypeVar("Checked")
WEIGHT_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Read a TOML file that a person wrote; `what` it is ("policy") stands in the ConfigurationError for any other."""
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"the {what} {str(path)!r} cannot be read ({error}). Correct it.") from error


def as_type(kind: type[Checked], values: object, path: Path, what: str) -> Checked:
    """Return what a file holds as `kind`; raise ConfigurationError, which says what is wrong, if it is none."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise ConfigurationError(f"the {what} {str(path)!r} is wrong: {in_words(error)}") from error


class TaskKind(StrEnum):
    """Which transformers task class every party builds."""

    SEQUENCE_CLASSIFICATION = "sequence-classification"
    SEQUENCE_REGRESSION = "sequence-regression"
    """One number per text: the class of sequence classification with one output and the squared error."""
    QUESTION_ANSWERING = "question-answering"
    """Extractive: where in the text the answer starts and where it ends."""
    CAUSAL_LM = "causal-lm"
    MASKED_LM = "masked-lm"
    SEQ2SEQ_LM = "seq2seq-lm"
    IMAGE_TEXT_TO_TEXT = "image-text-to-text"

    @property
    def reads_whole_texts(self) -> bool:
        """Whether there is one answer per text: of a class or a number."""
        return self in (TaskKind.SEQUENCE_CLASSIFICATION, TaskKind.SEQUENCE_REGRESSION)

    @property
    def writes(self) -> bool:
        """Whether the model writes text."""
        return self in (TaskKind.CAUSAL_LM, TaskKind.SEQ2SEQ_LM, TaskKind.IMAGE_TEXT_TO_TEXT)


@settings
class TaskSettings:
    """The task.

    Parameters
    ----------
    kind : TaskKind
        What the model's task head answers.
    label_names : tuple[str, ...]
        Names of the classes, in order of their index; empty where the task has none.
    """

    kind: TaskKind = TaskKind.SEQUENCE_CLASSIFICATION
    label_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        classifies = self.kind is TaskKind.SEQUENCE_CLASSIFICATION
        if classifies and len(self.label_names) < 2:
            raise ConfigurationError(
                f"label_names has {len(self.label_names)} entries; a classifier needs at least two classes. "
                "Name every class of the data."
            )
        if not classifies and self.label_names:
            raise ConfigurationError(
                f"label_names has {len(self.label_names)} entries, but the task {self.kind.value!r} has no classes. "
                "Leave them out, or set the task to 'sequence-classification'."
            )
        twice = sorted({name for name in self.label_names if self.label_names.count(name) > 1})
        if twice:
            raise ConfigurationError(
                f"label_names names {', '.join(map(repr, twice))} more than once; two outputs would mean the same "
                "class. Name every class once."
            )


@settings
class WeightSettings:
    """How every party keeps its segment's weights.

    Parameters
    ----------
    dtype : str
        ``"float32"``, or ``"bfloat16"``: half the memory; LoRA's own matrices stay float32.
    quantization : str
        ``"none"``, ``"int8"`` (LLM.int8, Dettmers et al., arXiv 2208.07339) or ``"nf4"`` (QLoRA, Dettmers et al., arXiv
        2305.14314): 8 or 4 bits per frozen weight, by bitsandbytes; only with LoRA.
    """

    dtype: str = "float32"
    quantization: str = "none"

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, tuple(WEIGHT_DTYPES))
        one_of("quantization", self.quantization, ("none", "int8", "nf4"))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights that are not quantised, and of hidden states."""
        return WEIGHT_DTYPES[self.dtype]


@settings
class LoraSettings:
    """LoRA (Hu et al., arXiv 2106.09685) on every segment, by PEFT.

    Parameters
    ----------
    method : str
        ``"lora"``; ``"dora"`` (Liu et al., arXiv 2402.09353): the norms of the weights' rows are trained as well; or
        ``"adalora"`` (Zhang et al., arXiv 2303.10512): ranks go where they matter most, from 1.5 times `rank` down to
        `rank` on average over each segment (`vflair_flower.partition.ranks`).
    rank, alpha, dropout
        As in `peft.LoraConfig`.
    target_modules : tuple[str, ...]
        Modules that get adapters; empty for PEFT's own choice for the family.
    """

    method: str = "lora"
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        one_of("method", self.method, ("lora", "dora", "adalora"))
        if self.rank < 1:
            raise ConfigurationError(f"the LoRA rank is {self.rank}; choose 1 or more, or no LoRA to train everything.")
        if self.alpha < 1:
            raise ConfigurationError(
                f"the LoRA alpha is {self.alpha}; adapters are scaled by alpha / rank. Choose 1 or more."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigurationError(f"the LoRA dropout is {self.dropout}; choose 0 <= dropout < 1.")


@settings
class ExpertSettings:
    """How the experts of a mixture-of-experts model are spread over the parties (PC-MoE, arXiv 2506.02965).

    Parameters
    ----------
    backbone : str
        Who has the model without experts: each ``"party"`` all of it; or it is ``"split"`` as the job's `plan` says,
        and the model party's layers call the hosts as well.
    placement : str
        ``"round-robin"``, ``"capacity"`` or ``"table"`` (`vflair_flower.experts.placement`).
    capacities : tuple[float, ...]
        For ``"capacity"``: what each party can hold, in the order of names, in any unit.
    table : tuple[tuple[int, ...], ...]
        For ``"table"``: per layer, for each expert the number of its host, in the order of names.
    schedule : str
        ``"concurrent"``: all parties train at once, and an expert steps on the mean over all their rows; or
        ``"round-robin"``: one party's batch at a time, as in the paper.
    combine : str
        Where a token's outputs are weighted and summed: at the ``"owner"`` of the token, exactly as in the whole model,
        or at the ``"host"`` of the experts, which sends one vector per token, sums in another order, and sees the
        router's weights.
    codec : str
        ``"none"``: vectors cross in the job's `wire_dtype`; ``"int8"``: 8 bits per number and a scale per 64 of them.
    on_host_lost : str
        ``"fail"``; ``"skip"``: a token's output is made of the experts that answered, their weights renormalised; or
        ``"replica"``: another copy's answers count, and training fails only with the last copy of an expert.
    k_min : int
        For ``"skip"``: with fewer experts than that for a token, fail all the same.  0 lets a token go by without any,
        as if the layer had no experts.
    replicas : int
        How many parties hold each expert: its host, and those that follow it in the order of names.  In training all of
        them compute the same steps, so traffic and work grow by as much.
    opted_out : tuple[int, ...]
        Numbers of parties, in the order of names, whose experts no router chooses; they train with the others'.
    local_tolerance : float
        A party's own expert is taken instead of a remote one whose score is at most ``1 + local_tolerance`` times its
        own.  0 leaves routing as it is.
    trained : str
        ``"all"``: experts are trained as the job's `tuning` says, whole or by LoRA of its rank; ``"none"``: they stay
        as they are, and the parties' own models are trained around them.
    balance_coefficient : float
        Of the load-balancing loss that is added in training, over all parties' tokens where they train at once
        (`vflair_flower.experts.balance`); 0 for none, which is what OLMoE (arXiv 2409.02060) found best in fine-tuning.
    routing_gap : int
        1 for none.  With g, no other party's host sees two tokens of a text that are less than g places apart, over all
        layers and passes together: the hosts are dealt into g groups, and a token goes to its owner's experts and to
        one group's (`vflair_flower.experts.token_routing`).  Another function than the model's own.
    private_share : float
        0 for none.  The rarest share of the distinct tokens of a party's training texts, and all tokens that these
        lack, go to the party's own experts alone; in training, the token before one of these as well.
    semantics : str
        ``"return"``: an expert's output comes back to its token's owner, and all is the whole model's function; or, as
        in the paper, the party whose experts weigh most runs the next block with its own model: for a whole sequence
        (``"hand-off-sequence"``) or for each token (``"hand-off-token"``; `vflair_flower.experts.handoff`).
    local_layers : int or tuple[int, int]
        The experts of so many first and as many last layers with experts (or of the first number's first and the
        second's last ones) are part of every party's own model, and nothing of these layers is sent.  That takes the
        two strongest reads from hosts: text by matching at the first layer, labels off the gradients at the last.
        Layers between still leak (docs/findings.md).  Each party holds 2q of L layers' experts whole.
    padding : str
        What calls to hosts are filled up to, so that sizes tell a network's observer less: ``"none"``; ``"whole"``, as
        much as a batch of so many tokens can send to a host; or ``"bucket"``, the least halving of that into which all
        hosts' rows of the layer go.  Hosts see what is filling, and the results are the same bits
        (`vflair_flower.experts.padding`).
    """

    backbone: str = "party"
    placement: str = "round-robin"
    capacities: tuple[float, ...] = ()
    table: tuple[tuple[int, ...], ...] = ()
    schedule: str = "concurrent"
    combine: str = "owner"
    codec: str = "none"
    on_host_lost: str = "fail"
    k_min: int = 1
    replicas: int = 1
    opted_out: tuple[int, ...] = ()
    local_tolerance: float = 0.0
    trained: str = "all"
    balance_coefficient: float = 0.0
    routing_gap: int = 1
    private_share: float = 0.0
    semantics: str = "return"
    local_layers: int | tuple[int, int] = 0
    padding: str = "none"

    def __post_init__(self) -> None:
        one_of("backbone", self.backbone, ("party", "split"))
        if self.backbone == "split" and (self.schedule != "concurrent" or self.replicas > 1 or self.local_tolerance):
            raise ConfigurationError(
                f"backbone is 'split', the schedule {self.schedule!r}, replicas {self.replicas} and local_tolerance "
                f"{self.local_tolerance}. A body that all parties train at once needs 'concurrent'; copies of experts "
                "could part where it calls them, and its routers are nobody's own. Set replicas to 1 and "
                "local_tolerance to 0."
            )
        one_of("placement", self.placement, ("round-robin", "capacity", "table"))
        one_of("schedule", self.schedule, ("concurrent", "round-robin"))
        one_of("combine", self.combine, ("owner", "host"))
        one_of("codec", self.codec, ("none", "int8"))
        one_of("on_host_lost", self.on_host_lost, ("fail", "skip", "replica"))
        one_of("trained", self.trained, ("all", "none"))
        if any(not 0.0 < capacity < math.inf for capacity in self.capacities):
            raise ConfigurationError(f"capacities are {self.capacities}; each is a number above 0.")
        for name, kind in (("capacities", "capacity"), ("table", "table")):
            if bool(getattr(self, name)) is not (self.placement == kind):
                raise ConfigurationError(
                    f"placement is {self.placement!r} and {name} has {len(getattr(self, name))} entries; {name} goes "
                    f"with the placement {kind!r} and with no other."
                )
        if self.k_min < 0:
            raise ConfigurationError(f"k_min is {self.k_min}; choose 0 or more.")
        if self.replicas < (2 if self.on_host_lost == "replica" else 1):
            raise ConfigurationError(
                f"replicas is {self.replicas} and on_host_lost {self.on_host_lost!r}; choose 1 or more, and 2 or more "
                "where another copy is to stand in for a lost host."
            )
        if self.replicas > 1 and self.combine == "host":
            raise ConfigurationError(
                f"replicas is {self.replicas} and combine 'host': a host's sum is over several experts, whose other "
                "copies are at different hosts, so that none could stand in for it. Set combine to 'owner'."
            )
        if len(set(self.opted_out)) < len(self.opted_out) or any(party < 0 for party in self.opted_out):
            raise ConfigurationError(
                f"opted_out is {self.opted_out}; give each party's number once, from 0 in the order of their names."
            )
        if not 0.0 <= self.local_tolerance < math.inf:
            raise ConfigurationError(f"local_tolerance is {self.local_tolerance}; choose 0 (none) or more.")
        if not 0.0 <= self.balance_coefficient < math.inf:
            raise ConfigurationError(f"balance_coefficient is {self.balance_coefficient}; choose 0 (none) or more.")
        if self.balance_coefficient and self.backbone == "split":
            raise ConfigurationError(
                f"balance_coefficient is {self.balance_coefficient} and backbone 'split': a party does not see what "
                "the body's routers choose. Set it to 0."
            )
        if self.balance_coefficient and (self.opted_out or self.local_tolerance):
            raise ConfigurationError(
                f"balance_coefficient is {self.balance_coefficient} and opted_out or local_tolerance is set: the loss "
                "would even out choices that are not made. Use one of them."
            )
        self._check_token_routing()
        self._check_semantics()
        self._check_spread()

    @property
    def local_ends(self) -> tuple[int, int]:
        """How many of the first and of the last layers with experts are every party's own."""
        return (self.local_layers, self.local_layers) if isinstance(self.local_layers, int) else self.local_layers

    def _check_spread(self) -> None:
        one_of("padding", self.padding, ("none", "bucket", "whole"))
        if min(self.local_ends) < 0:
            raise ConfigurationError(f"local_layers is {self.local_layers}; choose 0 (none) or more.")
        if any(self.local_ends) and (self.backbone != "party" or self.semantics != "return"):
            raise ConfigurationError(
                f"local_layers is {self.local_layers}, backbone {self.backbone!r} and semantics {self.semantics!r}: "
                "local layers belong to whole models that parties run themselves. Set backbone to 'party' and "
                "semantics to 'return', or local_layers to 0."
            )
        if self.padding != "none" and self.semantics != "return":
            raise ConfigurationError(
                f"padding is {self.padding!r} and semantics {self.semantics!r}: what is handed from lead to lead says "
                "by its size where tokens go. Set semantics to 'return', or padding to 'none'."
            )

    def _check_token_routing(self) -> None:
        if self.routing_gap < 1:
            raise ConfigurationError(f"routing_gap is {self.routing_gap}; choose 1 (none) or more places.")
        if not 0.0 <= self.private_share <= 1.0:
            raise ConfigurationError(
                f"private_share is {self.private_share}; choose 0 (none) to 1 (all), the part of a party's distinct "
                "tokens that goes to its own experts alone."
            )
        if self.routes_by_token:
            self.check_routes_by_token()

    @property
    def routes_by_token(self) -> bool:
        """Whether a token's place or kind says which hosts may see it."""
        return self.routing_gap > 1 or self.private_share > 0.0

    def check_routes_by_token(self) -> None:
        """Raise ConfigurationError for settings under which it is not an owner's own routers that choose hosts."""
        needed: dict[str, object] = {
            "backbone": "party",
            "replicas": 1,
            "balance_coefficient": 0.0,
            "semantics": "return",
        }
        odd = [name for name, value in needed.items() if getattr(self, name) != value]
        if odd:
            raise ConfigurationError(
                f"routing_gap is {self.routing_gap}, private_share {self.private_share} (or a party has private tokens "
                f"of its own) and {odd[0]} {getattr(self, odd[0])!r}; which hosts see a token is for its owner's own "
                f"routers to say, and {odd[0]} must be {needed[odd[0]]!r}."
            )

    def _check_semantics(self) -> None:
        one_of("semantics", self.semantics, ("return", "hand-off-sequence", "hand-off-token"))
        needed: dict[str, object] = {
            "schedule": "round-robin",
            "backbone": "party",
            "replicas": 1,
            "on_host_lost": "fail",
            "opted_out": (),
            "local_tolerance": 0.0,
            "balance_coefficient": 0.0,
        }
        odd = [name for name, value in needed.items() if getattr(self, name) != value]
        if self.semantics != "return" and odd:
            raise ConfigurationError(
                f"semantics is {self.semantics!r} and {odd[0]} {getattr(self, odd[0])!r}; where tokens are handed from "
                f"party to party, one party's batch is trained at a time, and {odd[0]} must be {needed[odd[0]]!r}."
            )


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
    max_grad_norm : float
        Gradients are scaled down to this norm, taken over the whole model: the parties tell each other the squares of
        theirs.  0 leaves them as they are.
    """

    name: str = "adamw"
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    schedule: str = "linear"
    warmup_fraction: float = 0.0
    max_grad_norm: float = 0.0

    def __post_init__(self) -> None:
        one_of("optimizer", self.name, ("adamw", "sgd"))
        one_of("schedule", self.schedule, ("linear", "constant"))
        if not 0.0 < self.learning_rate < math.inf:
            raise ConfigurationError(f"learning_rate is {self.learning_rate}; choose a number above 0.")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ConfigurationError(f"weight_decay is {self.weight_decay}; choose 0 (none) or more.")
        if not 0.0 <= self.warmup_fraction < 1.0:
            raise ConfigurationError(f"warmup_fraction is {self.warmup_fraction}; choose 0 <= warmup_fraction < 1.")
        if not 0.0 <= self.max_grad_norm < math.inf:
            raise ConfigurationError(f"max_grad_norm is {self.max_grad_norm}; choose 0 (no clipping) or more.")

    def rate(self, step: int, total_steps: int) -> float:
        """Return the learning rate of step `step` (from 0); a pure function, so that a resume repeats it."""
        warmup = self.warmup_fraction * total_steps
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * max(0.0, (total_steps - step) / max(1.0, total_steps - warmup))

    def clip_factor(self, norm: float) -> float:
        """Return what gradients of this norm are multiplied by, as `torch.nn.utils.clip_grad_norm_` does."""
        return min(1.0, self.max_grad_norm / (norm + 1e-6)) if self.max_grad_norm else 1.0

    def build(self, parameters: "list[torch.nn.Parameter]") -> torch.optim.Optimizer:
        """Return a torch optimiser over `parameters`, which may be none: a frozen segment has nothing to step."""
        groups = [{"params": parameters}]
        if self.name == "sgd":
            return torch.optim.SGD(groups, lr=self.learning_rate, weight_decay=self.weight_decay)
        return torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=self.weight_decay)


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
    micro_batch_size : int
        Rows per forward pass in training: a batch is taken in portions of like length, whose gradients add up to the
        batch's (gradient accumulation); 0 takes it whole.
    gradient_checkpointing : bool
        Keep only what goes into each block, and compute the block again in the backward pass: less memory, more time.
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
    micro_batch_size: int = 0
    gradient_checkpointing: bool = False
    evaluation_batch_size: int = 32
    max_tokens: int = 64
    group_by_length: bool = False

    def __post_init__(self) -> None:
        for name in ("rounds", "batch_size", "evaluation_batch_size", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; choose 1 or more.")
        if self.micro_batch_size < 0:
            raise ConfigurationError(f"micro_batch_size is {self.micro_batch_size}; choose 0 (a whole batch) or more.")
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


@settings
class GenerationSettings:
    """The bounds of what is written with key-value caches at every party.

    Parameters
    ----------
    max_rows : int
        Rows at once: texts times beams or returned sequences.
    max_length : int
        Tokens per row, prompt and padding included.
    max_caches : int
        Caches per party that the model party keeps; the oldest goes first.
    """

    max_rows: int = 16
    max_length: int = 512
    max_caches: int = 4

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_length", "max_caches"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; choose 1 or more.")


@settings
class DecodingSettings:
    """How texts are written, by transformers' `generate`.

    Parameters
    ----------
    max_new_tokens : int
        Tokens per text, at most; a text ends earlier at the model's end token.
    do_sample : bool
        Draw each token instead of taking the most likely one.
    temperature, top_p, top_k : float, float, int
        How tokens are drawn; `top_p` 1 and `top_k` 0 leave none out.
    num_beams : int
        Texts that are followed at once and of which the most likely is kept; 1 is greedy, or plain sampling.
    num_return_sequences : int
        Texts per prompt.
    seed : int
        Of the draws.  The same seed and prompts give the same texts, where a party is a process of its own.
    """

    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 50
    num_beams: int = 1
    num_return_sequences: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "num_return_sequences"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; choose 1 or more.")
        if not 0.0 < self.temperature < math.inf:
            raise ConfigurationError(
                f"temperature is {self.temperature}; choose a number above 0, or do_sample=False for the most likely "
                "token."
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigurationError(f"top_p is {self.top_p}; choose 0 < top_p <= 1.")
        if self.top_k < 0:
            raise ConfigurationError(f"top_k is {self.top_k}; choose 0 (leaves none out) or more.")
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigurationError(f"seed is {self.seed}; choose a number of at most 63 bits.")
        if not self.do_sample and (self.temperature, self.top_p, self.top_k) != (1.0, 1.0, 50):
            raise ConfigurationError(
                f"temperature is {self.temperature}, top_p {self.top_p} and top_k {self.top_k}, but do_sample is "
                "False, so nothing is drawn and they would mean nothing. Set do_sample=True, or leave them out."
            )
        most = self.num_beams if self.num_beams > 1 or not self.do_sample else self.num_return_sequences
        if self.num_return_sequences > most:
            raise ConfigurationError(
                f"num_return_sequences is {self.num_return_sequences}, but {most} "
                f"{'different text is' if most == 1 else 'beams are'} all there is. Set do_sample=True with one beam, "
                "or num_beams at least as high."
            )

    @property
    def rows_per_prompt(self) -> int:
        """Rows that a prompt takes in a batch."""
        return max(self.num_beams, self.num_return_sequences)

    def prompts_at_once(self, bounds: GenerationSettings) -> int:
        """Return how many prompts fit into a batch; raise ConfigurationError if not even one, or its text, does."""
        if self.rows_per_prompt > bounds.max_rows:
            raise ConfigurationError(
                f"a prompt takes {self.rows_per_prompt} rows (num_beams {self.num_beams}, num_return_sequences "
                f"{self.num_return_sequences}), and the parties agreed on {bounds.max_rows} at once. Ask for fewer, or "
                "raise max_rows in the job's generation settings."
            )
        if self.max_new_tokens >= bounds.max_length:
            raise ConfigurationError(
                f"max_new_tokens is {self.max_new_tokens}, and the parties agreed on rows of {bounds.max_length} "
                "tokens, prompt included. Ask for fewer, or raise max_length in the job's generation settings."
            )
        return bounds.max_rows // self.rows_per_prompt

    def to_json(self) -> str:
        """Return the settings as JSON text."""
        return TypeAdapter(type(self)).dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the settings that `to_json` wrote; raise ConfigurationError for anything else."""
        try:
            made: Self = TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            raise ConfigurationError(
                f"the decoding settings do not fit this version: {in_words(error)} "
                "All parties need the same version of vflair-flower."
            ) from error
        return made


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ConfigurationError unless `value` is known."""
    if value not in known:
        raise ConfigurationError(f"{name} is {value!r}; known are {', '.join(map(repr, known))}.")
