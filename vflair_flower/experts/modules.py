"""The experts of a transformers mixture-of-experts model: where they are, and how their rows are run.

transformers keeps all experts of a layer in one module with parameters ``[E, ...]``; its router, the shared experts and
everything else stay outside.  R rows (a token once for each expert that it is routed to), D hidden, E experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import _grouped_linear

from vflair_flower.errors import ModelError

_MARKS = ("is_concatenated", "has_gate", "num_experts")


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the experts modules of a model by name, first layer first."""
    return {name: m for name, m in model.named_modules() if all(hasattr(m, mark) for mark in _MARKS)}


def num_experts(config: PreTrainedConfig) -> int:
    """Return how many experts a layer has; raise ModelError for a model without."""
    text = config.get_text_config()
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        count = getattr(text, name, None)
        if isinstance(count, int) and count > 0:
            return count
    raise ModelError(
        f"the model family is {text.model_type!r}, which has no experts to spread over parties. Choose a "
        "mixture-of-experts model (Mixtral, OLMoE, Qwen3-MoE, DeepSeek-V2 or V3, GPT-OSS)."
    )


def expert_layers(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the experts modules of a model; raise ModelError if it has none of the known kind."""
    names = tuple(expert_modules(model))
    if not names:
        raise ModelError(
            f"the model family is {model.config.model_type!r}, and none of its modules keeps experts as transformers' "
            "mixture-of-experts models do. Choose Mixtral, OLMoE, Qwen3-MoE, DeepSeek-V2 or V3, or GPT-OSS."
        )
    return names


def keep_experts(module: nn.Module, experts: Sequence[int]) -> None:
    """Give a module, on the meta device, room for some of its experts alone."""
    count = int(module.num_experts)  # type: ignore[arg-type]
    module.num_experts = len(experts)  # type: ignore[assignment]
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.shape[:1] == (count,):
            shape = (len(experts), *parameter.shape[1:])
            setattr(module, name, nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device=parameter.device)))


def run_experts(module: nn.Module, rows_RD: Tensor, expert_R: Tensor) -> Tensor:
    """Run rows that are sorted by expert; returns the experts' outputs, not weighted, ``[R, D]``.

    The arithmetic is that of transformers' ``grouped_mm``, in the order of the rows: sorting them anew, or running the
    rows of one expert in two portions, would change the last bits of its matrix products.

    Parameters
    ----------
    module : torch.nn.Module
        An experts module.
    rows_RD : torch.Tensor
        Float, ``[R, D]``.
    expert_R : torch.Tensor
        Integer, ``[R]``, ascending: the place of the row's expert in this module.
    """
    m: nn.Module = module
    ends = torch.cumsum(torch.bincount(expert_R, minlength=m.num_experts), 0).to(torch.int32)  # type: ignore[arg-type]

    def linear(x: Tensor, name: str) -> Tensor:
        bias = getattr(m, f"{name}_bias")[expert_R] if m.has_bias else None
        weight, lora = getattr(m, name), getattr(m, f"{name}_lora", None)
        weight = weight if lora is None else lora(weight)
        out: Tensor = _grouped_linear(x, weight, ends, bias=bias, is_transposed=bool(m.is_transposed))
        return out

    activate: Any = m._apply_gate if m.has_gate else m.act_fn
    out_RD = linear(activate(linear(rows_RD, "gate_up_proj" if m.has_gate else "up_proj")), "down_proj")
    norm: Any = m.post_expert_norm if getattr(m, "has_post_expert_norm", False) else nn.Identity()
    normed_RD: Tensor = norm(out_RD)
    return normed_RD
