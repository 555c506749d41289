"""What encoding makes of examples, one value per kind: token ids, not padded, with what the model is to answer.

T tokens of one row.  A label of `IGNORED` counts for no loss; it is PyTorch's own default.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

IGNORED = -100


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A text, or two, as token ids with one answer for all of it: a class, or a number.

    Parameters
    ----------
    input_ids : tuple of int
        T tokens, special ones included.
    label : int or float
        An int for a class, a float for a regression.
    row_id : str
        The row it was.
    token_type_ids : tuple of int
        0 for the first text and 1 for the second, where the model tells them apart; else empty.
    """

    input_ids: tuple[int, ...]
    label: int | float
    row_id: str
    token_type_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EncodedText:
    """A text as token ids with one label per token, `IGNORED` where nothing is asked (causal and masked models).

    The labels stand at the tokens they name; a causal model of transformers shifts them itself.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    row_id: str


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """What an encoder reads and what its decoder writes; the two have lengths of their own."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    row_id: str


@dataclass(frozen=True, slots=True)
class EncodedWindow:
    """A question with one stretch of its context; a long context gives several windows.

    Parameters
    ----------
    input_ids, token_type_ids, row_id
        As in `EncodedRow`.
    offsets : tuple
        For each token the characters ``(start, end)`` of the context that it stands for, or None outside of it.
    start_position, end_position : int
        The answer's first and last token, or both `no_answer` if this stretch does not hold all of it.
    no_answer : int
        The place that means "not here": the classification token, or the first token of models without one.
    """

    input_ids: tuple[int, ...]
    offsets: tuple[tuple[int, int] | None, ...]
    start_position: int
    end_position: int
    no_answer: int
    row_id: str
    token_type_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class EncodedImageText:
    """An `EncodedText` with what the image processor made of the image.

    Parameters
    ----------
    features : mapping of str to Tensor
        By the name of the model's argument, such as ``"pixel_values"``; the first dimension is joined over rows.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    row_id: str
    features: Mapping[str, Tensor]


Encoded: TypeAlias = EncodedRow | EncodedText | EncodedPair | EncodedWindow | EncodedImageText
