"""Rows of a view, padded into batches for an inversion, and put back in the view's order.

B rows, T tokens, D hidden.  Invariant: padding is on the right here, whichever side the victim pads, and every row's
tokens keep the positions that they had.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vflair_flower.attacks.guesses import TextGuess
from vflair_flower.attacks.view import SplitView


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """A batch of rows to invert.

    Parameters
    ----------
    places : tuple of int
        Of each row in the view.
    hidden_BTD : Tensor
        Float32, zeros where there is no token.
    mask_BT : Tensor
        Int64, 1 for tokens.
    positions_BT : Tensor
        Int64, the position of each token in its text.
    """

    places: tuple[int, ...]
    hidden_BTD: Tensor
    mask_BT: Tensor
    positions_BT: Tensor

    def take(self, kept: Tensor) -> "Rows":
        """Return some of the rows, named by their places in this batch (int64)."""
        return Rows(
            places=tuple(self.places[int(row)] for row in kept),
            hidden_BTD=self.hidden_BTD[kept],
            mask_BT=self.mask_BT[kept],
            positions_BT=self.positions_BT[kept],
        )

    def until(self, end: int) -> "Rows":
        """Return the rows without what stands at a place or behind it."""
        return Rows(
            places=self.places,
            hidden_BTD=self.hidden_BTD[:, :end],
            mask_BT=self.mask_BT[:, :end],
            positions_BT=self.positions_BT[:, :end],
        )

    def split(self, ids_BT: Tensor) -> list[Tensor]:
        """Return each row's own tokens, without padding, on the CPU."""
        return [ids[mask.bool()] for ids, mask in zip(ids_BT.cpu(), self.mask_BT.cpu(), strict=True)]


def batches_of(view: SplitView, rows: int, *, device: torch.device | str = "cpu") -> Iterator[Rows]:
    """Yield all rows of a view in batches of at most `rows`, rows of like length together."""
    found: list[tuple[int, Tensor, Tensor]] = []
    for exchange in view.exchanges:
        for row in range(exchange.rows):
            mask = exchange.attention_mask_BT[row].bool()
            found.append((len(found), exchange.hidden_BTD[row][mask], _positions(exchange.position_ids_BT, row, mask)))
    found.sort(key=lambda one: len(one[1]))
    for start in range(0, len(found), rows):
        yield _padded(found[start : start + rows], device)


def read_rows(
    view: SplitView, rows: int, read: Callable[[Rows], Tensor], *, device: torch.device | str = "cpu"
) -> TextGuess:
    """Return a guess at all rows of a view, read in batches of at most `rows`.

    Parameters
    ----------
    view, rows, device
        As of `batches_of`.
    read : callable
        Returns a batch's tokens, int64 [B, T]; what stands at padding is not looked at.
    """
    places: list[int] = []
    found: list[Tensor] = []
    for batch in batches_of(view, rows, device=device):
        found += batch.split(read(batch))
        places += batch.places
    return TextGuess(ids=in_order(places, found))


def in_order(places: Sequence[int], ids: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return what was found for rows, in the order of the view."""
    return tuple(one for _, one in sorted(zip(places, ids, strict=True), key=lambda pair: pair[0]))


def _positions(positions_BT: Tensor | None, row: int, mask: Tensor) -> Tensor:
    if positions_BT is None:
        return torch.arange(int(mask.sum()))
    return positions_BT[row if positions_BT.shape[0] > 1 else 0][mask]


def _padded(rows: list[tuple[int, Tensor, Tensor]], device: torch.device | str) -> Rows:
    longest = max(len(hidden) for _, hidden, _ in rows)
    hidden_BTD = torch.zeros(len(rows), longest, rows[0][1].shape[-1])
    mask_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
    positions_BT = torch.arange(longest).repeat(len(rows), 1)
    for place, (_, hidden_TD, positions_T) in enumerate(rows):
        count = len(hidden_TD)
        hidden_BTD[place, :count] = hidden_TD
        mask_BT[place, :count] = 1
        positions_BT[place, :count] = positions_T
    return Rows(
        places=tuple(place for place, _, _ in rows),
        hidden_BTD=hidden_BTD.to(device),
        mask_BT=mask_BT.to(device),
        positions_BT=positions_BT.to(device),
    )
