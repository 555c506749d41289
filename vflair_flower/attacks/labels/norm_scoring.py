"""Norm scoring: rows of the rarer or harder class are further from being right, and their gradients longer.

B rows, T tokens, D hidden, C classes.
"""

import torch

from vflair_flower.attacks.guesses import LabelGuess
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.labels.seen import CLASSIFIES, row_gradients
from vflair_flower.attacks.registry import Goal, Phase, attack
from vflair_flower.attacks.view import SplitView


@attack(
    "norm-scoring",
    goal=Goal.LABELS,
    sees=SplitView,
    paper="Li et al., ICLR 2022, arXiv 2102.08504; the score is the norm itself, not scaled by its batch",
    during=Phase.TRAINING,
    kinds=CLASSIFIES,
)
def norm_scoring(view: SplitView, knows: Knowledge, *, seed: int = 0) -> LabelGuess:
    """Score each row by the length of its gradient.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`.
    """
    return LabelGuess(scores=torch.stack([grad.norm() for grad in row_gradients(view)]))
