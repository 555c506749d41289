"""TAG: as DLG, with absolute differences beside the squared ones, which weigh more near the input."""

from collections.abc import Sequence

from torch import Tensor

from vflair_flower.attacks.gradients.descent import descend, draw
from vflair_flower.attacks.gradients.distances import absolute, falling_weights, squared
from vflair_flower.attacks.gradients.replay import KINDS, Replay, guess_of
from vflair_flower.attacks.gradients.view import GradientView
from vflair_flower.attacks.guesses import TextGuess
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.registry import Goal, Phase, attack

_WARM_UP = 50


@attack(
    "tag",
    goal=Goal.TEXT,
    sees=GradientView,
    during=Phase.TRAINING,
    kinds=KINDS,
    paper="Deng et al., Findings of EMNLP 2021, arXiv 2103.06819; the dummies' step is clipped, which others who "
    "ran it found decisive",
)
def tag(
    view: GradientView,
    knows: Knowledge,
    *,
    seed: int = 0,
    steps: int = 1000,
    rate: float = 0.05,
    scale: float = 0.1,
    clip: float = 1.0,
) -> TextGuess:
    """Minimise squared and absolute differences of the gradients, then take the nearest tokens.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`.
    steps : int
        Of Adam.
    rate : float
        Adam's; rises over the first 50 steps and then falls to 0.
    scale : float
        How much an absolute difference weighs at the tensor nearest to the input; evenly less behind it.
    clip : float
        The most that the gradient by the dummies may measure; 0 for no limit.
    """
    replay = Replay(view, knows)
    weights = falling_weights(len(replay.names), scale)

    def distance(found: Sequence[Tensor], seen: Sequence[Tensor]) -> Tensor:
        return squared(found, seen) + absolute(found, seen, weights)

    def fall(step: int) -> float:
        return min((step + 1) / _WARM_UP, 1.0, (steps - step) / max(1, steps - _WARM_UP))

    found = descend(replay, draw(replay), distance, steps=steps, rate=rate, fall=fall, clip=clip)
    return guess_of(replay, found.embeds_BTD, knows)
