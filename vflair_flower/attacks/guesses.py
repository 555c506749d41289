"""What an attack comes to: a guess at texts, at labels or at who was trained on.

Rows of a guess are in the order of the view: all rows of its first exchange, then those of the second.
"""

from dataclasses import dataclass

from torch import Tensor

from vflair_flower.errors import DataError

NOTHING = -1
"""Stands where an attack guesses no token."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TextGuess:
    """Tokens of each row.

    Parameters
    ----------
    ids : tuple of Tensor
        One int64 tensor per row: with `aligned`, a token for each of the row's positions (padding left out), `NOTHING`
        where there is no guess; else any tokens in any number.
    aligned : bool
        Whether a guess stands at the place that it is for.
    matched : bool
        Whether row i is a guess at row i; a gradient of a batch does not tell, and the scorer then matches rows.
    """

    ids: tuple[Tensor, ...]
    aligned: bool = True
    matched: bool = True


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelGuess:
    """A class for each row, or a score that tells one class from another, or both.

    Parameters
    ----------
    labels : Tensor or None
        Int64 [N].
    scores : Tensor or None
        Float [N]: larger for rows that are likelier of class 1 of two, or of the rarer class.
    """

    labels: Tensor | None = None
    scores: Tensor | None = None

    def __post_init__(self) -> None:
        if self.labels is None and self.scores is None:
            raise DataError("a guess at labels has neither labels nor scores. Give one of them.")


@dataclass(frozen=True, kw_only=True, eq=False)
class MemberGuess:
    """How likely each candidate was trained on.

    Parameters
    ----------
    scores : Tensor
        Float [N], larger for likelier members.
    """

    scores: Tensor


Guess = TextGuess | LabelGuess | MemberGuess
