"""Prompt inversion: embeddings held near the embedding table, then tokens chosen among the nearest by their states.

B rows, R of them, T tokens, K candidates, E the width of embeddings, V vocabulary.  The first stage moves all positions
at once and needs gradients; the second tries few tokens per position: from left to right where the model is causal,
and elsewhere, where each token moves every state, at the position that fits worst, again and again.
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vflair_flower.attacks.guesses import TextGuess
from vflair_flower.attacks.inversion.matching import likeness, nearest_tokens, row_distances
from vflair_flower.attacks.inversion.prefixes import Prefixes, is_causal
from vflair_flower.attacks.inversion.rows import Rows, read_rows
from vflair_flower.attacks.inversion.settling import apart_from_seen
from vflair_flower.attacks.inversion.vocabulary_matching import relative
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.registry import Goal, attack
from vflair_flower.attacks.surrogate import Surrogate
from vflair_flower.attacks.view import SplitView
from vflair_flower.partition import Mode

_LOOK_EVERY = 10
_PATIENCE = 4
"""Positions of a row that a sweep tries in vain before it leaves the row; the wrong one is mostly the first."""


@attack(
    "pia",
    goal=Goal.TEXT,
    sees=SplitView,
    paper="Qu et al., Prompt Inversion Attack, arXiv 2503.09022; the constraint is the squared distance to the nearest "
    "embedding, growing over the steps, and where no language model is at hand none is asked; bidirectional models by "
    "coordinate-wise sweeps are ours",
)
def pia(
    view: SplitView,
    knows: Knowledge,
    *,
    seed: int = 0,
    steps: int = 200,
    rate: float = 1.0,
    pull: float = 0.1,
    loss: str = "mse",
    candidates: int = 32,
    proposals: int = 16,
    sweeps: int = 2,
    batch_rows: int = 32,
    tolerance: float = 1e-6,
) -> TextGuess:
    """Optimise embeddings under a pull towards the table, then choose each token by the state it gives.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`.
    steps : int
        Of Adam, at most; a batch stops early when its nearest tokens give what was seen.
    rate : float
        Adam's, relative to the root mean square of the embeddings' numbers; falls to 0.
    pull : float
        Weight, in the end, of the squared distance to the nearest embedding, relative to an embedding's mean square.
    loss : {"mse", "cosine"}
        See `vflair_flower.attacks.inversion.matching`.
    candidates : int
        Tokens nearest to each embedding that are tried.
    proposals : int
        Likeliest next tokens, by the surrogate's language model, that are tried too; 0, or a model that writes
        nothing, tries none.
    sweeps : int
        Over the positions of a bidirectional model.
    batch_rows : int
        Rows at once.
    tolerance : float
        The distance below which tokens count as found.
    """
    surrogate = knows.surrogate

    def read(rows: Rows) -> Tensor:
        soft_BTE = _soft(surrogate, rows, steps=steps, rate=rate, pull=pull, loss=loss, tolerance=tolerance)
        near_BTK = likeness(soft_BTE, surrogate.embedding).topk(min(candidates, len(surrogate.embedding)), dim=-1)[1]
        if is_causal(surrogate):
            return _left_to_right(knows, rows, near_BTK, proposals)
        return _sweep(surrogate, rows, near_BTK, sweeps=sweeps, tolerance=tolerance)

    return read_rows(view, batch_rows, read, device=surrogate.device)


def _soft(
    surrogate: Surrogate, rows: Rows, *, steps: int, rate: float, pull: float, loss: str, tolerance: float
) -> Tensor:
    """Return embeddings [B, T, E] whose states are those seen, and which are not far from some token's."""
    table_VE = surrogate.embedding
    scale = float(table_VE.square().mean())
    embeds_BTE = table_VE.mean(0).expand(*rows.hidden_BTD.shape[:2], -1).clone().requires_grad_()
    optimizer = torch.optim.Adam([embeds_BTE], lr=rate * scale**0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    nearest_BT = nearest_tokens(embeds_BTE.detach(), table_VE)
    for step in range(steps):
        optimizer.zero_grad()
        hidden_BTD = surrogate.head(embeds_BTE, rows.mask_BT, rows.positions_BT)
        apart_B = row_distances(hidden_BTD, rows.hidden_BTD, rows.mask_BT, loss)
        off_BT = (embeds_BTE - table_VE[nearest_BT]).square().mean(-1) / scale
        off_B = (off_BT * rows.mask_BT).sum(-1) / rows.mask_BT.sum(-1)
        (apart_B + pull * (step / steps) ** 2 * off_B).sum().backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % _LOOK_EVERY == 0:
            nearest_BT = nearest_tokens(embeds_BTE.detach(), table_VE)
            if bool((apart_from_seen(surrogate, rows, nearest_BT).sum(-1) < tolerance).all()):
                break
    return embeds_BTE.detach()


@torch.no_grad()
def _left_to_right(knows: Knowledge, rows: Rows, near_BTK: Tensor, proposals: int) -> Tensor:
    """Return tokens, int64 [B, T], each the best of its candidates after those before it."""
    prefixes = Prefixes(knows.surrogate, rows.positions_BT)
    asks = proposals if knows.surrogate.task.kind.writes else 0
    for place in range(rows.mask_BT.shape[1]):
        rows_R = rows.mask_BT[:, place].nonzero()[:, 0]
        tried_RK = near_BTK[rows_R, place]
        if asks and place:
            likely_RV = _next_logits(knows, prefixes.ids_BT[rows_R], rows.positions_BT[rows_R, :place])
            tried_RK = torch.cat([tried_RK, likely_RV.topk(min(asks, likely_RV.shape[-1]), dim=-1)[1]], dim=1)
        apart_RK = relative(prefixes.states(rows_R, tried_RK), rows.hidden_BTD[rows_R, place])
        next_B = torch.zeros(len(rows.places), dtype=torch.int64, device=rows_R.device)
        next_B[rows_R] = tried_RK.gather(1, apart_RK.argmin(dim=1, keepdim=True))[:, 0]
        prefixes.append(next_B[:, None])
    return prefixes.ids_BT


def _next_logits(knows: Knowledge, ids_RT: Tensor, positions_RT: Tensor) -> Tensor:
    """Return the language model's logits behind some tokens, [R, V]; of bodies, the adversary's own is preferred."""
    surrogate, own = knows.surrogate, knows.own or knows.surrogate
    mask_RT = torch.ones_like(ids_RT)
    hidden_RTD = surrogate.head_of_ids(ids_RT, None, positions_RT)
    answer = own.body(hidden_RTD, mask_RT, positions_RT)
    return (answer if surrogate.plan.mode is Mode.HT else surrogate.tail(answer, mask_RT, positions_RT))[:, -1]


@torch.no_grad()
def _sweep(surrogate: Surrogate, rows: Rows, near_BTK: Tensor, *, sweeps: int, tolerance: float) -> Tensor:
    """Return tokens, int64 [B, T]: one position of each row after the other, the one that fits worst first."""
    ids_BT = near_BTK[..., 0].clone()
    apart_BT = apart_from_seen(surrogate, rows, ids_BT)
    for _ in range(sweeps):
        untried_BT = rows.mask_BT.bool()
        vain_B = torch.zeros_like(ids_BT[:, 0])
        for _ in range(ids_BT.shape[1]):
            wanting_B = (apart_BT.sum(-1) >= tolerance) & (vain_B < _PATIENCE) & untried_BT.any(-1)
            rows_R = wanting_B.nonzero()[:, 0]
            if not len(rows_R):
                break
            worst_R = apart_BT[rows_R].masked_fill(~untried_BT[rows_R], -1.0).argmax(-1)
            untried_BT[rows_R, worst_R] = False
            tried_RK = near_BTK[rows_R, worst_R]
            at_RT = one_hot(worst_R, ids_BT.shape[1]).bool()
            variants_RKT = torch.where(at_RT[:, None], tried_RK[..., None], ids_BT[rows_R][:, None])
            part = rows.take(rows_R)
            apart_RKT = torch.stack([apart_from_seen(surrogate, part, ids_RT) for ids_RT in variants_RKT.unbind(1)], 1)
            best_R = apart_RKT.sum(-1).argmin(dim=1)
            every_R = torch.arange(len(rows_R), device=rows_R.device)
            better_R = apart_RKT[every_R, best_R].sum(-1) < apart_BT[rows_R].sum(-1)
            vain_B[rows_R] = torch.where(better_R, 0, vain_B[rows_R] + 1)
            ids_BT[rows_R[better_R]] = variants_RKT[every_R, best_R][better_R]
            apart_BT[rows_R[better_R]] = apart_RKT[every_R, best_R][better_R]
    return ids_BT
