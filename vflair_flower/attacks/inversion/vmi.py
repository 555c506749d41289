"""Vanilla model inversion: look for the embeddings whose hidden states at the cut are those that were seen.

B rows, T tokens, D hidden.  All rows of a batch are optimised at once and each row by its own loss; Adam treats every
number by itself, so a row's result does not depend on its batch but for rounding.
"""

import torch
from torch import Tensor

from vflair_flower.attacks.guesses import TextGuess
from vflair_flower.attacks.inversion.matching import nearest_tokens, row_distances
from vflair_flower.attacks.inversion.rows import Rows, batches_of, in_order
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.registry import Goal, attack
from vflair_flower.attacks.surrogate import Surrogate
from vflair_flower.attacks.view import SplitView

_LOOK_EVERY = 20


@attack(
    "vmi",
    goal=Goal.TEXT,
    sees=SplitView,
    paper="Fredrikson et al., CCS 2015, as in VFLAIR-LLM, arXiv 2508.03097; the loss is a distance, not a "
    "cross-entropy of real numbers, which has no minimum",
)
def vmi(
    view: SplitView,
    knows: Knowledge,
    *,
    seed: int = 0,
    steps: int = 300,
    rate: float = 0.02,
    loss: str = "mse",
    batch_rows: int = 100,
    tolerance: float = 1e-4,
) -> TextGuess:
    """Optimise embeddings by Adam, from their table's mean, and take the nearest tokens.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`.
    steps : int
        At most; a batch stops early when the tokens of all its rows, sent through the head, give what was seen.
    rate : float
        Adam's, relative to the root mean square of the embeddings' numbers, which models differ in; falls to 0.
    loss : {"mse", "cosine"}
        See `vflair_flower.attacks.inversion.matching`.
    batch_rows : int
        Rows at once.
    tolerance : float
        The distance below which tokens count as found.
    """
    places: list[int] = []
    found: list[Tensor] = []
    for rows in batches_of(view, batch_rows, device=knows.surrogate.device):
        table_VD = knows.surrogate.embedding
        start_BTD = table_VD.mean(0).expand(*rows.hidden_BTD.shape[:2], -1).clone()
        ids_BT = invert(knows.surrogate, rows, start_BTD, steps=steps, rate=rate, loss=loss, tolerance=tolerance)
        places += rows.places
        found += [ids[mask.bool()] for ids, mask in zip(ids_BT.cpu(), rows.mask_BT.cpu(), strict=True)]
    return TextGuess(ids=in_order(places, found))


def invert(
    surrogate: Surrogate,
    rows: Rows,
    start_BTD: Tensor,
    *,
    steps: int,
    rate: float,
    loss: str,
    tolerance: float,
) -> Tensor:
    """Return the tokens, int64 [B, T], that embeddings lead to which begin at `start_BTD`; parameters as in `vmi`."""
    table_VD = surrogate.embedding
    embeds_BTD = start_BTD.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([embeds_BTD], lr=rate * float(table_VD.square().mean().sqrt()) / 0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    ids_BT = nearest_tokens(embeds_BTD.detach(), table_VD)
    for step in range(steps):
        optimizer.zero_grad()
        hidden_BTD = surrogate.head(embeds_BTD, rows.mask_BT, rows.positions_BT)
        row_distances(hidden_BTD, rows.hidden_BTD, rows.mask_BT, loss).sum().backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % _LOOK_EVERY == 0 or step + 1 == steps:
            ids_BT = nearest_tokens(embeds_BTD.detach(), table_VD)
            if bool((_errors(surrogate, rows, ids_BT, loss) < tolerance).all()):
                break
    return ids_BT


@torch.no_grad()
def _errors(surrogate: Surrogate, rows: Rows, ids_BT: Tensor, loss: str) -> Tensor:
    hidden_BTD = surrogate.head_of_ids(ids_BT, rows.mask_BT, rows.positions_BT)
    return row_distances(hidden_BTD, rows.hidden_BTD, rows.mask_BT, loss)
