"""Encode a prompt and its response: for models that go on writing, and for those that read first and then write.

The prompt's tokens are those that the model will see when it is asked to write, and the loss is on the response only.
The response keeps the tokens it has after its prompt, so a tokenizer that starts each text with a space adds none; if
a token would reach over the border, the response is encoded by itself instead.

P tokens of the prompt, R of the response, with its end token.
Invariant: labels are `IGNORED` over the prompt; every row keeps at least one token of its response, and no row is
longer than `max_tokens`.
"""

import logging
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.tasks.encoded import IGNORED, EncodedPair, EncodedText
from vflair_flower.tasks.examples import PromptRow
from vflair_flower.tasks.texts import check_room, end_token_id

logger = logging.getLogger(__name__)


def encode_responses(
    rows: Sequence[PromptRow], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, add_end: bool = True
) -> list[EncodedText]:
    """Join each prompt and its response for a causal model.

    What is too long is cut, and how often is logged: the prompt at its start, since its end leads to the response; and
    the response at its end, only if it is longer than what the prompt leaves free and longer than half of
    `max_tokens`.  A response that was cut gets no end token, which would teach the model to stop too early.

    Parameters
    ----------
    rows : sequence of PromptRow
        What to encode; an empty prompt makes a text to model as a whole.
    tokenizer : PreTrainedTokenizerBase
        The tokenizer of the model.
    max_tokens : int
        The longest sequence.
    add_end : bool
        Whether the end token is part of the response; leave it out to measure how likely the words alone are.

    Returns
    -------
    list of EncodedText
        In the order of `rows`; see `prompt_tokens` for P.

    Raises
    ------
    ConfigurationError
        `max_tokens` is too small, or an end token is wanted and the tokenizer has none.
    DataError
        A response has no tokens.
    """
    check_room(tokenizer, max_tokens, least=2)
    end = (end_token_id(tokenizer),) if add_end else ()
    encoded, cut_prompts, cut_responses = [], 0, 0
    for row in rows:
        prompt, response = _split_ids(row, tokenizer)
        whole = response + end
        room = min(len(whole), max(max_tokens - len(prompt), max_tokens // 2))
        kept = whole if room == len(whole) else response[:room]
        shown = _without_start(prompt, max_tokens - len(kept), tokenizer)
        cut_prompts += len(shown) < len(prompt)
        cut_responses += len(kept) < len(whole)
        encoded.append(EncodedText(shown + kept, (IGNORED,) * len(shown) + kept, row.id))
    if cut_prompts or cut_responses:
        logger.info(
            "max_tokens = %d cut %d of %d prompts at their start and %d responses at their end",
            max_tokens,
            cut_prompts,
            len(rows),
            cut_responses,
        )
    return encoded


def encode_prompts(
    rows: Sequence[PromptRow], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int
) -> list[EncodedText]:
    """Encode prompts alone, for a model that shall write the response; pad these on the left.

    Parameters
    ----------
    rows, tokenizer
        As for `encode_responses`.
    max_tokens : int
        The longest prompt; a longer one loses its start.

    Raises
    ------
    ConfigurationError
        `max_tokens` is too small.
    DataError
        A prompt has no tokens.
    """
    check_room(tokenizer, max_tokens)
    encoded = []
    for row in rows:
        ids = _without_start(_prompt_ids(row.prompt, tokenizer), max_tokens, tokenizer)
        if not ids:
            raise DataError(f"Row {row.id!r} has the prompt {row.prompt!r}, without any token. Remove the row.")
        encoded.append(EncodedText(ids, (IGNORED,) * len(ids), row.id))
    return encoded


def encode_pairs(
    rows: Sequence[PromptRow], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, max_target_tokens: int
) -> list[EncodedPair]:
    """Encode prompts for an encoder and responses for its decoder, both cut at their end.

    Parameters
    ----------
    rows, tokenizer
        As for `encode_responses`.
    max_tokens, max_target_tokens : int
        The longest prompt and the longest response.

    Raises
    ------
    ConfigurationError
        A length is too small, or the tokenizer has no end token.
    DataError
        A response has no tokens.
    """
    check_room(tokenizer, max_tokens)
    check_room(tokenizer, max_target_tokens)
    end = end_token_id(tokenizer)
    if not rows:
        return []
    read = tokenizer([row.prompt for row in rows], truncation=True, max_length=max_tokens)["input_ids"]
    written = tokenizer(text_target=[row.response for row in rows])["input_ids"]
    encoded, cut = [], 0
    for row, prompt, response in zip(rows, read, written, strict=True):
        target = tuple(response) if response and response[-1] == end else (*response, end)
        if target == (end,) or not prompt:
            raise DataError(f"Row {row.id!r} has a prompt or a response without any token. Remove the row.")
        cut += len(target) > max_target_tokens
        encoded.append(EncodedPair(tuple(prompt), target[:max_target_tokens], row.id))
    if cut:
        logger.info("max_target_tokens = %d cut %d of %d responses at their end", max_target_tokens, cut, len(rows))
    return encoded


def prompt_tokens(encoded: EncodedText) -> int:
    """Return P, how many tokens come before the first that is asked for."""
    return next((place for place, label in enumerate(encoded.labels) if label != IGNORED), len(encoded.labels))


def _split_ids(row: PromptRow, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    prompt = _prompt_ids(row.prompt, tokenizer)
    whole = _prompt_ids(row.prompt + row.response, tokenizer)
    if whole[: len(prompt)] == prompt:
        response = whole[len(prompt) :]
    else:
        response = tuple(tokenizer(row.response, add_special_tokens=False)["input_ids"])
    if not response:
        raise DataError(
            f"Row {row.id!r} has the response {ascii(row.response)[:60]}, in which this tokenizer finds no token, so "
            "there is nothing to learn. Remove the row."
        )
    return prompt, response


def _prompt_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids of a text that is not over: with the special tokens at its start, without those at its end."""
    ids = tuple(tokenizer(text)["input_ids"])
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    bare = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids[:-1] if len(ids) > bare and ids[-1] in ends else ids


def _without_start(prompt: tuple[int, ...], room: int, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    if len(prompt) <= room:
        return prompt
    starts = (tokenizer.bos_token_id, tokenizer.cls_token_id)
    if room < 1:
        raise ConfigurationError(f"There is room for {room} tokens of a prompt. Choose a larger max_tokens.")
    if prompt[0] in starts and room > 1:
        return prompt[:1] + prompt[len(prompt) - room + 1 :]
    return prompt[len(prompt) - room :]
