"""From embeddings to tokens: of the likeliest tokens for each place, those whose hidden states are the seen ones.

B rows, T tokens, K choices.  An optimised embedding lies near several tokens, and a model may not care how long an
embedding is, so the nearest is not always the true one; what the head makes of a token tells.
Invariant: a row's distance from what was seen never grows.
"""

import torch
from torch import Tensor

from vflair_flower.attacks.inversion.matching import token_distances
from vflair_flower.attacks.inversion.rows import Rows
from vflair_flower.attacks.surrogate import Surrogate

_ROUNDS = 3


@torch.no_grad()
def settle(
    surrogate: Surrogate, rows: Rows, choices_BTK: Tensor, *, loss: str, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Choose tokens by what the head makes of them.

    All unsettled places of a row try their k-th choice at once, and each keeps what brings its own state nearest: a
    state depends on its own token most.  If that does not help the row as a whole, the row stays as it was.

    Parameters
    ----------
    surrogate, rows
        What is compared.
    choices_BTK : Tensor
        Int64 [B, T, K], where a search begins with ``[..., 0]``.
    loss : {"mse", "cosine"}
        See `token_distances`.
    tolerance : float
        A place whose distance is below counts as settled, and a row when all its places are.

    Returns
    -------
    Tensor
        Int64 [B, T], the tokens.
    Tensor
        Bool [B], which rows are settled.
    """
    ids_BT = choices_BTK[..., 0].clone()
    apart_BT = apart_from_seen(surrogate, rows, ids_BT, loss)
    for _ in range(_ROUNDS):
        todo = (apart_BT >= tolerance).any(-1).nonzero()[:, 0]
        if not len(todo):
            break
        part = rows.take(todo)
        open_BT = apart_BT[todo] >= tolerance
        best_BT, best_apart_BT = ids_BT[todo], apart_BT[todo]
        for k in range(choices_BTK.shape[-1]):
            tried_BT = torch.where(open_BT, choices_BTK[todo, :, k], ids_BT[todo])
            tried_apart_BT = apart_from_seen(surrogate, part, tried_BT, loss)
            better_BT = open_BT & (tried_apart_BT < best_apart_BT)
            best_BT = torch.where(better_BT, tried_BT, best_BT)
            best_apart_BT = torch.where(better_BT, tried_apart_BT, best_apart_BT)
        together_BT = apart_from_seen(surrogate, part, best_BT, loss)
        better_B = together_BT.sum(-1) < apart_BT[todo].sum(-1)
        if not bool(better_B.any()):
            break
        ids_BT[todo[better_B]] = best_BT[better_B]
        apart_BT[todo[better_B]] = together_BT[better_B]
    return ids_BT, (apart_BT < tolerance).all(-1)


@torch.no_grad()
def apart_from_seen(surrogate: Surrogate, rows: Rows, ids_BT: Tensor, loss: str = "mse") -> Tensor:
    """Return how far the state of each of some tokens is from the seen one, [B, T]; 0 at padding."""
    hidden_BTD = surrogate.head_of_ids(ids_BT, rows.mask_BT, rows.positions_BT)
    return token_distances(hidden_BTD, rows.hidden_BTD, loss) * rows.mask_BT
