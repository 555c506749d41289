"""The loss alone: what was trained on has a small one."""

from vflair_flower.attacks.guesses import MemberGuess
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.membership.losses import KINDS, row_losses
from vflair_flower.attacks.membership.view import ModelView
from vflair_flower.attacks.registry import Goal, attack


@attack(
    "loss-threshold",
    goal=Goal.MEMBERS,
    sees=ModelView,
    paper="Yeom et al., CSF 2018, arXiv 1709.01604; the score is given, not one threshold",
    kinds=KINDS,
)
def loss_threshold(view: ModelView, knows: Knowledge, *, seed: int = 0, batch_rows: int = 32) -> MemberGuess:
    """Score each candidate by its loss with the sign turned.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`.
    batch_rows : int
        Rows at once.
    """
    losses = row_losses(
        view.model, view.candidates, kind=view.task.kind, pad_token_id=knows.pad_id, batch_rows=batch_rows
    )
    return MemberGuess(scores=-losses)
