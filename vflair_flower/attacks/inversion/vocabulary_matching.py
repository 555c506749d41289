"""Vocabulary matching: try tokens one position after the other, and keep the one whose state is nearest to the seen.

B rows, R of them that still search, T tokens, K candidates, V vocabulary, D hidden.  In a causal model a token's state
depends on the tokens before it alone, so a text of T tokens is T searches over V, not one over V to the power of T.
Cost: at most V tokens through the head per token found, with the prefix cached; the order of candidates and the bound
below which one is accepted make it few of them where the surrogate is exact (the log says how many).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vflair_flower.attacks.guesses import TextGuess
from vflair_flower.attacks.inversion.prefixes import Prefixes, refuse_encoders
from vflair_flower.attacks.inversion.proposals import Proposer
from vflair_flower.attacks.inversion.rows import Rows, read_rows
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.registry import Goal, attack
from vflair_flower.attacks.surrogate import Surrogate
from vflair_flower.attacks.view import SplitView
from vflair_flower.settings import TaskKind
from vflair_flower.tasks import Encoded

_log = logging.getLogger(__name__)
_NAME = "vocabulary-matching"
_FIRST, _GROWTH = 16, 4


@attack(
    _NAME,
    goal=Goal.TEXT,
    sees=SplitView,
    paper="Thomas et al., Hidden No More, arXiv 2505.18332, of plain states, and SipIt, arXiv 2510.15511; distances "
    "are L2 relative to the seen state, and a ridge regression orders candidates, not a language model or gradients",
    kinds=(
        *(TaskKind.CAUSAL_LM, TaskKind.SEQUENCE_CLASSIFICATION, TaskKind.SEQUENCE_REGRESSION),
        TaskKind.QUESTION_ANSWERING,
    ),
    causal_only=True,
)
def vocabulary_matching(
    view: SplitView,
    knows: Knowledge,
    *,
    seed: int = 0,
    candidates: int = 0,
    calibration_texts: int = 8,
    batch_rows: int = 32,
    tokens_at_once: int = 4096,
) -> TextGuess:
    """Choose, from left to right, the token whose state after the prefix found so far is nearest to the seen one.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`.
    candidates : int
        The most to try per position; 0 is the whole vocabulary.
    calibration_texts : int
        Auxiliary texts that the bound is measured on, see `acceptance`; without any, all candidates are tried.
    batch_rows : int
        Rows at once.
    tokens_at_once : int
        Candidates of all rows that go through the head together.

    Raises
    ------
    ConfigurationError
        The model is bidirectional.
    """
    refuse_encoders(knows.surrogate, _NAME)
    proposer = Proposer(knows)
    bound = acceptance(knows.surrogate, proposer, knows.auxiliary[:calibration_texts])
    search = _Search(
        proposer=proposer, bound=bound, most=candidates or len(knows.surrogate.embedding), at_once=tokens_at_once
    )
    guess = read_rows(
        view, batch_rows, lambda rows: _read(knows.surrogate, rows, search), device=knows.surrogate.device
    )
    search.report()
    return guess


@torch.no_grad()
def acceptance(surrogate: Surrogate, proposer: Proposer, texts: Sequence[Encoded], *, among: int = 255) -> float:
    """Return the distance below which a candidate is accepted unseen the others: half of the least between two tokens.

    A state nearer than that to the seen one is, by the triangle inequality, the nearest of all.  The least distance is
    measured between the last token of each text and those of `among` others that are proposed first for its state; of
    no text it is 0.
    """
    least: list[float] = []
    for text in texts:
        ids_BT = torch.tensor([text.input_ids], device=surrogate.device)
        if ids_BT.shape[1] == 1:  # begins, and holds nothing
            continue
        prefixes = Prefixes(surrogate, torch.arange(ids_BT.shape[1], device=surrogate.device)[None])
        prefixes.append(ids_BT[:, :-1])
        row = torch.zeros(1, dtype=torch.int64, device=surrogate.device)
        true_BD = prefixes.states(row, ids_BT[:, -1:])[:, 0]
        order_BV = proposer.order(true_BD)
        others_BK = order_BV[order_BV != ids_BT[0, -1]][None, :among]
        least.append(float(relative(prefixes.states(row, others_BK), true_BD).min()))
    return min(least, default=0.0) / 2


def relative(found_RKD: Tensor, seen_RD: Tensor) -> Tensor:
    """Return the L2 distances of candidates' states to the seen ones, relative to these, [R, K]."""
    lengths_R = seen_RD.square().sum(-1).sqrt().clamp_min(1e-12)
    return (found_RKD - seen_RD[:, None]).square().sum(-1).sqrt() / lengths_R[:, None]


@dataclass(kw_only=True)
class _Search:
    """How candidates are tried, and how many were."""

    proposer: Proposer
    bound: float
    most: int
    at_once: int
    tokens: int = 0
    accepted: int = 0
    tried: int = 0

    def report(self) -> None:
        """Say what it took, and at how many tokens nothing came near enough."""
        _log.info(
            "%s: %d tokens, %.1f candidates each; at %d none was nearer than %.3g, and the nearest was kept",
            _NAME,
            self.tokens,
            self.tried / max(1, self.tokens),
            self.tokens - self.accepted,
            self.bound,
        )

    def next_tokens(self, prefixes: Prefixes, rows_R: Tensor, seen_RD: Tensor) -> Tensor:
        """Return the next token of some rows, int64 [R]."""
        order_RV = self.proposer.order(seen_RD)[:, : self.most]
        best_R = order_RV[:, 0].clone()
        near_R = torch.full_like(seen_RD[:, 0], float("inf"))
        open_R = torch.arange(len(rows_R), device=rows_R.device)
        start, size = 0, _FIRST
        while len(open_R) and start < order_RV.shape[1]:
            size = max(1, min(size, self.at_once // len(open_R)))
            tried = order_RV[open_R, start : start + size]
            apart_RK = relative(prefixes.states(rows_R[open_R], tried), seen_RD[open_R])
            least_R, which_R = apart_RK.min(dim=1)
            better_R = least_R < near_R[open_R]
            best_R[open_R[better_R]] = tried.gather(1, which_R[:, None])[better_R, 0]
            near_R[open_R] = torch.minimum(near_R[open_R], least_R)
            self.tried += tried.numel()
            open_R = open_R[near_R[open_R] >= self.bound]
            start, size = start + tried.shape[1], size * _GROWTH
        self.tokens += len(rows_R)
        self.accepted += int((near_R < self.bound).sum())
        return best_R


def _read(surrogate: Surrogate, rows: Rows, search: _Search) -> Tensor:
    """Return the tokens of a batch, int64 [B, T]."""
    prefixes = Prefixes(surrogate, rows.positions_BT)
    for place in range(rows.mask_BT.shape[1]):
        rows_R = rows.mask_BT[:, place].nonzero()[:, 0]
        next_B = torch.zeros(len(rows.places), dtype=torch.int64, device=rows_R.device)
        next_B[rows_R] = search.next_tokens(prefixes, rows_R, rows.hidden_BTD[rows_R, place])
        prefixes.append(next_B[:, None])
    return prefixes.ids_BT
