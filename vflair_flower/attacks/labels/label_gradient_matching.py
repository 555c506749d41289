"""Label gradient matching: soft labels for which the tail sends the gradient that came up, row by row.

B rows, T tokens, D hidden, C classes, V vocabulary.  The gradient by a row's answer depends on no other row, so that
large batches protect nothing.
"""

import torch
from torch import Tensor

from vflair_flower.attacks.guesses import NOTHING, LabelGuess, TextGuess
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.labels.gradient_matching import Matching, match_labels
from vflair_flower.attacks.labels.seen import (
    CLASSIFIES_OR_WRITES,
    answer_grad,
    can_be_asked,
    guess_of,
    tail_pass,
    twice_differentiable,
)
from vflair_flower.attacks.registry import Goal, Phase, attack
from vflair_flower.attacks.surrogate import Surrogate
from vflair_flower.attacks.view import Exchange, SplitView


@attack(
    "label-gradient-matching",
    goal=Goal.LABELS,
    sees=SplitView,
    paper="the backward half of BiSR, Chen et al., CCS 2024, arXiv 2409.00960, and GMA-SL of the Gradient Mirage paper; "
    "distances are relative to what was seen, and how many tokens the loss is the mean of is found, not given",
    during=Phase.TRAINING,
    kinds=CLASSIFIES_OR_WRITES,
)
def label_gradient_matching(
    view: SplitView,
    knows: Knowledge,
    *,
    seed: int = 0,
    steps: int = 200,
    rate: float = 0.1,
    temperature: float = 1.0,
    squared: float = 0.75,
    floor: float = 0.1,
) -> LabelGuess | TextGuess:
    """Optimise soft labels until the tail's gradient by the answer is the one that came up.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`.
    steps, rate, temperature, squared
        See `vflair_flower.attacks.labels.gradient_matching.Matching`.
    floor : float
        Of a language model: tokens whose share of the loss is found smaller than this, relative to the batch's median,
        count as not asked.
    """
    matching = Matching(steps=steps, rate=rate, temperature=temperature, squared=squared)
    return guess_of(view, [_labels(knows.surrogate, exchange, matching, floor) for exchange in view.exchanges])


def _labels(surrogate: Surrogate, exchange: Exchange, matching: Matching, floor: float) -> Tensor:
    run = tail_pass(surrogate, exchange)
    observed = answer_grad(exchange).to(surrogate.device)
    rows, classifies = exchange.rows, surrogate.task.kind.reads_whole_texts
    if classifies:
        shares = torch.full_like(run.logits[..., 0], 1 / rows).detach()
    else:
        asked_BT = can_be_asked(exchange, surrogate.task.kind).to(surrogate.device)
        shares = asked_BT / asked_BT.sum()

    def pull(logits_grad: Tensor) -> Tensor:
        return run.pull(logits_grad, twice=True).reshape(rows, -1)

    with twice_differentiable():
        towards = match_labels(
            pull,
            observed.reshape(rows, -1),
            run.logits.detach().softmax(-1),
            shares=shares,
            matching=matching,
            shares_known=classifies,
        )
    return towards.argmax(-1) if classifies else towards.argmax(-1).where(asked_BT, NOTHING)
