"""The load-balancing loss of all parties' tokens together, though each party sees its own routers alone.

Switch Transformers (Fedus et al., arXiv 2101.03961, eq. 4 to 6), in the form that transformers computes: over the
tokens of all layers, padding left out, ``E * sum_e f_e P_e`` with f_e the choices of expert e per token, and P_e the
mean of the router's probabilities.  Only P_e has a gradient, and it is a sum over tokens, so a party needs of the
others no more than their sum of choices: E whole numbers, and the number of tokens.

E experts of a layer, T tokens of a forward pass with padding, S numbers that a party sends.
Invariant: with gradients weighted by items, as hosts and averaging weight them, the parties' terms add up to the
gradient of the loss of the joined batch.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from vflair_flower.errors import ConfigurationError, SessionError
from vflair_flower.experts.modules import num_experts
from vflair_flower.partition.loading import task_class
from vflair_flower.remote.protocol import FINISH
from vflair_flower.remote.schedule import Barrier
from vflair_flower.session import Link, OperationSpec, Reply, Request, TensorSpec
from vflair_flower.spec import SplitSpec
from vflair_flower.training.evaluation import asked_labels

BALANCER = "balancer"
"""Name of the hub's endpoint that sums parties' counts, in sessions that balance."""
BALANCE = "balance"

Exchange = Callable[[Tensor], Tensor]


def balances_jointly(spec: SplitSpec) -> bool:
    """Whether parties sum their counts at every step; else each balances its own batch, or none does."""
    return spec.experts is not None and spec.experts.balance_coefficient > 0 and spec.experts.schedule == "concurrent"


def balance_operation(config: PreTrainedConfig) -> OperationSpec:
    """Return what crosses: `counts` [E + 2] each way, the choices per expert, the tokens, and the items of the loss."""
    counts = TensorSpec("counts", (torch.int64,), (num_experts(config) + 2,), (True,))
    return OperationSpec((counts,), (counts,))


def refuse_balance(spec: SplitSpec, config: PreTrainedConfig) -> None:
    """Raise ConfigurationError if the loss is asked for, and the family has none or batches come in portions."""
    assert spec.experts is not None
    if not spec.experts.balance_coefficient:
        return
    cls = task_class(config, spec.task)
    if not hasattr(sys.modules[cls.__module__], "load_balancing_loss_func"):
        raise ConfigurationError(
            f"balance_coefficient is {spec.experts.balance_coefficient:g}, and the model family is "
            f"{config.get_text_config().model_type!r}, for which transformers has no load-balancing loss. Set it to 0, "
            "or choose Mixtral, OLMoE, Qwen3-MoE or GPT-OSS."
        )
    size = spec.training.micro_batch_size
    if 0 < size < spec.training.batch_size:
        raise ConfigurationError(
            f"balance_coefficient is {spec.experts.balance_coefficient:g} and micro_batch_size {size}; the load is "
            f"that of whole batches ({spec.training.batch_size} rows), which no portion shows. Set micro_batch_size "
            "to 0."
        )


class LoadCounter:
    """The hub's end: a `Handler` that answers each party with the sum of all parties' counts.

    Parameters
    ----------
    parties : sequence of str
        Of the session.
    deadline_s : float
        Longest wait for the others, in seconds.
    """

    def __init__(self, parties: Sequence[str], deadline_s: float) -> None:
        self._barrier = Barrier(parties, deadline_s)
        self._lock = threading.Lock()
        self._given: dict[str, Tensor] = {}
        self._sum: Tensor | None = None

    def __call__(self, request: Request) -> Reply:
        """Answer a `balance` call; a `finish` call takes the party out."""
        if request.operation == FINISH:
            self.leave(request.source)
            return Reply({})
        if request.operation != BALANCE:
            raise SessionError(f"the operation {request.operation!r} is unknown to the balancer.")
        counts_S = request.tensors["counts"]
        if int(counts_S.min()) < 0 or int(counts_S[-1]) < 1:
            raise SessionError(
                f"'{request.source}' counts {int(counts_S.min())} choices and {int(counts_S[-1])} items; a batch has "
                "at least one item, and nothing is chosen less than never."
            )
        with self._lock:
            self._given[request.source] = counts_S
        self._barrier.arrive(request.source, self._add)
        # Nobody can complete the next sum before this party has arrived again, so it is still this step's.
        assert self._sum is not None
        return Reply({"counts": self._sum})

    def leave(self, party: str) -> None:
        """Take a party out that is done or lost."""
        self._barrier.leave(party)

    def _add(self, arrived: list[str]) -> None:
        with self._lock:
            self._sum = torch.stack([self._given.pop(party) for party in arrived]).sum(0)


def exchange_over(link: Link) -> Exchange:
    """Return what sends a party's counts to the hub and brings back the sum of all."""

    def exchange(counts_S: Tensor) -> Tensor:
        return link.call(BALANCER, BALANCE, {"counts": counts_S}, {}).tensors["counts"]

    return exchange


@contextmanager
def load_balance(model: nn.Module, spec: SplitSpec, exchange: Exchange | None = None) -> Iterator[None]:
    """Add the loss to a model's own, in training, inside the block.

    Parameters
    ----------
    model : torch.nn.Module
        A party's own task model, or its `PeftModel`; it must be called with labels, once for each optimiser step.
    spec : SplitSpec
        With `experts`; a `balance_coefficient` of 0 does nothing.
    exchange : callable, optional
        Returns the sum of all parties' counts; by default this party's own are all there are.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    assert spec.experts is not None
    # A checkpoint may ask transformers for the loss, which would be of this party's tokens, and in evaluation too.
    inner.config.get_text_config().output_router_logits = False
    if not spec.experts.balance_coefficient:
        yield
        return
    term = _Term(inner.config, spec, exchange or (lambda counts_S: counts_S))
    routers = (inner._can_record_outputs or {})["router_logits"].target_class
    hooks = [m.register_forward_hook(term.note_router) for m in inner.modules() if isinstance(m, routers)]
    hooks.append(model.register_forward_pre_hook(term.begin))
    hooks.append(model.register_forward_hook(term.add, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Term:
    """Gathers what the routers of one forward pass say, and adds the loss to the pass's own."""

    def __init__(self, config: PreTrainedConfig, spec: SplitSpec, exchange: Exchange) -> None:
        assert spec.experts is not None
        self._coefficient = spec.experts.balance_coefficient
        self._experts = num_experts(config)
        self._per_token = int(config.get_text_config().num_experts_per_tok)
        self._kind = spec.task.kind
        self._exchange = exchange
        self._logits: list[Tensor] | None = None

    def begin(self, model: nn.Module, _args: Any) -> None:
        self._logits = [] if model.training and torch.is_grad_enabled() else None

    def note_router(self, _router: nn.Module, _args: Any, output: tuple[Tensor, ...]) -> None:
        if self._logits is not None:  # None as well where a layer is computed again in the backward pass
            self._logits.append(output[0])

    def add(self, _model: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        logits, self._logits = self._logits, None
        if logits is None:
            return output
        labels = kwargs.get("labels")
        if not isinstance(labels, Tensor) or getattr(output, "loss", None) is None:
            raise SessionError(
                "balance_coefficient is set, and the model was called in training without labels, so there is no loss "
                "to add to. Give labels by name, call eval() or no_grad() for what is not trained on, or set it to 0."
            )
        output.loss = output.loss + self._coefficient * self._loss(logits, kwargs.get("attention_mask"), labels)
        return output

    def _loss(self, logits: list[Tensor], mask_BT: Tensor | None, labels: Tensor) -> Tensor:
        """Return the loss of all parties' tokens, of which this party's have a gradient, times its share's inverse."""
        chosen_E = torch.zeros(self._experts, device=logits[0].device)
        probability_E = torch.zeros_like(chosen_E)
        real_T = torch.ones(len(logits[0])) if mask_BT is None else mask_BT.reshape(-1).float()
        real_T = real_T.to(chosen_E.device)
        for logits_TE in logits:
            probability_TE = logits_TE.softmax(-1)
            expert_TK = probability_TE.topk(self._per_token, dim=-1).indices
            chosen_E = chosen_E.scatter_add(0, expert_TK.reshape(-1), real_T.repeat_interleave(self._per_token))
            probability_E = probability_E + (probability_TE.float() * real_T.unsqueeze(-1)).sum(0)
        own_tokens = len(logits) * int(real_T.sum())
        items = max(1, asked_labels(labels, self._kind))
        own_S = torch.cat([chosen_E.long().cpu(), torch.tensor([own_tokens, items])])
        all_S = self._exchange(own_S)
        tokens = float(all_S[-2])
        share_E = all_S[:-2].to(chosen_E) / tokens
        loss = torch.sum(share_E * (probability_E / tokens)) * self._experts
        return loss * (int(all_S[-1]) / items)
