"""How many planted secrets come out: in what attacks found, by prompting the finished model, and by rank.

A secret counts as found where it stands in a text, whatever its case and spaces.  Chance is what other values of the
same kind and format get, which were never planted.
"""

import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vflair_flower.attacks.membership.losses import token_log_probs
from vflair_flower.attacks.scoring import Figure, shows
from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.settings import TaskKind
from vflair_flower.tasks import (
    Example,
    PromptRow,
    Score,
    Secret,
    collate,
    encode_prompts,
    encode_responses,
    made_up_secret,
    mean_interval,
    padding_token_id,
    text_of,
)
from vflair_flower.tasks.scores import corpus_score

_CHANCE_VALUES = 20
_TRIES_PER_VALUE = 50


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """Which secrets came out.

    Parameters
    ----------
    secrets : tuple of Secret
        All that were looked for.
    found : tuple of bool
        Of each, whether it stands in any text.
    found_by : mapping of str to tuple of bool
        The same by source of texts, such as an attack's name.
    figure : Figure
        The share that came out by any source, with its chance.
    """

    secrets: tuple[Secret, ...]
    found: tuple[bool, ...]
    found_by: Mapping[str, tuple[bool, ...]]
    figure: Figure

    def of_kind(self, kind: str) -> tuple[int, int]:
        """Return how many secrets of a kind came out, and of how many."""
        own = [hit for secret, hit in zip(self.secrets, self.found, strict=True) if secret.kind == kind]
        return sum(own), len(own)


def extracted(texts: Mapping[str, Sequence[str]], secrets: Sequence[Secret], *, seed: int = 0) -> Extraction:
    """Return which secrets stand in what attacks found: one number for all attacks together.

    Parameters
    ----------
    texts : mapping of str to sequence of str
        By the name of each attack, what it made of the victim's rows (`vflair_flower.attacks.scoring.guessed_texts`)
        or got from the model (`prompt_for_secrets`).  A secret counts wherever it stands: an adversary that
        has it need not know whose it is.
    secrets : sequence of Secret
        What was planted in the rows that were attacked.
    seed : int
        Of chance and interval.

    Raises
    ------
    DataError
        There are no secrets.
    """
    if not secrets:
        raise DataError("no secrets were planted, so none can come out. Use a data set that has some.")
    found_by = {name: tuple(_in_any(own, secret.value) for secret in secrets) for name, own in sorted(texts.items())}
    found = tuple(any(hits) for hits in zip(*found_by.values(), strict=True)) or (False,) * len(secrets)
    everything = [text for own in texts.values() for text in own]
    planted = {secret.value for secret in secrets}
    by_chance = [
        _in_any(everything, value)
        for place, secret in enumerate(secrets)
        for value in alternatives(secret, _CHANCE_VALUES, seed=seed + place)
        if value not in planted
    ]
    interval = mean_interval([float(hit) for hit in found], seed=seed)
    figure = Figure(
        value=interval.estimate,
        low=interval.low,
        high=interval.high,
        chance=sum(by_chance) / max(1, len(by_chance)),
        n=len(secrets),
    )
    return Extraction(secrets=tuple(secrets), found=found, found_by=found_by, figure=figure)


def prompt_for_secrets(
    model: PreTrainedModel,
    rows: Sequence[Example],
    secrets: Sequence[Secret],
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: TaskKind = TaskKind.CAUSAL_LM,
    max_tokens: int = 256,
    more_tokens: int = 8,
    batch_rows: int = 16,
) -> tuple[str, ...]:
    """Let the finished model go on, greedily, from the text before each secret.

    An adversary that has this text has much: this is an upper bound (discoverable memorisation, Carlini et al., ICLR
    2023, arXiv 2202.07646).

    Parameters
    ----------
    model : PreTrainedModel
        The whole trained model, in evaluation mode.
    rows : sequence of examples
        Those that hold the secrets.
    secrets : sequence of Secret
        What to ask for.
    tokenizer : PreTrainedTokenizerBase
        The model's.
    kind : TaskKind
        The model's task; only causal language models write on.
    max_tokens : int
        Of the text before a secret, at most; a longer one loses its start.
    more_tokens : int
        How many are written beyond as many as the secret has.
    batch_rows : int
        Prompts at once.

    Returns
    -------
    tuple of str
        What was written for each secret, without the prompt; empty where nothing comes before it and the model has no
        begin token.

    Raises
    ------
    ConfigurationError
        The model does not write on.
    DataError
        A secret does not stand in its row.
    """
    _check_writes(kind)
    pad = padding_token_id(tokenizer)
    device = next(model.parameters()).device
    asked = list(_before_secrets(rows, secrets, tokenizer))
    written = [""] * len(asked)
    places = [place for place, (row, starts) in enumerate(asked) if row.prompt or starts]
    for start in range(0, len(places), batch_rows):
        chosen = places[start : start + batch_rows]
        prompts = encode_prompts([asked[place][0] for place in chosen], tokenizer, max_tokens=max_tokens)
        batch = collate(prompts, pad_token_id=pad, padding_side="left")
        longest = max(len(tokenizer(secrets[place].value)["input_ids"]) for place in chosen)
        with torch.no_grad():
            ids_BT = model.generate(  # type: ignore[operator]
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                max_new_tokens=longest + more_tokens,
                do_sample=False,
                pad_token_id=pad,
            )
        for place, ids in zip(chosen, ids_BT[:, batch.input_ids.shape[1] :], strict=True):
            written[place] = str(tokenizer.decode(ids.tolist(), skip_special_tokens=True)).strip()
    return tuple(written)


@dataclass(frozen=True, kw_only=True)
class Exposure:
    """How high a model ranks a secret among values that could stand in its place (Carlini et al., USENIX Sec. 2019).

    Parameters
    ----------
    secret : Secret
        What was planted.
    rank : int
        1 for the likeliest; values that are as likely as the secret count as likelier.
    alternatives : int
        How many other values of the same kind and format it was compared with.
    """

    secret: Secret
    rank: int
    alternatives: int

    @property
    def bits(self) -> float:
        """Bits that the model saves whoever guesses the secret: from 0 to `most_bits`."""
        return self.most_bits - math.log2(self.rank)

    @property
    def most_bits(self) -> float:
        """What rank 1 gives; a larger exposure cannot be seen with so few alternatives."""
        return math.log2(self.alternatives + 1)

    @property
    def chance_bits(self) -> float:
        """The mean over all ranks, which a model gives that never saw the secret: about 1.44."""
        return self.most_bits - float(np.log2(np.arange(1, self.alternatives + 2)).mean())


def exposures(
    model: PreTrainedModel,
    rows: Sequence[Example],
    secrets: Sequence[Secret],
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: TaskKind = TaskKind.CAUSAL_LM,
    compared_with: int = 255,
    max_tokens: int = 256,
    batch_rows: int = 64,
    seed: int = 0,
) -> tuple[Exposure, ...]:
    """Return the exposure of each secret, given the text before it.

    Not as in the paper: the rank is among a sample of values, and the distribution of likelihoods is not extrapolated.

    Parameters
    ----------
    model, rows, secrets, tokenizer, kind
        As for `prompt_for_secrets`.
    compared_with : int
        How many other values each secret is compared with; fewer where its format has fewer.
    max_tokens : int
        Of the text before and the secret together.
    batch_rows : int
        Values at once.
    seed : int
        Of the other values.

    Raises
    ------
    ConfigurationError
        The model is no causal language model, or there is nothing to compare with.
    DataError
        A secret does not stand in its row, or its format has no other values.
    """
    _check_writes(kind)
    if compared_with < 1:
        raise ConfigurationError(f"compared_with is {compared_with}; a rank needs others. Choose 1 or more.")
    pad, found = padding_token_id(tokenizer), []
    for place, (row, _) in enumerate(_before_secrets(rows, secrets, tokenizer)):
        secret = secrets[place]
        others = alternatives(secret, compared_with, seed=seed + place)
        space = row.response[: -len(secret.value)]
        texts = [
            PromptRow(prompt=row.prompt, response=space + value, id=f"{index}")
            for index, value in enumerate((secret.value, *others))
        ]
        encoded = encode_responses(texts, tokenizer, max_tokens=max_tokens, add_end=False)
        asked = token_log_probs(model, encoded, kind=kind, pad_token_id=pad, batch_rows=batch_rows)
        likely = torch.stack([one.sum() for one in asked])
        rank = 1 + int((likely[1:] >= likely[0]).sum())
        found.append(Exposure(secret=secret, rank=rank, alternatives=len(others)))
    return tuple(found)


def mean_exposure(found: Sequence[Exposure], *, seed: int = 0) -> Score:
    """Return the mean of exposures in bits, with a bootstrap interval over secrets and its chance."""
    bits = np.array([one.bits for one in found])
    return corpus_score(
        "exposure_bits",
        lambda places: float(bits[places].mean()),
        count=len(bits),
        seed=seed,
        chance=float(np.mean([one.chance_bits for one in found])) if found else None,
    )


def alternatives(secret: Secret, count: int, *, seed: int = 0) -> tuple[str, ...]:
    """Return up to `count` different values of a secret's kind and format (digits where it has digits), without it.

    Raises
    ------
    DataError
        No other value of the format was found.
    """
    generator = random.Random(f"alternatives|{seed}|{secret.kind}")
    shape = _shape(secret)
    ours = any(_shape_of(secret.kind, made_up_secret(secret.kind, generator)) == shape for _ in range(400))
    values: dict[str, None] = {}
    for _ in range(_TRIES_PER_VALUE * count):
        if len(values) == count:
            break
        value = made_up_secret(secret.kind, generator) if ours else _other_digits(secret.value, generator)
        if value != secret.value and _shape_of(secret.kind, value) == shape:
            values[value] = None
    if not values:
        raise DataError(
            f"the secret of row {secret.row_id!r} has the kind {secret.kind!r} and no digits, and is not of the format "
            "that is planted for it, so that nothing like it can be made up. Leave it out."
        )
    return tuple(values)


def _shape(secret: Secret) -> str:
    return _shape_of(secret.kind, secret.value)


def _shape_of(kind: str, value: str) -> str:
    """Return a value with zeros for digits, or of a person only how many names there are."""
    return re.sub(r"[^\W\d_]+", "a", value) if kind == "person" else re.sub(r"\d", "0", value)


def _other_digits(value: str, generator: random.Random) -> str:
    return re.sub(r"\d", lambda _: str(generator.randrange(10)), value)


def _in_any(texts: Sequence[str], value: str) -> bool:
    return any(shows(text, value) for text in texts)


def _before_secrets(
    rows: Sequence[Example], secrets: Sequence[Secret], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[PromptRow, bool]]:
    """Yield, per secret, the text before it and the secret with the space before it; and whether texts have a begin."""
    texts = {row.id: text_of(row) for row in rows}
    begins = bool(tokenizer("")["input_ids"])
    for secret in secrets:
        text = texts.get(secret.row_id)
        at = -1 if text is None else text.find(secret.value)
        if text is None or at < 0:
            raise DataError(
                f"the {secret.kind} of row {secret.row_id!r} does not stand in its row, or the row is missing. Give "
                "the rows that the secrets were planted in."
            )
        prompt = text[:at].rstrip()
        yield PromptRow(prompt=prompt, response=text[len(prompt) : at] + secret.value, id=secret.row_id), begins


def _check_writes(kind: TaskKind) -> None:
    if kind is not TaskKind.CAUSAL_LM:
        raise ConfigurationError(
            f"the task is {kind.value!r}, and only a causal language model goes on from a text. Look for secrets in "
            "what other attacks find (`extracted`)."
        )
