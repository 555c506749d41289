"""Which experts routers may choose, and which they prefer: opted-out experts, a party's own, or one party's alone.

A router ranks the E experts of its layer by scores [T, E], takes the K best for each of T tokens, and makes weights of
their scores.  Here only the ranking changes: weights are made of the very same scores by the router's own rule.
Not here: how a router learns; gradients go through the scores of the experts that were taken, as always.
Invariant: where nothing is masked or preferred, nothing is touched.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

from vflair_flower.errors import ConfigurationError, ModelError
from vflair_flower.experts.dispatch import ExpertChannel, RemoteExperts
from vflair_flower.experts.modules import expert_modules, num_experts
from vflair_flower.experts.placement import Placement
from vflair_flower.experts.token_routing import PrivateTokens, TokenRouting
from vflair_flower.settings import ExpertSettings

Experts = Mapping[int, Collection[int]]
"""Some experts of each layer, by the layer's place among those with experts."""

_RANK_LOGITS = ("gpt_oss",)
"""Families whose routers rank logits; all others rank probabilities or what is like them."""


def route_locally(
    model: nn.Module,
    settings: ExpertSettings,
    placement: Placement,
    party: str,
    private_tokens: PrivateTokens | None = None,
) -> AbstractContextManager[None]:
    """Return what makes a party's routers choose as the job's settings say, within a ``with`` block.

    Parameters
    ----------
    model : torch.nn.Module
        The party's own, or the whole one.
    settings, placement
        Of the job.
    party : str
        Whose model and tokens.
    private_tokens : callable, optional
        The party's own rule of which tokens go to its own experts alone: ``[B, T]`` token ids to ``[B, T]`` bools.

    Raises
    ------
    ConfigurationError
        If a token could be left with too few experts, or the rule does not go with the job's settings.
    """
    by_token = settings.routes_by_token or private_tokens is not None
    if not settings.opted_out and not settings.local_tolerance and not by_token:
        return nullcontext()
    own = dict(enumerate(placement.experts_of(party)))
    masked = opted_out_experts(placement)
    tokens = TokenRouting(settings, placement, party, private_tokens) if by_token else None
    return _preferring(model, masked=masked, preferred=own, tolerance=settings.local_tolerance, tokens=tokens)


def prefer_experts(
    model: nn.Module, *, masked: Experts | None = None, preferred: Experts | None = None, tolerance: float = 0.0
) -> AbstractContextManager[None]:
    """Change which experts a model's routers choose, inside the block; whole models and split ones alike.

    Where gradients are checkpointed, the backward pass chooses again and belongs into the block too.  A router that
    first chooses groups of experts (DeepSeek) chooses among those with experts that are not masked, and prefers experts
    within the groups that it chose.

    Parameters
    ----------
    model : torch.nn.Module
        A mixture-of-experts model of transformers, or a `PeftModel` around one.
    masked : mapping of int to collection of int, optional
        Per layer with experts, those that are not chosen.  All but one party's: inference with its experts alone.
    preferred : mapping of int to collection of int, optional
        Per layer, those that are taken instead of others whose score is at most ``1 + tolerance`` times theirs.  (A
        score s below 0 counts as ``s + tolerance * abs(s)``; where logits are ranked, ``log(1 + tolerance)`` is added.)
    tolerance : float
        0 or more.

    Raises
    ------
    ConfigurationError
        If masking leaves fewer experts than a token is routed to.
    ModelError
        If the model has no experts, or routers that choose otherwise.

    Examples
    --------
    >>> import torch
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> model = MixtralForCausalLM(MixtralConfig(vocab_size=32, num_key_value_heads=2, num_local_experts=4, **sizes))
    >>> chosen = []
    >>> model.model.layers[0].mlp.gate.register_forward_hook(lambda module, args, out: chosen.append(out[2]))
    <...>
    >>> with prefer_experts(model, masked={0: [0, 1], 1: [0, 1]}):
    ...     logits = model(torch.arange(8).unsqueeze(0)).logits
    >>> torch.unique(chosen[0]).tolist()
    [2, 3]
    """
    if not 0.0 <= tolerance < math.inf:
        raise ConfigurationError(f"tolerance is {tolerance}; choose 0 (none) or more.")
    return _preferring(model, masked=masked or {}, preferred=preferred or {}, tolerance=tolerance, tokens=None)


@contextmanager
def _preferring(
    model: nn.Module, *, masked: Experts, preferred: Experts, tolerance: float, tokens: TokenRouting | None
) -> Iterator[None]:
    config: PreTrainedConfig = model.config  # type: ignore[assignment]
    check_enough_experts(config, masked)
    count = num_experts(config)
    channel = next((module.channel for module in model.modules() if isinstance(module, RemoteExperts)), None)
    additive = config.get_text_config().model_type in _RANK_LOGITS
    with ExitStack() as stack:
        if tokens is not None:
            for shut in tokens.sets_of_masked():
                check_enough_experts(config, shut)
            stack.enter_context(tokens.watching(model))
        for layer, router in _routers(model).items():
            masked_E, preferred_E = (_flags(chosen.get(layer, ()), count) for chosen in (masked, preferred))
            if tolerance == 0.0:
                preferred_E[:] = False
            if tokens is not None or bool((masked_E | preferred_E).any()):
                choose = partial(_choice, masked_E, preferred_E, tolerance, additive, tokens, layer, channel)
                stack.enter_context(_choosing(router, choose))
        yield


def check_job_routing(config: PreTrainedConfig, settings: ExpertSettings, placement: Placement) -> None:
    """Raise ConfigurationError where a job's settings could leave some party's token with too few experts."""
    check_enough_experts(config, opted_out_experts(placement))
    if settings.routes_by_token:
        for party in placement.hosts:
            for shut in TokenRouting(replace(settings, private_share=0.0), placement, party).sets_of_masked():
                check_enough_experts(config, shut)


def opted_out_experts(placement: Placement) -> dict[int, tuple[int, ...]]:
    """Return, per layer, the experts whose hosts have opted out."""
    return {
        layer: tuple(expert for expert, home in enumerate(homes) if home in placement.opted_out)
        for layer, homes in enumerate(placement.host_of)
    }


def check_enough_experts(config: PreTrainedConfig, masked: Experts) -> None:
    """Raise ConfigurationError where masking leaves fewer experts than a token is routed to."""
    text, count = config.get_text_config(), num_experts(config)
    wanted, groups = int(text.num_experts_per_tok), int(getattr(text, "n_group", None) or 1)
    for layer, experts in masked.items():
        odd = sorted({expert for expert in experts if not 0 <= expert < count})
        if odd:
            raise ConfigurationError(
                f"expert {odd[0]} of layer {layer} is masked; there are the experts 0 to {count - 1}."
            )
        left_GE = ~_flags(experts, count).view(groups, -1)
        left = int(left_GE.sum())
        if groups > 1:
            # A router takes its experts from `topk_group` groups, and ranks a group by one or two of its experts.
            by_group, taken = left_GE.sum(-1), int(text.topk_group)
            several = int((by_group >= min(2, left_GE.shape[1])).sum()) >= taken
            left = int(by_group[by_group > 0].sort().values[:taken].sum()) if several else 0
        if left < wanted:
            where = f", in the {text.topk_group} groups that it is routed to," if groups > 1 else ""
            raise ConfigurationError(
                f"in layer {layer}, {len(set(experts))} of {count} experts are masked or opted out, and a token may be "
                f"left{where} with {left} of the {wanted} that it is routed to. Let more experts take part."
            )


@contextmanager
def _choosing(router: nn.Module, choose: "Callable[[], _Choice]") -> Iterator[None]:
    """Let a router choose anew inside the block."""
    before, choose_as_built = router.__dict__.get("forward"), router.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with choose() as choice:
            out = choose_as_built(*args, **kwargs)
        if not choice.made:
            raise ModelError(
                f"the router {type(router).__name__} did not choose experts by torch.topk over all their scores, so "
                "that nothing can be masked or preferred. Unset opted_out, local_tolerance, routing_gap and private "
                "tokens for this family."
            )
        return out

    router.forward = forward
    try:
        yield
    finally:
        del router.forward  # what is left is the class's own
        if before is not None:
            router.forward = before


def _choice(
    masked_E: Tensor,
    preferred_E: Tensor,
    tolerance: float,
    additive: bool,
    tokens: TokenRouting | None,
    layer: int,
    channel: ExpertChannel | None,
) -> "_Choice":
    masked_NE = masked_E.unsqueeze(0)
    if tokens is not None:
        masked_NE = masked_NE | tokens.masked(layer, None if channel is None else channel.replay)
    return _Choice(masked_NE, preferred_E, tolerance, additive=additive)


class _Choice(TorchFunctionMode):
    """Inside it, the `topk` over all experts' scores ranks other scores than those that it returns.

    What is masked, ``[N, E]``, is each token's own, or of all: ``[1, E]``.
    """

    def __init__(self, masked_NE: Tensor, preferred_E: Tensor, tolerance: float, *, additive: bool) -> None:
        super().__init__()
        self._masked_NE, self._preferred_E = masked_NE, preferred_E
        self._tolerance, self._additive = tolerance, additive
        self.made = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, Tensor.topk, torch.max, Tensor.max) and args:
            scores, count = args[0], len(self._preferred_E)
            if scores.dim() == 3 and scores.shape[1] * scores.shape[2] == count:  # the scores by group
                masked_NGE = self._masked_NE.view(-1, *scores.shape[1:]).to(scores.device)
                return func(scores.masked_fill(masked_NGE, -math.inf), *args[1:], **kwargs)
            if scores.dim() == 2 and scores.shape[1] == count and func in (torch.topk, Tensor.topk):
                self.made = True
                expert_TK = func(self._ranked(scores.detach().float()), *args[1:], **kwargs)[1]
                return torch.return_types.topk((scores.gather(1, expert_TK), expert_TK))
        return func(*args, **kwargs)

    def _ranked(self, scores_TE: Tensor) -> Tensor:
        more_TE = scores_TE.abs() * self._tolerance
        if self._additive:
            more_TE = torch.full_like(scores_TE, math.log1p(self._tolerance))
        # An expert of a group that was not chosen has a score of minus infinity; it stays there.
        raised_E = self._preferred_E.to(scores_TE.device) & scores_TE.isfinite()
        ranked_TE = torch.where(raised_E, scores_TE + more_TE, scores_TE)
        return ranked_TE.masked_fill(self._masked_NE.to(scores_TE.device), -math.inf)


def _routers(model: nn.Module) -> dict[int, nn.Module]:
    """Return the routers of a model's layers with experts, by the layer's place among them."""
    remote = {name: module.layer for name, module in model.named_modules() if isinstance(module, RemoteExperts)}
    layers = remote or {name: layer for layer, name in enumerate(expert_modules(model))}
    if not layers:
        raise ModelError("the model has no experts, so that none can be masked or preferred; leave it as it is.")
    return {layer: _router_beside(model, name) for name, layer in layers.items()}


def _router_beside(model: nn.Module, name: str) -> nn.Module:
    above = name
    while above:  # adapters may have put modules of their own around the experts
        above = above.rpartition(".")[0]
        block = model.get_submodule(above)
        for leaf in ("gate", "router"):
            found = getattr(block, leaf, None)
            if isinstance(found, nn.Module):
                return found
    raise ModelError(f"no router ('gate' or 'router') is beside the experts {name!r}; this family is not known.")


def _flags(experts: Collection[int], count: int) -> Tensor:
    flags_E = torch.zeros(count, dtype=torch.bool)
    flags_E[list(experts)] = True
    return flags_E
