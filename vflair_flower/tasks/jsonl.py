"""Read a folder of train/validation[/test].jsonl, one JSON object a line, strictly.

It guesses nothing: whatever is not as documented is refused with file and line.  Lines end at a line feed only, because
texts may hold other Unicode separators (U+2028, U+0085) that `str.splitlines` would cut at.

Invariant: every line of every file becomes exactly one row, or nothing is returned.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from vflair_flower.errors import DataError
from vflair_flower.tasks.dataset import SPLITS, TextDataset
from vflair_flower.tasks.labels import RawRow, checked_label, checked_text, resolve_labels


def load_folder(folder: Path, *, text_column: str, label_column: str) -> TextDataset:
    """Read the data set in `folder`.

    Parameters
    ----------
    folder : Path
        Holds ``train.jsonl`` and ``validation.jsonl``, perhaps ``test.jsonl`` and ``labels.json`` (a list of names).
    text_column, label_column : str
        Names of the columns. ``id`` and ``label_name`` are read too where they are present.

    Raises
    ------
    DataError
        With file and line: whatever is missing or broken.
    """
    for split in ("train", "validation"):
        if not (folder / f"{split}.jsonl").is_file():
            found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
            raise DataError(
                f"{folder} has no {split}.jsonl (it holds {found}), and training needs one. Write that file, one JSON "
                f'object a line: {{"{text_column}": "...", "{label_column}": 0}}.'
            )
    raw = {
        split: _read_split(folder / f"{split}.jsonl", split, text_column=text_column, label_column=label_column)
        for split in SPLITS
        if (folder / f"{split}.jsonl").exists()
    }
    names_path = folder / "labels.json"
    names = _read_names(names_path) if names_path.exists() else None
    label_names, splits = resolve_labels(raw, names=names, names_from=str(names_path))
    return TextDataset(name=folder.name, source=str(folder), label_names=label_names, splits=splits)


def read_records(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield the number, from 1, and the JSON object of every line of a file.

    Raises
    ------
    DataError
        With file and line: a line is not one JSON object in utf-8, or the file is empty.
    """
    for number, line in _lines(path):
        yield number, _parsed(line, f"{path}:{number}")


def _read_split(path: Path, split: str, *, text_column: str, label_column: str) -> list[RawRow]:
    rows: list[RawRow] = []
    first_seen: dict[str, str] = {}
    for number, record in read_records(path):
        where = f"{path}:{number}"
        for column in (text_column, label_column):
            if column not in record:
                has = ", ".join(map(repr, list(record)[:8])) or "none"
                raise DataError(
                    f"{where}: the column {column!r} is missing (the line has {has}). Add it, or name the right one "
                    "with text_column and label_column."
                )
        row_id = str(record.get("id", f"{split}:{number}"))
        if row_id in first_seen:
            raise DataError(
                f"{where}: the id {row_id!r} was used at {first_seen[row_id]} already, so results could not be traced "
                "to a row. Make ids unique in a file, or leave them out."
            )
        first_seen[row_id] = where
        label_name = record.get("label_name")
        rows.append(
            RawRow(
                text=checked_text(record[text_column], column=text_column, where=where),
                label=checked_label(record[label_column], column=label_column, where=where),
                label_name=None if label_name is None else checked_text(label_name, column="label_name", where=where),
                id=row_id,
                where=where,
            )
        )
    return rows


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    lines = _bytes_of(path).rstrip(b"\r\n").split(b"\n")
    if lines == [b""]:
        raise DataError(f"{path}:1: the file is empty. Write one JSON object a line, or remove a test file.")
    for number, line in enumerate(lines, start=1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}:{number}: byte {line[error.start]:#04x} at place {error.start + 1} of the line is not utf-8. "
                "Save the file as utf-8."
            ) from None


def _parsed(line: str, where: str) -> dict[str, object]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: {line[:60]!r} is not JSON ({error}). Write one complete JSON object on each line."
        ) from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: {line[:60]!r} is not a JSON object, so it has no columns. Write {{...}}.")
    return record


def _read_names(path: Path) -> list[str]:
    try:
        names = json.loads(_bytes_of(path).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: this is not JSON in utf-8 ({error}). Write a list of the label names.") from None
    if not isinstance(names, list) or not names:
        raise DataError(
            f"{path}: it holds {type(names).__name__} {str(names)[:60]!r} and not a list of names. Write a JSON list, "
            "one name per label, in the order of the labels."
        )
    return [checked_text(name, column=f"name {index}", where=str(path)) for index, name in enumerate(names)]


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Check the file and its rights.") from error
