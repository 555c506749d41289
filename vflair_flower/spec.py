"""What all parties of a job must agree on: one value, sent with every Flower message, validated at birth.

Not here: what only one party knows (its data, its paths) and what only the strategy decides (addresses, deadlines).
"""

from typing import Self

import torch
from pydantic import TypeAdapter, ValidationError

from vflair_flower.dp_settings import DpSettings
from vflair_flower.errors import ConfigurationError
from vflair_flower.partition.plan import PartitionPlan
from vflair_flower.secagg_settings import SecAggSettings
from vflair_flower.settings import (
    ExpertSettings,
    GenerationSettings,
    LoraSettings,
    OptimizerSettings,
    TaskKind,
    TaskSettings,
    TrainingSettings,
    WeightSettings,
    in_words,
    one_of,
    settings,
)

WIRE_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@settings
class SplitSpec:
    """Everything that all parties must agree on.

    Parameters
    ----------
    model : str
        A local folder, a hub id, or ``"minilm-l6"``; every party resolves it on its own machine.
    plan : PartitionPlan
        The cut.
    task, optimizer, training, generation, weights
        See their classes.
    tuning : LoraSettings or None
        LoRA on every segment, or None to train all parameters.
    scope : str
        ``"full"``: all parties train their segments; ``"local"``: the data parties alone, the model party's is frozen.
    experts : ExpertSettings or None
        For `CollaborativeMoE`: how a model's experts are spread over the parties.
    wire_dtype : str
        What hidden states and gradients are cast to before they are sent, in both directions; anything but
        ``"float32"`` ends bit equality with the unsplit model.
    averaging : str
        When the data parties' heads and tails are made equal: ``"round"``, by the aggregator at the end of the round,
        or ``"step"``, their gradients at every step as well (`vflair_flower.remote.averaging`).  ``"none"``, for
        `CollaborativeMoE` alone, never.
    defences : str
        What every data party applies to what it sends, by name, with settings after a colon and blanks between, in the
        order in which they act (`vflair_flower.privacy`): ``"dp:epsilon=8 quantize"``.  Empty for none.
    defence_seed : int
        0: defences draw from each party's own secret.  Any other number makes what they draw repeatable, and known to
        whoever knows the number: for research alone.
    privacy : DpSettings or None
        Train every segment by DP-SGD (`vflair_flower.privacy.dpsgd`); None trains as ever.
    secure_aggregation : SecAggSettings or None
        Mask what data parties train, so that the strategy sees the sum over parties alone
        (`vflair_flower.privacy.masked_party`); None sends each party's arrays to the aggregator.
    seed : int
        Of initialisation, batch order and dropout.
    """

    model: str = "minilm-l6"
    plan: PartitionPlan = PartitionPlan()
    task: TaskSettings
    tuning: LoraSettings | None = LoraSettings()
    scope: str = "full"
    weights: WeightSettings = WeightSettings()
    experts: ExpertSettings | None = None
    optimizer: OptimizerSettings = OptimizerSettings()
    training: TrainingSettings = TrainingSettings()
    generation: GenerationSettings = GenerationSettings()
    wire_dtype: str = "float32"
    averaging: str = "round"
    defences: str = ""
    defence_seed: int = 0
    privacy: DpSettings | None = None
    secure_aggregation: SecAggSettings | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("wire_dtype", self.wire_dtype, tuple(WIRE_DTYPES))
        one_of("averaging", self.averaging, ("round", "step", "none"))
        if self.averaging == "none" and self.experts is None:
            raise ConfigurationError(
                "averaging is 'none', and parties that never average their heads and tails train different models on "
                "one body. Set it to 'round' or 'step'; 'none' is for experts spread over parties."
            )
        one_of("scope", self.scope, ("full", "local"))
        if self.defences:
            from vflair_flower.privacy.defence import parse_defences  # which reads this package's settings

            parse_defences(self.defences)
            if self.experts is not None:
                raise ConfigurationError(
                    f"defences are {self.defences!r}, and the model's experts are spread over hosts, to which tokens "
                    "go by ways that these defences do not cover. Leave them out."
                )
        if self.weights.quantization == "int8" and self.tuning is not None and self.tuning.method == "dora":
            raise ConfigurationError(
                "quantization is 'int8' and the LoRA method 'dora', and bitsandbytes loses the scales of such matrices "
                "when PEFT reads them in a forward pass. Use 'nf4', or the method 'lora'."
            )
        if self.scope == "local" and self.tuning is not None and self.tuning.method == "adalora":
            raise ConfigurationError(
                "scope is 'local' and the LoRA method 'adalora', which would take the frozen segment's ranks for "
                "unimportant ones in the unsplit model. Use 'lora' or 'dora', or scope 'full'."
            )
        if self.weights.quantization != "none" and self.tuning is None:
            raise ConfigurationError(
                f"quantization is {self.weights.quantization!r} and all parameters are to be trained; rounded weights "
                "cannot be. Use LoRA, whose own matrices are not rounded, or no quantization."
            )
        if self.privacy is not None:
            self._check_private()
        if self.secure_aggregation is not None:
            self._check_summed()

    def _check_summed(self) -> None:
        """Refuse what would show the hub a single party's arrays all the same, or averages nothing."""
        if self.experts is not None:
            raise ConfigurationError(
                "secure_aggregation is set, and experts are spread over parties: each trains experts that no other "
                "has, and a sum over one hides nothing. Leave it out."
            )
        if self.averaging != "round":
            raise ConfigurationError(
                f"secure_aggregation is set and averaging is {self.averaging!r}: the hub would see each party's "
                "gradient at every step. Set averaging to 'round'."
            )

    def _check_private(self) -> None:
        """Refuse what would break DP-SGD's guarantee, or what its hooks cannot follow."""
        method = "" if self.tuning is None else self.tuning.method
        wrong = [
            (
                bool(self.optimizer.max_grad_norm),
                f"max_grad_norm of the optimiser is {self.optimizer.max_grad_norm}: parties would tell each other "
                "norms, which hold no noise. DP-SGD clips every row instead: set privacy's max_grad_norm, and the "
                "optimiser's to 0",
            ),
            (
                self.training.gradient_checkpointing,
                "gradient_checkpointing is on, and blocks that are computed again would leave their rows' gradients "
                "twice. Switch it off, and set micro_batch_size to save memory",
            ),
            *self._wrong_of_experts(),
            (
                method == "adalora",
                "the LoRA method is 'adalora', which chooses ranks by gradients without noise. Use 'lora'",
            ),
            (
                method == "dora",
                "the LoRA method is 'dora', whose norms are trained in modules that Opacus cannot follow. Use 'lora'",
            ),
            (
                self.weights.quantization == "int8",
                "quantization is 'int8', which rounds by the largest numbers of a batch, so one row changes the "
                "others. Use 'nf4' or none",
            ),
            (
                self.task.kind is TaskKind.IMAGE_TEXT_TO_TEXT,
                f"the task is {self.task.kind.value!r}, whose images have lost their rows where they are read",
            ),
        ]
        for is_wrong, said in wrong:
            if is_wrong:
                raise ConfigurationError(f"privacy is set (DP-SGD), and {said}.")

    def _wrong_of_experts(self) -> list[tuple[bool, str]]:
        """Return what of the experts' settings lets hosts learn from rows other than by clipped sums with noise."""
        if self.experts is None:
            return []
        needed: dict[str, object] = {
            "backbone": "party",
            "semantics": "return",
            "replicas": 1,
            "on_host_lost": "fail",
            "balance_coefficient": 0.0,
            "opted_out": (),
        }
        return [
            (
                getattr(self.experts, name) != value,
                f"{name} of the experts is {getattr(self.experts, name)!r}. Set it to {value!r}",
            )
            for name, value in needed.items()
        ]

    def to_json(self) -> str:
        """Return the specification as JSON text."""
        return TypeAdapter(type(self)).dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the specification that `to_json` wrote; raise ConfigurationError for anything else."""
        try:
            spec: Self = TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            raise ConfigurationError(
                f"the job's specification does not fit this version: {in_words(error)} "
                "All parties need the same version of vflair-flower."
            ) from error
        return spec
