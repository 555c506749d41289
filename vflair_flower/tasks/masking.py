"""Hide tokens from a masked language model, afresh at every step and yet the same whenever a run is repeated.

Of the tokens chosen (15 %), 80 % become the mask token, 10 % a random token and 10 % stay (Devlin et al. 2019,
arXiv:1810.04805, section 3.1).  What is chosen depends on (seed, party, step) and the row alone, so it does not matter
how a step's rows are cut into portions.

T tokens of one row.
Invariant: special tokens are never chosen, and of a row with any other token at least one is.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.tasks.encoded import IGNORED, EncodedText
from vflair_flower.tasks.examples import Example, text_of
from vflair_flower.tasks.texts import check_room, mask_token_id


def encode_texts(rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> list[EncodedText]:
    """Encode all text of each example, cut off after `max_tokens`; nothing is asked until `mask_tokens` hides some.

    Raises
    ------
    ConfigurationError
        `max_tokens` leaves no room for a text.
    """
    check_room(tokenizer, max_tokens)
    if not rows:
        return []
    ids = tokenizer([text_of(row) for row in rows], truncation=True, max_length=max_tokens)["input_ids"]
    return [EncodedText(tuple(row_ids), (IGNORED,) * len(row_ids), r.id) for r, row_ids in zip(rows, ids, strict=True)]


def mask_tokens(
    encoded: Sequence[EncodedText],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    party: str,
    step: int,
    share: float = 0.15,
) -> list[EncodedText]:
    """Hide a share of the tokens of each row and ask for them.

    Parameters
    ----------
    encoded : sequence of EncodedText
        Rows of one step, from `encode_texts`.
    tokenizer : PreTrainedTokenizerBase
        The tokenizer of the model.
    seed, party, step
        Of the run; the party's name; counted from 0 over the whole run.  For an evaluation that is to be repeated,
        always pass the same step.
    share : float
        Of the tokens that are not special.

    Returns
    -------
    list of EncodedText
        Labels are the true ids where a token was chosen, and `IGNORED` elsewhere.

    Raises
    ------
    ConfigurationError
        The tokenizer has no mask token, or a value is out of range.
    DataError
        A row has special tokens only.
    """
    if not 0 < share <= 1:
        raise ConfigurationError(f"share is {share}, but it is a share of the tokens. Choose 0 < share <= 1.")
    if step < 0 or seed < 0:
        raise ConfigurationError(f"step is {step} and seed is {seed}; both count from 0. Pass the global step.")
    mask = mask_token_id(tokenizer)
    special = np.asarray(sorted(tokenizer.all_special_ids))
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), special)
    return [
        _masked(
            row, mask=mask, special=special, ordinary=ordinary, key=f"{seed}|{party}|{step}|{row.row_id}", share=share
        )
        for row in encoded
    ]


def _masked(
    row: EncodedText,
    *,
    mask: int,
    special: npt.NDArray[np.int64],
    ordinary: npt.NDArray[np.int64],
    key: str,
    share: float,
) -> EncodedText:
    ids_T = np.asarray(row.input_ids)
    maskable = np.flatnonzero(~np.isin(ids_T, special))
    if maskable.size == 0:
        raise DataError(f"Row {row.row_id!r} has special tokens only, so nothing can be hidden. Remove the row.")
    # Python's own hash() of a string differs from process to process.
    generator = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big"))
    chosen = maskable[generator.random(maskable.size) < share]
    if chosen.size == 0:
        chosen = maskable[[generator.integers(maskable.size)]]
    labels_T = np.full_like(ids_T, IGNORED)
    labels_T[chosen] = ids_T[chosen]
    fate = generator.random(chosen.size)
    shown_T = ids_T.copy()
    shown_T[chosen[fate < 0.8]] = mask
    changed = chosen[(fate >= 0.8) & (fate < 0.9)]
    shown_T[changed] = generator.choice(ordinary, size=changed.size)
    return EncodedText(tuple(shown_T.tolist()), tuple(labels_T.tolist()), row.row_id)
