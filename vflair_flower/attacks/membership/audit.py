"""A privacy audit in one training run: which of many canaries, put in or left out by a fair coin each, can be told?

Steinke, Nasr, Jagielski, NeurIPS 2023, arXiv 2305.08846.  Whoever trains with (epsilon, delta)-differential privacy,
of adding or removing one canary, cannot let an auditor be right too often; how often it is right gives a lower bound on
epsilon.  m canaries, r guesses (the other canaries are left without), v of them right.
Invariant: which canaries are in is drawn apart from everything else, and scores never see it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from scipy.special import expit
from scipy.stats import binom
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vflair_flower.attacks.membership.losses import row_losses
from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.settings import TaskKind, TaskSettings
from vflair_flower.tasks import Example, PromptRow, Row, encode_task, padding_token_id

_MOST_EPSILON = 64.0


def guess_p_value(correct: int, guesses: int, canaries: int, *, epsilon: float, delta: float) -> float:
    """Return how likely so many right guesses are at most, if training is (epsilon, delta)-private (Theorem 5.2).

    Parameters
    ----------
    correct, guesses, canaries : int
        v of r guesses about m canaries, ``0 <= v <= r <= m``.
    epsilon, delta : float
        What is claimed.

    Raises
    ------
    ConfigurationError
        A number is out of its range.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ConfigurationError(
            f"correct is {correct}, guesses {guesses} and canaries {canaries}; no more can be right than was guessed, "
            "and there is one guess per canary at most. Check the counts."
        )
    if not (epsilon >= 0.0 and 0.0 <= delta <= 1.0):
        raise ConfigurationError(f"epsilon is {epsilon} and delta {delta}; choose epsilon >= 0 and 0 <= delta <= 1.")
    right = float(expit(epsilon))  # what a guess at a bit behind randomised response is right with
    p_value = float(binom.sf(correct - 1, guesses, right))
    if delta and correct:
        below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))  # P[v - i <= W < v], i = 1..v
        p_value += 2.0 * canaries * delta * float((below / np.arange(1, correct + 1)).max())
    return min(1.0, p_value)


def epsilon_lower_bound(
    correct: int, guesses: int, canaries: int, *, delta: float = 0.0, confidence: float = 0.95
) -> float:
    """Return the largest epsilon that the guesses refute, or 0 if they refute none.

    How many guesses are made must be fixed before anybody looks at which are right.

    Parameters
    ----------
    correct, guesses, canaries : int
        v of r guesses about m canaries.
    delta : float
        Of the claim.
    confidence : float
        How surely the true epsilon is above the bound.

    Raises
    ------
    ConfigurationError
        A number is out of its range.

    Examples
    --------
    >>> round(epsilon_lower_bound(75, 100, 1000, delta=1e-4), 3)
    0.673
    """
    if not 0.0 < confidence < 1.0:
        raise ConfigurationError(f"confidence is {confidence}, but it is a share. Choose 0 < confidence < 1.")
    level = 1.0 - confidence

    def refuted(epsilon: float) -> bool:
        return guess_p_value(correct, guesses, canaries, epsilon=epsilon, delta=delta) <= level

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high) and high < _MOST_EPSILON:
        low, high = high, 2.0 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


@dataclass(frozen=True, kw_only=True, eq=False)
class Canaries:
    """Rows that are made to be remembered, and which of them are trained on.

    Parameters
    ----------
    rows : tuple of examples
        All m.
    included : Tensor
        Bool [m], each by a fair coin of its own.
    """

    rows: tuple[Example, ...]
    included: Tensor

    @property
    def trained(self) -> tuple[Example, ...]:
        """The rows to put among those that the model is trained on."""
        return tuple(row for row, is_in in zip(self.rows, self.included.tolist(), strict=True) if is_in)


@dataclass(frozen=True, kw_only=True)
class OneRunAudit:
    """What an audit in one run came to.

    Parameters
    ----------
    canaries, included : int
        How many canaries there were, and how many of them were trained on.
    guesses, correct : int
        How many were guessed in or out, and how many of the guesses are right.
    epsilon : float
        The lower bound; 0 if the guesses refute nothing.
    epsilon_at_best : float
        What the bound would be if all guesses were right: an audit can say no more than that.
    delta, confidence : float
        What the bound is for.
    """

    canaries: int
    included: int
    guesses: int
    correct: int
    epsilon: float
    epsilon_at_best: float
    delta: float
    confidence: float

    @property
    def accuracy(self) -> float:
        """The share of right guesses; chance is 0.5."""
        return self.correct / self.guesses

    def to_json(self) -> dict[str, float]:
        """Return all fields by name, and the accuracy."""
        return asdict(self) | {"accuracy": self.accuracy}


def random_canaries(
    count: int, tokenizer: PreTrainedTokenizerBase, task: TaskSettings, *, num_tokens: int = 16, seed: int = 0
) -> Canaries:
    """Make texts of random tokens, with a random class where the task has classes.

    Parameters
    ----------
    count : int
        m.
    tokenizer : PreTrainedTokenizerBase
        Of the model; special tokens are left out.
    task : TaskSettings
        A classification or a causal language model.
    num_tokens : int
        Per text.
    seed : int
        Of texts, classes and coins.

    Raises
    ------
    ConfigurationError
        A number is out of range, or the task is another.
    """
    if count < 1 or num_tokens < 1:
        raise ConfigurationError(f"count is {count} and num_tokens {num_tokens}; choose 1 or more of each.")
    special = set(tokenizer.all_special_ids)
    plain = [
        token
        for token in range(len(tokenizer))
        if token not in special and str(tokenizer.decode([token])).strip().isalnum()
    ]
    random = np.random.default_rng([seed, 0])
    rows: list[Example] = []
    for place in range(count):
        text = str(tokenizer.decode(random.choice(plain, size=num_tokens).tolist())).strip()
        if task.kind is TaskKind.SEQUENCE_CLASSIFICATION:
            rows.append(Row(text=text, label=int(random.integers(len(task.label_names))), id=f"canary-{place}"))
        elif task.kind is TaskKind.CAUSAL_LM:
            rows.append(PromptRow(prompt="", response=text, id=f"canary-{place}"))
        else:
            raise ConfigurationError(
                f"the task is {task.kind.value!r}; canaries are made for classifications and causal language models."
            )
    return Canaries(rows=tuple(rows), included=_coins(count, seed))


def mislabelled_canaries(rows: Sequence[Row], task: TaskSettings, *, seed: int = 0) -> Canaries:
    """Give rows a wrong class each, drawn evenly.

    Parameters
    ----------
    rows : sequence of Row
        Rows of their own: none of them may be among the rows that are trained on beside the canaries.
    task : TaskSettings
        A classification.
    seed : int
        Of classes and coins.

    Raises
    ------
    DataError
        There are no rows, or the task has no classes.
    """
    classes = len(task.label_names)
    if not rows or classes < 2:
        raise DataError(
            f"there are {len(rows)} rows and {classes} classes; a wrong class needs rows and two classes. Use "
            "random_canaries for other tasks."
        )
    shifts = np.random.default_rng([seed, 0]).integers(1, classes, size=len(rows)).tolist()
    wrong = [
        replace(row, label=(row.label + shift) % classes, id=f"canary-{place}")
        for place, (row, shift) in enumerate(zip(rows, shifts, strict=True))
    ]
    return Canaries(rows=tuple(wrong), included=_coins(len(rows), seed))


def canary_scores(
    canaries: Canaries,
    before: PreTrainedModel,
    after: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskSettings,
    *,
    max_tokens: int,
    batch_rows: int = 32,
) -> Tensor:
    """Return by how much training lowered the loss of each canary, float64 [m]: the paper's black-box score.

    Parameters
    ----------
    canaries : Canaries
        All of them.
    before, after : PreTrainedModel
        The whole model before and after training, in evaluation mode.
    tokenizer, task, max_tokens
        As in training.
    batch_rows : int
        Rows at once.
    """
    encoded = encode_task(task.kind, canaries.rows, tokenizer, max_tokens=max_tokens)
    pad = padding_token_id(tokenizer)
    old, new = (
        row_losses(model, encoded, kind=task.kind, pad_token_id=pad, batch_rows=batch_rows) for model in (before, after)
    )
    return old - new


def audit_in_one_run(
    scores: Tensor,
    canaries: Canaries,
    *,
    guess_in: int | None = None,
    guess_out: int | None = None,
    delta: float = 1e-5,
    confidence: float = 0.95,
) -> OneRunAudit:
    """Guess which canaries are in, and bound epsilon by how many guesses are right.

    Parameters
    ----------
    scores : Tensor
        Float [m], larger for canaries that are likelier in.
    canaries : Canaries
        The truth.
    guess_in, guess_out : int, optional
        How many of the largest scores are guessed in and how many of the smallest out; a quarter of the canaries each
        by default.  Choose them before you see a result: the best of several choices is no bound.
    delta, confidence
        See `epsilon_lower_bound`.

    Raises
    ------
    DataError
        There are not as many finite scores as canaries.
    ConfigurationError
        There are more guesses than canaries, or none.
    """
    total = len(canaries.rows)
    if tuple(scores.shape) != (total,) or not bool(torch.isfinite(scores).all()):
        raise DataError(
            f"the scores are {tuple(scores.shape)} for {total} canaries, or one is not finite. Give one number each."
        )
    top = total // 4 if guess_in is None else guess_in
    bottom = total // 4 if guess_out is None else guess_out
    guesses = top + bottom
    if top < 0 or bottom < 0 or not 1 <= guesses <= total:
        raise ConfigurationError(
            f"{top} canaries are to be guessed in and {bottom} out, of {total}. Guess 1 or more, and each once at most."
        )
    order = scores.argsort(descending=True, stable=True)
    included = canaries.included[order]
    correct = int(included[:top].sum()) + int((~included[total - bottom :]).sum())

    def bound(right: int) -> float:
        return epsilon_lower_bound(right, guesses, total, delta=delta, confidence=confidence)

    return OneRunAudit(
        canaries=total,
        included=int(included.sum()),
        guesses=guesses,
        correct=correct,
        epsilon=bound(correct),
        epsilon_at_best=bound(guesses),
        delta=delta,
        confidence=confidence,
    )


def _coins(count: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, 1]).random(count) < 0.5)
