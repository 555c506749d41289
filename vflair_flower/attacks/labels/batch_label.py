"""Batch labels: soft labels of a whole batch for which the body's own gradient is the one that it computed.

B rows, T tokens, D hidden, C classes.  The model party always knows the gradient of its own parameters: it works it out
from what came up.  That gradient is a sum over the batch, and linear in the gradient of the answer, from which it is
made: whoever sees the latter has no need of the former, but a party that is only told averages may.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vflair_flower.attacks.guesses import LabelGuess
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.labels.gradient_matching import Matching, match_labels
from vflair_flower.attacks.labels.seen import (
    CLASSIFIES,
    answer_grad,
    tail_pass,
    twice_differentiable,
)
from vflair_flower.attacks.registry import Goal, Phase, attack
from vflair_flower.attacks.surrogate import Surrogate
from vflair_flower.attacks.view import Exchange, SplitView
from vflair_flower.partition.structure import find_stacks
from vflair_flower.settings import one_of

MATCHES = ("body", "cut")


@attack(
    "batch-label",
    goal=Goal.LABELS,
    sees=SplitView,
    paper="Zou et al., arXiv 2112.05409, as in VFLAIR-LLM, arXiv 2508.03097; the loss is the one that is trained, the "
    "cross-entropy against soft labels, and not the product of logits and labels, whose gradient never matches",
    during=Phase.TRAINING,
    kinds=CLASSIFIES,
)
def batch_label(
    view: SplitView,
    knows: Knowledge,
    *,
    seed: int = 0,
    match: str = "body",
    body_blocks: int = 1,
    steps: int = 200,
    rate: float = 0.3,
    squared: float = 1.0,
) -> LabelGuess:
    """Optimise the labels of a batch until they explain the gradient of the body, or of its answer.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`.
    match : {"body", "cut"}
        The gradient of the body's parameters, summed over the batch; or of the answer, the batch as a whole.
    body_blocks : int
        Of how many of the body's last blocks the parameters are matched; 0 is all.
    steps, rate, squared
        See `vflair_flower.attacks.labels.gradient_matching.Matching`.
    """
    one_of("match", match, MATCHES)
    matching = Matching(steps=steps, rate=rate, squared=squared)
    body = (knows.own or knows.surrogate) if match == "body" else None
    found = [_labels(knows.surrogate, body, one, matching, body_blocks) for one in view.exchanges]
    return LabelGuess(labels=torch.cat(found).cpu())


def _labels(
    surrogate: Surrogate, body: Surrogate | None, exchange: Exchange, matching: Matching, body_blocks: int
) -> Tensor:
    run = tail_pass(surrogate, exchange)
    observed = answer_grad(exchange).to(surrogate.device)
    shares_B = torch.full_like(run.logits[:, 0], 1 / exchange.rows).detach()
    with _own_gradient(body, exchange, body_blocks) as own, twice_differentiable():

        def pull(logits_grad: Tensor) -> Tensor:
            return own(run.pull(logits_grad, twice=True), True)

        found = match_labels(
            pull, own(observed, False), run.logits.detach().softmax(-1), shares=shares_B, matching=matching
        )
    return found.labels.argmax(-1)


@contextmanager
def _own_gradient(
    body: Surrogate | None, exchange: Exchange, blocks: int
) -> Iterator[Callable[[Tensor, bool], Tensor]]:
    """Give a function that makes of a gradient of the answer that of the body's parameters, [1, M]: a linear map.

    It also takes whether what it returns shall be differentiable.  The body runs without dropout here and ran with it
    there; both sides of the match go through the same map.  Without a body, the gradient is the answer's own.
    """
    if body is None:
        yield lambda grad, twice: grad.reshape(1, -1)
        return
    parameters = _parameters(body, blocks)
    before = [parameter.requires_grad for parameter in parameters]
    mask_BT = exchange.attention_mask_BT.to(body.device)
    for parameter in parameters:
        parameter.requires_grad_()

    def made(grad: Tensor, twice: bool) -> Tensor:
        found = torch.autograd.grad(
            answer, parameters, grad, retain_graph=True, create_graph=twice, materialize_grads=True
        )
        return torch.cat([one.reshape(-1) for one in found])[None]

    try:
        with torch.enable_grad(), twice_differentiable():
            answer = body.body(exchange.hidden_BTD.to(body.device), mask_BT, exchange.position_ids_BT)
        yield made
    finally:
        for parameter, wanted in zip(parameters, before, strict=True):
            parameter.requires_grad_(wanted)


def _parameters(body: Surrogate, blocks: int) -> list[nn.Parameter]:
    """Return the parameters of the body's last blocks; the task head, where it is the body's, goes with them."""
    chosen = list(body.body_model.parameters())
    if blocks:
        owned = body.plan.model_party(body.num_blocks).blocks
        stack = find_stacks(body.body_model)[-1].blocks  # type: ignore[arg-type]
        others = {id(p) for index in owned[:-blocks] for p in stack[index].parameters()}
        chosen = [p for p in chosen if id(p) not in others]
    return chosen
