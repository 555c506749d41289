"""The least likely tokens: a text that was not trained on has some that surprise the model."""

import math

import torch

from vflair_flower.attacks.guesses import MemberGuess
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.membership.losses import token_log_probs
from vflair_flower.attacks.membership.view import ModelView
from vflair_flower.attacks.registry import Goal, attack
from vflair_flower.errors import ConfigurationError
from vflair_flower.settings import TaskKind


@attack(
    "min-k",
    goal=Goal.MEMBERS,
    sees=ModelView,
    paper="Shi et al., ICLR 2024, arXiv 2310.16789 (Min-K% Prob); only over the tokens that training asked for",
    kinds=(TaskKind.CAUSAL_LM,),
)
def min_k(view: ModelView, knows: Knowledge, *, seed: int = 0, share: float = 0.2, batch_rows: int = 32) -> MemberGuess:
    """Score each candidate by the mean log probability of its least likely tokens.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`.
    share : float
        Which part of the tokens; one at least is taken.
    batch_rows : int
        Rows at once.

    Raises
    ------
    ConfigurationError
        `share` is not in 0..1.
    """
    if not 0.0 < share <= 1.0:
        raise ConfigurationError(f"share is {share}, but it is a part of the tokens. Choose 0 < share <= 1.")
    tokens = token_log_probs(
        view.model, view.candidates, kind=view.task.kind, pad_token_id=knows.pad_id, batch_rows=batch_rows
    )
    lowest = [one.topk(math.ceil(share * len(one)), largest=False).values.mean() for one in tokens]
    return MemberGuess(scores=torch.stack(lowest))
