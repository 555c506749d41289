"""Patched inversion from both sides: what was written by the body's answers, the prompt patch after patch.

B rows, T tokens, A answered positions, D hidden, E the width of embeddings, V vocabulary.  A token that was written is
the likeliest one behind the answer before it, if the victim writes greedily; in Head-Tail the answers are the logits
themselves, in Head-Body-Tail the surrogate's tail makes them.  In a causal model each prefix is a problem of its own,
so positions are inverted in patches, those before them fixed, and a last pass moves all at once.
"""

import torch
from torch import Tensor

from vflair_flower.attacks.guesses import NOTHING, TextGuess
from vflair_flower.attacks.inversion.matching import nearest_tokens, row_distances
from vflair_flower.attacks.inversion.prefixes import refuse_encoders
from vflair_flower.attacks.inversion.proposals import Proposer
from vflair_flower.attacks.inversion.rows import Rows, read_rows
from vflair_flower.attacks.inversion.vmi import invert, root_mean_square
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.registry import Goal, Phase, attack
from vflair_flower.attacks.surrogate import Surrogate
from vflair_flower.attacks.view import Exchange, SplitView
from vflair_flower.partition import Mode
from vflair_flower.settings import TaskKind

_NAME = "pidi"
_LOOK_EVERY = 10
_TAIL_ROWS = 8


@attack(
    _NAME,
    goal=Goal.TEXT,
    sees=SplitView,
    paper="Gu et al., From Prompts to Responses, arXiv 2606.14210; the prompt's start is a ridge regression on the "
    "auxiliary texts, not a recurrent inverter, and patches found are fixed as tokens, not as embeddings",
    during=Phase.GENERATION,
    kinds=(TaskKind.CAUSAL_LM,),
    causal_only=True,
)
def pidi(
    view: SplitView,
    knows: Knowledge,
    *,
    seed: int = 0,
    patch: int = 8,
    steps: int = 100,
    joint_steps: int = 60,
    rate: float = 0.4,
    loss: str = "mse",
    batch_rows: int = 32,
    tolerance: float = 1e-6,
) -> TextGuess:
    """Read what was written off the answers, then invert the prompt in patches; a guess at all positions.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`.  Of a batch that wrote nothing, all is inverted.
    patch : int
        Positions per patch.
    steps : int
        Of Adam per patch, at most; it stops early when its tokens give what was seen.
    joint_steps : int
        Of the last pass over all positions, which rows that fit already do not need; a row keeps what fits better.
    rate : float
        Adam's, relative to the root mean square of the embeddings' numbers; falls to 0.
    loss : {"mse", "cosine"}
        See `vflair_flower.attacks.inversion.matching`.
    batch_rows : int
        Rows at once.
    tolerance : float
        The distance below which tokens count as found.

    Raises
    ------
    ConfigurationError
        The model is bidirectional.
    """
    surrogate = knows.surrogate
    refuse_encoders(surrogate, _NAME)
    proposer = Proposer(knows)
    written = [ids for exchange in view.exchanges for ids in _written(exchange, surrogate)]
    size = rate * root_mean_square(surrogate.embedding)

    def read(rows: Rows) -> Tensor:
        known_BT = torch.full_like(rows.mask_BT, NOTHING)
        for row, place in enumerate(rows.places):
            known_BT[row, : len(written[place])] = written[place].to(surrogate.device)
        start_BTE = proposer.embeddings(rows.hidden_BTD)
        ids_BT = _patched(
            surrogate, rows, known_BT, start_BTE, patch=patch, steps=steps, rate=rate, loss=loss, tolerance=tolerance
        )
        if not joint_steps or bool((_errors(surrogate, rows, ids_BT, rows.mask_BT) < tolerance).all()):
            return ids_BT
        moved_BT = invert(
            surrogate,
            rows,
            surrogate.embedding[ids_BT],
            steps=joint_steps,
            step_size=size / 4,
            loss=loss,
            tolerance=tolerance,
        )
        return _better(surrogate, rows, ids_BT, moved_BT)

    return read_rows(view, batch_rows, read, device=surrogate.device)


@torch.no_grad()
def _written(exchange: Exchange, surrogate: Surrogate) -> list[Tensor]:
    """Return for each row, without padding, the tokens that were written, and `NOTHING` where the prompt was."""
    width = exchange.hidden_BTD.shape[1]
    mask_BT = exchange.attention_mask_BT.bool()
    ids_BT = torch.full(mask_BT.shape, NOTHING, dtype=torch.int64)
    if exchange.prompt_tokens is not None and exchange.answer is not None and exchange.answer.dim() == 3:
        after_BA = _likeliest(exchange, exchange.answer, surrogate)
        # The answer at one position is the token at the next; in Head-Tail the prompt may be answered at its end alone.
        first = max(exchange.prompt_tokens, width - after_BA.shape[1] + 1)
        ids_BT[:, first:] = after_BA[:, after_BA.shape[1] - 1 - (width - first) : -1]
    return [ids[mask] for ids, mask in zip(ids_BT, mask_BT, strict=True)]


def _likeliest(exchange: Exchange, answer: Tensor, surrogate: Surrogate) -> Tensor:
    """Return the likeliest next token behind each answered position, int64 [B, A]."""
    if surrogate.plan.mode is Mode.HT:
        return answer.argmax(-1)
    mask_BT = exchange.attention_mask_BT
    ids_BT = torch.zeros_like(mask_BT)
    for start in range(0, len(mask_BT), _TAIL_ROWS):
        rows = slice(start, start + _TAIL_ROWS)
        positions_BT = None if exchange.position_ids_BT is None else exchange.position_ids_BT.expand_as(mask_BT)[rows]
        if positions_BT is None:
            positions_BT = (mask_BT[rows].cumsum(-1) - 1).clamp_min(0)
        inputs = (answer[rows], mask_BT[rows], positions_BT)
        ids_BT[rows] = surrogate.tail(*(one.to(surrogate.device) for one in inputs)).argmax(-1).cpu()
    return ids_BT


def _patched(
    surrogate: Surrogate,
    rows: Rows,
    known_BT: Tensor,
    start_BTE: Tensor,
    *,
    patch: int,
    steps: int,
    rate: float,
    loss: str,
    tolerance: float,
) -> Tensor:
    """Return tokens, int64 [B, T]: the known ones, and the others patch after patch."""
    table_VE = surrogate.embedding
    open_BT = (known_BT == NOTHING) & rows.mask_BT.bool()
    ids_BT = torch.where(open_BT, nearest_tokens(start_BTE, table_VE), known_BT.clamp_min(0))
    for start in range(0, ids_BT.shape[1], patch):
        end = min(start + patch, ids_BT.shape[1])
        here_BT = torch.zeros_like(rows.mask_BT[:, :end])
        here_BT[:, start:] = rows.mask_BT[:, start:end]
        rows_R = open_BT[:, start:end].any(-1).nonzero()[:, 0]
        if not len(rows_R):
            continue
        part = rows.take(rows_R).until(end)
        chosen_RT = _patch(
            surrogate,
            part,
            here_BT[rows_R],
            open_BT[rows_R, :end] & here_BT[rows_R].bool(),
            ids_BT[rows_R, :end],
            start_BTE[rows_R, :end],
            steps=steps,
            rate=rate,
            loss=loss,
            tolerance=tolerance,
        )
        ids_BT[rows_R, :end] = chosen_RT
    return ids_BT


def _patch(
    surrogate: Surrogate,
    rows: Rows,
    here_BT: Tensor,
    open_BT: Tensor,
    ids_BT: Tensor,
    start_BTE: Tensor,
    *,
    steps: int,
    rate: float,
    loss: str,
    tolerance: float,
) -> Tensor:
    """Return the tokens of rows, those of one patch that are open found by optimisation and the others as they were."""
    table_VE = surrogate.embedding
    fixed_BTE = table_VE[ids_BT]
    free_BTE = start_BTE.clone().requires_grad_()
    optimizer = torch.optim.Adam([free_BTE], lr=rate * root_mean_square(table_VE))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    best_BT, least_B = ids_BT, _errors(surrogate, rows, ids_BT, here_BT)
    for step in range(steps):
        if bool((least_B < tolerance).all()):
            break
        optimizer.zero_grad()
        embeds_BTE = torch.where(open_BT[..., None], free_BTE, fixed_BTE)
        hidden_BTD = surrogate.head(embeds_BTE, rows.mask_BT, rows.positions_BT)
        row_distances(hidden_BTD, rows.hidden_BTD, here_BT, loss).sum().backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % _LOOK_EVERY == 0 or step + 1 == steps:
            tried_BT = torch.where(open_BT, nearest_tokens(free_BTE.detach(), table_VE), ids_BT)
            errors_B = _errors(surrogate, rows, tried_BT, here_BT)
            best_BT = torch.where((errors_B < least_B)[:, None], tried_BT, best_BT)
            least_B = torch.minimum(errors_B, least_B)
    return best_BT


def _better(surrogate: Surrogate, rows: Rows, one_BT: Tensor, other_BT: Tensor) -> Tensor:
    """Return for each row whichever tokens' states are nearer to the seen ones."""
    nearer_B = _errors(surrogate, rows, other_BT, rows.mask_BT) < _errors(surrogate, rows, one_BT, rows.mask_BT)
    return torch.where(nearer_B[:, None], other_BT, one_BT)


@torch.no_grad()
def _errors(surrogate: Surrogate, rows: Rows, ids_BT: Tensor, where_BT: Tensor) -> Tensor:
    """Return each row's mean squared relative distance over some positions, [B]."""
    hidden_BTD = surrogate.head_of_ids(ids_BT, rows.mask_BT, rows.positions_BT)
    return row_distances(hidden_BTD, rows.hidden_BTD, where_BT, "mse")
