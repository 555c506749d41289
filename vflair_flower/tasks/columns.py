"""From a record, as a file or a hub gives it, to an example: columns found by role, checked, and put into the prompt.

It reads no files; `where` is what an error points at, for instance ``data/train.jsonl:7``.

Invariant: whatever leaves is complete and well typed; a record that cannot be used is refused with its place.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from vflair_flower.errors import DataError
from vflair_flower.settings import TaskKind
from vflair_flower.tasks.entries import TaskEntry
from vflair_flower.tasks.examples import Example, NumberRow, PromptRow, Row, Span, SpanRow
from vflair_flower.tasks.labels import checked_text

Record = Mapping[str, object]
_ANSWERS = ("label", "answers", "answer", "solution", "output", "target")
_MAY_BE_MISSING = frozenset({"id", "image", "image_id"})


def example_from(entry: TaskEntry, record: Record, *, where: str, row_id: str, folder: Path | None = None) -> Example:
    """Make one example of a record.

    Parameters
    ----------
    entry : TaskEntry
        The data set's row in the catalogue.
    record : mapping of str to object
        One row by column.
    where : str
        Names the place in errors.
    row_id : str
        Its id if no column has one.
    folder : Path, optional
        What the path of an image is relative to.

    Raises
    ------
    DataError
        A column is missing, or what it holds cannot be used.
    """
    values = _by_role(entry, record, where)
    row_id = str(values.get("id", row_id))
    if entry.kind is TaskKind.QUESTION_ANSWERING:
        context = _text(values, "context", where)
        answers = _spans(values["answers"], context, where)
        return SpanRow(_text(values, "question", where), context, answers, row_id)
    if entry.kind.writes:
        return _prompt_row(entry, values, where=where, row_id=row_id, folder=folder)
    text = _text(values, "text", where)
    pair = _text(values, "pair", where) if entry.pair else None
    if entry.kind is TaskKind.SEQUENCE_REGRESSION:
        return NumberRow(text, _number(values["label"], where), row_id, pair)
    return Row(text, _label(values["label"], entry, where), row_id, pair)


def group_of(entry: TaskEntry, record: Record, example: Example) -> str | None:
    """Return what a row must share its split with, or None if its own text is all."""
    for role in entry.group:
        for column in (role, *entry.columns.get(role, ())):
            value = record.get(column)
            if isinstance(value, str | int) and str(value).strip():
                return f"{column}={value}"
    return None


def has_answers(entry: TaskEntry, record: Record) -> bool:
    """Return whether a record is labelled: hidden test parts have -1, null or nothing instead."""
    try:
        values = _by_role(entry, record, "")
    except DataError:
        return False
    return not any(_is_blank(values[role]) for role in _ANSWERS if role in values)


def _by_role(entry: TaskEntry, record: Record, where: str) -> dict[str, object]:
    values: dict[str, object] = {}
    for role, names in entry.columns.items():
        column = next((name for name in names if name in record), None)
        if column is not None:
            values[role] = record[column]
    if "passage" in values and not {"context", "target"} <= set(values):
        values["context"], values["target"] = _last_word(values["passage"], where)
    for role, names in entry.columns.items():
        optional = role in _MAY_BE_MISSING | {"passage"} or (role == "input" and entry.template_without_input)
        if role not in values and not optional:
            has = ", ".join(map(repr, list(record)[:8])) or "none"
            called = " or ".join(map(repr, names))
            raise DataError(
                f"{where}: {entry.name} needs a column {called}, and it is missing (there are {has}). "
                "Rename the column in your file, or leave the source out to read the set from the hub."
            )
    return values


def _prompt_row(
    entry: TaskEntry, values: Mapping[str, object], *, where: str, row_id: str, folder: Path | None
) -> PromptRow:
    references: tuple[str, ...] = ()
    texts: dict[str, str] = {}
    if "answers" in values:
        references = _answers(values["answers"], where)
        # Of equally frequent answers the first, so that the choice does not depend on a hash.
        texts["answer"] = Counter(references).most_common(1)[0][0]
    for role, value in values.items():
        if role == "input":
            texts[role] = value if isinstance(value, str) else ""
        elif role not in ("id", "answers", "image", "image_id", "passage"):
            texts[role] = checked_text(value, column=role, where=where)
    template = entry.template
    if entry.template_without_input and not texts.get("input", "").strip():
        template = entry.template_without_input
    tests = f"{texts['tests']}\ncheck({texts['entry_point']})\n" if "tests" in texts else ""
    return PromptRow(
        prompt=template.format(**texts),
        response=entry.response.format(**texts),
        id=row_id,
        references=references,
        image=_image(values.get("image"), folder, where),
        tests=tests,
    )


def _text(values: Mapping[str, object], role: str, where: str) -> str:
    return checked_text(values[role], column=role, where=where)


def _label(value: object, entry: TaskEntry, where: str) -> int:
    if isinstance(value, str) and value in entry.label_names:
        return entry.label_names.index(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(entry.label_names):
        raise DataError(
            f"{where}: 'label' is {value!r}; a label of {entry.name} is one of 0..{len(entry.label_names) - 1} "
            f"({', '.join(entry.label_names)}). Correct the row (-1 often means 'unlabelled')."
        )
    return value


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise DataError(f"{where}: 'label' is {value!r}, but a regression learns a finite number. Write one.")
    return float(value)


def _spans(value: object, context: str, where: str) -> tuple[Span, ...]:
    texts = value.get("text") if isinstance(value, Mapping) else None
    starts = value.get("answer_start") if isinstance(value, Mapping) else None
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise DataError(
            f"{where}: 'answers' is {ascii(value)[:60]}, but answers are "
            '{"text": [...], "answer_start": [...]} of equal lengths. Write them so.'
        )
    spans = []
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text or not isinstance(start, int) or start < 0:
            raise DataError(
                f"{where}: {text!r} at {start!r} is not an answer. Write a text and the place it starts at."
            )
        if context[start : start + len(text)] != text:
            raise DataError(
                f"{where}: the answer {ascii(text)[:60]} should start at character {start} of the context, but "
                f"{ascii(context[start : start + len(text)])[:60]} stands there. Count Unicode characters, not bytes."
            )
        spans.append(Span(text, start))
    return tuple(spans)


def _answers(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(answer, str) for answer in value):
        raise DataError(f"{where}: 'answers' is {ascii(value)[:60]}, not a list of texts. Write all answers given.")
    return tuple(value)


def _last_word(value: object, where: str) -> tuple[str, str]:
    words = checked_text(value, column="text", where=where).rstrip().rsplit(maxsplit=1)
    if len(words) != 2:
        raise DataError(f"{where}: the passage {value!r} has one word, so nothing comes before the last. Remove it.")
    return words[0], words[1]


def _image(value: object, folder: Path | None, where: str) -> Path | bytes | None:
    if isinstance(value, Mapping):  # what `datasets` gives for an image that is not decoded
        value = value.get("bytes") or value.get("path")
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return (folder or Path()) / value
    raise DataError(f"{where}: 'image' is a {type(value).__name__}, not the path of a file. Write the path.")


def _is_blank(value: object) -> bool:
    return value is None or value in (-1, -1.0, "", []) or (isinstance(value, Mapping) and not value.get("text"))
