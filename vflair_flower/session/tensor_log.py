"""A log of tensors on disk: one line of JSON per entry in an index, and the entries' tensors in numbered files.

What it is: `index.jsonl`, whose first line says what the folder is, and safetensors files that its lines point to.
What it is not: a database; entries are added and read in order.  Invariants: a line is written after its tensors, so
whatever the index names is there; and the folder never holds more bytes than its cap.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vflair_flower.errors import ConfigurationError, DataError

logger = logging.getLogger(__name__)

INDEX = "index.jsonl"
VERSION = 1
_BUFFER_BYTES = 16 << 20
_TENSOR_BYTES = 160  # of a safetensors header, per tensor, its name not counted
_FILE_BYTES = 1024  # of a file and of the note at the end

Line = dict[str, Any]


class TensorLog:
    """Write a log; not safe for use from many threads.

    Parameters
    ----------
    folder : pathlib.Path
        Made if it is not there, for its owner's eyes only; a log that is there already is gone on with.
    kind : str
        What the log is of; readers ask for it.
    about : mapping
        What the first line says beside.
    prefix : str
        Begins the names of files, so that two writers never share one.
    max_bytes : int
        The most that the folder may hold.

    Raises
    ------
    ConfigurationError
        If the folder holds something else.
    """

    def __init__(self, folder: Path, *, kind: str, about: Mapping[str, Any], prefix: str, max_bytes: int) -> None:
        self.folder = folder
        self._prefix, self._max_bytes = prefix, max_bytes
        self._lines: list[Line] = []
        self._tensors: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self._files = 0
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            index = folder / INDEX
            if not index.exists() and any(folder.iterdir()):
                raise ConfigurationError(f"{folder} holds other files; a log is written into a folder of its own.")
            self.noted = False
            """Whether the log has ended already, with a note."""
            if index.exists():
                _check_header(folder, kind)
                self.noted = _ends_with_note(index)
            else:
                self._append([{"format": kind, "version": VERSION, **about}])
            self.used_bytes = _FILE_BYTES + sum(path.stat().st_size for path in folder.iterdir())
        except (OSError, DataError) as error:
            raise ConfigurationError(f"nothing can be written into {folder}: {error} Choose another folder.") from error

    @property
    def filling(self) -> float:
        """Part of the cap that is used."""
        return self.used_bytes / self._max_bytes

    def add(self, line: Line, tensors: Mapping[str, Tensor]) -> bool:
        """Add an entry, with copies of its tensors; return False, and add nothing, if the cap does not allow it."""
        number = len(self._lines)
        if tensors:
            line = {**line, "file": self._file, "tensors": {name: f"{number}.{name}" for name in tensors}}
        cost = len(_text(line)) + sum(t.nbytes + _TENSOR_BYTES + len(name) for name, t in tensors.items())
        cost += 0 if self._tensors or not tensors else _FILE_BYTES
        if self.used_bytes + cost > self._max_bytes:
            return False
        self._lines.append(line)
        self._tensors |= {f"{number}.{name}": tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        self.used_bytes += cost
        self._waiting_bytes += cost
        if self._waiting_bytes >= _BUFFER_BYTES:
            self.flush()
        return True

    def flush(self) -> None:
        """Write what waits."""
        if self._tensors:
            draft = self.folder / f"{self._file}.part"
            save_file({name: tensor.contiguous() for name, tensor in self._tensors.items()}, draft)
            os.replace(draft, self.folder / self._file)
            self._files += 1
        if self._lines:
            self._append(self._lines)
        self._lines, self._tensors, self._waiting_bytes = [], {}, 0

    def close(self, note: str | None = None) -> None:
        """Write what waits, and why there is no more of it, if there is a reason."""
        self.flush()
        if note is not None:
            self._append([{"note": note}])

    @property
    def _file(self) -> str:
        return f"{self._prefix}-{self._files:05d}.safetensors"

    def _append(self, lines: list[Line]) -> None:
        with open(self.folder / INDEX, "a", encoding="utf-8") as index:
            index.write("".join(map(_text, lines)))


def read_log(folder: Path, kind: str) -> Iterator[tuple[Line, dict[str, Tensor]]]:
    """Return the entries of a log with their tensors, which are read as they come.

    Raises
    ------
    DataError
        At once, if the folder holds no such log; later, if a part of it is broken or missing.
    """
    _check_header(folder, kind)
    return _entries(folder)


def _entries(folder: Path) -> Iterator[tuple[Line, dict[str, Tensor]]]:
    name, opened = "", None
    try:
        for place, line in _lines(folder / INDEX):
            if "note" in line:
                logger.warning("%s: %s", folder, line["note"])
                continue
            if place == 1:
                continue
            tensors: dict[str, Tensor] = {}
            if "file" in line:
                if line["file"] != name:
                    if opened is not None:
                        opened.__exit__(None, None, None)
                    name, opened = str(line["file"]), _open(folder, line["file"], place)
                tensors = _read(opened, line, folder / INDEX, place)
            yield line, tensors
    finally:
        if opened is not None:
            opened.__exit__(None, None, None)


def _open(folder: Path, name: object, place: int) -> Any:
    path = folder / str(name)
    if not isinstance(name, str) or Path(name).name != name or not path.is_file():
        raise DataError(
            f"line {place} of {folder / INDEX} names the file {str(name)[:80]!r}, which is not there. Put it back: a "
            "log is one folder, with all of its files."
        )
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read ({error}); it was cut short or is no safetensors file.") from error


def _read(opened: Any, line: Line, index: Path, place: int) -> dict[str, Tensor]:
    try:
        return {str(name): opened.get_tensor(key) for name, key in line["tensors"].items()}
    except (SafetensorError, KeyError, AttributeError, TypeError) as error:
        raise DataError(
            f"line {place} of {index} names tensors that {line['file']} does not hold ({error}); the two are not of "
            "one log."
        ) from error


def _check_header(folder: Path, kind: str) -> None:
    index = folder / INDEX
    first: Line = next((line for _, line in _lines(index)), {}) if index.is_file() else {}
    if first.get("format") != kind:
        seen = f"says {first.get('format')!r}" if index.is_file() else "has no index.jsonl"
        raise DataError(f"{folder} is no {kind}: it {seen}. Name a folder that holds one.")
    if first.get("version") != VERSION:
        raise DataError(
            f"{folder} is a {kind} of version {first.get('version')!r}, and this version reads {VERSION}. Read it with "
            "the version of vflair_flower that wrote it."
        )


def _lines(index: Path) -> Iterator[tuple[int, Line]]:
    with open(index, encoding="utf-8", errors="replace") as text:
        for place, each in enumerate(text, 1):
            try:
                line = json.loads(each)
            except ValueError as error:
                raise DataError(
                    f"line {place} of {index} is not JSON ({error}); it was cut short or changed. Remove it to read "
                    "the others."
                ) from error
            if not isinstance(line, dict):
                raise DataError(f"line {place} of {index} is no JSON object; the file is no index. Remove the line.")
            yield place, line


def _ends_with_note(index: Path) -> bool:
    with open(index, "rb") as text:
        text.seek(max(0, index.stat().st_size - _FILE_BYTES))
        return text.read().rstrip(b"\n").rpartition(b"\n")[2].startswith(b'{"note":')


def _text(line: Line) -> str:
    return json.dumps(line, separators=(",", ":"), ensure_ascii=True) + "\n"
