"""Deep leakage from gradients: move random embeddings until their gradient is the one that was seen."""

from vflair_flower.attacks.gradients.descent import descend, draw
from vflair_flower.attacks.gradients.distances import squared
from vflair_flower.attacks.gradients.replay import KINDS, Replay, guess_of
from vflair_flower.attacks.gradients.view import GradientView
from vflair_flower.attacks.guesses import TextGuess
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.registry import Goal, Phase, attack


@attack(
    "dlg",
    goal=Goal.TEXT,
    sees=GradientView,
    during=Phase.TRAINING,
    kinds=KINDS,
    paper="Zhu et al., NeurIPS 2019, arXiv 1906.08935; by Adam instead of L-BFGS, as LAMP's authors ran it again",
)
def dlg(view: GradientView, knows: Knowledge, *, seed: int = 0, steps: int = 2500, rate: float = 0.1) -> TextGuess:
    """Minimise the squared distance of the gradients, then take the nearest tokens.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`.
    steps : int
        Of Adam.
    rate : float
        Adam's, all the way.
    """
    replay = Replay(view, knows)
    found = descend(replay, draw(replay), squared, steps=steps, rate=rate)
    return guess_of(replay, found.embeds_BTD, knows)
