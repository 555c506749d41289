"""Gradient descent on dummy embeddings, the same for DLG, TAG and LAMP.

B rows, T tokens, D hidden, C classes.  Where labels are not known they are optimised too, as scores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vflair_flower.attacks.gradients.replay import Replay

Distance = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Dummies:
    """Where an optimisation stands.

    Parameters
    ----------
    embeds_BTD : Tensor
        The embeddings.
    scores_BC : Tensor or None
        Of the labels, where these are not known.
    """

    embeds_BTD: Tensor
    scores_BC: Tensor | None

    def moved(self, embeds_BTD: Tensor) -> "Dummies":
        """Return the same with other embeddings."""
        return Dummies(embeds_BTD=embeds_BTD, scores_BC=self.scores_BC)


def draw(replay: Replay, *, length: float | None = None) -> Dummies:
    """Return random dummies: standard normal embeddings, or such of a given length."""
    shape = (*replay.ids_BT.shape, replay.table_VD.shape[1])
    embeds_BTD = torch.randn(shape, device=replay.device)
    if length is not None:
        embeds_BTD = embeds_BTD / embeds_BTD.norm(dim=-1, keepdim=True) * length
    scores_BC = None if replay.labels is not None else torch.randn(replay.rows, replay.classes, device=replay.device)
    return Dummies(embeds_BTD=embeds_BTD, scores_BC=scores_BC)


def distance_of(replay: Replay, dummies: Dummies, distance: Distance) -> float:
    """Return how far the dummies' gradient is from the one that was seen."""
    targets_BC = replay.targets(dummies.scores_BC)
    found = replay.gradients(dummies.embeds_BTD, targets_BC, differentiable=False)
    return float(distance(found, replay.target))


def descend(
    replay: Replay,
    start: Dummies,
    distance: Distance,
    *,
    steps: int,
    rate: float,
    fall: Callable[[int], float] = lambda step: 1.0,
    clip: float = 0.0,
    rule: Callable[[Tensor], Tensor] | None = None,
    shuffle: Callable[[int, Dummies], Tensor | None] = lambda step, dummies: None,
    keep_best: bool = False,
) -> Dummies:
    """Move dummies by Adam until their gradient is the one that was seen.

    Parameters
    ----------
    replay : Replay
        The surrogate's gradient and the one that was seen.
    start : Dummies
        Where to begin.
    distance : callable
        Of two lists of gradients; what is minimised.
    steps : int
        How many.
    rate : float
        Adam's.
    fall : callable
        What the rate is multiplied with at a step.
    clip : float
        The most that the gradient by the embeddings may measure; 0 for no limit.
    rule : callable, optional
        A term of the embeddings [B, T, D] that is added to the distance.
    shuffle : callable
        Told the step and the dummies before it, returns other embeddings to go on from, or None.
    keep_best : bool
        Return those dummies that had the least distance and rule together, not the last.
    """
    embeds_BTD = start.embeds_BTD.detach().clone().requires_grad_()
    scores_BC = None if start.scores_BC is None else start.scores_BC.detach().clone().requires_grad_()
    moving = [embeds_BTD] if scores_BC is None else [embeds_BTD, scores_BC]
    optimizer = torch.optim.Adam(moving, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, fall)
    now = Dummies(embeds_BTD=embeds_BTD, scores_BC=scores_BC)
    best, least = now, float("inf")
    for step in range(steps):
        with torch.no_grad():
            shuffled_BTD = shuffle(step, now)
            if shuffled_BTD is not None:
                embeds_BTD.copy_(shuffled_BTD)
        loss = distance(replay.gradients(embeds_BTD, replay.targets(scores_BC)), replay.target)
        if rule is not None:
            loss = loss + rule(embeds_BTD)
        far = float(loss.detach())
        if keep_best and far < least:
            least, best = far, _copy(now)
        found = torch.autograd.grad(loss, moving)
        for one, gradient in zip(moving, found, strict=True):
            one.grad = gradient
        if clip:
            torch.nn.utils.clip_grad_norm_(moving, clip)
        optimizer.step()
        schedule.step()
    return best if keep_best else _copy(now)


def _copy(dummies: Dummies) -> Dummies:
    scores_BC = None if dummies.scores_BC is None else dummies.scores_BC.detach().clone()
    return Dummies(embeds_BTD=dummies.embeds_BTD.detach().clone(), scores_BC=scores_BC)
