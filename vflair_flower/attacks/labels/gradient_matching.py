"""Matching a gradient: look for the soft labels whose cross-entropy makes the gradient that was seen.

C classes or vocabulary, G groups that are matched each by itself (rows, or a whole batch), M numbers of a group.
The cross-entropy of p against soft labels q has the gradient (p - q) / N by the logits, and what follows from it at a
cut or at parameters is linear in it (`pull`).  So each step is one backward pass through the tail and one back.
Invariant: q sums to 1 at every item, and at the true labels the loss is zero if the adversary's tail is the victim's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vflair_flower.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Matching:
    """How soft labels are looked for.

    Parameters
    ----------
    steps : int
        Of Adam.
    rate : float
        Of Adam, on the soft labels' logits.
    temperature : float
        q = softmax(Z / temperature).
    squared : float
        Share of the squared distance in the loss, in 0..1; the rest is of the sum of absolute differences.
    """

    steps: int = 200
    rate: float = 0.3
    temperature: float = 1.0
    squared: float = 0.75

    def __post_init__(self) -> None:
        if not (self.steps >= 1 and self.rate > 0 and self.temperature > 0 and 0 <= self.squared <= 1):
            raise ConfigurationError(
                f"matching has {self.steps} steps at rate {self.rate}, temperature {self.temperature} and a share of "
                f"squares of {self.squared}; give at least one step, a rate and a temperature above 0, and a share in "
                "0..1."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Matched:
    """What was found.

    Parameters
    ----------
    labels : Tensor
        The soft labels q, [..., C].
    shares : Tensor
        [...], as they were given, or as they were found.
    logits : Tensor
        Z, from which a further search can start.
    loss_G : Tensor
        How far off each group's gradient is, relative to itself.
    """

    labels: Tensor
    shares: Tensor
    logits: Tensor
    loss_G: Tensor


def match_labels(
    pull: Callable[[Tensor], Tensor],
    observed_GM: Tensor,
    probabilities: Tensor,
    *,
    shares: Tensor,
    matching: Matching,
    start: Tensor | None = None,
    shares_known: bool = True,
) -> Matched:
    """Return soft labels whose gradient is the one that was seen.

    Parameters
    ----------
    pull : callable
        Makes of a gradient by the logits, [..., C], what it causes where the adversary looked, [G, M]; linear, and
        differentiable.
    observed_GM : Tensor
        What was seen there.
    probabilities : Tensor
        p, [..., C].
    shares : Tensor
        [...], how much each item counts in the loss: 1 / N, and 0 for those that are not asked.
    matching : Matching
        See there.
    start : Tensor, optional
        Z at first, [..., C]; zeros by default.
    shares_known : bool
        Whether `shares` are right; else they are where a search for them begins, which leaves zeros alone.

    Returns
    -------
    Matched
        What was found at the last step.
    """
    soft = (torch.zeros_like(probabilities) if start is None else start.detach().clone()).requires_grad_()
    log_shares = torch.zeros_like(shares).requires_grad_(not shares_known)
    optimizer = torch.optim.Adam([soft] if shares_known else [soft, log_shares], lr=matching.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, matching.steps, eta_min=matching.rate / 10)
    squares_G = observed_GM.square().sum(-1).clamp_min(1e-30)
    sums_G = observed_GM.abs().sum(-1).clamp_min(1e-15)
    for _ in range(matching.steps):
        optimizer.zero_grad()
        labels = (soft / matching.temperature).softmax(-1)
        weights = shares * log_shares.exp()
        apart_GM = pull((probabilities - labels) * weights[..., None]) - observed_GM
        loss_G = matching.squared * apart_GM.square().sum(-1) / squares_G
        loss_G = loss_G + (1 - matching.squared) * apart_GM.abs().sum(-1) / sums_G
        gradients = torch.autograd.grad(loss_G.sum(), [soft] if shares_known else [soft, log_shares])
        soft.grad = gradients[0]
        if not shares_known:
            log_shares.grad = gradients[1]
        optimizer.step()
        schedule.step()
    labels = (soft.detach() / matching.temperature).softmax(-1)
    return Matched(
        labels=labels, shares=shares * log_shares.detach().exp(), logits=soft.detach(), loss_G=loss_G.detach()
    )
