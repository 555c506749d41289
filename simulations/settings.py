"""The settings of the main job, as they come from Flower's run configuration (`[tool.flwr.app.config]`)."""

import secrets
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

from simulations.run_config import JobPaths
from vflair_flower.dp_settings import DpSettings
from vflair_flower.errors import ConfigurationError
from vflair_flower.partition import PartitionPlan
from vflair_flower.partition.plan import parse_mode
from vflair_flower.privacy import Policy, parse_defences
from vflair_flower.remote.protocol import SENT_NAMES
from vflair_flower.secagg_settings import SecAggSettings
from vflair_flower.session import RecordingSettings
from vflair_flower.settings import (
    LoraSettings,
    OptimizerSettings,
    TaskSettings,
    TrainingSettings,
    WeightSettings,
    one_of,
)
from vflair_flower.spec import SplitSpec
from vflair_flower.tasks import DealSettings


@dataclass(frozen=True, kw_only=True)
class JobSettings(JobPaths):
    """One value per key of the run configuration; see the comments there."""

    data: str
    text_column: str
    label_column: str
    task: str
    max_rows: int
    data_partition: str
    alpha: float
    model: str
    parties: int
    model_party: str
    mode: str
    head_blocks: int
    tail_blocks: int
    body_mode: str
    lora_rank: int
    lora_method: str
    lora_alpha: int
    lora_dropout: float
    lora_targets: str
    scope: str
    weights_dtype: str
    quantization: str
    optimizer: str
    learning_rate: float
    weight_decay: float
    schedule: str
    warmup_fraction: float
    max_grad_norm: float
    rounds: int
    passes: float
    local_steps: int
    batch_size: int
    micro_batch_size: int
    gradient_checkpointing: bool
    evaluation_batch_size: int
    max_tokens: int
    group_by_length: bool
    wire_dtype: str
    averaging: str
    defences: str
    defence_seed: int
    policy: str
    dp_epsilon: float
    dp_noise_multiplier: float
    dp_delta: float
    dp_max_grad_norm: float
    dp_body_max_grad_norm: float
    dp_body_share: float
    dp_accountant: str
    secure_aggregation: bool
    seed: int
    unsplit: bool
    audit: str
    audit_rows: int
    threads: int
    body_threads: int
    deadline_s: float
    on_party_lost: str
    hub_bind: str
    record: str
    record_every: int
    record_max_mb: int

    def __post_init__(self) -> None:
        one_of("data-partition", self.data_partition, ("iid", "label-skew", "quantity-skew"))
        one_of("model-party", self.model_party, ("strategy", "node"))
        if self.max_rows < 0:
            raise ConfigurationError(f"max-rows is {self.max_rows}; choose 0 (all rows) or more.")
        if self.parties < 1:
            raise ConfigurationError(f"parties is {self.parties}; a job needs at least one data party.")
        if self.resume and self.run_id not in ("", self.resume):
            raise ConfigurationError(
                f"resume is {self.resume!r} and run-id {self.run_id!r}; a resumed run keeps its id."
            )
        parse_mode(self.mode)
        parse_defences(self.defences)
        policy = self.read_policy()
        if policy is not None:
            policy.check_names(SENT_NAMES)
        self.recording()

    def to_flat(self) -> dict[str, Any]:
        """Return the settings by their names in the run configuration."""
        return {field.name.replace("_", "-"): getattr(self, field.name) for field in fields(self)}

    @property
    def num_nodes(self) -> int:
        """Flower nodes that the job needs."""
        return self.parties + (self.model_party == "node")

    def recording(self) -> RecordingSettings | None:
        """What is recorded, below the folder of the run; None if nothing is."""
        adversaries = tuple(name.strip() for name in self.record.split(",") if name.strip())
        if not adversaries:
            return None
        return RecordingSettings(
            folder=self.runs_dir,
            adversaries=adversaries,
            every=self.record_every,
            max_bytes=self.record_max_mb * 1_000_000,
        )

    def read_policy(self) -> Policy | None:
        """Return the policy that every data party obeys; None if none was named."""
        return Policy.read(self.path(self.policy)) if self.policy else None

    def privacy(self) -> DpSettings | None:
        """Return the settings of DP-SGD; None if neither an epsilon nor a noise multiplier is set."""
        if not self.dp_epsilon and not self.dp_noise_multiplier:
            return None
        return DpSettings(
            epsilon=self.dp_epsilon,
            noise_multiplier=self.dp_noise_multiplier,
            delta=self.dp_delta,
            max_grad_norm=self.dp_max_grad_norm,
            body_max_grad_norm=self.dp_body_max_grad_norm,
            body_share=self.dp_body_share,
            accountant=self.dp_accountant,
        )

    def deal_settings(self) -> DealSettings:
        """How rows are dealt to the parties."""
        return DealSettings(kind=self.data_partition, alpha=self.alpha, seed=self.seed)  # type: ignore[arg-type]

    def spec(self, task: TaskSettings) -> SplitSpec:
        """Return what all parties agree on."""
        averaging = self.averaging
        if averaging == "auto":
            averaging = "step" if self.body_mode == "synchronous" and not self.secure_aggregation else "round"
        targets = tuple(name.strip() for name in self.lora_targets.split(",") if name.strip())
        lora = (
            None
            if not self.lora_rank
            else LoraSettings(
                method=self.lora_method,
                rank=self.lora_rank,
                alpha=self.lora_alpha,
                dropout=self.lora_dropout,
                target_modules=targets,
            )
        )
        return SplitSpec(
            model=self.model,
            plan=PartitionPlan(mode=parse_mode(self.mode), head_blocks=self.head_blocks, tail_blocks=self.tail_blocks),
            task=task,
            tuning=lora,
            scope=self.scope,
            weights=WeightSettings(dtype=self.weights_dtype, quantization=self.quantization),
            optimizer=OptimizerSettings(
                name=self.optimizer,
                learning_rate=self.learning_rate,
                weight_decay=self.weight_decay,
                schedule=self.schedule,
                warmup_fraction=self.warmup_fraction,
                max_grad_norm=self.max_grad_norm,
            ),
            training=TrainingSettings(
                rounds=self.rounds,
                passes=self.passes,
                local_steps=self.local_steps,
                batch_size=self.batch_size,
                micro_batch_size=self.micro_batch_size,
                gradient_checkpointing=self.gradient_checkpointing,
                evaluation_batch_size=self.evaluation_batch_size,
                max_tokens=self.max_tokens,
                group_by_length=self.group_by_length,
            ),
            wire_dtype=self.wire_dtype,
            averaging=averaging,
            defences=self.defences,
            defence_seed=self.defence_seed,
            privacy=self.privacy(),
            secure_aggregation=SecAggSettings() if self.secure_aggregation else None,
            seed=self.seed,
        )


def new_run_id() -> str:
    """Return an id that sorts by time: ``20260102-030405-a1b2``."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
