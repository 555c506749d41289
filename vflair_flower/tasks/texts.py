"""Encode whole texts, one or two at a time, for a class or a number; and what a tokenizer must have for any task.

Two texts are told apart by the tokenizer's own separator; where it has none, the second starts on a new line, so that
the last word of one and the first of the other never become one token.

Invariant: a row is never longer than `max_tokens`, and of two texts the longer one is cut first.
"""

import logging
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.tasks.encoded import EncodedRow
from vflair_flower.tasks.examples import NumberRow, Row, text_of

logger = logging.getLogger(__name__)


def encode(rows: Sequence[Row | NumberRow], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> list[EncodedRow]:
    """Turn texts into token ids with the special tokens of the model, cut off after `max_tokens`.

    Parameters
    ----------
    rows : sequence of Row or of NumberRow
        What to encode.
    tokenizer : PreTrainedTokenizerBase
        The tokenizer of the model.
    max_tokens : int
        The longest sequence, special tokens included.

    Returns
    -------
    list of EncodedRow
        In the order of `rows`; labels are ints for classes and floats for numbers.

    Raises
    ------
    ConfigurationError
        `max_tokens` leaves no room for a text.
    DataError
        A text has no tokens.
    """
    paired = any(row.pair is not None for row in rows)
    check_room(tokenizer, max_tokens, texts=2 if paired else 1)
    encoded = []
    for row, (ids, types) in zip(rows, _token_ids(rows, tokenizer, max_tokens), strict=True):
        if not ids:
            raise DataError(
                f"Row {row.id!r} has the text {ascii(row.text)[:60]}, in which this tokenizer finds no token, so there "
                "is nothing to read. Remove the row."
            )
        label = row.label if isinstance(row, Row) else float(row.number)
        encoded.append(EncodedRow(input_ids=ids, label=label, row_id=row.id, token_type_ids=types))
    return encoded


def check_room(tokenizer: PreTrainedTokenizerBase, max_tokens: int, *, texts: int = 1, least: int = 0) -> None:
    """Check that `max_tokens` leaves room beside the special tokens.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Adds the special tokens.
    max_tokens : int
        The longest sequence.
    texts : int
        One, or two that are told apart.
    least : int
        How many tokens of text there must be room for; one per text if it is 0.

    Raises
    ------
    ConfigurationError
        It does not.
    """
    special = tokenizer.num_special_tokens_to_add(pair=texts == 2)
    needed = special + (least or texts)
    if max_tokens < needed:
        raise ConfigurationError(
            f"max_tokens is {max_tokens}, but this tokenizer adds {special} special tokens, so no text would be left. "
            f"Choose more than {needed - 1}."
        )


def has_separator(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer itself puts something between two texts."""
    return tokenizer.sep_token_id is not None and bool(
        tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False)
    )


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


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that ends a response.

    Raises
    ------
    ConfigurationError
        The tokenizer has none, so a model could never learn to stop.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigurationError(
            f"{type(tokenizer).__name__} has no eos token, so a model could not learn where a response ends. "
            "Set tokenizer.eos_token, for instance to tokenizer.sep_token."
        )
    return int(tokenizer.eos_token_id)


def mask_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that hides a token from a masked language model.

    Raises
    ------
    ConfigurationError
        The tokenizer has none.
    """
    if tokenizer.mask_token_id is None:
        raise ConfigurationError(
            f"{type(tokenizer).__name__} has no mask token, so no token can be hidden. "
            "Choose a masked language model such as BERT, or the task 'causal-lm'."
        )
    return int(tokenizer.mask_token_id)


def _token_ids(
    rows: Sequence[Row | NumberRow], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return ids and, for two texts and a model that tells them apart, token types."""
    if not rows:
        return []
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())] * len(rows)
    between = "" if has_separator(tokenizer) else "\n"
    for paired in (False, True):
        places = [place for place, row in enumerate(rows) if (row.pair is not None) == paired]
        if not places:
            continue
        made = tokenizer(
            [rows[place].text for place in places],
            [f"{between}{rows[place].pair}" for place in places] if paired else None,
            truncation="longest_first" if paired else True,
            max_length=max_tokens,
            padding=False,
        )
        # One text needs no types: models take zeros when they get none.
        types = made.get("token_type_ids") if paired else None
        for index, place in enumerate(places):
            found[place] = (tuple(made["input_ids"][index]), tuple(types[index]) if types is not None else ())
    for row, (ids, _) in zip(rows, found, strict=True):
        assert len(ids) <= max_tokens, text_of(row)
    return found
