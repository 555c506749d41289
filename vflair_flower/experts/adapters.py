"""LoRA on experts: what PEFT computes on the whole model (``target_parameters``), for the experts of one host.

E experts of a layer, H of them here, r rank, I what goes into a matrix, O what comes out.  ``lora_A`` is [H, r, I] and
``lora_B`` [H, O, r], so that every parameter of a host has its experts in its first dimension.
Invariant: who hosts what changes neither the adapters that a job begins with nor a bit of what they compute.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vflair_flower.errors import ConfigurationError
from vflair_flower.experts.modules import expert_modules
from vflair_flower.partition import LoadedSegment, make_trainable
from vflair_flower.partition.adapters import draw_kaiming
from vflair_flower.settings import LoraSettings
from vflair_flower.spec import SplitSpec

EXPERT_TARGETS = ("experts.gate_up_proj", "experts.down_proj")
"""As PEFT's ``target_parameters``: the matrices of experts, by the ends of their names."""


class ExpertLora(nn.Module):
    """Low-rank changes to one matrix of each of a host's experts in a layer.

    Parameters
    ----------
    name : str
        Of the matrix, in the whole model; A is drawn from it and the job's seed.
    weight_HIO : torch.Tensor
        The frozen matrices, ``[H, I, O]`` if `transposed`, else ``[H, O, I]``.
    experts : tuple[int, ...]
        Which of the layer's experts they are.
    of : int
        E.
    settings : LoraSettings
        Rank and alpha.
    seed : int
        The job's.
    transposed : bool
        How the family keeps its matrices.
    """

    def __init__(
        self,
        name: str,
        weight_HIO: Tensor,
        experts: tuple[int, ...],
        *,
        of: int,
        settings: LoraSettings,
        seed: int,
        transposed: bool,
    ) -> None:
        super().__init__()
        entering, leaving = weight_HIO.shape[1:] if transposed else weight_HIO.shape[:0:-1]
        drawn_XI = torch.empty(of * settings.rank, entering)  # for all experts, whoever hosts them
        draw_kaiming(drawn_XI, name, seed)
        self.lora_A = nn.Parameter(drawn_XI.view(of, settings.rank, entering)[list(experts)].to(weight_HIO.device))
        self.lora_B = nn.Parameter(torch.zeros(len(experts), leaving, settings.rank, device=weight_HIO.device))
        self._scale = settings.alpha / settings.rank
        self._transposed = transposed

    def forward(self, weight_HIO: Tensor) -> Tensor:
        """Return the frozen matrices with their changes; kept in float32, added in the matrices' dtype."""
        a_HrI, b_HOr = self.lora_A.to(weight_HIO.dtype), self.lora_B.to(weight_HIO.dtype)
        left, right = (a_HrI.mT, b_HOr.mT) if self._transposed else (b_HOr, a_HrI)
        return torch.baddbmm(weight_HIO, left, right, alpha=self._scale)


def tune_experts(shard: nn.Module, experts: Mapping[str, tuple[int, ...]], spec: SplitSpec, *, of: int) -> None:
    """Freeze a host's experts and give them LoRA, or do as little as the job says, in place.

    Parameters
    ----------
    shard : torch.nn.Module
        As `load_experts` returns it.
    experts : mapping of str to tuple[int, ...]
        By the name of each experts module, which ones are here, ascending.
    spec : SplitSpec
        The job.
    of : int
        How many experts a layer has at all hosts together.
    """
    assert spec.experts is not None
    if spec.experts.trained == "none" or spec.tuning is not None:
        shard.requires_grad_(False)
    if spec.experts.trained == "none" or spec.tuning is None:
        return
    for name, module in expert_modules(shard).items():
        for target in EXPERT_TARGETS:
            leaf = target.rpartition(".")[2]
            lora = ExpertLora(
                f"{name}.{leaf}",
                getattr(module, leaf),
                experts[name],
                of=of,
                settings=spec.tuning,
                seed=spec.seed,
                transposed=bool(module.is_transposed),
            )
            module.add_module(f"{leaf}_lora", lora)


def tune_own(loaded: LoadedSegment, spec: SplitSpec) -> nn.Module:
    """Make a party's own model ready for training, in place; what it has of experts as `tune_experts` does hosts'.

    Parameters
    ----------
    loaded : LoadedSegment
        As `load_backbone` returns it.
    spec : SplitSpec
        The job.
    """
    assert spec.experts is not None
    local, trained = expert_modules(loaded.model), spec.experts.trained == "all"
    targets = EXPERT_TARGETS if local and trained else ()
    model = make_trainable(loaded, spec.tuning, spec.task, seed=spec.seed, target_parameters=targets)
    for module in () if trained else local.values():
        module.requires_grad_(False)
    return model


def refuse_expert_tuning(spec: SplitSpec) -> None:
    """Raise ConfigurationError for a tuning that experts cannot get."""
    assert spec.experts is not None
    if spec.tuning is None or spec.experts.trained == "none":
        return
    if spec.tuning.method != "lora":
        raise ConfigurationError(
            f"the LoRA method is {spec.tuning.method!r}, and experts get plain LoRA alone: PEFT knows no other for "
            "matrices that lie in one parameter. Use the method 'lora', or leave the experts as they are "
            "(ExpertSettings(trained='none'))."
        )
    if spec.tuning.dropout:
        raise ConfigurationError(
            f"the LoRA dropout is {spec.tuning.dropout:g}, and experts' adapters are added to their matrices before "
            "any token comes, where nothing can be dropped. Set it to 0, or leave the experts as they are "
            "(ExpertSettings(trained='none'))."
        )
