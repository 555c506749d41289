"""SIP: a learned inverter, trained on the adversary's own texts, reads each state by itself.

B rows, T tokens, K choices.  It never looks at the head again once it is trained: one forward pass per batch.
"""

from vflair_flower.attacks.guesses import TextGuess
from vflair_flower.attacks.inversion.inverter import read
from vflair_flower.attacks.inversion.inverter_training import train_inverter
from vflair_flower.attacks.inversion.rows import read_rows
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.registry import Goal, attack
from vflair_flower.attacks.view import SplitView


@attack(
    "sip",
    goal=Goal.TEXT,
    sees=SplitView,
    paper="Chen et al., BiSR, CCS 2024, arXiv 2409.00960; the network gives an embedding that is compared "
    "with the model's table, instead of a logit per token, and has a linear path, so that a thousand texts are enough",
)
def sip(
    view: SplitView,
    knows: Knowledge,
    *,
    seed: int = 0,
    inverter: str = "gru",
    epochs: int = 10,
    texts: int = 1000,
    batch_rows: int = 100,
) -> TextGuess:
    """Train an inverter on the auxiliary texts and read the seen states with it.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`.
    inverter : {"linear", "gru", "namoe"}
        See `vflair_flower.attacks.inversion.inverter`.
    epochs : int
        Passes over the auxiliary texts.
    texts : int
        The most auxiliary texts to use.
    batch_rows : int
        Rows read at once.
    """
    trained = train_inverter(knows, kind=inverter, epochs=epochs, texts=texts)
    table_VD = knows.surrogate.embedding
    return read_rows(
        view,
        batch_rows,
        lambda rows: read(trained, rows.hidden_BTD, rows.mask_BT, table_VD)[..., 0],
        device=knows.surrogate.device,
    )
