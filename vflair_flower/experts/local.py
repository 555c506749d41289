"""A party's model without the others: its own model and its own experts, with routers that choose among these alone.

T tokens, K experts per token, E experts of a layer, D hidden.
Invariant: it computes what the whole model does when the others' experts are masked (`prefer_experts`).
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vflair_flower.errors import ConfigurationError
from vflair_flower.experts.finished import finished_backbone, finished_experts
from vflair_flower.experts.loading import expert_layer_names
from vflair_flower.experts.modules import num_experts
from vflair_flower.experts.placement import Placement
from vflair_flower.experts.routing import check_enough_experts, prefer_experts
from vflair_flower.partition import ModelSource
from vflair_flower.partition.sources import load_config
from vflair_flower.spec import SplitSpec


class OwnExperts(nn.Module):
    """Stands where a layer's experts were, and has some of them.

    Parameters
    ----------
    experts : torch.nn.Module
        An experts module that holds just these.
    chosen : sequence of int
        Their numbers in the whole layer, ascending.
    count : int
        E.
    """

    place_E: Tensor

    def __init__(self, experts: nn.Module, chosen: Sequence[int], count: int) -> None:
        super().__init__()
        self.experts = experts
        place_E = torch.full((count,), -1)
        place_E[list(chosen)] = torch.arange(len(chosen))
        self.register_buffer("place_E", place_E, persistent=False)

    def forward(self, hidden_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Return ``[T, D]``, the weighted sum of the experts' outputs."""
        out_TD: Tensor = self.experts(hidden_TD, self.place_E[expert_TK], weight_TK)
        return out_TD


def load_local(
    source: ModelSource,
    placement: Placement,
    party: str,
    spec: SplitSpec,
    *,
    trained: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a party's own model with its own experts; it needs no session, and generates as any transformers model.

    Of the experts that a router ranks, the best of this party's own are taken, with the weights that the router's rule
    gives them.  How good that is, nobody promises: the fewer experts a party has, the further it is from the whole.

    Parameters
    ----------
    source : ModelSource
        The checkpoint.
    placement : Placement
        Who hosts what (`place_experts`).
    party : str
        Whose.
    spec : SplitSpec
        The job's.
    trained : mapping, optional
        What the party keeps after a round of a job: ``PartyStore(state_dir / "models", job=..., party=...).load(r)``;
        by default the model as the job began.

    Raises
    ------
    ConfigurationError
        If the party has fewer experts of a layer than a token is routed to, or no model of its own.
    CheckpointError
        If `trained` is of another model, placement or tuning.
    ModelError
        If the checkpoint cannot be read.
    """
    if spec.experts is None or spec.experts.backbone != "party":
        raise ConfigurationError(
            "the job has no experts, or its backbone is split, so that no party has a model of its own to load; export "
            "the whole one."
        )
    config = load_config(source, spec.task)
    names, own = expert_layer_names(config, spec.task), placement.experts_of(party)
    count = num_experts(config)
    others = {layer: tuple(sorted(set(range(count)) - set(own[layer]))) for layer in placement.spread}
    check_enough_experts(config, others)
    model = finished_backbone(source, spec, None if trained is None else trained["own"])
    by_name = dict(zip(names, own, strict=True))
    experts = finished_experts(source, by_name, spec, None if trained is None else trained["host"]["trained"])
    routing = ExitStack()
    routing.enter_context(prefer_experts(model, masked=others))
    object.__setattr__(model, "own_routing", routing)  # lasts as long as the model does
    for name in (names[layer] for layer in placement.spread):
        chosen = by_name[name]
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, OwnExperts(experts.get_submodule(name), chosen, count))
    model.eval()
    return model
