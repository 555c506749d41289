"""Where the tokens that hosts saw stand in the owner's texts, and what they are; for the scorer alone.

N tokens of a moment.  The places come from the owner's own calls, not from what was sent.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import comb

import torch
from torch import Tensor

from vflair_flower.attacks.experts.view import Granted, HostView, Moment
from vflair_flower.attacks.guesses import NOTHING, TextGuess
from vflair_flower.attacks.scoring import Truth
from vflair_flower.errors import DataError


@dataclass(frozen=True, kw_only=True, eq=False)
class MoeTruth:
    """What an owner's texts are and where each token went.

    Parameters
    ----------
    texts : Truth
        Whole rows.
    next_ids : tuple of Tensor
        For each row and position, the token that the loss there asks for, or `NOTHING`.
    places : mapping of int to Tensor
        By the number of a call, int64 [U, 2]: the row of each of its tokens, and the position in that row's text,
        `NOTHING` for padding.
    """

    texts: Truth
    next_ids: tuple[Tensor, ...]
    places: Mapping[int, Tensor]

    def places_of(self, moment: Moment) -> Tensor:
        """Return row and position of a moment's tokens, int64 [N, 2]."""
        place_N2 = torch.full((len(moment.tokens_ND), 2), NOTHING)
        for call, place_U in zip(moment.calls, moment.place_of, strict=True):
            place_N2[place_U] = self.places[call.number]
        return place_N2

    def grant(self, view: HostView) -> HostView:
        """Return the view of an adversary that knows where the tokens that it saw stand, and how long rows are."""
        places = tuple(self.places_of(moment) for moment in view.moments)
        return replace(view, granted=Granted(places=places, lengths=tuple(len(ids) for ids in self.texts.ids)))

    def seen(self, view: HostView) -> Truth:
        """Return the truth of the tokens that were seen: in whole rows, where the others do not count."""
        return replace(self.texts, counted=self._counted(view))

    def asked(self, view: HostView) -> Truth:
        """Return the truth of what the loss asks for at the tokens that were seen: the next token."""
        special = torch.tensor(sorted(self.texts.tokenizer.all_special_ids))
        counted = tuple(
            seen & (ids != NOTHING) & ~torch.isin(ids, special)
            for seen, ids in zip(self._seen(view), self.next_ids, strict=True)
        )
        return replace(self.texts, ids=self.next_ids, counted=counted)

    def spread(self, view: HostView, guess: TextGuess) -> TextGuess:
        """Return a guess with one row per moment as one with whole rows, `NOTHING` where nothing was seen.

        Where several moments have a guess at a token, the first one that is not `NOTHING` counts.

        Raises
        ------
        DataError
            The guess is not at this view's moments.
        """
        if [len(ids) for ids in guess.ids] != [len(moment.tokens_ND) for moment in view.moments]:
            raise DataError(
                f"the guess has {len(guess.ids)} rows and the view {len(view.moments)} moments, or their lengths "
                "differ. Spread a guess at each token of each moment."
            )
        whole = [torch.full_like(ids, NOTHING) for ids in self.texts.ids]
        for moment, ids_N in zip(view.moments, guess.ids, strict=True):
            for (row, position), token in zip(self.places_of(moment).tolist(), ids_N.tolist(), strict=True):
                if position != NOTHING and whole[row][position] == NOTHING:
                    whole[row][position] = token
        return TextGuess(ids=tuple(whole))

    def _seen(self, view: HostView) -> tuple[Tensor, ...]:
        seen = tuple(torch.zeros_like(counted) for counted in self.texts.counted)
        for moment in view.moments:
            for row, position in self.places_of(moment).tolist():
                if position != NOTHING:
                    seen[row][position] = True
        return seen

    def _counted(self, view: HostView) -> tuple[Tensor, ...]:
        return tuple(seen & counted for seen, counted in zip(self._seen(view), self.texts.counted, strict=True))


def coverage(view: HostView, truth: MoeTruth) -> dict[int | None, float]:
    """Return which share of the texts' tokens a coalition saw: by layer, and under None at any layer."""
    total = sum(int(counted.sum()) for counted in truth.texts.counted)

    def share(part: HostView) -> float:
        return sum(int(counted.sum()) for counted in truth.seen(part).counted) / max(1, total)

    return {layer: share(view.at(layer)) for layer in view.layers} | {None: share(view)}


def expected_coverage(*, experts: int, per_token: int, held: int) -> float:
    """Return the share of tokens that hosts of `held` experts of a layer see if all experts are as likely: 1 - C / C.

    Examples
    --------
    >>> round(expected_coverage(experts=64, per_token=8, held=16), 3)
    0.915
    """
    return 1 - comb(experts - held, per_token) / comb(experts, per_token)
