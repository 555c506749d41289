"""LAMP: continuous steps on embeddings, and between them discrete ones, which try other orders of the same words.

B rows, T tokens, D hidden.  A discrete step takes the order that is best in two ways at once: its gradient is near the
one that was seen, and it reads like a text.
"""

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vflair_flower.attacks.gradients.descent import Distance, Dummies, descend, distance_of, draw
from vflair_flower.attacks.gradients.distances import absolute, squared, turned
from vflair_flower.attacks.gradients.prior import NgramPrior
from vflair_flower.attacks.gradients.replay import KINDS, Replay, guess_of
from vflair_flower.attacks.gradients.view import GradientView
from vflair_flower.attacks.guesses import TextGuess
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.registry import Goal, Phase, attack
from vflair_flower.settings import one_of

LOSSES = ("cosine", "l2l1")
_FALL, _FALL_EVERY = 0.89, 50
_BURN_IN = 0.1
_L1 = 0.01
_USUAL_SIZE = 0.05


@attack(
    "lamp",
    goal=Goal.TEXT,
    sees=GradientView,
    during=Phase.TRAINING,
    kinds=KINDS,
    paper="Balunovic et al., NeurIPS 2022, arXiv 2202.08827; the language model is of trigrams over the adversary's "
    "own texts, not a GPT-2",
)
def lamp(
    view: GradientView,
    knows: Knowledge,
    *,
    seed: int = 0,
    loss: str = "cosine",
    steps: int = 2000,
    rate: float = 0.01,
    starts: int = 500,
    every: int = 75,
    proposals: int = 200,
    length_weight: float = 1.0,
    prior_weight: float = 0.2,
) -> TextGuess:
    """Alternate continuous and discrete steps, then take the nearest tokens of the best embeddings.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`; `knows.auxiliary` is what the prior is made of.
    loss : {"cosine", "l2l1"}
        How far gradients are apart: by direction, tensor by tensor; or squared and 0.01 of absolute differences.
    steps : int
        Of Adam.
    rate : float
        Adam's, where the embeddings' numbers have a root mean square of 0.05, as BERT's have, and relative to it where
        they have another; 0.89 of it after every 50 steps.
    starts : int
        How many random starts are looked at, and then how many orders of the best.
    every : int
        Steps between two discrete ones, of which the first tenth has none.
    proposals : int
        Orders that a discrete step tries for each row; 0 for no discrete steps.
    length_weight : float
        Of the squared difference between the embeddings' mean length and that of words.
    prior_weight : float
        Of how surprising a text is, in nats per token; 0 for no prior.
    """
    one_of("loss", loss, LOSSES)
    replay = Replay(view, knows)
    measure = _distance(loss, len(replay.names))
    usual = float(replay.table_VD.norm(dim=-1).mean())
    rng = random.Random(seed)
    prior = NgramPrior((row.input_ids for row in knows.auxiliary), len(replay.table_VD))

    def rule(embeds_BTD: Tensor) -> Tensor:
        lengths: Tensor = torch.linalg.vector_norm(embeds_BTD[~replay.pinned_BT], dim=-1)
        unusual: Tensor = (lengths.mean() - usual).square()
        return length_weight * unusual

    def worth(dummies: Dummies) -> float:
        ids_BT = replay.nearest(dummies.embeds_BTD, knows.special_ids)
        texts = replay.texts(ids_BT) if prior_weight else ()
        surprise = sum(prior.surprise(text.tolist()) for text in texts) / replay.rows
        return distance_of(replay, dummies, measure) + prior_weight * surprise

    def shuffle(step: int, dummies: Dummies) -> Tensor | None:
        if not proposals or step < _BURN_IN * steps or (step + 1) % every:
            return None
        return _best_order(replay, dummies, worth, proposals, rng)

    start = _start(replay, measure, starts, usual, rng)
    found = descend(
        replay,
        start,
        measure,
        steps=steps,
        rate=rate * float(replay.table_VD.square().mean().sqrt()) / _USUAL_SIZE,
        fall=lambda step: _FALL ** (step // _FALL_EVERY),
        rule=rule,
        shuffle=shuffle,
        keep_best=True,
    )
    return guess_of(replay, found.embeds_BTD, knows)


def _distance(loss: str, count: int) -> Distance:
    def both(found: Sequence[Tensor], seen: Sequence[Tensor]) -> Tensor:
        return squared(found, seen) + absolute(found, seen, [_L1] * count)

    return turned if loss == "cosine" else both


def _start(replay: Replay, measure: Distance, starts: int, usual: float, rng: random.Random) -> Dummies:
    """Return the best of some random starts, in the best of as many orders."""
    best, least = draw(replay, length=usual), float("inf")
    for _ in range(starts):
        drawn = draw(replay, length=usual)
        far = distance_of(replay, drawn, measure)
        if far < least:
            best, least = drawn, far
    for _ in range(starts):
        embeds_BTD = best.embeds_BTD.clone()
        for row in range(replay.rows):
            places = _free(replay, row)
            embeds_BTD[row, places] = embeds_BTD[row, rng.sample(places, len(places))]
        moved = best.moved(embeds_BTD)
        far = distance_of(replay, moved, measure)
        if far < least:
            best, least = moved, far
    return best


def _best_order(
    replay: Replay, dummies: Dummies, worth: Callable[[Dummies], float], proposals: int, rng: random.Random
) -> Tensor:
    """Return the embeddings in the best of some orders; rows one after another."""
    embeds_BTD = dummies.embeds_BTD.detach().clone()
    least = worth(dummies.moved(embeds_BTD))
    for row in range(replay.rows):
        places = _free(replay, row)
        before_TD, best = embeds_BTD[row].clone(), None
        for number in range(proposals if len(places) > 1 else 0):
            order = _other_order(places, number, rng)
            embeds_BTD[row, places] = before_TD[order]
            far = worth(dummies.moved(embeds_BTD))
            if far < least:
                least, best = far, order
        embeds_BTD[row] = before_TD
        if best is not None:
            embeds_BTD[row, places] = before_TD[best]
    return embeds_BTD


def _other_order(places: list[int], number: int, rng: random.Random) -> list[int]:
    """Return places in another order: two swapped, one moved, a run of them moved, or a beginning put at the end."""
    order, count = list(places), len(places)
    kind = number % 4
    if kind == 0:
        one, other = rng.sample(range(count), 2)
        order[one], order[other] = order[other], order[one]
    elif kind == 1:
        taken = order.pop(rng.randrange(count))
        order.insert(rng.randrange(count), taken)
    elif kind == 2:
        first, last = sorted(rng.sample(range(count + 1), 2))
        run, rest = order[first:last], order[:first] + order[last:]
        at = rng.randint(0, len(rest))
        order = rest[:at] + run + rest[at:]
    else:
        cut = rng.randrange(1, count)
        order = order[cut:] + order[:cut]
    return order


def _free(replay: Replay, row: int) -> list[int]:
    """Return the places of a row that are not known."""
    return [int(place) for place in torch.nonzero(~replay.pinned_BT[row]).flatten()]
