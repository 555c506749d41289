"""The loss beside that of the public model: a text that is easy for any model proves nothing by a small loss."""

from vflair_flower.attacks.guesses import MemberGuess
from vflair_flower.attacks.knowledge import HeadKnowledge, Knowledge
from vflair_flower.attacks.membership.losses import KINDS, row_losses
from vflair_flower.attacks.membership.view import ModelView
from vflair_flower.attacks.registry import Goal, attack
from vflair_flower.errors import ConfigurationError


@attack(
    "reference-loss",
    goal=Goal.MEMBERS,
    sees=ModelView,
    paper="Watson et al., ICLR 2022, arXiv 2111.08440, with one reference: the checkpoint that training began with, as "
    "in Mireshghallah et al., EMNLP 2022, arXiv 2203.03929",
    kinds=KINDS,
    knowledge=(HeadKnowledge.PUBLIC, HeadKnowledge.ARCHITECTURE),
)
def reference_loss(view: ModelView, knows: Knowledge, *, seed: int = 0, batch_rows: int = 32) -> MemberGuess:
    """Score each candidate by how much smaller its loss became.

    Where the reference has a new classifier, its losses say little, and this is nearly the loss alone.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`.
    batch_rows : int
        Rows at once.

    Raises
    ------
    ConfigurationError
        The adversary's copy is the finished model itself.
    """
    refuse_exact(knows, "reference-loss")
    before, after = (
        row_losses(model, view.candidates, kind=view.task.kind, pad_token_id=knows.pad_id, batch_rows=batch_rows)
        for model in (knows.surrogate.whole, view.model)
    )
    return MemberGuess(scores=before - after)


def refuse_exact(knows: Knowledge, name: str) -> None:
    """Raise ConfigurationError if the adversary's copy is the finished model, which is in the view anyway."""
    if knows.head is HeadKnowledge.EXACT:
        raise ConfigurationError(
            f"attack {name!r} takes its reference from the adversary's copy, and that is the finished model itself "
            "(head knowledge 'exact'), to which nothing can be compared. Give it the 'public' checkpoint."
        )
