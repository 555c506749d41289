"""How good a model is, row by row: one figure in 0..1 per row, so that means, intervals and pairs work for every task.

| task                    | per row                                                     | name             |
|-------------------------|-------------------------------------------------------------|------------------|
| sequence classification | 1 if the likeliest class is the label                       | `accuracy`       |
| question answering      | F1 of the words shared with the best reference (SQuAD)      | `f1`             |
| causal, masked, seq2seq | share of the asked tokens that the model puts first         | `token-accuracy` |

Language models are measured on the references, token by token, without writing: what is written is another figure
(`vflair_flower.tasks.score_texts`).  B rows per batch, T tokens, C classes, V vocabulary.
Invariant: how rows are batched makes no difference but for rounding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vflair_flower.errors import ConfigurationError
from vflair_flower.settings import TaskKind
from vflair_flower.tasks import (
    IGNORED,
    Batch,
    Encoded,
    EncodedWindow,
    Example,
    SpanRow,
    best_spans,
    collate,
    span_f1,
    unpadded,
)

METRICS = {
    TaskKind.SEQUENCE_CLASSIFICATION: "accuracy",
    TaskKind.QUESTION_ANSWERING: "f1",
    TaskKind.CAUSAL_LM: "token-accuracy",
    TaskKind.SEQ2SEQ_LM: "token-accuracy",
}
"""What a job of each task is measured by; jobs of other tasks are refused."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What an evaluation gave.

    Parameters
    ----------
    metric : str
        Name of the figure.
    loss : float
        Mean loss per row, window or, of language models, token (so its exponential is the perplexity).
    scores : tuple[float, ...]
        The figure of each row, in 0..1.
    row_ids : tuple[str, ...]
        Which rows those are, in the order in which they were given.
    """

    metric: str
    loss: float
    scores: tuple[float, ...]
    row_ids: tuple[str, ...]

    @property
    def score(self) -> float:
        """The mean over rows."""
        return sum(self.scores) / len(self.scores)


def metric_of(kind: TaskKind) -> str:
    """Return the name of a task's figure; raise ConfigurationError if no job is measured by this version."""
    if kind not in METRICS:
        raise ConfigurationError(
            f"the task is {kind.value!r}; jobs of it are not trained and measured by this version, only cut and "
            f"certified. Choose {', '.join(k.value for k in METRICS)}, or train with your own loop (split_session)."
        )
    return METRICS[kind]


def evaluate(
    model: nn.Module,
    encoded: Sequence[Encoded],
    *,
    kind: TaskKind,
    rows: Sequence[Example],
    batch_size: int,
    pad_token_id: int,
) -> Evaluated:
    """Measure a model on rows; it is left in evaluation mode.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers task model, whole or with holes.
    encoded : sequence of Encoded
        The rows, encoded for the task (`encode_task`).
    kind : TaskKind
        The task.
    rows : sequence of Example
        The rows themselves; answers are compared with them.
    batch_size, pad_token_id : int
        Rows per forward pass, and what they are filled up with.

    Raises
    ------
    ConfigurationError
        If jobs of this task are not measured.
    """
    name = metric_of(kind)
    model.eval()
    passes = _forward(model, encoded, batch_size, pad_token_id)
    if kind is TaskKind.SEQUENCE_CLASSIFICATION:
        loss, scores = _classes(passes, encoded)
    elif kind is TaskKind.QUESTION_ANSWERING:
        loss, scores = _spans(passes, encoded, rows)
    else:
        loss, scores = _tokens(passes, len(encoded), shifted=kind is TaskKind.CAUSAL_LM)
    return Evaluated(metric=name, loss=loss, scores=tuple(scores), row_ids=tuple(row.id for row in rows))


def asked_items(batch: Batch, kind: TaskKind) -> int:
    """Return over how many items the model's loss of a batch is the mean: rows, windows or asked tokens."""
    labels = batch.inputs.get("labels")
    return len(batch.input_ids) if labels is None else asked_labels(labels, kind)


def asked_labels(labels: Tensor, kind: TaskKind) -> int:
    """Return over how many items the loss of these labels, ``[B]`` or ``[B, T]``, is the mean."""
    if labels.dim() < 2:
        return len(labels)
    return int((labels[:, 1 if kind is TaskKind.CAUSAL_LM else 0 :] != IGNORED).sum())


def _forward(
    model: nn.Module, encoded: Sequence[Encoded], batch_size: int, pad_token_id: int
) -> Iterator[tuple[list[int], Batch, Any]]:
    """Yield the places of a batch's rows, the batch and what the model makes of it; batched by length."""
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i].input_ids))
    for start in range(0, len(by_length), batch_size):
        chosen = by_length[start : start + batch_size]
        batch = collate([encoded[i] for i in chosen], pad_token_id=pad_token_id)
        with torch.no_grad():
            output = model(**batch.inputs)
        yield chosen, batch, output


def _classes(passes: Iterator[tuple[list[int], Batch, Any]], encoded: Sequence[Encoded]) -> tuple[float, list[float]]:
    scores, total = [0.0] * len(encoded), 0.0
    for chosen, batch, output in passes:
        total += float(output.loss) * len(chosen)
        for i, right in zip(chosen, (output.logits.argmax(-1) == batch.labels).tolist(), strict=True):
            scores[i] = float(right)
    return total / len(encoded), scores


def _spans(
    passes: Iterator[tuple[list[int], Batch, Any]], encoded: Sequence[Encoded], rows: Sequence[Example]
) -> tuple[float, list[float]]:
    windows = [window for window in encoded if isinstance(window, EncodedWindow)]
    questions = [row for row in rows if isinstance(row, SpanRow)]
    empty = torch.empty(0)
    starts, ends, total = [empty] * len(windows), [empty] * len(windows), 0.0
    for chosen, batch, output in passes:
        total += float(output.loss) * len(chosen)
        found = zip(
            unpadded(output.start_logits, batch.attention_mask),
            unpadded(output.end_logits, batch.attention_mask),
            strict=True,
        )
        for i, (start, end) in zip(chosen, found, strict=True):
            starts[i], ends[i] = start, end
    answers = best_spans(questions, windows, starts, ends)
    scores = [span_f1(answers[row.id].text, [span.text for span in row.answers]) for row in questions]
    return total / len(windows), scores


def _tokens(
    passes: Iterator[tuple[list[int], Batch, Any]], num_rows: int, *, shifted: bool
) -> tuple[float, list[float]]:
    scores, total, tokens = [0.0] * num_rows, 0.0, 0
    for chosen, batch, output in passes:
        right_B, asked_B = _first_choices(output.logits, batch.labels, shifted=shifted)
        total += float(output.loss) * int(asked_B.sum())
        tokens += int(asked_B.sum())
        for i, share in zip(chosen, (right_B / asked_B.clamp(min=1)).tolist(), strict=True):
            scores[i] = share
    return total / max(1, tokens), scores


def _first_choices(logits_BTV: Tensor, labels_BT: Tensor, *, shifted: bool) -> tuple[Tensor, Tensor]:
    """Return, per row, how many of the asked tokens the model puts first, and how many were asked."""
    chosen_BT = logits_BTV.argmax(-1)
    if shifted:
        chosen_BT, labels_BT = chosen_BT[:, :-1], labels_BT[:, 1:]
    asked_BT = labels_BT != IGNORED
    return ((chosen_BT == labels_BT) & asked_BT).sum(-1), asked_BT.sum(-1)


def commonest_token(train: Sequence[Encoded], held_out: Sequence[Encoded]) -> float:
    """Return the token accuracy, mean over held-out rows, of always answering the token most often asked in train."""
    answers = [_asked_tokens(row) for row in train]
    asked = [_asked_tokens(row) for row in held_out]
    counts = torch.bincount(torch.tensor([token for row in answers for token in row]))
    first = int(counts.argmax())  # of equals, the smallest
    return sum(row.count(first) / max(1, len(row)) for row in asked) / len(asked)


def _asked_tokens(row: Encoded) -> list[int]:
    labels: tuple[int, ...] = getattr(row, "labels", ())
    return [token for token in labels if token != IGNORED]
