"""The door to the catalogue: a name, and the data set comes from a local folder or a hub, in its standard splits.

A folder holds ``<split>.jsonl`` files.  If its ``test.jsonl`` has answers, files are what they are called.  If it has
none, files are called as on the hub: GLUE's ``validation.jsonl`` is then the part that is reported, hence `test`, and
validation is cut from train.  A file that stands for a split which would otherwise be cut from train is that split.

Invariant: validation shares no row with test, and no group (an article, an image, a text) is cut in two by holding
out; the same source and seed give the same splits.
"""

import hashlib
import itertools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.tasks.catalogue import task_entry
from vflair_flower.tasks.columns import Record, example_from, group_of, has_answers
from vflair_flower.tasks.dataset import SPLITS, TaskDataset, TextDataset
from vflair_flower.tasks.entries import HeldOut, Part, TaskEntry
from vflair_flower.tasks.examples import Example, PromptRow, text_of
from vflair_flower.tasks.hub import open_part
from vflair_flower.tasks.jsonl import read_records
from vflair_flower.tasks.rows import load_text_dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Found:
    """An example, and what it must share its split with."""

    example: Example
    group: str


def load_task(
    name: str, *, source: str | Path | None = None, seed: int = 0, max_rows: int | None = None
) -> TaskDataset[Example]:
    """Load a data set of the catalogue.

    Parameters
    ----------
    name : str
        Such as ``"gsm8k"``; see `CATALOGUE`.
    source : str or Path, optional
        A folder with ``train.jsonl`` and so on; by default the set is read from the hub.
    seed : int
        Decides which rows are held out, and which are taken if `max_rows` is set.
    max_rows : int, optional
        Take at most so many rows of each split, for the large sets; images from a hub are held in memory.

    Returns
    -------
    TaskDataset
        The splits that the set has; those for testing only have no train.

    Raises
    ------
    DataError
        The name is unknown, nothing is found, or what is found is broken; with file and line.
    ConfigurationError
        The library for hubs is not installed, or a setting is out of range.
    """
    entry = task_entry(name)
    if seed < 0 or (max_rows is not None and max_rows < 1):
        raise ConfigurationError(f"seed is {seed} and max_rows is {max_rows}. Choose seed >= 0 and max_rows >= 1.")
    if source is None:
        found = {split: _from_hub(entry, part) for split, part in _parts(entry).items()}
        origin = entry.hub_id
    else:
        folder = Path(source).expanduser()
        found = {split: _from_file(entry, path) for split, path in _files(entry, folder).items()}
        origin = str(folder)
    held_out = {split: how for split, how in entry.splits.items() if isinstance(how, HeldOut) and split not in found}
    if held_out:
        found = _hold_out(found, held_out, entry, seed, origin)
    splits = {}
    for split in SPLITS:
        if split in found:
            taken = _taken(found[split], max_rows, f"{seed}|{name}|{split}")
            splits[split] = tuple(row.example for row in taken)
    if source is None and "image" in entry.columns:
        splits = {split: _with_images(entry, rows) for split, rows in splits.items()}
    return TaskDataset(name=name, source=origin, kind=entry.kind, label_names=entry.label_names, splits=splits)


def load_rows(
    data: str,
    *,
    task: str = "",
    text_column: str = "text",
    label_column: str = "label",
    max_rows: int = 0,
    seed: int = 0,
    base_dir: Path | None = None,
) -> TextDataset | TaskDataset[Example]:
    """Load the data set that a job names: texts with labels, or one of the catalogue's if it names a task.

    Parameters
    ----------
    data : str
        See `load_text_dataset`; with a task its folder, or ``"hub"``.
    task : str
        Name of a set of the catalogue, or empty.
    text_column, label_column, base_dir
        As in `load_text_dataset`.
    max_rows, seed
        As in `load_task`; 0 takes all rows.

    Raises
    ------
    DataError
        Nothing is found, what is found is broken, or it has no train or no validation rows.
    """
    if not task:
        return load_text_dataset(data, text_column=text_column, label_column=label_column, base_dir=base_dir)
    source = None if data == "hub" else (base_dir or Path()) / data
    found = load_task(task, source=source, seed=seed, max_rows=max_rows or None)
    missing = [split for split in ("train", "validation") if not found.splits.get(split)]
    if missing:
        raise DataError(
            f"the task {task!r} has no {missing[0]} rows in {found.source}; a job trains and chooses by them. "
            "Take a set that is not for testing only."
        )
    return found


def _parts(entry: TaskEntry) -> dict[str, str]:
    """Return the hub's name of each split that the set itself has."""
    return {split: how.names[0] for split, how in entry.splits.items() if isinstance(how, Part)}


def _files(entry: TaskEntry, folder: Path) -> dict[str, Path]:
    """Return which file of a folder is which split."""
    if not folder.is_dir():
        raise DataError(
            f"The folder {folder.absolute()} does not exist, so there are no rows of {entry.name}. Correct the path, "
            "or leave the source out to read the set from the hub."
        )
    there = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
    named = {split: there[split] for split in SPLITS if split in there and split in entry.splits}
    if "test" in named and _is_labelled(entry, named["test"]):
        found = named
    else:
        found = {}
        for split, how in entry.splits.items():
            names = how.names if isinstance(how, Part) else ()
            called = next((name for name in names if name in there and name != "test"), None)
            if called is not None:
                found[split] = there[called]
        for split in ("train", "validation"):
            if split in named and named[split] not in found.values():
                found.setdefault(split, named[split])
    for split in ("train", "test"):
        how_made = entry.splits.get(split)
        if isinstance(how_made, Part) and split not in found:
            called_or = " or ".join(f"{name}.jsonl" for name in how_made.names)
            holds = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
            raise DataError(
                f"{folder} has no {called_or} with answers (it holds {holds}), and {entry.name} needs one for its "
                f"{split} split. Write that file, one JSON object a line, with the columns of the hub's set."
            )
    return found


def _is_labelled(entry: TaskEntry, path: Path) -> bool:
    # The first rows tell: a hidden part has no answers in any row.
    return any(has_answers(entry, record) for _, record in itertools.islice(read_records(path), 8))


def _from_file(entry: TaskEntry, path: Path) -> list[_Found]:
    records = ((f"{path}:{number}", f"{path.stem}:{number}", record) for number, record in read_records(path))
    return _examples(entry, records, folder=path.parent)


def _from_hub(entry: TaskEntry, part: str) -> list[_Found]:
    rows = open_part(entry.hub_id, entry.hub_config, part)
    if "image" in rows.column_names:  # read later, of the rows that are taken only
        rows = rows.remove_columns("image")
    name = f"{entry.hub_id}[{part}]"
    records = ((f"{name} row {i}", f"{part}:{i}", record) for i, record in enumerate(rows))
    return _examples(entry, records, folder=None)


def _examples(entry: TaskEntry, records: Iterable[tuple[str, str, Record]], *, folder: Path | None) -> list[_Found]:
    found: list[_Found] = []
    seen: dict[str, str] = {}
    for where, row_id, record in records:
        example = example_from(entry, record, where=where, row_id=row_id, folder=folder)
        if example.id in seen:
            raise DataError(
                f"{where}: the id {example.id!r} was used at {seen[example.id]} already, so results could not be "
                "traced to a row. Make ids unique in a file, or leave them out."
            )
        seen[example.id] = where
        found.append(_Found(example, group_of(entry, record, example) or text_of(example)))
    return found


def _hold_out(
    found: Mapping[str, list[_Found]], shares: Mapping[str, HeldOut], entry: TaskEntry, seed: int, origin: str
) -> dict[str, list[_Found]]:
    """Cut the splits of `shares` from train, whole groups at a time, in an order of hashes."""
    train = found["train"]
    groups: dict[str, list[int]] = {}
    for place, row in enumerate(train):
        groups.setdefault(row.group, []).append(place)
    waiting = sorted(groups, key=lambda group: _rank(f"{seed}|{entry.name}|{group}"))
    if len(waiting) <= len(shares):
        raise DataError(
            f"{origin}: train has {len(waiting)} rows that can be parted, too few to hold out {', '.join(shares)} "
            "and leave any. Add rows, or write the splits as files."
        )
    cut: dict[str, list[int]] = {split: [] for split in shares}
    for split, how in shares.items():
        wanted = max(1, round(how.share * len(train)))
        # Every split still to come, and train, keeps a group.
        while waiting[len(shares) :] and len(cut[split]) < wanted:
            cut[split] += groups[waiting.pop(0)]
        if not cut[split]:
            cut[split] += groups[waiting.pop(0)]
        logger.info("%s: %d of %d train rows are held out as %s", origin, len(cut[split]), len(train), split)
    gone = {place for places in cut.values() for place in places}
    rest = [row for place, row in enumerate(train) if place not in gone]
    return {**found, "train": rest} | {split: [train[place] for place in sorted(p)] for split, p in cut.items()}


def _taken(rows: list[_Found], max_rows: int | None, key: str) -> list[_Found]:
    if max_rows is None or len(rows) <= max_rows:
        return rows
    ranked = sorted(range(len(rows)), key=lambda place: _rank(f"{key}|{rows[place].example.id}"))
    return [rows[place] for place in sorted(ranked[:max_rows])]


def _rank(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _with_images(entry: TaskEntry, rows: tuple[Example, ...]) -> tuple[Example, ...]:
    """Read the images of rows from the hub, which were left out when all rows were read."""
    wanted = {row.id for row in rows}
    names = entry.columns["id"]
    images: dict[str, Path | bytes | None] = {}
    for part in _parts(entry).values():
        rows_of_part = open_part(entry.hub_id, entry.hub_config, part, raw_images=True)
        column = next((name for name in names if name in rows_of_part.column_names), None)
        ids = [str(v) for v in rows_of_part[column][:]] if column else [f"{part}:{i}" for i in range(len(rows_of_part))]
        for place, row_id in enumerate(ids):
            if row_id in wanted and row_id not in images:
                record = rows_of_part[place]
                found = example_from(entry, record, where=f"{entry.hub_id}[{part}] row {place}", row_id=row_id)
                assert isinstance(found, PromptRow)
                images[row_id] = found.image
    return tuple(replace(row, image=images[row.id]) if isinstance(row, PromptRow) else row for row in rows)
