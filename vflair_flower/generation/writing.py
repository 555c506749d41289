"""Write texts for prompts with a causal language model, whole or cut: batches, left padding, decoding settings.

Nothing here knows of sessions: the model is a transformers model, and if it has a hole, the hole calls.
B rows, T tokens.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchEncoding, GenerationConfig, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from vflair_flower.errors import DataError
from vflair_flower.settings import DecodingSettings, GenerationSettings


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written.

    Parameters
    ----------
    texts : tuple[tuple[str, ...], ...]
        For each prompt its `num_return_sequences` texts, without the prompt.
    prompt_tokens, new_tokens : int
        Tokens read, padding not counted; tokens written, end tokens counted.
    seconds : float
        In `generate`.
    """

    texts: tuple[tuple[str, ...], ...]
    prompt_tokens: int
    new_tokens: int
    seconds: float


def write_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    decoding: DecodingSettings,
    bounds: GenerationSettings,
) -> Written:
    """Write texts for prompts, as many prompts at once as the bounds allow, in their order.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers model that writes, or a `PeftModel` around one.
    tokenizer : transformers.PreTrainedTokenizerBase
        With a pad token.
    prompts : sequence of str
        Read as they are; a chat template is the caller's.
    decoding : DecodingSettings
        How.
    bounds : GenerationSettings
        Rows and tokens that the parties agreed on.

    Raises
    ------
    DataError
        If a prompt has no token, or too many.
    """
    size = decoding.prompts_at_once(bounds)
    batches = [encode_prompts(tokenizer, prompts[i : i + size], first=i) for i in range(0, len(prompts), size)]
    for number, batch in enumerate(batches):
        refuse_too_long(batch["attention_mask"], decoding, bounds, first=number * size)
    texts: list[tuple[str, ...]] = []
    read = written = 0
    started = time.monotonic()
    with drawing(decoding):
        for batch in batches:
            tokens_BT = generate(model, tokenizer, batch, decoding)
            read += int(batch["attention_mask"].sum())
            rows = [text_of(tokenizer, row) for row in tokens_BT]
            written += sum(_length(row, _end_tokens(model)) for row in tokens_BT)
            each = decoding.num_return_sequences
            texts += [tuple(rows[i : i + each]) for i in range(0, len(rows), each)]
    return Written(texts=tuple(texts), prompt_tokens=read, new_tokens=written, seconds=time.monotonic() - started)


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batch: BatchEncoding,
    decoding: DecodingSettings,
    *,
    streamer: BaseStreamer | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """Return the new tokens, int64 ``[B, T]``, rows that ended earlier filled up with pad tokens.

    Parameters
    ----------
    model, tokenizer, decoding
        As in `write_texts`.
    batch : transformers.BatchEncoding
        ``input_ids`` and ``attention_mask``, padded on the left.
    streamer : transformers.BaseStreamer, optional
        Gets tokens as they come; for a batch of one row and one beam.
    cache : transformers.Cache, optional
        To go on from: the batch begins with the tokens that are in it.
    """
    writer: Any = model
    inputs: dict[str, Any] = {name: batch[name].to(writer.device) for name in ("input_ids", "attention_mask")}
    settings = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=decoding.do_sample,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        top_k=decoding.top_k,
        num_beams=decoding.num_beams,
        num_return_sequences=decoding.num_return_sequences,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=_end_tokens(model) or tokenizer.eos_token_id,
    )
    if cache is not None:
        inputs["past_key_values"] = cache
    with torch.no_grad():
        tokens_BT: Tensor = writer.generate(**inputs, generation_config=settings, streamer=streamer)
    # A decoder repeats the prompt; behind an encoder it begins with a start token.
    return tokens_BT[:, 1 if writer.config.is_encoder_decoder else inputs["input_ids"].shape[1] :]


def text_of(tokenizer: PreTrainedTokenizerBase, row_T: Tensor) -> str:
    """Return the text of a row of tokens, without special ones."""
    text = tokenizer.decode(row_T, skip_special_tokens=True)
    assert isinstance(text, str)  # of one row
    return text


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, first: int = 0) -> BatchEncoding:
    """Return prompts as a batch, padded on the left; raise DataError for one without tokens."""
    batch: BatchEncoding = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")
    if not len(prompts) or batch["input_ids"].dtype != torch.int64 or not bool(batch["attention_mask"].any(-1).all()):
        empty = [first + i for i, prompt in enumerate(prompts) if not tokenizer(prompt)["input_ids"]]
        raise DataError(f"prompt {empty[0] if empty else first} has no tokens; the model needs one to go on from.")
    return batch


def refuse_too_long(mask_BT: Tensor, decoding: DecodingSettings, bounds: GenerationSettings, *, first: int = 0) -> None:
    """Raise DataError if a prompt and its text would not fit into the agreed length."""
    row = int(mask_BT.sum(-1).argmax())
    if mask_BT.shape[1] + decoding.max_new_tokens > bounds.max_length:
        raise DataError(
            f"prompt {first + row} has {int(mask_BT[row].sum())} tokens; with max_new_tokens {decoding.max_new_tokens} "
            f"it would pass the {bounds.max_length} that the parties agreed on. Shorten it, ask for fewer tokens, or "
            "raise max_length in the job's generation settings."
        )


@contextmanager
def drawing(decoding: DecodingSettings) -> Iterator[None]:
    """Seed the draws inside, and leave the process's random numbers as they were.

    transformers draws from the process's one generator: parties that are threads of one process disturb each other.
    """
    if not decoding.do_sample:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(decoding.seed)
        yield


def _end_tokens(model: nn.Module) -> list[int]:
    writer: Any = model
    end = writer.generation_config.eos_token_id
    return [] if end is None else list(end) if isinstance(end, list) else [end]


def _length(row_T: Tensor, ends: list[int]) -> int:
    """Return how many tokens were written, the first end token included."""
    at = torch.isin(row_T, torch.tensor(ends, dtype=row_T.dtype, device=row_T.device)).nonzero()
    return int(at[0]) + 1 if len(at) else len(row_T)
