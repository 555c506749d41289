"""Vanilla model inversion: look for the embeddings whose hidden states at the cut are those that were seen.

B rows, T tokens, D hidden, K choices.  All rows of a batch are optimised at once and each by its own loss, so a row's
result does not depend on its batch but for rounding.  The search begins at the seen states themselves: blocks add to
what they get, so a state still holds its token's embedding.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vflair_flower.attacks.guesses import TextGuess
from vflair_flower.attacks.inversion.descent import RowDescent
from vflair_flower.attacks.inversion.matching import likely_tokens, row_distances
from vflair_flower.attacks.inversion.rows import Rows, read_rows
from vflair_flower.attacks.inversion.settling import settle
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.registry import Goal, attack
from vflair_flower.attacks.surrogate import Surrogate
from vflair_flower.attacks.view import SplitView
from vflair_flower.settings import one_of

_FIRST_LOOK = 10


@attack(
    "vmi",
    goal=Goal.TEXT,
    sees=SplitView,
    paper="Fredrikson et al., CCS 2015, as in VFLAIR-LLM, arXiv 2508.03097; the loss is a distance, not a "
    "cross-entropy of real numbers, which has no minimum; it begins at the seen states, not at 0, and chooses among "
    "the nearest tokens by what the head makes of them",
)
def vmi(
    view: SplitView,
    knows: Knowledge,
    *,
    seed: int = 0,
    steps: int = 100,
    rate: float = 0.3,
    loss: str = "mse",
    start: str = "seen",
    choices: int = 8,
    batch_rows: int = 100,
    tolerance: float = 1e-4,
) -> TextGuess:
    """Optimise embeddings by Adam and take near tokens.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`.
    steps : int
        At most; a row stops early when its tokens, sent through the head, give what was seen.  Looks are after 10, 20,
        40, 80, ... steps, and after the last.
    rate : float
        Adam's, relative to the root mean square of the embeddings' numbers, which models differ in; falls to 0.
    loss : {"mse", "cosine"}
        See `vflair_flower.attacks.inversion.matching`.
    start : {"seen", "mean"}
        The seen states, brought to the embeddings' size, or the mean embedding, which knows nothing.
    choices : int
        Nearest tokens to choose among; special tokens are always tried too.  With 1 and no special token the nearest
        is taken, as the paper does.
    batch_rows : int
        Rows at once.
    tolerance : float
        The distance below which a token counts as found; 0 turns the early stop off.
    """
    one_of("start", start, ("seen", "mean"))
    table_VD = knows.surrogate.embedding
    choose = near_choices(table_VD, choices, knows.special_ids)

    def read(rows: Rows) -> Tensor:
        start_BTD = sized(rows.hidden_BTD, table_VD) if start == "seen" else table_VD.mean(0).expand_as(rows.hidden_BTD)
        return invert(
            knows.surrogate,
            rows,
            start_BTD,
            choose,
            steps=steps,
            step_size=rate * root_mean_square(table_VD),
            loss=loss,
            tolerance=tolerance,
        )

    return read_rows(view, batch_rows, read, device=knows.surrogate.device)


Choose = Callable[[Tensor, Tensor], Tensor]
"""Makes choices of tokens, int64 [B', T, K], of some rows' optimised numbers [B', T, ...] and their places [B']."""


def invert(
    surrogate: Surrogate,
    rows: Rows,
    start: Tensor,
    choose: Choose | None = None,
    *,
    embed: Callable[[Tensor], Tensor] | None = None,
    steps: int,
    step_size: float,
    loss: str,
    tolerance: float,
    look_first: bool = False,
) -> Tensor:
    """Optimise numbers for each place of each row, and return the tokens that they lead to, int64 [B, T].

    Parameters
    ----------
    surrogate, rows
        What is compared.
    start : Tensor
        Float [B, T, ...], the numbers to begin with.
    choose : callable, optional
        See `Choose`; without it the nearest token of an embedding is taken.
    embed : callable, optional
        Makes embeddings [B', T, D] of the numbers; without it they are embeddings.
    step_size : float
        Adam's at first, as it is; falls to 0.
    steps, loss, tolerance
        As in `vmi`.
    look_first : bool
        Whether rows may be found at the start, without a step.
    """
    choose = choose or near_choices(surrogate.embedding, 1, frozenset())
    descent = RowDescent(start, rate=step_size, steps=max(1, steps))
    ids_BT = torch.zeros_like(rows.mask_BT)
    left_B = torch.arange(len(rows.places), device=rows.mask_BT.device)
    open_rows = rows
    for step in range(steps + 1):
        if step == steps or (step == 0 and look_first) or _looks(step):
            choices_BTK = choose(descent.value.detach(), left_B)
            ids_BT[left_B], done_B = settle(surrogate, open_rows, choices_BTK, loss=loss, tolerance=tolerance)
            kept = (~done_B).nonzero()[:, 0]
            if step == steps or not len(kept):
                break
            if len(kept) < len(left_B):
                left_B, open_rows = left_B[kept], open_rows.take(kept)
                descent.keep(kept)
        embeds_BTD = descent.value if embed is None else embed(descent.value)
        hidden_BTD = surrogate.head(embeds_BTD, open_rows.mask_BT, open_rows.positions_BT)
        apart_B = row_distances(hidden_BTD, open_rows.hidden_BTD, open_rows.mask_BT, loss)
        descent.step(torch.autograd.grad(apart_B.sum(), descent.value)[0])
    return ids_BT


def near_choices(table_VD: Tensor, choices: int, special_ids: frozenset[int]) -> Choose:
    """Return a `Choose` of the nearest tokens and all special ones, which an adversary knows to be somewhere."""

    def choose(embeds_BTD: Tensor, _: Tensor) -> Tensor:
        return with_specials(likely_tokens(embeds_BTD, table_VD, choices), special_ids)

    return choose


def with_specials(choices_BTK: Tensor, special_ids: frozenset[int]) -> Tensor:
    """Return choices with all special tokens behind them at every place."""
    special_S = torch.tensor(sorted(special_ids), dtype=torch.int64, device=choices_BTK.device)
    return torch.cat([choices_BTK, special_S.expand(*choices_BTK.shape[:2], -1)], dim=-1)


def sized(hidden_BTD: Tensor, table_VD: Tensor) -> Tensor:
    """Return states at the size that embeddings have: each with the table's root mean square."""
    own_BT1 = hidden_BTD.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
    return hidden_BTD / own_BT1 * root_mean_square(table_VD)


def root_mean_square(numbers: Tensor) -> float:
    """Return how large numbers are."""
    return float(numbers.square().mean().sqrt())


def _looks(step: int) -> bool:
    """Whether a step is 10, 20, 40, 80, ..."""
    times, rest = divmod(step, _FIRST_LOOK)
    return rest == 0 and times > 0 and times & (times - 1) == 0
