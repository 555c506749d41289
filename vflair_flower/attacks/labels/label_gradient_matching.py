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
    paper="the backward half of BiSR, Chen et al., CCS 2024, arXiv 2409.00960 (GMA-SL, where Gradient Mirage is from); "
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
    rate: float = 0.3,
    temperature: float = 1.0,
    squared: float = 0.75,
    floor: float = 0.3,
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
        count as not asked.  A second search, with equal shares for all others, then begins where the first ended.
    """
    matching = Matching(steps=steps, rate=rate, temperature=temperature, squared=squared)
    return guess_of(view, [_labels(knows.surrogate, exchange, matching, floor) for exchange in view.exchanges])


def _labels(surrogate: Surrogate, exchange: Exchange, matching: Matching, floor: float) -> Tensor:
    run = tail_pass(surrogate, exchange)
    observed = answer_grad(exchange).to(surrogate.device)
    observed_BM = observed.reshape(exchange.rows, -1)
    expected = run.logits.detach().softmax(-1)

    def pull(logits_grad: Tensor) -> Tensor:
        return run.pull(logits_grad, twice=True).reshape(observed_BM.shape)

    with twice_differentiable():
        if surrogate.task.kind.reads_whole_texts:
            shares_B = torch.full_like(expected[:, 0], 1 / exchange.rows)
            return match_labels(pull, observed_BM, expected, shares=shares_B, matching=matching).labels.argmax(-1)
        asked_BT = can_be_asked(exchange, surrogate.task.kind).to(surrogate.device) & (observed.norm(dim=-1) > 0)
        # From the model's own prediction: a token that is not asked then stays where it makes no gradient.
        first = match_labels(
            pull,
            observed_BM,
            expected,
            shares=asked_BT / asked_BT.sum().clamp_min(1),
            matching=matching,
            start=run.logits,
            shares_known=False,
        )
        if bool(asked_BT.any()):
            asked_BT &= first.shares > floor * first.shares[asked_BT].median()
        shares_BT = asked_BT / asked_BT.sum().clamp_min(1)
        second = match_labels(pull, observed_BM, expected, shares=shares_BT, matching=matching, start=first.logits)
    return second.labels.argmax(-1).where(asked_BT, NOTHING)
