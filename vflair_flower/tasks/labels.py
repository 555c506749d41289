"""From labels as they were written (ints or strings) to labels 0..K-1 with names, one rule for folders and hubs.

It does not read anything: `jsonl.py` and `hub.py` hand in `RawRow`s that know where they come from.

Invariant: what leaves has every label in 0..K-1, and the names follow from the train rows (or the given list) alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vflair_flower.errors import DataError
from vflair_flower.tasks.dataset import Row


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as it was read; `where` is what an error message points at, for instance ``data/train.jsonl:7``."""

    text: str
    label: int | str
    label_name: str | None
    id: str
    where: str


def checked_text(value: object, *, column: str, where: str) -> str:
    """Return `value` if it is a text that a tokenizer can read.

    Raises
    ------
    DataError
        It is not a string, is blank, or holds half a surrogate pair.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: {column!r} is {_shown(value)}, not a text. Put a string there.")
    if not value.strip():
        raise DataError(f"{where}: {column!r} is {_shown(value)}, a blank text teaches nothing. Remove the row.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: {column!r} is {_shown(value)} and holds half a surrogate pair, which no tokenizer can read. "
            "Write the character out in utf-8."
        ) from None
    return value


def checked_label(value: object, *, column: str, where: str) -> int | str:
    """Return `value` if it can be a label: an int that is not negative, or a string that is not blank.

    Raises
    ------
    DataError
        It is anything else; a bool is refused because it is usually the answer to another question.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DataError(
            f"{where}: {column!r} is {_shown(value)}; a label is an int 0..K-1 or a string. Write it as one of these."
        )
    if isinstance(value, int) and value < 0:
        raise DataError(
            f"{where}: {column!r} is {_shown(value)}, but labels count from 0 (negative ones often mean 'unlabelled'). "
            "Label the row or remove it."
        )
    if isinstance(value, str) and not value.strip():
        raise DataError(f"{where}: {column!r} is {_shown(value)}, a blank label. Label the row or remove it.")
    return value


def resolve_labels(
    raw: Mapping[str, Sequence[RawRow]], *, names: Sequence[str] | None, names_from: str
) -> tuple[tuple[str, ...], dict[str, tuple[Row, ...]]]:
    """Give every row a label 0..K-1 and every label a name.

    Parameters
    ----------
    raw : mapping of str to sequence of RawRow
        The splits; ``"train"`` is among them and has a row.
    names : sequence of str, optional
        The names in the order of the labels; without it, they follow from the train rows.
    names_from : str
        Where `names` stand, for messages.

    Returns
    -------
    tuple
        The K names, and the rows per split.

    Raises
    ------
    DataError
        Ints and strings are mixed, ints leave a gap, or a label is not defined by the train rows or `names`.
    """
    first = raw["train"][0]
    for row in _all_rows(raw):
        if isinstance(row.label, str) != isinstance(first.label, str):
            raise DataError(
                f"{row.where}: the label is {_shown(row.label)}, but the label at {first.where} is "
                f"{_shown(first.label)}; one data set has either ints or strings. Use one of them throughout."
            )
    if isinstance(first.label, str):
        label_names = tuple(names) if names is not None else tuple(sorted({str(row.label) for row in raw["train"]}))
        known: dict[int | str, int] = {name: index for index, name in enumerate(label_names)}
    else:
        label_names = tuple(names) if names is not None else _names_of_ints(raw)
        known = {index: index for index in range(len(label_names))}
    defined_by = f"{names_from} names" if names is not None else "the train rows have"
    rows: dict[str, tuple[Row, ...]] = {}
    for split, raw_rows in raw.items():
        for row in raw_rows:
            if row.label not in known:
                raise DataError(
                    f"{row.where}: the label is {_shown(row.label)}, but {defined_by} {len(known)} labels and this is "
                    "not one of them, so nothing could learn it. Correct the row, or add the label."
                )
        rows[split] = tuple(Row(text=row.text, label=known[row.label], id=row.id) for row in raw_rows)
    return label_names, rows


def _names_of_ints(raw: Mapping[str, Sequence[RawRow]]) -> tuple[str, ...]:
    present = sorted({row.label for row in raw["train"] if isinstance(row.label, int)})
    gap = next((index for index, label in enumerate(present) if index != label), None)
    if gap is not None:
        beyond = next(row for row in raw["train"] if isinstance(row.label, int) and row.label > gap)
        raise DataError(
            f"{beyond.where}: the label is {beyond.label}, but no train row has label {gap}; the labels of K classes "
            "are 0..K-1 without a gap. Renumber them, or list all names in labels.json."
        )
    named: dict[int | str, RawRow] = {}
    for row in _all_rows(raw):
        if row.label_name is None:
            continue
        before = named.setdefault(row.label, row)
        if before.label_name != row.label_name:
            raise DataError(
                f"{row.where}: label {row.label} is called {_shown(row.label_name)}, but at {before.where} it is "
                f"called {_shown(before.label_name)}. Give each label one name."
            )
    return tuple((named[label].label_name if label in named else None) or str(label) for label in present)


def _all_rows(raw: Mapping[str, Sequence[RawRow]]) -> Iterator[RawRow]:
    for rows in raw.values():
        yield from rows


def _shown(value: object, longest: int = 60) -> str:
    text = ascii(value)
    return text if len(text) <= longest else f"{text[:longest]}... ({type(value).__name__})"
