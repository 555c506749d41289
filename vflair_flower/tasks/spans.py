"""Questions about a context: cut long contexts into overlapping windows, and turn logits back into an answer's text.

T tokens of one window.  Places in a context count characters.  The question comes first and the context second, as in
Devlin et al. (2019, arXiv:1810.04805, section 4.2).

Invariant: an answer that is read from the places an encoded window names contains the true answer's characters.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.tasks.encoded import EncodedWindow
from vflair_flower.tasks.examples import Span, SpanRow
from vflair_flower.tasks.texts import check_room, has_separator

Offsets = tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True, slots=True)
class FoundSpan:
    """An answer read from logits: its text, the character it starts at (-1 for no answer), and its score."""

    text: str
    start: int
    score: float


def encode_spans(
    rows: Sequence[SpanRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    doc_stride: int = 128,
    max_question_tokens: int = 64,
) -> list[EncodedWindow]:
    """Encode questions with their contexts, as many windows of `max_tokens` as a context needs.

    Parameters
    ----------
    rows : sequence of SpanRow
        What to encode; the first of several answers is the one to learn.
    tokenizer : PreTrainedTokenizerBase
        A fast tokenizer, which knows the characters of its tokens.
    max_tokens : int
        The longest window, special tokens and question included.
    doc_stride : int
        How many tokens of the context two windows share.
    max_question_tokens : int
        Longer questions are cut off.

    Returns
    -------
    list of EncodedWindow
        The windows of a row follow each other and bear its id.

    Raises
    ------
    ConfigurationError
        The tokenizer is slow, or the lengths leave no room for the context to move on.
    DataError
        An answer does not stand where its row says.
    """
    if not tokenizer.is_fast:
        raise ConfigurationError(
            f"{type(tokenizer).__name__} does not know which characters its tokens stand for. Load the fast tokenizer "
            "with AutoTokenizer."
        )
    check_room(tokenizer, max_tokens, texts=2)
    windows: list[EncodedWindow] = []
    between = "" if has_separator(tokenizer) else "\n"
    special = tokenizer.num_special_tokens_to_add(pair=True)
    for row in rows:
        answer = _checked_answer(row)
        question, length = _cut(row.question.strip(), tokenizer, max_question_tokens)
        if max_tokens - special - length <= doc_stride:
            raise ConfigurationError(
                f"doc_stride is {doc_stride}, but beside the {length} tokens of question {row.id!r} a window of "
                f"max_tokens = {max_tokens} has room for {max_tokens - special - length} tokens of context only, so "
                "windows would not move on. Choose a smaller doc_stride or larger max_tokens."
            )
        made = tokenizer(
            question,
            between + row.context,
            truncation="only_second",
            max_length=max_tokens,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=False,
        )
        types = made.get("token_type_ids")
        for index, ids in enumerate(made["input_ids"]):
            offsets = _of_context(made["offset_mapping"][index], made.sequence_ids(index), len(between))
            no_answer = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
            start, end = _tokens_of(answer, offsets, no_answer)
            windows.append(
                EncodedWindow(
                    input_ids=tuple(ids),
                    offsets=offsets,
                    start_position=start,
                    end_position=end,
                    no_answer=no_answer,
                    row_id=row.id,
                    token_type_ids=tuple(types[index]) if types is not None and has_separator(tokenizer) else (),
                )
            )
    return windows


def best_spans(
    rows: Sequence[SpanRow],
    windows: Sequence[EncodedWindow],
    start_logits: Sequence[Tensor],
    end_logits: Sequence[Tensor],
    *,
    n_best: int = 20,
    max_answer_tokens: int = 30,
    no_answer_margin: float | None = None,
) -> dict[str, FoundSpan]:
    """Read the best answer of every row from its windows' logits.

    The score of an answer is its start logit plus its end logit; only the `n_best` starts and ends of a window are
    paired, an answer lies inside the context, does not end before it starts, and has at most `max_answer_tokens`.

    Parameters
    ----------
    rows : sequence of SpanRow
        The rows that were encoded.
    windows : sequence of EncodedWindow
        All of their windows.
    start_logits, end_logits : sequence of Tensor
        For each window one value per token, without padding; see `unpadded`.
    n_best, max_answer_tokens : int
        How many places are tried, and the longest answer.
    no_answer_margin : float, optional
        For data with unanswerable questions: "no answer" wins if its score exceeds the best answer's by more than this.
        By default every question is answered.

    Returns
    -------
    dict of str to FoundSpan
        By row id, for every row.

    Raises
    ------
    DataError
        Windows and logits are not as many, or a window is of no row.
    """
    if not len(windows) == len(start_logits) == len(end_logits):
        raise DataError(
            f"There are {len(windows)} windows, {len(start_logits)} start and {len(end_logits)} end logits; they must "
            "be of the same windows. Pass one tensor of each per window."
        )
    contexts = {row.id: row.context for row in rows}
    candidates: dict[str, list[FoundSpan]] = defaultdict(list)
    nothing: dict[str, float] = {}
    for window, starts_T, ends_T in zip(windows, start_logits, end_logits, strict=True):
        if window.row_id not in contexts:
            raise DataError(f"A window is of row {window.row_id!r}, which is not among the rows. Pass the same rows.")
        if not starts_T.shape == ends_T.shape == (len(window.input_ids),):
            raise DataError(
                f"A window of row {window.row_id!r} has {len(window.input_ids)} tokens, but its logits have the shapes "
                f"{tuple(starts_T.shape)} and {tuple(ends_T.shape)}. Take off the padding with `unpadded`."
            )
        candidates[window.row_id] += _candidates(
            window, starts_T, ends_T, contexts[window.row_id], n_best=n_best, longest=max_answer_tokens
        )
        here = float(starts_T[window.no_answer] + ends_T[window.no_answer])
        # The row has no answer only if no window has one.
        nothing[window.row_id] = min(here, nothing.get(window.row_id, here))
    found = {}
    for row in rows:
        best = max(candidates[row.id], key=lambda span: span.score, default=FoundSpan("", -1, float("-inf")))
        if no_answer_margin is not None and nothing.get(row.id, 0.0) - best.score > no_answer_margin:
            best = FoundSpan("", -1, nothing.get(row.id, 0.0))
        found[row.id] = best
    return found


def _candidates(
    window: EncodedWindow, starts_T: Tensor, ends_T: Tensor, context: str, *, n_best: int, longest: int
) -> list[FoundSpan]:
    inside = [place for place, characters in enumerate(window.offsets) if characters is not None]
    if not inside:
        return []
    outside_T = torch.ones(len(window.offsets), dtype=torch.bool)
    outside_T[inside] = False
    many = min(n_best, len(inside))
    starts, ends = (
        logits_T.detach().float().cpu().masked_fill(outside_T, float("-inf")).topk(many)
        for logits_T in (starts_T, ends_T)
    )
    found = []
    for first, first_score in zip(starts.indices.tolist(), starts.values.tolist(), strict=True):
        for last, last_score in zip(ends.indices.tolist(), ends.values.tolist(), strict=True):
            if not first <= last < first + longest:
                continue
            begin, end = window.offsets[first], window.offsets[last]
            assert begin is not None
            assert end is not None
            text = context[begin[0] : end[1]]
            blank = len(text) - len(text.lstrip())  # byte-level tokens take the space before a word with them
            found.append(FoundSpan(text.strip(), begin[0] + blank, first_score + last_score))
    return found


def _checked_answer(row: SpanRow) -> Span | None:
    for answer in row.answers:
        there = row.context[answer.start : answer.end] if answer.start >= 0 else ""
        if there != answer.text or not answer.text:
            raise DataError(
                f"Row {row.id!r}: the answer {answer.text!r} should start at character {answer.start} of the context, "
                f"but {there!r} stands there. Count Unicode characters, not bytes."
            )
    return row.answers[0] if row.answers else None


def _cut(question: str, tokenizer: PreTrainedTokenizerBase, most: int) -> tuple[str, int]:
    """Return the question's characters up to its `most`-th token, and how many tokens that is."""
    made = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)
    length = len(made["input_ids"])
    if length <= most:
        return question, length
    return question[: made["offset_mapping"][most - 1][1]], most


def _of_context(characters: list[tuple[int, int]], sequences: list[int | None], shift: int) -> Offsets:
    return tuple(
        (max(0, begin - shift), end - shift) if sequence == 1 and end - shift > 0 else None
        for (begin, end), sequence in zip(characters, sequences, strict=True)
    )


def _tokens_of(answer: Span | None, offsets: Offsets, no_answer: int) -> tuple[int, int]:
    inside = [(place, characters) for place, characters in enumerate(offsets) if characters is not None]
    if answer is None or not inside or inside[0][1][0] > answer.start or inside[-1][1][1] < answer.end:
        return no_answer, no_answer
    first = next((place for place, (_, end) in inside if end > answer.start), no_answer)
    last = next((place for place, (begin, _) in reversed(inside) if begin < answer.end), no_answer)
    return (first, last) if first <= last else (no_answer, no_answer)
