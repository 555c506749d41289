"""Every cut, tuning and codec that a company could use, with memory, bytes and time by formula.

N blocks, B rows, T tokens, D hidden, H heads.  Time is what a step waits for the network: bytes over the link's rate,
and two delays for each round trip.  What computing takes is not known before anything has run and is left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from vflair_flower.advise.company import Company
from vflair_flower.errors import ConfigurationError, ModelError, PartitionError
from vflair_flower.partition import Mode, ModelSource, PartitionPlan, load_config
from vflair_flower.partition.footprint import Footprint, Share, footprint
from vflair_flower.partition.structure import hidden_size, num_blocks
from vflair_flower.report.numbers import counted
from vflair_flower.settings import LoraSettings, TaskKind, TaskSettings, TrainingSettings, WeightSettings
from vflair_flower.spec import WIRE_DTYPES, SplitSpec

_CODECS = ("float32", "bfloat16")
_TUNINGS = (("all", "none"), ("lora", "none"), ("lora", "nf4"))
_LORA_RANK = 8
_ROUND_TRIPS = 4
"""Forward, backward, the average of gradients, the step."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run the job, without a defence.

    Parameters
    ----------
    plan : PartitionPlan
        The cut.
    tuning : str
        ``"all"`` parameters, or ``"lora"``.
    quantization : str
        Of frozen weights.
    wire_dtype : str
        Of what crosses.
    memory_bytes, model_party_bytes : int
        Weights, gradients, optimiser and activations of a data party, and of the model party with all parties' batches.
    step_bytes : int
        Of one party and step, both ways.
    step_seconds : float
        That a step waits for the network.
    """

    plan: PartitionPlan
    tuning: str
    quantization: str
    wire_dtype: str
    memory_bytes: int
    model_party_bytes: int
    step_bytes: int
    step_seconds: float

    @property
    def cut(self) -> str:
        """The cut in words."""
        behind = f", {self.plan.tail_blocks} behind" if self.plan.mode is Mode.HBT else ""
        return f"{self.plan.mode.value}, {counted(self.plan.head_blocks, 'block')} before the cut{behind}"

    @property
    def name(self) -> str:
        """In words."""
        tuned = {"all": "all parameters", "lora": f"LoRA of rank {_LORA_RANK}"}[self.tuning]
        weights = "" if self.quantization == "none" else f", frozen weights in {self.quantization}"
        return f"{self.cut}; {tuned}{weights}; {self.wire_dtype} on the wire"

    def unfit(self, company: Company) -> str:
        """Say which of the company's means it exceeds; empty for none."""
        if self.memory_bytes > company.memory_gb * 1e9:
            return "memory of the data party"
        if self.model_party_bytes > company.model_party_memory_gb * 1e9:
            return "memory of the model party"
        if self.step_seconds > company.step_seconds:
            return "time on the network"
        return ""

    def to_job(self, company: Company, defences: str) -> dict[str, object]:
        """Return the main job's keys."""
        return {
            "model": company.model,
            "data": company.data,
            "task": company.task,
            "parties": company.parties,
            "mode": self.plan.mode.value,
            "head-blocks": self.plan.head_blocks,
            "tail-blocks": self.plan.tail_blocks,
            "lora-rank": _LORA_RANK if self.tuning == "lora" else 0,
            "quantization": self.quantization,
            "wire-dtype": self.wire_dtype,
            "batch-size": company.batch_size,
            "max-tokens": company.max_tokens,
            "defences": defences,
        }


def candidates(company: Company, source: ModelSource) -> Iterator[Candidate]:
    """Return all candidates of a model; those of a family or task that cannot be cut so are left out.

    Parameters
    ----------
    company : Company
        Gives batch, link and task.
    source : ModelSource
        The model; only its configuration is read.
    """
    task = task_of(company)
    blocks = num_blocks(load_config(source, task))
    activations = block_activation_bytes(company, source, task)
    for plan in plans(blocks):
        for tuning, quantization in _TUNINGS:
            try:
                spec = SplitSpec(
                    model=company.model,
                    plan=plan,
                    task=task,
                    tuning=LoraSettings(rank=_LORA_RANK) if tuning == "lora" else None,
                    weights=WeightSettings(quantization=quantization),
                    training=TrainingSettings(batch_size=company.batch_size, max_tokens=company.max_tokens),
                )
                numbers = footprint(source, spec)
            except (PartitionError, ModelError, ConfigurationError):
                continue
            for codec in _CODECS:
                yield _candidate(company, plan, tuning, quantization, codec, numbers, activations)


def plans(blocks: int) -> list[PartitionPlan]:
    """Return cuts worth a look: shallow ones, and a few deeper ones of a model with many blocks."""
    heads = sorted({head for head in (1, 2, 3, 4, blocks // 4, blocks // 2, blocks - 1) if 1 <= head < blocks})
    split = [
        PartitionPlan(mode=Mode.HBT, head_blocks=head, tail_blocks=tail)
        for head in heads
        for tail in (1, 2)
        if head + tail < blocks
    ]
    return [*split, *(PartitionPlan(mode=Mode.HT, head_blocks=head, tail_blocks=0) for head in heads)]


def task_of(company: Company) -> TaskSettings:
    """Return the company's task."""
    kind = TaskKind(company.kind)
    names = tuple(f"class {i}" for i in range(company.classes)) if kind is TaskKind.SEQUENCE_CLASSIFICATION else ()
    return TaskSettings(kind=kind, label_names=names)


def _candidate(
    company: Company,
    plan: PartitionPlan,
    tuning: str,
    quantization: str,
    codec: str,
    numbers: Footprint,
    activations: int,
) -> Candidate:
    own_blocks = plan.head_blocks + plan.tail_blocks
    share = WIRE_DTYPES[codec].itemsize / WIRE_DTYPES["float32"].itemsize
    # Gradients of heads and tails are averaged at every step, in float32, where there are several parties.
    averaged = 2 * 4 * numbers.data_party.trained if company.parties > 1 else 0
    crossed = int((numbers.up_bytes_per_step + numbers.down_bytes_per_step) * share) + averaged
    trips = _ROUND_TRIPS if company.parties > 1 else _ROUND_TRIPS - 1
    waits = crossed * 8 / (company.link_mbit * 1e6) + 2 * trips * company.delay_ms / 1e3
    return Candidate(
        plan=plan,
        tuning=tuning,
        quantization=quantization,
        wire_dtype=codec,
        memory_bytes=_held(numbers.data_party) + own_blocks * activations,
        model_party_bytes=_held(numbers.model_party)
        + (numbers.num_blocks - own_blocks) * activations * company.parties,
        step_bytes=crossed,
        step_seconds=waits,
    )


def block_activation_bytes(company: Company, source: ModelSource, task: TaskSettings) -> int:
    """Return what one block keeps for its backward pass, at most: Korthikanti et al., 2022, for float32.

    ``2 (34 B T D + 5 H B T^2)`` bytes; attention that keeps no T x T matrix needs less.
    """
    config = load_config(source, task)
    rows, tokens, width = company.batch_size, company.max_tokens, hidden_size(config)
    heads = int(getattr(config.get_text_config(), "num_attention_heads", None) or 1)
    return 2 * (34 * rows * tokens * width + 5 * heads * rows * tokens * tokens)


def _held(share: Share) -> int:
    return share.parameter_bytes + share.training_bytes
