"""Relaxed model inversion: look for a mixture of all tokens at each place whose hidden states are the seen ones.

B rows, T tokens, D hidden, V vocabulary.  The numbers are Z [B, T, V] and the embeddings softmax(Z / temperature) W, so
the search stays among mixtures of real embeddings.  Memory is about seven times B x T x V numbers, which decides B.
"""

import torch
from torch import Tensor

from vflair_flower.attacks.guesses import TextGuess
from vflair_flower.attacks.inversion.matching import likeness
from vflair_flower.attacks.inversion.rows import Rows, read_rows
from vflair_flower.attacks.inversion.vmi import Choose, invert, with_specials
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.registry import Goal, attack
from vflair_flower.attacks.view import SplitView
from vflair_flower.settings import one_of

_COPIES = 7  # Z, its gradient, Adam's two averages, the softmax, its gradient and one more for sums


@attack(
    "rmi",
    goal=Goal.TEXT,
    sees=SplitView,
    paper="Song and Raghunathan, CCS 2020, as in VFLAIR-LLM, arXiv 2508.03097; the loss is a distance, "
    "Z begins at the seen states' cosines with the embeddings, not at 0, and the head chooses among the likeliest",
)
def rmi(
    view: SplitView,
    knows: Knowledge,
    *,
    seed: int = 0,
    steps: int = 100,
    rate: float = 0.02,
    temperature: float = 0.05,
    loss: str = "mse",
    start: str = "seen",
    choices: int = 8,
    memory_mib: int = 1024,
    tolerance: float = 1e-4,
) -> TextGuess:
    """Optimise mixtures of tokens by Adam and take likely ones.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`.
    steps, loss, choices, tolerance
        As in `vmi`.
    rate : float
        Adam's on Z; falls to 0.
    temperature : float
        Of the softmax; smaller mixes less.
    start : {"seen", "zero"}
        Z at first: how alike the seen states and the embeddings are (cosine), or 0, every token alike.
    memory_mib : int
        About how much memory to use; decides how many rows are optimised at once.
    """
    one_of("start", start, ("seen", "zero"))
    table_VD = knows.surrogate.embedding
    longest = max(int(exchange.attention_mask_BT.sum(-1).max()) for exchange in view.exchanges)
    batch_rows = max(1, memory_mib * 2**20 // (_COPIES * longest * table_VD.shape[0] * 4))
    choose = _likeliest(choices, knows.special_ids)

    def embed(scores_BTV: Tensor) -> Tensor:
        return (scores_BTV / temperature).softmax(-1) @ table_VD

    def read(rows: Rows) -> Tensor:
        alike_BTV = likeness(rows.hidden_BTD, table_VD)
        return invert(
            knows.surrogate,
            rows,
            alike_BTV if start == "seen" else torch.zeros_like(alike_BTV),
            choose,
            embed=embed,
            steps=steps,
            step_size=rate,
            loss=loss,
            tolerance=tolerance,
        )

    return read_rows(view, batch_rows, read, device=knows.surrogate.device)


def _likeliest(choices: int, special_ids: frozenset[int]) -> Choose:
    def choose(scores_BTV: Tensor, _: Tensor) -> Tensor:
        likely_BTK = scores_BTV.topk(min(choices, scores_BTV.shape[-1]), dim=-1).indices
        return with_specials(likely_BTK, special_ids)

    return choose
