"""Read a text classification data set from the Hugging Face hub, by its id, through the `datasets` library.

It does not download by itself and runs no code of a data set: `datasets` reads plain files and caches them.

Invariant: the rows are as the hub gives them; only a missing validation split is cut from train, in a fixed order
(sha256 of the row's place, no random generator), and unlabelled test rows are left out.  Both are logged.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.tasks.dataset import TextDataset
from vflair_flower.tasks.labels import RawRow, checked_label, checked_text, resolve_labels

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

VALIDATION_SHARE = 0.1
_SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def load_from_hub(hub_id: str, *, folder: Path, text_column: str, label_column: str) -> TextDataset:
    """Read the data set called `hub_id`.

    Parameters
    ----------
    hub_id : str
        For instance ``"stanfordnlp/sst2"``.
    folder : Path
        The local folder that was looked for first and is not there; named in messages.
    text_column, label_column : str
        Names of the columns.

    Raises
    ------
    ConfigurationError
        The `datasets` library is not installed.
    DataError
        The hub cannot be reached, does not have the data set, or its rows are unusable.
    """
    loaded = _loaded(hub_id, folder)
    found = {split: name for split, names in _SPLIT_NAMES.items() for name in names[::-1] if name in loaded}
    if "train" not in found:
        raise DataError(
            f"{hub_id!r} on the hub has the splits {sorted(loaded)} but no 'train', so there is nothing to learn from. "
            "Choose another data set, or write its rows to a local folder."
        )
    raw = {
        split: _raw_rows(loaded[name], f"{hub_id}[{name}]", split, text_column=text_column, label_column=label_column)
        for split, name in found.items()
    }
    if "test" in raw and not raw["test"]:
        logger.info("%s: its test split has no labels and is left out", hub_id)
        del raw["test"]
    if "validation" not in raw:
        raw["train"], raw["validation"] = _carved(raw["train"], hub_id)
    names = getattr(loaded[found["train"]].features[label_column], "names", None)
    label_names, splits = resolve_labels(raw, names=names, names_from=f"{hub_id}'s features")
    return TextDataset(name=hub_id.rsplit("/", maxsplit=1)[-1], source=hub_id, label_names=label_names, splits=splits)


def _loaded(hub_id: str, folder: Path) -> "Mapping[str, Dataset]":
    missing = f"The folder {folder} does not exist"
    try:
        import datasets
    except ImportError as error:
        raise ConfigurationError(
            f"{missing}, and reading {hub_id!r} from the hub needs the library 'datasets', which is not installed. "
            "Run pip install 'vflair-flower[simulation]', or correct the path."
        ) from error
    try:
        loaded: Mapping[str, Dataset] = datasets.load_dataset(hub_id)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"{missing}, and the hub has no public data set {hub_id!r} ({error}). Correct the path or the id; "
            "for a private one, log in with `hf auth login`."
        ) from error
    except OSError as error:  # ConnectionError and OfflineModeIsEnabled among them
        raise DataError(
            f"{missing}, and no hub could be reached to look for a data set {hub_id!r} ({error}). Correct the path, "
            "connect to the network, or use the built-in 'messages'."
        ) from error
    except (ValueError, RuntimeError) as error:  # needs a configuration name, or code to run, or files are broken
        raise DataError(
            f"{missing}, and the data set {hub_id!r} of the hub cannot be read ({error}). Write its rows to a local "
            "folder as train.jsonl and validation.jsonl and name that folder."
        ) from error
    return loaded


def _raw_rows(rows: "Dataset", where: str, split: str, *, text_column: str, label_column: str) -> list[RawRow]:
    for column in (text_column, label_column):
        if column not in rows.column_names:
            raise DataError(
                f"{where}: the column {column!r} is missing (there are {rows.column_names}). Name the right ones "
                "with text_column and label_column."
            )
    raw: list[RawRow] = []
    # A slice of a column is a plain list; iterating over the column itself decodes row by row and is slow.
    for index, (text, label) in enumerate(zip(rows[text_column][:], rows[label_column][:], strict=True)):
        if split == "test" and label in (-1, None):
            continue
        place = f"{where} row {index}"
        raw.append(
            RawRow(
                text=checked_text(text, column=text_column, where=place),
                label=checked_label(label, column=label_column, where=place),
                label_name=None,
                id=f"{split}:{index}",
                where=place,
            )
        )
    if not raw and split != "test":
        raise DataError(f"{where} has no rows. Choose another data set.")
    return raw


def _carved(train: Sequence[RawRow], hub_id: str) -> tuple[list[RawRow], list[RawRow]]:
    in_hash_order = sorted(train, key=lambda row: hashlib.sha256(f"{hub_id}|{row.id}".encode()).hexdigest())
    count = max(1, round(VALIDATION_SHARE * len(train)))
    held_out = {row.id for row in in_hash_order[:count]}
    logger.info(
        "%s: the hub has no validation split; %d of %d train rows, in a fixed hash order, stand in for it",
        hub_id,
        count,
        len(train),
    )
    return [row for row in train if row.id not in held_out], [row for row in train if row.id in held_out]


def open_part(hub_id: str, config: str, part: str, *, raw_images: bool = False) -> "Dataset":
    """Open one part of a data set on the hub, such as ``"validation_matched"``.

    Parameters
    ----------
    hub_id, config : str
        The set and its configuration; empty if it has one only.
    part : str
        The hub's own name of a split.
    raw_images : bool
        Leave images as the files they are, not decoded.

    Raises
    ------
    ConfigurationError
        The `datasets` library is not installed.
    DataError
        The hub cannot be reached, or does not have it.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigurationError(
            f"Reading {hub_id!r} from the hub needs the library 'datasets', which is not installed. "
            "Run pip install 'vflair-flower[simulation]', or name a folder with the rows as the source."
        ) from error
    try:
        rows: Dataset = datasets.load_dataset(hub_id, config or None, split=part)
    except OSError as error:  # ConnectionError and OfflineModeIsEnabled among them
        raise DataError(
            f"No hub could be reached to read {part!r} of {hub_id!r} ({error}). Connect to the network, or name a "
            "folder with train.jsonl and so on, of the same columns, as the source."
        ) from error
    except (ValueError, RuntimeError) as error:
        raise DataError(
            f"The part {part!r} of {hub_id!r} on the hub cannot be read ({error}). Name a folder with the rows as "
            "the source."
        ) from error
    if raw_images and "image" in rows.column_names:
        rows = rows.cast_column("image", datasets.Image(decode=False))
    return rows
