"""The files of a checkpoint's folder: which tensor lies in which of them, whether all are there, whose part they hold.

Headers and JSON only; no tensor is read here.  The names of files are transformers' own, in its order of preference.
Invariant: what is wrong with a file is said with that file's name, before anything is loaded.
"""

import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vflair_flower.errors import ModelError
from vflair_flower.partition.plan import Mode, Segment
from vflair_flower.settings import TaskKind

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
MANIFEST = "segment.json"
_FORMAT = "vflair-segment"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SegmentManifest:
    """What ``segment.json`` says: the folder is no whole checkpoint but one party's part of a cut.

    Parameters
    ----------
    model : str
        Name of the model that was cut.
    party : str
        ``"data-party"`` or ``"model-party"``.
    mode, head_blocks, tail_blocks
        The cut.
    segment : Segment
        What the folder holds.
    tasks : tuple[TaskKind, ...]
        The tasks whose tensors it holds; for others a tensor that the model has may be missing.
    """

    model: str
    party: str
    mode: Mode
    head_blocks: int
    tail_blocks: int
    segment: Segment
    tasks: tuple[TaskKind, ...]

    def holds(self, segment: Segment, kind: TaskKind) -> bool:
        """Whether all that the model has of another segment is in this one as well."""
        own = self.segment
        return (
            kind in self.tasks
            and segment.num_blocks == own.num_blocks
            and set(segment.blocks) <= set(own.blocks)
            and segment.embedding <= own.embedding
            and segment.task_head <= own.task_head
        )

    def describe(self) -> str:
        """Say in words what the folder is."""
        middle = self.segment.num_blocks - self.head_blocks - self.tail_blocks
        sizes = (self.head_blocks, middle, *((self.tail_blocks,) if self.mode is Mode.HBT else ()))
        return (
            f"the {self.party.replace('-', ' ')}'s segment of {self.model!r} for the cut {self.mode} "
            f"{'|'.join(map(str, sizes))} ({self.segment.describe()})"
        )

    def write(self, folder: Path) -> None:
        """Write ``segment.json``."""
        row = {"format": _FORMAT, "version": _VERSION, "owns": self.segment.describe(), **asdict(self)}
        (folder / MANIFEST).write_text(json.dumps(row, indent=2) + "\n")


def read_manifest(location: str | Path) -> SegmentManifest | None:
    """Return what a folder's ``segment.json`` says, or None if it has none: then it is a whole checkpoint.

    Raises
    ------
    ModelError
        If the file is there and is not one of ours.
    """
    file = Path(location) / MANIFEST
    if not file.is_file():
        return None
    row = read_json(file)
    try:
        if (row["format"], row["version"]) != (_FORMAT, _VERSION):
            raise ValueError(f"format {row['format']!r}, version {row['version']!r}")
        own = row["segment"]
        return SegmentManifest(
            model=str(row["model"]),
            party=str(row["party"]),
            mode=Mode(row["mode"]),
            head_blocks=int(row["head_blocks"]),
            tail_blocks=int(row["tail_blocks"]),
            segment=Segment(
                blocks=tuple(int(i) for i in own["blocks"]),
                num_blocks=int(own["num_blocks"]),
                embedding=bool(own["embedding"]),
                task_head=bool(own["task_head"]),
            ),
            tasks=tuple(TaskKind(kind) for kind in row["tasks"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{str(file)!r} does not say which segment the folder holds ({type(error).__name__}: {error}); another "
            "version wrote it, or it was edited. Export the segment again with `vflair export-segment`."
        ) from error


def weight_files(folder: Path) -> dict[str, Path] | Path:
    """Return in which file each tensor is, as the index says, or the one file if there is no index.

    Raises
    ------
    ModelError
        If the folder holds no weights, or its index is not one.
    """
    for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (PICKLED, PICKLED_INDEX)):
        if (folder / single).is_file():
            return folder / single
        if (folder / index).is_file():
            weight_map = read_json(folder / index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ModelError(
                    f"the checkpoint {str(folder)!r} could not be read: {index} has no 'weight_map', which says where "
                    "each tensor is. Copy the checkpoint again."
                )
            return {str(name): folder / str(file) for name, file in weight_map.items()}
    raise ModelError(
        f"the checkpoint {str(folder)!r} could not be read: it has none of {SAFETENSORS}, {SAFETENSORS_INDEX}, "
        f"{PICKLED} and {PICKLED_INDEX}. Name a folder that `save_pretrained` or `vflair export-segment` wrote."
    )


def check_weight_files(location: str) -> None:
    """Refuse a local checkpoint of which a file is missing or damaged; a hub's files are checked when they come.

    Raises
    ------
    ModelError
        Names the first such file.
    """
    folder = Path(location)
    if not folder.is_dir():
        return
    found = weight_files(folder)
    files = [found] if isinstance(found, Path) else sorted(set(found.values()))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            f"the checkpoint {location!r} could not be read: its index lists {len(files)} shards, of which "
            f"{len(missing)} are missing, the first is {missing[0]!r}. Copy the missing shards into the folder, or "
            "ask whoever has the whole model for your part alone (`vflair export-segment`)."
        )
    for file in files:
        reason = _damage(file)
        if reason:
            raise ModelError(
                f"the checkpoint {location!r} could not be read: the file {file.name!r} ({file.stat().st_size:,} "
                f"bytes) is damaged or was not copied to its end ({reason}). Copy that file again."
            )


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; raise ModelError if the file is none."""
    try:
        row = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{str(file)!r} could not be read: {error}. Copy the file again.") from error
    if not isinstance(row, dict):
        raise ModelError(f"{str(file)!r} holds a {type(row).__name__}, not a JSON object. Copy the file again.")
    return row


def _damage(file: Path) -> str:
    """Return why a file of weights cannot be whole, or ""; a header that fits the file's size is taken for whole."""
    if file.suffix != ".safetensors":
        return "" if zipfile.is_zipfile(file) else "not a zip file, which torch.save writes"
    try:
        with safe_open(file, framework="pt"):
            return ""
    except (SafetensorError, OSError) as error:
        return str(error)
