"""Score a model's answers by the names of metrics: classes, numbers, texts, or likelihoods, each by its own door.

The formulas are those of scikit-learn, scipy, rouge-score and sacrebleu; see `overlap.py` and `answers.py` for the
official normalisations.

Invariant: a metric is only ever given the answers it is made for; a name that is unknown, or of another kind, is
refused.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef

from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.tasks.answers import final_number, last_boxed, same_math, same_number
from vflair_flower.tasks.examples import PromptRow, SpanRow
from vflair_flower.tasks.likelihood import Likelihood
from vflair_flower.tasks.metrics import bootstrap_interval, majority_accuracy
from vflair_flower.tasks.overlap import corpus_bleu, exact_match, rouge, span_f1, vqa_agreement
from vflair_flower.tasks.scores import Places, Score, corpus_score, mean_score, share_score

METRICS: Mapping[str, str] = {
    "accuracy": "share of rows with the right class",
    "f1": "F1 of the second class, or of all classes alike (macro) where there are more than two",
    "mcc": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman rank correlation",
    "exact_match": "SQuAD's exact match",
    "span_f1": "SQuAD's F1 of shared words",
    "last_word_accuracy": "share of rows whose whole last word is the model's first choice, sub-word by sub-word",
    "word_perplexity": "perplexity of the whole last word",
    "token_perplexity": "perplexity per token of the response, end token included",
    "rouge1": "ROUGE-1, F-measure",
    "rouge2": "ROUGE-2, F-measure; 0 where a text is a single word",
    "rougeL": "ROUGE-L, F-measure",
    "bleu": "BLEU of the corpus, 0..100",
    "gsm8k_accuracy": "share of rows with the right final number",
    "math_accuracy": "share of rows with the right boxed answer in its normal form",
    "vqa_accuracy": "agreement with ten people",
    "pass_at_1": "share of programs that pass their tests; by `score_pass_at_k`, if generated code is allowed",
}
"""Every metric's name and what it is."""

_CLASSES = ("accuracy", "f1", "mcc")
_NUMBERS = ("pearson", "spearman")
_LIKELIHOODS = ("last_word_accuracy", "word_perplexity", "token_perplexity")
Table: TypeAlias = npt.NDArray[np.int64]
Answered: TypeAlias = Sequence[PromptRow] | Sequence[SpanRow]


def score_classes(
    metrics: Sequence[str],
    predictions: Sequence[int],
    labels: Sequence[int],
    *,
    num_labels: int,
    train_labels: Sequence[int] = (),
    seed: int = 0,
) -> tuple[Score, ...]:
    """Score predicted classes.

    Parameters
    ----------
    metrics : sequence of str
        Of accuracy, f1 and mcc.
    predictions, labels : sequence of int
        One of each per row.
    num_labels : int
        K, for the chance level.
    train_labels : sequence of int
        For the majority's accuracy; without them it is not given.
    seed : int
        Of the bootstrap.

    Raises
    ------
    DataError
        There are no rows, or not as many predictions as labels.
    ConfigurationError
        A metric is not one of classes.
    """
    _check("classes", metrics, _CLASSES)
    _check_counts(len(predictions), len(labels))
    given, true = np.asarray(predictions, dtype=np.int64), np.asarray(labels, dtype=np.int64)
    if not ((given >= 0) & (given < num_labels) & (true >= 0) & (true < num_labels)).all():
        raise DataError(
            f"Classes are 0..{num_labels - 1}, but {given.min()} to {given.max()} were predicted. Check num_labels."
        )
    always = np.full_like(true, np.bincount(train_labels).argmax()) if len(train_labels) else None
    scores = []
    for name in metrics:
        if name == "accuracy":
            interval = bootstrap_interval([bool(right) for right in given == true], seed=seed)
            score = Score(name=name, value=interval.estimate, count=len(true), interval=interval, chance=1 / num_labels)
            scores.append(replace(score, majority=None if always is None else majority_accuracy(train_labels, labels)))
            continue
        exact = _mcc if name == "mcc" else _f1
        # scikit-learn gives the figure; a thousand resamples of it are taken from the confusion table.
        quick = _mcc_of_table if name == "mcc" else _f1_of_table

        def statistic(places: Places, quick: Callable[[Table], float] = quick) -> float:
            cells = true[places] * num_labels + given[places]
            return quick(np.bincount(cells, minlength=num_labels**2).reshape(num_labels, num_labels))

        scores.append(
            corpus_score(
                name,
                statistic,
                value=exact(true, given, num_labels),
                count=len(true),
                seed=seed,
                chance=0.0 if name == "mcc" else None,
                majority=None if always is None else exact(true, always, num_labels),
            )
        )
    return tuple(scores)


def _mcc(true: Table, given: Table, num_labels: int) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rows that all have one label; the figure is then 0
        return float(matthews_corrcoef(true, given))


def _f1(true: Table, given: Table, num_labels: int) -> float:
    if num_labels == 2:
        return float(f1_score(true, given, average="binary", zero_division=0.0))
    return float(f1_score(true, given, labels=list(range(num_labels)), average="macro", zero_division=0.0))


def _mcc_of_table(table: Table) -> float:
    true, given, right, rows = table.sum(1), table.sum(0), np.trace(table), table.sum()
    scale = math.sqrt(float(rows**2 - given @ given) * float(rows**2 - true @ true))
    return float(right * rows - true @ given) / scale if scale else 0.0


def _f1_of_table(table: Table) -> float:
    both = table.sum(0) + table.sum(1)
    each = np.divide(2 * np.diag(table), both, out=np.zeros(len(table)), where=both > 0)
    return float(each[1] if len(table) == 2 else each.mean())


def score_numbers(
    metrics: Sequence[str], predictions: Sequence[float], numbers: Sequence[float], *, seed: int = 0
) -> tuple[Score, ...]:
    """Score predicted numbers by their correlation with the true ones; predictions that are all equal get 0.

    Raises
    ------
    DataError
        There are fewer than two rows, not as many predictions as numbers, or one is not finite.
    ConfigurationError
        A metric is not one of numbers.
    """
    _check("numbers", metrics, _NUMBERS)
    _check_counts(len(predictions), len(numbers))
    given, true = np.asarray(predictions, dtype=np.float64), np.asarray(numbers, dtype=np.float64)
    if len(given) < 2 or not (np.isfinite(given).all() and np.isfinite(true).all()):
        raise DataError(
            f"{len(given)} predictions were given, the first of them {list(predictions)[:3]}; a correlation needs two "
            "or more, all finite. Check the model's output."
        )
    note = "" if np.ptp(given) > 0 and np.ptp(true) > 0 else "not defined (all equal), counted as 0"
    scores = []
    for name in metrics:
        correlation = stats.pearsonr if name == "pearson" else stats.spearmanr

        def statistic(places: Places, correlation: Callable[..., tuple[float, float]] = correlation) -> float:
            if np.ptp(given[places]) == 0 or np.ptp(true[places]) == 0:
                return 0.0
            return float(correlation(given[places], true[places])[0])

        scores.append(corpus_score(name, statistic, count=len(given), seed=seed, chance=0.0, note=note))
    return tuple(scores)


def score_texts(
    metrics: Sequence[str], predictions: Sequence[str], rows: Answered, *, seed: int = 0
) -> tuple[Score, ...]:
    """Score what a model wrote, or the answers found in contexts.

    Parameters
    ----------
    metrics : sequence of str
        Of exact_match, span_f1, rouge1, rouge2, rougeL, bleu, gsm8k_accuracy, math_accuracy and vqa_accuracy.
    predictions : sequence of str
        One per row; of prompts, without the prompt.
    rows : sequence of PromptRow or of SpanRow
        With the references.
    seed : int
        Of the bootstrap.

    Raises
    ------
    DataError
        There are no rows, or not as many predictions.
    ConfigurationError
        A metric is not one of texts.
    """
    _check("texts", metrics, tuple(_TEXTS))
    _check_counts(len(predictions), len(rows))
    references = [_references(row) for row in rows]
    return tuple(_TEXTS[name](name, predictions, references, seed) for name in metrics)


def score_likelihoods(metrics: Sequence[str], found: Sequence[Likelihood], *, seed: int = 0) -> tuple[Score, ...]:
    """Score how likely a model found what was asked for.

    `word_perplexity` takes the response of a row as one word, all its sub-words together; `token_perplexity` is per
    token, so it compares only models with the same tokenizer.

    Raises
    ------
    DataError
        There are no rows.
    ConfigurationError
        A metric is not one of likelihoods.
    """
    _check("likelihoods", metrics, _LIKELIHOODS)
    _check_counts(len(found), len(found))
    nll = np.asarray([row.nll for row in found])
    tokens = np.asarray([row.tokens for row in found])
    scores = []
    for name in metrics:
        if name == "last_word_accuracy":
            scores.append(share_score(name, [row.foreseen for row in found], seed=seed))
            continue
        units = tokens if name == "token_perplexity" else np.ones_like(tokens)

        def statistic(places: Places, units: Table = units) -> float:
            mean = float(nll[places].sum() / units[places].sum())
            return math.exp(mean) if mean < 700 else math.inf

        scores.append(corpus_score(name, statistic, count=len(found), seed=seed, note=f"{int(units.sum())} units"))
    return tuple(scores)


_TextScore = Callable[[str, Sequence[str], Sequence[tuple[str, ...]], int], Score]


def _exact(name: str, said: Sequence[str], references: Sequence[tuple[str, ...]], seed: int) -> Score:
    return share_score(
        name, [exact_match(one, wanted) for one, wanted in zip(said, references, strict=True)], seed=seed
    )


def _span_f1(name: str, said: Sequence[str], references: Sequence[tuple[str, ...]], seed: int) -> Score:
    return mean_score(name, [span_f1(one, wanted) for one, wanted in zip(said, references, strict=True)], seed=seed)


def _rouge(name: str, said: Sequence[str], references: Sequence[tuple[str, ...]], seed: int) -> Score:
    return mean_score(name, [rouge(name, one, wanted) for one, wanted in zip(said, references, strict=True)], seed=seed)


def _bleu(name: str, said: Sequence[str], references: Sequence[tuple[str, ...]], seed: int) -> Score:
    return corpus_score(
        name, corpus_bleu(said, references), count=len(said), seed=seed, note="sacrebleu, 13a tokens, smoothing exp"
    )


def _gsm8k(name: str, said: Sequence[str], references: Sequence[tuple[str, ...]], seed: int) -> Score:
    numbers = [final_number(one) for one in said]
    correct = [same_number(one, final_number(wanted[0])) for one, wanted in zip(numbers, references, strict=True)]
    fallback = sum(one is not None and not one.marked for one in numbers)
    none = sum(one is None for one in numbers)
    note = f"{fallback} answers without #### were read by their last number, {none} have no number"
    return share_score(name, correct, seed=seed, note=note)


def _math(name: str, said: Sequence[str], references: Sequence[tuple[str, ...]], seed: int) -> Score:
    boxes = [last_boxed(one) for one in said]
    correct = [same_math(one, last_boxed(wanted[0])) for one, wanted in zip(boxes, references, strict=True)]
    return share_score(name, correct, seed=seed, note=f"{sum(one is None for one in boxes)} answers have no box")


def _vqa(name: str, said: Sequence[str], references: Sequence[tuple[str, ...]], seed: int) -> Score:
    values = [min(1.0, vqa_agreement(one, wanted)) for one, wanted in zip(said, references, strict=True)]
    return mean_score(name, values, seed=seed)


_TEXTS: Mapping[str, _TextScore] = {
    "exact_match": _exact,
    "span_f1": _span_f1,
    "rouge1": _rouge,
    "rouge2": _rouge,
    "rougeL": _rouge,
    "bleu": _bleu,
    "gsm8k_accuracy": _gsm8k,
    "math_accuracy": _math,
    "vqa_accuracy": _vqa,
}


def _references(row: PromptRow | SpanRow) -> tuple[str, ...]:
    if isinstance(row, SpanRow):
        return tuple(answer.text for answer in row.answers)
    return row.accepted


def _check(kind: str, metrics: Sequence[str], known: tuple[str, ...]) -> None:
    for name in metrics:
        if name not in known:
            raise ConfigurationError(
                f"The metric {name!r} is not one of {kind}, so these answers cannot be scored by it. "
                f"Choose of {', '.join(known)}."
            )


def _check_counts(predictions: int, rows: int) -> None:
    if predictions != rows or rows == 0:
        raise DataError(f"There are {predictions} predictions and {rows} rows. Pass one per row, of one or more.")
