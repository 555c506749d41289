"""From rows to batches: encode once, order by a pure function, pad per batch.

It holds no iterator state: which rows are in step s follows from (seed, party, s), so a resumed run sees the same
batches as one that was never stopped.

B batch, T tokens.
Invariant: every epoch visits every row exactly once.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.tasks.dataset import Row

logger = logging.getLogger(__name__)

_GROUPED_BATCHES = 16


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row as token ids, not padded."""

    input_ids: tuple[int, ...]
    label: int
    row_id: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What a model takes.

    Parameters
    ----------
    input_ids : Tensor
        [B, T] int64, padded.
    attention_mask : Tensor
        [B, T] int64, 1 where there is a token and 0 where there is padding.
    labels : Tensor
        [B] int64.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> list[EncodedRow]:
    """Turn texts into token ids with the special tokens of the model, cut off after `max_tokens`.

    Parameters
    ----------
    rows : sequence of Row
        What to encode.
    tokenizer : PreTrainedTokenizerBase
        The tokenizer of the model.
    max_tokens : int
        The longest sequence, special tokens included.

    Returns
    -------
    list of EncodedRow
        In the order of `rows`.

    Raises
    ------
    ConfigurationError
        `max_tokens` leaves no room for a text.
    DataError
        A text has no tokens.
    """
    special = tokenizer.num_special_tokens_to_add()
    if max_tokens <= special:
        raise ConfigurationError(
            f"max_tokens is {max_tokens}, but this tokenizer adds {special} special tokens, so no text would be left. "
            f"Choose more than {special}."
        )
    if not rows:
        return []
    ids = tokenizer([row.text for row in rows], truncation=True, max_length=max_tokens, padding=False)["input_ids"]
    encoded = [
        EncodedRow(input_ids=tuple(token_ids), label=row.label, row_id=row.id)
        for row, token_ids in zip(rows, ids, strict=True)
    ]
    for row, encoded_row in zip(rows, encoded, strict=True):
        if not encoded_row.input_ids:
            raise DataError(
                f"Row {row.id!r} has the text {ascii(row.text)[:60]}, in which this tokenizer finds no token, so there "
                "is nothing to read. Remove the row."
            )
    return encoded


def padding_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id to pad with: the pad token, or the end-of-sequence token of models that have none.

    Raises
    ------
    ConfigurationError
        The tokenizer has neither.
    """
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    if tokenizer.eos_token_id is not None:
        logger.info("the tokenizer has no pad token; its eos token %r stands in for it", tokenizer.eos_token)
        return int(tokenizer.eos_token_id)
    raise ConfigurationError(
        f"{type(tokenizer).__name__} has neither a pad nor an eos token, so texts of different lengths cannot share a "
        "batch. Set tokenizer.pad_token."
    )


def collate(
    encoded: Sequence[EncodedRow],
    *,
    pad_token_id: int,
    padding_side: Literal["left", "right"] = "right",
    pad_to_multiple_of: int | None = None,
) -> Batch:
    """Pad rows to the longest of them.

    Parameters
    ----------
    encoded : sequence of EncodedRow
        The B rows of the batch; at least one.
    pad_token_id : int
        See `padding_token_id`.
    padding_side : {"right", "left"}
        Where the padding goes; ``"left"`` for models that read the last token.
    pad_to_multiple_of : int, optional
        Make T a multiple of this, for hardware that likes it.

    Returns
    -------
    Batch
        T is the longest row, rounded up.

    Raises
    ------
    DataError
        There are no rows.
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
    input_ids_BT = torch.full((len(encoded), num_tokens), pad_token_id, dtype=torch.int64)
    attention_mask_BT = torch.zeros_like(input_ids_BT)
    for index, row in enumerate(encoded):
        length = len(row.input_ids)
        place = slice(0, length) if padding_side == "right" else slice(num_tokens - length, num_tokens)
        input_ids_BT[index, place] = torch.tensor(row.input_ids, dtype=torch.int64)
        attention_mask_BT[index, place] = 1
    labels_B = torch.tensor([row.label for row in encoded], dtype=torch.int64)
    return Batch(input_ids=input_ids_BT, attention_mask=attention_mask_BT, labels=labels_B)


@dataclass(frozen=True, kw_only=True)
class BatchOrder:
    """Which rows are in which step, without end: each epoch is a new permutation, its last batch may be smaller.

    Parameters
    ----------
    num_rows : int
        How many rows the party has.
    batch_size : int
        Rows per step.
    seed : int
        The run's seed.
    party : str
        Name of the party, so that parties do not walk in step.
    lengths : tuple of int
        Tokens of each row, to group rows of like length; empty does not.  Batches of like length need little padding,
        and on short texts of mixed length half of the arithmetic is padding.  Grouping is within `_GROUPED_BATCHES`
        batches of the epoch's permutation, and whole batches are shuffled again.

    Raises
    ------
    ConfigurationError
        A value is out of its range.

    Examples
    --------
    >>> order = BatchOrder(num_rows=5, batch_size=2, seed=1, party="north")
    >>> order.steps_per_epoch, sorted(order.indices(0) + order.indices(1) + order.indices(2))
    (3, [0, 1, 2, 3, 4])
    """

    num_rows: int
    batch_size: int
    seed: int
    party: str
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for setting, value, least in (
            ("num_rows", self.num_rows, 1),
            ("batch_size", self.batch_size, 1),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise ConfigurationError(
                    f"{setting} is {value} for party {self.party!r}, so there would be no batches. "
                    f"Choose at least {least}."
                )

        if self.lengths and len(self.lengths) != self.num_rows:
            raise ConfigurationError(
                f"there are {len(self.lengths)} lengths for {self.num_rows} rows of party {self.party!r}. "
                "Give one length per row, or none."
            )

    @property
    def steps_per_epoch(self) -> int:
        """How many steps visit every row once."""
        return -(-self.num_rows // self.batch_size)

    def epoch(self, step: int) -> int:
        """Return the epoch that global step `step` belongs to; both count from 0."""
        if step < 0:
            raise ConfigurationError(f"step is {step}, but steps count from 0. Pass the global step.")
        return step // self.steps_per_epoch

    def indices(self, step: int) -> list[int]:
        """Return the rows of global step `step`, a pure function of (seed, party, step) and the sizes.

        Parameters
        ----------
        step : int
            Counted from 0 over the whole run, not per round or epoch.

        Returns
        -------
        list of int
            Between 1 and `batch_size` places of rows.

        Raises
        ------
        ConfigurationError
            `step` is negative.
        """
        epoch = self.epoch(step)
        # Python's own hash() of a string differs from process to process.
        party = int.from_bytes(hashlib.sha256(self.party.encode()).digest()[:16], "big")
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch, party]))
        permutation = generator.permutation(self.num_rows)
        if self.lengths:
            permutation = self._grouped(permutation, generator)
        start = (step % self.steps_per_epoch) * self.batch_size
        return [int(place) for place in permutation[start : start + self.batch_size]]

    def _grouped(self, permutation: npt.NDArray[np.int64], generator: np.random.Generator) -> npt.NDArray[np.int64]:
        """Sort stretches of the permutation by length, then shuffle whole batches; a smaller one stays last."""
        lengths = np.asarray(self.lengths)
        stretch = _GROUPED_BATCHES * self.batch_size
        parts = [permutation[i : i + stretch] for i in range(0, self.num_rows, stretch)]
        grouped = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
        full = self.num_rows // self.batch_size
        batches = grouped[: full * self.batch_size].reshape(full, self.batch_size)
        return np.concatenate([batches[generator.permutation(full)].reshape(-1), grouped[full * self.batch_size :]])
