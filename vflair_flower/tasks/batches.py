"""From encoded rows to what a model's forward takes: padded tensors by the names of its arguments.

B batch, T tokens of the longest row, S tokens of the longest target of a sequence-to-sequence model.
Invariant: padding is masked and labelled `IGNORED`, whatever token it is written with; no token is lost or moved
relative to its label.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.tasks.encoded import (
    IGNORED,
    Encoded,
    EncodedImageText,
    EncodedPair,
    EncodedRow,
    EncodedText,
    EncodedWindow,
)

Side = Literal["left", "right"]
_EncodedT = TypeVar("_EncodedT", bound=Encoded)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What a model takes: ``model(**batch.inputs)``.

    Parameters
    ----------
    inputs : mapping of str to Tensor
        `input_ids` and `attention_mask` [B, T] int64, the mask 1 where there is a token and 0 where there is padding;
        `token_type_ids` [B, T] where the model has them; and what is asked: `labels` [B] int64 (classes), [B] float32
        (numbers), [B, T] or [B, S] int64 (texts), or `start_positions` and `end_positions` [B] int64 (answers).
    row_ids : tuple of str
        Of the B rows.
    """

    inputs: Mapping[str, Tensor]
    row_ids: tuple[str, ...] = ()

    @property
    def input_ids(self) -> Tensor:
        """[B, T] int64, padded."""
        return self.inputs["input_ids"]

    @property
    def attention_mask(self) -> Tensor:
        """[B, T] int64, 1 where there is a token and 0 where there is padding."""
        return self.inputs["attention_mask"]

    @property
    def labels(self) -> Tensor:
        """The labels; a batch of questions and contexts has none.

        Raises
        ------
        DataError
            The batch has start and end positions instead.
        """
        if "labels" not in self.inputs:
            raise DataError(
                f"This batch asks for {', '.join(sorted(self.inputs))} and has no labels. Pass `inputs` to the model."
            )
        return self.inputs["labels"]


def collate(
    encoded: Sequence[Encoded],
    *,
    pad_token_id: int,
    padding_side: Side = "right",
    pad_to_multiple_of: int | None = None,
) -> Batch:
    """Pad rows to the longest of them.

    Parameters
    ----------
    encoded : sequence of Encoded
        The B rows of the batch; at least one, all of one kind.
    pad_token_id : int
        See `padding_token_id`.
    padding_side : {"right", "left"}
        Where the padding goes; ``"left"`` for models that go on from the last token.  Targets of
        sequence-to-sequence models are padded on the right in any case, since a decoder starts at the first.
    pad_to_multiple_of : int, optional
        Make T a multiple of this, for hardware that likes it.

    Returns
    -------
    Batch
        T is the longest row, rounded up.

    Raises
    ------
    DataError
        There are no rows, or rows of several kinds.
    ConfigurationError
        A setting is out of range.

    Examples
    --------
    >>> rows = [EncodedRow((5, 6), 0, "a"), EncodedRow((7,), 1, "b")]
    >>> collate(rows, pad_token_id=0).input_ids.tolist()
    [[5, 6], [7, 0]]
    """
    if not encoded:
        raise DataError("A batch of 0 rows was asked for, and a model cannot take it. Pass at least one row.")
    if padding_side not in ("left", "right"):
        raise ConfigurationError(f"padding_side is {padding_side!r}. Choose 'right' or 'left'.")
    multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
    if multiple < 1:
        raise ConfigurationError(f"pad_to_multiple_of is {pad_to_multiple_of}. Choose at least 1, or None.")
    longest = max(len(row.input_ids) for row in encoded)
    num_tokens = -(-longest // multiple) * multiple
    ids = [row.input_ids for row in encoded]
    inputs = {
        "input_ids": _padded(ids, num_tokens, padding_side, pad_token_id),
        "attention_mask": _padded([(1,) * len(row) for row in ids], num_tokens, padding_side, 0),
    }
    types = [row.token_type_ids for row in encoded if isinstance(row, EncodedRow | EncodedWindow)]
    if any(types):
        filled = [row or (0,) * len(row_ids) for row, row_ids in zip(types, ids, strict=True)]
        inputs["token_type_ids"] = _padded(filled, num_tokens, padding_side, 0)
    return Batch(inputs=inputs | _asked(encoded, num_tokens, padding_side), row_ids=tuple(r.row_id for r in encoded))


def padded_ids(rows: Sequence[Sequence[int]], *, pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Return tokens of rows without more, padded on the right, and their mask: both int64 [B, T].

    Parameters
    ----------
    rows : sequence of sequences of int
        At least one.
    pad_token_id : int
        See `padding_token_id`.

    Examples
    --------
    >>> ids, mask = padded_ids([(5, 6), (7,)], pad_token_id=0)
    >>> ids.tolist(), mask.tolist()
    ([[5, 6], [7, 0]], [[1, 1], [1, 0]])
    """
    longest = max(len(row) for row in rows)
    masks = [(1,) * len(row) for row in rows]
    return _padded(rows, longest, "right", pad_token_id), _padded(masks, longest, "right", 0)


def unpadded(values_BT: Tensor, attention_mask_BT: Tensor) -> list[Tensor]:
    """Return, for each row, what stands at its tokens, whichever side was padded.

    Parameters
    ----------
    values_BT : Tensor
        [B, T, ...], such as start logits.
    attention_mask_BT : Tensor
        [B, T], of the batch.
    """
    return [values[mask.bool()] for values, mask in zip(values_BT, attention_mask_BT, strict=True)]


def _asked(encoded: Sequence[Encoded], num_tokens: int, side: Side) -> dict[str, Tensor]:
    first = encoded[0]
    if isinstance(first, EncodedRow):
        answers = [row.label for row in _all_of(EncodedRow, encoded)]
        numbers = any(isinstance(answer, float) for answer in answers)
        return {"labels": torch.tensor(answers, dtype=torch.float32 if numbers else torch.int64)}
    if isinstance(first, EncodedWindow):
        windows = _all_of(EncodedWindow, encoded)
        shifts = [num_tokens - len(row.input_ids) if side == "left" else 0 for row in windows]
        return {
            "start_positions": torch.tensor([r.start_position + n for r, n in zip(windows, shifts, strict=True)]),
            "end_positions": torch.tensor([r.end_position + n for r, n in zip(windows, shifts, strict=True)]),
        }
    if isinstance(first, EncodedPair):
        targets = [row.labels for row in _all_of(EncodedPair, encoded)]
        return {"labels": _padded(targets, max(map(len, targets)), "right", IGNORED)}
    if isinstance(first, EncodedText):
        texts = _all_of(EncodedText, encoded)
        return {"labels": _padded([row.labels for row in texts], num_tokens, side, IGNORED)}
    pictured = _all_of(EncodedImageText, encoded)
    features = {name: torch.cat([row.features[name] for row in pictured]) for name in first.features}
    return {"labels": _padded([row.labels for row in pictured], num_tokens, side, IGNORED)} | features


def _all_of(kind: type[_EncodedT], encoded: Sequence[Encoded]) -> list[_EncodedT]:
    rows: list[_EncodedT] = []
    for row in encoded:
        if not isinstance(row, kind):
            raise DataError(
                f"A batch starts with a {kind.__name__} and row {row.row_id!r} is a {type(row).__name__}; one forward "
                "pass cannot answer both. Make batches of one kind."
            )
        rows.append(row)
    return rows


def _padded(rows: Sequence[Sequence[int]], num_tokens: int, side: Side, filler: int) -> Tensor:
    padded = torch.full((len(rows), num_tokens), filler, dtype=torch.int64)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(num_tokens - len(row), num_tokens)
        padded[index, place] = torch.as_tensor(row, dtype=torch.int64)
    return padded
