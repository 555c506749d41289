"""What a job has made of a party's own model and experts, as plain parameters: adapters are added to their matrices."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from vflair_flower.errors import CheckpointError
from vflair_flower.experts.adapters import EXPERT_TARGETS, tune_experts, tune_own
from vflair_flower.experts.loading import layers_and_placement, load_backbone, load_experts, own_segment
from vflair_flower.experts.modules import expert_modules, num_experts
from vflair_flower.partition import ModelSource, load_trained_state
from vflair_flower.partition.sources import load_config
from vflair_flower.spec import SplitSpec


def finished_backbone(source: ModelSource, spec: SplitSpec, trained: Mapping[str, Tensor] | None) -> PreTrainedModel:
    """Load what a party has of the model without experts, as it was trained; None is as it began."""
    segment = own_segment(load_config(source, spec.task), spec)
    loaded, _ = load_backbone(
        source, spec.task, weights=spec.weights, seed=spec.seed, segment=segment, experts=spec.experts
    )
    model = tune_own(loaded, spec)
    if trained:
        load_trained_state(model, trained)
    return cast("PreTrainedModel", model.merge_and_unload() if isinstance(model, PeftModel) else model)


def finished_experts(
    source: ModelSource, experts: Mapping[str, tuple[int, ...]], spec: SplitSpec, trained: Mapping[str, Tensor] | None
) -> nn.Module:
    """Load some of the experts that a party hosts, as they were trained; None is as they began.

    Parameters
    ----------
    source : ModelSource
        The checkpoint.
    experts : mapping of str to tuple[int, ...]
        By the name of each experts module, which ones: all that the party hosts in that layer, or none.
    spec : SplitSpec
        The job.
    trained : mapping, optional
        ``"host"``, ``"trained"`` of what the party keeps; layers that are not asked for are left aside.

    Raises
    ------
    CheckpointError
        If `trained` is of another model, placement or tuning.
    """
    shard = load_experts(source, experts, spec.task, weights=spec.weights)
    tune_experts(shard, experts, spec, of=num_experts(load_config(source, spec.task)))
    if trained is not None:
        layers = tuple(f"{name}." for name in expert_modules(shard))
        _put(shard, {name: tensor for name, tensor in trained.items() if name.startswith(layers)})
    for module in expert_modules(shard).values():
        for leaf in (target.rpartition(".")[2] for target in EXPERT_TARGETS):
            lora: Any = getattr(module, f"{leaf}_lora", None)
            if lora is not None:
                with torch.no_grad():
                    setattr(module, leaf, nn.Parameter(lora(getattr(module, leaf)), requires_grad=False))
                delattr(module, f"{leaf}_lora")
    return shard


def joined_experts(
    config: PreTrainedConfig,
    spec: SplitSpec,
    trained: Mapping[str, Mapping[str, Tensor]],
    *,
    base: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Put all parties' trained experts in their places in the whole model's parameters.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        The model's, for the task.
    spec : SplitSpec
        The job.
    trained : mapping of str to mapping
        By party: ``"host"``, ``"trained"`` of what it keeps, or `ExpertHost.trained_state`.
    base : mapping of str to torch.Tensor, optional
        The whole model's parameters: what stands where no party has the expert.

    Returns
    -------
    dict of str to torch.Tensor
        By the names of the whole model's parameters, ``[E, ...]``; of copies the last party's.  Without a `base` NaN
        where no party has the expert.
    """
    layers, placement = layers_and_placement(config, spec, list(trained))
    whole: dict[str, Tensor] = {}
    for party, own in trained.items():
        experts_of = dict(zip(layers, placement.experts_of(party), strict=True))
        for name, part in own.items():
            experts = next(experts_of[layer] for layer in layers if name.startswith(f"{layer}."))
            if name not in whole:
                blank = part.new_full((num_experts(config), *part.shape[1:]), float("nan"))
                whole[name] = blank if base is None else base[name].detach().clone()
            whole[name][list(experts)] = part
    return whole


def _put(shard: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = {name: p for name, p in shard.named_parameters() if p.requires_grad}
    odd = sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]
    if odd:
        raise CheckpointError(
            f"the trained experts do not fit: {len(odd)} names or shapes differ, the first is {odd[0]!r}. They are of "
            "another model, placement or tuning; use those of the job that trained them."
        )
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
