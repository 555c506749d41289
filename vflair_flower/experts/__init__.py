"""PC-MoE (arXiv 2506.02965): the experts of one model at many parties, called by all of them."""

from vflair_flower.experts.adapters import EXPERT_TARGETS, tune_experts, tune_own
from vflair_flower.experts.caller import ExpertCaller
from vflair_flower.experts.coactivation import count_coactivation, place_by_coactivation
from vflair_flower.experts.dispatch import ExpertChannel, RemoteExperts
from vflair_flower.experts.host import ExpertHost
from vflair_flower.experts.loading import expert_layer_names, load_backbone, load_experts
from vflair_flower.experts.local import OwnExperts, load_local
from vflair_flower.experts.merged_adapter import merge_expert_adapters
from vflair_flower.experts.modules import num_experts
from vflair_flower.experts.placement import Placement, place_experts
from vflair_flower.experts.protocol import expert_agreement
from vflair_flower.experts.routing import prefer_experts, route_locally
from vflair_flower.experts.token_routing import PrivateTokens, rare_tokens

__all__ = [
    "EXPERT_TARGETS",
    "ExpertCaller",
    "ExpertChannel",
    "ExpertHost",
    "OwnExperts",
    "Placement",
    "PrivateTokens",
    "RemoteExperts",
    "count_coactivation",
    "expert_agreement",
    "expert_layer_names",
    "load_backbone",
    "load_experts",
    "load_local",
    "merge_expert_adapters",
    "num_experts",
    "place_by_coactivation",
    "place_experts",
    "prefer_experts",
    "rare_tokens",
    "route_locally",
    "tune_experts",
    "tune_own",
]
