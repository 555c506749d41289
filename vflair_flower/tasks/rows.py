"""The door to data: one name, and the rows come from our generator, a local folder or a hub.

It decides where to look and nothing else; `messages.py`, `jsonl.py` and `hub.py` do the reading.

Invariant: whatever the source, a `TextDataset` comes back that is complete and consistent, or an error says why not.
"""

import re
from pathlib import Path

from vflair_flower.errors import DataError
from vflair_flower.tasks.dataset import Row, Secret, TextDataset
from vflair_flower.tasks.hub import load_from_hub
from vflair_flower.tasks.jsonl import load_folder
from vflair_flower.tasks.messages import generate_messages

__all__ = ["Row", "Secret", "TextDataset", "load_text_dataset"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def load_text_dataset(
    source: str | Path, *, text_column: str = "text", label_column: str = "label", base_dir: Path | None = None
) -> TextDataset:
    """Load a text classification data set.

    Parameters
    ----------
    source : str or Path
        ``"messages"`` for the built-in made-up company messages; else a folder with ``train.jsonl``,
        ``validation.jsonl`` and perhaps ``test.jsonl``; else the id of a hub data set, such as ``"stanfordnlp/sst2"``.
        A folder that is called ``messages`` is ``"./messages"``.
    text_column, label_column : str
        Names of the columns; the generator does not need them.
    base_dir : Path, optional
        What a relative folder is relative to; the working directory if not given.

    Returns
    -------
    TextDataset
        Train, validation and, if there is a labelled one, test.

    Raises
    ------
    DataError
        Nothing is found under this name, or what is found is broken; with file and line.
    ConfigurationError
        The source can only be a hub data set and the library for it is not installed.

    Examples
    --------
    >>> load_text_dataset("messages").num_labels
    12
    """
    if source == "messages":
        return generate_messages()
    if not str(source).strip():
        raise DataError(f"The data source is {source!r}, a blank name. Name a folder, a hub data set or 'messages'.")
    folder = (base_dir or Path()) / Path(source).expanduser()
    if folder.is_dir():
        return load_folder(folder, text_column=text_column, label_column=label_column)
    if folder.exists():
        raise DataError(
            f"{folder} is a file, but a data set is a folder that holds train.jsonl and validation.jsonl. "
            "Name the folder."
        )
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source):
        raise DataError(
            f"The folder {folder.absolute()} does not exist, and {str(source)!r} cannot be the id of a hub "
            "data set (such as 'owner/name'). Correct the path, or use the built-in 'messages'."
        )
    return load_from_hub(source, folder=folder.absolute(), text_column=text_column, label_column=label_column)
