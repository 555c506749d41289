"""What a model makes of each row by itself: its loss, its tokens' log probabilities, its confidence in the label.

B batch, T tokens, C classes, N rows.  Natural logarithms; double precision, since attacks compare small differences.
Invariant: a row's figures are those of a batch of this row alone, but for rounding.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from vflair_flower.errors import ConfigurationError
from vflair_flower.settings import TaskKind
from vflair_flower.tasks import IGNORED, Batch, Encoded, collate

KINDS = (
    TaskKind.SEQUENCE_CLASSIFICATION,
    TaskKind.SEQUENCE_REGRESSION,
    TaskKind.QUESTION_ANSWERING,
    TaskKind.CAUSAL_LM,
    TaskKind.SEQ2SEQ_LM,
)
"""Tasks whose loss is a function of model and row; that of masked models depends on what is masked."""
_LANGUAGE = (TaskKind.CAUSAL_LM, TaskKind.SEQ2SEQ_LM)


def row_losses(
    model: PreTrainedModel, encoded: Sequence[Encoded], *, kind: TaskKind, pad_token_id: int, batch_rows: int = 32
) -> Tensor:
    """Return each row's loss, float64 [N], as training takes it.

    Parameters
    ----------
    model : PreTrainedModel
        A whole task model; it is run as it is, so put it in evaluation mode.
    encoded : sequence of Encoded
        N rows of the task.
    kind : TaskKind
        One of `KINDS`: the label's cross-entropy, a number's squared error, the mean cross-entropy of the two ends of
        an answer, or the mean over the asked tokens.
    pad_token_id, batch_rows : int
        What rows are filled up with, and how many are run at once.

    Raises
    ------
    ConfigurationError
        The task has no loss per row.
    """
    _check(kind)
    if kind in _LANGUAGE:
        asked = token_log_probs(model, encoded, kind=kind, pad_token_id=pad_token_id, batch_rows=batch_rows)
        return torch.stack([-one.mean() for one in asked])
    losses = torch.zeros(len(encoded), dtype=torch.float64)
    for places, batch, output in _outputs(model, encoded, pad_token_id, batch_rows):
        losses[places] = _read(output, batch, kind)
    return losses


def log_odds(
    model: PreTrainedModel, encoded: Sequence[Encoded], *, kind: TaskKind, pad_token_id: int, batch_rows: int = 32
) -> Tensor:
    """Return each row's confidence on a scale on which it is nearly normal, float64 [N]; parameters as `row_losses`.

    For classes ``log(p / (1 - p))`` of the label's probability (Carlini et al., 2022, section V-C), computed without a
    difference of nearly equal numbers; for all other tasks the loss with its sign turned.
    """
    if kind is not TaskKind.SEQUENCE_CLASSIFICATION:
        return -row_losses(model, encoded, kind=kind, pad_token_id=pad_token_id, batch_rows=batch_rows)
    odds = torch.zeros(len(encoded), dtype=torch.float64)
    for places, batch, output in _outputs(model, encoded, pad_token_id, batch_rows):
        logits_BC, labels_B1 = output.logits.double().cpu(), batch.labels[:, None]
        others_BC = logits_BC.scatter(1, labels_B1, float("-inf"))
        odds[places] = logits_BC.gather(1, labels_B1).squeeze(1) - others_BC.logsumexp(1)
    return odds


def token_log_probs(
    model: PreTrainedModel, encoded: Sequence[Encoded], *, kind: TaskKind, pad_token_id: int, batch_rows: int = 32
) -> list[Tensor]:
    """Return, for each row of a language model, the log probabilities of its asked tokens, float64 [T of the row].

    Parameters as `row_losses`; `kind` is ``causal-lm`` or ``seq2seq-lm``.
    """
    if kind not in _LANGUAGE:
        raise ConfigurationError(f"the task is {kind.value!r}, which asks for no tokens. Give a language model.")
    found: list[Tensor] = [torch.empty(0)] * len(encoded)
    for places, batch, output in _outputs(model, encoded, pad_token_id, batch_rows):
        logits_BTV, labels_BT = output.logits, batch.labels.to(output.logits.device)
        if kind is TaskKind.CAUSAL_LM:
            logits_BTV, labels_BT = logits_BTV[:, :-1], labels_BT[:, 1:]
        asked_BT = labels_BT != IGNORED
        targets_BT1 = labels_BT.masked_fill(~asked_BT, 0)[..., None]
        chosen_BT = torch.log_softmax(logits_BTV.double(), dim=-1).gather(-1, targets_BT1).squeeze(-1)
        for place, values, asked in zip(places, chosen_BT, asked_BT, strict=True):
            found[place] = values[asked].cpu()
    return found


@torch.no_grad()
def _outputs(
    model: PreTrainedModel, encoded: Sequence[Encoded], pad_token_id: int, batch_rows: int
) -> Iterator[tuple[list[int], Batch, Any]]:
    """Yield the places of a batch's rows, the batch and what the model makes of it; rows of like length together."""
    device = next(model.parameters()).device
    by_length = sorted(range(len(encoded)), key=lambda place: len(encoded[place].input_ids))
    for start in range(0, len(by_length), batch_rows):
        places = by_length[start : start + batch_rows]
        batch = collate([encoded[place] for place in places], pad_token_id=pad_token_id)
        yield places, batch, model(**{name: tensor.to(device) for name, tensor in batch.inputs.items()})


def _read(output: Any, batch: Batch, kind: TaskKind) -> Tensor:
    if kind is TaskKind.SEQUENCE_CLASSIFICATION:
        return cross_entropy(output.logits.double().cpu(), batch.labels, reduction="none")
    if kind is TaskKind.SEQUENCE_REGRESSION:
        numbers_B: Tensor = output.logits.squeeze(-1).double().cpu()
        return (numbers_B - batch.labels).square()
    ends = []
    for end in ("start", "end"):
        # transformers' own loss lets padding share in the probability, which would tell rows of other lengths apart.
        logits_BT = output[f"{end}_logits"].double().cpu().masked_fill(~batch.attention_mask.bool(), float("-inf"))
        ends.append(cross_entropy(logits_BT, batch.inputs[f"{end}_positions"], reduction="none"))
    return torch.stack(ends).mean(0)


def _check(kind: TaskKind) -> None:
    if kind not in KINDS:
        raise ConfigurationError(
            f"the task is {kind.value!r}, and a row of it has no loss of its own. Choose one of "
            f"{', '.join(one.value for one in KINDS)}."
        )
