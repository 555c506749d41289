"""Hand out one segment of a model: a folder that holds a party's own tensors and no others.

Tensors are copied as they lie in the checkpoint, names, layout and dtype included; nothing is converted, and no more
than one shard is in memory.  `load_segment` reads the folder as it reads the whole checkpoint.
Invariant: a segment loaded from its folder equals the one loaded from the whole checkpoint, bit for bit.
"""

import json
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from vflair_flower.errors import ModelError
from vflair_flower.partition.conversions import original_layout
from vflair_flower.partition.files import (
    PICKLED,
    PICKLED_INDEX,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    SegmentManifest,
    check_weight_files,
    read_manifest,
    weight_files,
)
from vflair_flower.partition.loading import classes_of, segment_class, tasks_of
from vflair_flower.partition.plan import PartitionPlan, Segment
from vflair_flower.partition.sources import ModelSource, read_config
from vflair_flower.partition.structure import num_blocks
from vflair_flower.settings import TaskKind

SHARD_BYTES = 2_000_000_000
_SETTINGS = ("config.json", "generation_config.json")
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json", "processor_config.json", "preprocessor_config.json"),
)
"""What the data party reads text and images with; files of code are never copied."""


class Side(StrEnum):
    """Whose part of a cut is meant."""

    DATA_PARTY = "data-party"
    MODEL_PARTY = "model-party"


@dataclass(frozen=True, kw_only=True)
class ExportedSegment:
    """What was written where."""

    folder: Path
    manifest: SegmentManifest
    tensors: int
    tensor_bytes: int
    files: tuple[str, ...]


def export_segment(
    source: ModelSource,
    plan: PartitionPlan,
    side: Side,
    folder: Path,
    *,
    tasks: Collection[TaskKind] = (),
    shard_bytes: int = SHARD_BYTES,
) -> ExportedSegment:
    """Write the part of a model that one party owns.

    Parameters
    ----------
    source : ModelSource
        The whole checkpoint; of one on a hub, only the shards that hold something of the segment are fetched.
    plan : PartitionPlan
        The cut.
    side : Side
        Whose part; the data party's comes with the tokenizer.
    folder : pathlib.Path
        Must not exist, or be empty.
    tasks : collection of TaskKind
        What the segment is for; by default every task that the family has.  A narrower choice can spare a party the
        language-model head, which no classifier reads.
    shard_bytes : int
        The size of a file, at most, but for a single tensor that is larger.

    Raises
    ------
    PartitionError
        If the cut does not fit the model.
    ModelError
        If the checkpoint cannot be read, is a segment itself, or the folder is not empty.
    """
    refuse_to_overwrite(folder)
    if shard_bytes < 1:
        raise ModelError(f"shard_bytes is {shard_bytes}; it is the size of a file. Choose 1 or more.")
    config = read_config(source)
    segment = (plan.data_party if side is Side.DATA_PARTY else plan.model_party)(num_blocks(config))
    kinds = _tasks(config, tasks)
    whole = _settings_folder(source)
    if (part := read_manifest(whole)) is not None:
        raise ModelError(
            f"the model {source.location!r} is no whole checkpoint but {part.describe()}; a segment is cut from the "
            "whole model only. Ask whoever has it."
        )
    found = tensor_files(source)
    own = own_tensors(config, segment, found, kinds)
    files = {name: found[name] for name in own}
    fetch_files(source, files.values())
    manifest = SegmentManifest(
        model=source.name,
        party=side.value,
        mode=plan.mode,
        head_blocks=plan.head_blocks,
        tail_blocks=plan.tail_blocks,
        segment=segment,
        tasks=kinds,
    )
    with written_at_once(folder) as draft:
        total = write_tensors(draft, _tensors(files), shard_bytes)
        _copy(whole, (*_SETTINGS, *(_TOKENIZER if side is Side.DATA_PARTY else ())), draft)
        manifest.write(draft)
        written = tuple(sorted(file.name for file in draft.iterdir()))
    return ExportedSegment(folder=folder, manifest=manifest, tensors=len(own), tensor_bytes=total, files=written)


def tensor_files(source: ModelSource) -> dict[str, Path]:
    """Return in which file of a checkpoint each tensor is; of a hub's, only the index is fetched if there is one."""
    found = weight_files(_with_single_file(source, _settings_folder(source)))
    return dict.fromkeys(_names(found), found) if isinstance(found, Path) else found


def fetch_files(source: ModelSource, files: Iterable[Path]) -> None:
    """Fetch these files of a checkpoint, if it is on a hub; raise ModelError if one is missing or damaged."""
    _fetch(source, sorted({file.name for file in files}))
    check_weight_files(source.location)


def own_tensors(
    config: PreTrainedConfig, segment: Segment, names: Iterable[str], tasks: Collection[TaskKind]
) -> list[str]:
    """Return which tensors of a checkpoint a segment owns in any of some tasks, by their names in the checkpoint.

    The choice is made as transformers makes it when it loads: by renaming each name and looking for it in the model.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        The model's.
    segment : Segment
        What is owned.
    names : iterable of str
        All names of the checkpoint.
    tasks : collection of TaskKind
        Each has a task class of its own.
    """
    ordered = sorted(names)
    own: set[str] = set()
    for task_class in classes_of(config, tasks):
        cut_class, _ = segment_class(task_class, segment)
        with torch.device("meta"), original_layout(cut_class, config):
            model = cut_class(config)
            transforms = get_model_conversion_mapping(model)
        held = model.state_dict()
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        prefix = model.base_model_prefix
        for name in ordered:
            renamed, _ = rename_source_key(name, renamings, converters, prefix, held)
            if renamed in held or rename_source_key(name, [], [], prefix, held)[0] in held:
                own.add(name)
    return sorted(own)


def _tasks(config: PreTrainedConfig, asked: Collection[TaskKind]) -> tuple[TaskKind, ...]:
    known = tasks_of(config)
    odd = [kind.value for kind in asked if kind not in known]
    if odd:
        raise ModelError(
            f"transformers has no {odd[0]} class for the model family {config.model_type!r}. Choose among "
            f"{', '.join(kind.value for kind in known)}, or name no task: the segment then serves all of them."
        )
    return tuple(asked) or known


def refuse_to_overwrite(folder: Path) -> None:
    """Raise ModelError if there is something in a folder that is to be written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(
            f"the folder to write is {str(folder)!r}, and there is something in it already; nothing is overwritten. "
            "Name a folder that does not exist, or empty it."
        )


def copy_text_files(source: ModelSource, folder: Path) -> None:
    """Copy what a model's texts are read and written with, as far as its checkpoint has it."""
    _copy(_settings_folder(source), ("generation_config.json", *_TOKENIZER), folder)


def _copy(whole: Path, names: Iterable[str], folder: Path) -> None:
    for name in names:
        if (whole / name).is_file():
            shutil.copyfile(whole / name, folder / name)


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> int:
    """Write tensors by their names in the checkpoint, shard by shard, and return how many bytes they have."""
    weight_map: dict[str, int] = {}
    pending: dict[str, Tensor] = {}
    size = total = shards = 0

    def flush() -> None:
        nonlocal size, shards
        shards += 1
        save_file(pending, folder / _draft_name(shards), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(pending, shards))
        pending.clear()
        size = 0

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if shards == 1:
        (folder / _draft_name(1)).rename(folder / SAFETENSORS)
        return total
    final = {i: f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)}
    for number, file in final.items():
        (folder / _draft_name(number)).rename(folder / file)
    index = {"metadata": {"total_size": total}, "weight_map": {n: final[i] for n, i in sorted(weight_map.items())}}
    (folder / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return total


def _draft_name(number: int) -> str:
    return f"draft-{number}.safetensors"


def _tensors(files: dict[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors file by file; those of other parties are not read."""
    for file in sorted(set(files.values())):
        names = [name for name, place in files.items() if place == file]
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                for name in names:
                    yield name, opened.get_tensor(name)
        else:
            held = _unpickled(file)
            for name in names:
                yield name, held[name].clone().contiguous()  # tensors of one storage have no place in safetensors


def _names(file: Path) -> list[str]:
    if file.suffix == ".safetensors":
        check_weight_files(str(file.parent))
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    return list(_unpickled(file))


def _unpickled(file: Path) -> dict[str, Tensor]:
    """Map a torch.save file into memory; weights_only refuses whatever is not a tensor, so no code is run."""
    try:
        held: dict[str, Tensor] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises what it likes on a file that is none
        raise ModelError(
            f"the checkpoint file {str(file)!r} could not be read ({type(error).__name__}). Copy that file again, or "
            "convert the checkpoint to safetensors."
        ) from error
    return held


@contextmanager
def written_at_once(folder: Path) -> Iterator[Path]:
    """Give a folder to write into that takes the real one's place when all is written, and is gone if that fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:8]}"
    draft.mkdir()
    try:
        yield draft
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _settings_folder(source: ModelSource) -> Path:
    return _fetch(source, [*_SETTINGS, *_TOKENIZER, SAFETENSORS_INDEX, PICKLED_INDEX])


def _with_single_file(source: ModelSource, folder: Path) -> Path:
    """Fetch the file of a checkpoint on a hub that has no index, because it has one file only."""
    for name in (SAFETENSORS, PICKLED):
        if any((folder / file).is_file() for file in (SAFETENSORS, SAFETENSORS_INDEX, PICKLED, PICKLED_INDEX)):
            break
        folder = _fetch(source, [name])
    return folder


def _fetch(source: ModelSource, names: list[str]) -> Path:
    """Return the local folder of a model, with these files of a hub's repository in it as far as it has them."""
    folder = Path(source.location)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(source.location, allow_patterns=names))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the model {source.location!r} is no local folder, and no hub gave {names[0]!r} ({type(error).__name__}). "
            "Name a local folder, or a hub id that this machine can reach."
        ) from error
