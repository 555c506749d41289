"""One door to encoding: the task's kind decides what is made of a row.

Each kind has a function of its own (`encode`, `encode_spans`, ...) that takes all its settings; this door takes those
that every training loop has.  Images need a processor, not a tokenizer: see `encode_images`.

Invariant: what comes back is of one kind of `Encoded`, and `collate` makes a batch of any of it.
"""

from collections.abc import Sequence
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.settings import TaskKind
from vflair_flower.tasks.encoded import Encoded
from vflair_flower.tasks.examples import Example, NumberRow, PromptRow, Row, SpanRow
from vflair_flower.tasks.masking import encode_texts
from vflair_flower.tasks.responses import encode_pairs, encode_responses
from vflair_flower.tasks.spans import encode_spans
from vflair_flower.tasks.texts import encode

_RowT = TypeVar("_RowT", Row, NumberRow, SpanRow, PromptRow)


def encode_task(
    kind: TaskKind, rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int
) -> Sequence[Encoded]:
    """Encode examples for a task.

    Parameters
    ----------
    kind : TaskKind
        The task.
    rows : sequence of examples
        Of that task.
    tokenizer : PreTrainedTokenizerBase
        The tokenizer of the model.
    max_tokens : int
        The longest sequence; of contexts, the longest window, a quarter of which two windows share; of
        sequence-to-sequence models, of prompt and response each.

    Returns
    -------
    sequence of Encoded
        In the order of `rows`; contexts may give several windows each, and masked models' rows must go through
        `mask_tokens` at every step.

    Raises
    ------
    ConfigurationError
        A setting or the tokenizer does not fit, or the task reads images.
    DataError
        A row is of another task, or has no tokens.
    """
    if kind is TaskKind.SEQUENCE_CLASSIFICATION:
        return encode(_only(Row, rows, kind), tokenizer, max_tokens=max_tokens)
    if kind is TaskKind.SEQUENCE_REGRESSION:
        return encode(_only(NumberRow, rows, kind), tokenizer, max_tokens=max_tokens)
    if kind is TaskKind.QUESTION_ANSWERING:
        questions = _only(SpanRow, rows, kind)
        most = max(1, max_tokens // 4)
        return encode_spans(questions, tokenizer, max_tokens=max_tokens, doc_stride=most, max_question_tokens=most)
    if kind is TaskKind.CAUSAL_LM:
        return encode_responses(_only(PromptRow, rows, kind), tokenizer, max_tokens=max_tokens)
    if kind is TaskKind.SEQ2SEQ_LM:
        prompts = _only(PromptRow, rows, kind)
        return encode_pairs(prompts, tokenizer, max_tokens=max_tokens, max_target_tokens=max_tokens)
    if kind is TaskKind.MASKED_LM:
        return encode_texts(rows, tokenizer, max_tokens=max_tokens)
    raise ConfigurationError(
        f"The task is {kind.value!r}, whose images a tokenizer cannot read. Call encode_images with the processor."
    )


def _only(wanted: type[_RowT], rows: Sequence[Example], kind: TaskKind) -> list[_RowT]:
    chosen: list[_RowT] = []
    for row in rows:
        if not isinstance(row, wanted):
            raise DataError(
                f"Row {row.id!r} is a {type(row).__name__}, but the task {kind.value!r} takes {wanted.__name__}. "
                "Load the data set of that task."
            )
        chosen.append(row)
    return chosen
