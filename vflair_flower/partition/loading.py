"""Load one segment of a model: only its own tensors are read from the checkpoint, all others are never touched.

A dynamic subclass of the task class cuts itself right after it was built on the meta device; `from_pretrained` then
materialises just what is left.  Parameters that the checkpoint lacks (a new classifier) are drawn from the seed and
their own global name, so that every party, and the unsplit model, draws the same ones.
"""

import hashlib
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)
from transformers.utils import logging

from vflair_flower.errors import ModelError
from vflair_flower.partition.conversions import original_layout, was_translated
from vflair_flower.partition.cut import cut
from vflair_flower.partition.files import SegmentManifest, check_weight_files, read_manifest
from vflair_flower.partition.holes import Channel
from vflair_flower.partition.plan import Segment
from vflair_flower.partition.quantization import quantized
from vflair_flower.partition.sources import ModelSource, load_config
from vflair_flower.partition.structure import family_of, segments_of, task_head_places
from vflair_flower.settings import TaskKind, TaskSettings, WeightSettings

_one_at_a_time = threading.Lock()
_TASK_CLASSES = {
    TaskKind.SEQUENCE_CLASSIFICATION: MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    TaskKind.SEQUENCE_REGRESSION: MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    TaskKind.QUESTION_ANSWERING: MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    TaskKind.CAUSAL_LM: MODEL_FOR_CAUSAL_LM_MAPPING,
    TaskKind.MASKED_LM: MODEL_FOR_MASKED_LM_MAPPING,
    TaskKind.SEQ2SEQ_LM: MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    TaskKind.IMAGE_TEXT_TO_TEXT: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
}


@dataclass(frozen=True)
class LoadedSegment:
    """A segment in memory: the task model with holes, what it owns, and what joins its holes."""

    model: PreTrainedModel
    segment: Segment
    channel: Channel
    new_parameters: tuple[str, ...]
    """Names of own parameters that the checkpoint did not hold and that were drawn from the seed."""


def task_class(config: PreTrainedConfig, task: TaskSettings) -> type[PreTrainedModel]:
    """Return transformers' class for a model family and a task; raise ModelError if there is none."""
    known = tasks_of(config)
    if task.kind not in known:
        raise ModelError(
            f"transformers has no {task.kind.value} class for the model family {config.model_type!r}. "
            f"Choose another model, or a task it has: {', '.join(kind.value for kind in known) or 'none'}."
        )
    return classes_of(config, [task.kind])[0]


def tasks_of(config: PreTrainedConfig) -> tuple[TaskKind, ...]:
    """Return the tasks for which transformers has a class for this model family."""
    found = [kind for kind, mapping in _TASK_CLASSES.items() if type(config) in mapping]
    # transformers has causal classes for encoders too; on an encoder's weights they would see the words to come.
    if family_of(config).encoder and TaskKind.CAUSAL_LM in found:
        found.remove(TaskKind.CAUSAL_LM)
    return tuple(found)


def classes_of(config: PreTrainedConfig, tasks: Collection[TaskKind]) -> list[type[PreTrainedModel]]:
    """Return the different task classes of some tasks of `tasks_of`."""
    mappings: list[Any] = [_TASK_CLASSES[kind] for kind in tasks]
    return list(dict.fromkeys(_first(mapping[type(config)]) for mapping in mappings))


def _first(classes: object) -> type[PreTrainedModel]:
    return cast("type[PreTrainedModel]", classes[0] if isinstance(classes, tuple) else classes)


def load_segment(
    source: ModelSource,
    segment: Segment,
    task: TaskSettings,
    *,
    weights: WeightSettings | None = None,
    seed: int = 0,
    edit: Callable[[PreTrainedModel], None] | None = None,
) -> LoadedSegment:
    """Load what `segment` owns of a model.

    Parameters
    ----------
    source : ModelSource
        The checkpoint.
    segment : Segment
        What to load; a whole segment gives the unsplit model.
    task : TaskSettings
        Chooses the task class.
    weights : WeightSettings, optional
        Their dtype and quantisation; float32 by default.
    seed : int
        For parameters that the checkpoint does not hold.
    edit : callable, optional
        Changes the cut model before its tensors are read: what it takes out is not.

    Raises
    ------
    ModelError
        If the checkpoint cannot be read, or lacks a tensor that is not part of a new classifier.
    ConfigurationError
        If the weights are to be quantised and bitsandbytes is not there.
    PartitionError
        If the cut does not fit the model.
    """
    config = load_config(source, task)
    segments_of(config, segment)
    check_weight_files(source.location)
    manifest = read_manifest(source.location)
    cls = task_class(config, task)
    own_class, channels = segment_class(cls, segment, edit)
    weights = weights or WeightSettings()
    options = quantized(cls, config, weights)
    try:
        with quiet(), original_layout(own_class, config):
            loaded: Any = own_class.from_pretrained(
                source.location,
                config=config,
                dtype=weights.torch_dtype,
                output_loading_info=True,
                trust_remote_code=False,
                **options,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the checkpoint {source.location!r} could not be read: {error}") from error
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    missing = sorted(info["missing_keys"])
    elsewhere = manifest is not None and not manifest.holds(segment, task.kind)
    lost = [name for name in missing if elsewhere or not _may_be_new(name, model, task)]
    if lost:
        raise ModelError(_lacks(source, lost, segment, task, manifest))
    if was_translated(config):
        model._weight_conversions = []  # type: ignore[assignment] # so that it is saved as the Llama or GLM that it is
        model.config.architectures = [cls.__name__]
    for name in missing:
        _draw(model, name, seed)
    model.config.use_cache = task.kind.writes
    if model.config.pad_token_id is None:
        # As load_tokenizer does: decoders that classify find a text's last token by it, and refuse batches without.
        # Not set any earlier, or the embedding would leave out that token's gradient.
        end = model.config.eos_token_id
        model.config.pad_token_id = end[0] if isinstance(end, list) else end
    return LoadedSegment(model, segment, channels[-1], tuple(missing))


def _lacks(
    source: ModelSource, lost: list[str], segment: Segment, task: TaskSettings, manifest: SegmentManifest | None
) -> str:
    begin = f"the checkpoint {source.location!r} lacks {len(lost)} tensors of this segment, the first is {lost[0]!r}. "
    if manifest is None:
        return f"{begin}It belongs to another architecture, or is a segment that was cut elsewhere."
    for_tasks = ", ".join(kind.value for kind in manifest.tasks)
    return (
        f"{begin}The folder is {manifest.describe()}, for {for_tasks}; asked for were {segment.describe()}, for "
        f"{task.kind.value}. Use the cut and task that it was written for, or have whoever has the whole model write "
        "this one (`vflair export-segment`)."
    )


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; raise ModelError if there is none or it cannot pad."""
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.location, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"the tokenizer of {source.location!r} is code in its repository, and code from a hub is never run. "
                "Put a tokenizer.json into the model's folder, from a converted copy of the model (often the "
                "repository with '-hf' in its name), and take auto_map out of its tokenizer_config.json."
            ) from error
        raise ModelError(
            f"no tokenizer could be read for the model {source.location!r}: {error}. Put its files "
            "(tokenizer.json or vocab.txt) into the model's folder."
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"the tokenizer of {source.location!r} has neither a pad nor an end token, and batches of texts cannot "
                "be made without. Set pad_token in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def draw_normal(tensor: torch.Tensor, name: str, seed: int, std: float) -> None:
    """Fill `tensor` with normal numbers that depend on the seed and the parameter's global name alone."""
    tensor.normal_(0.0, std, generator=generator_for(seed, name))


def generator_for(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator seeded by a job's seed and a name, the same at every party."""
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from reporting every tensor that is another party's as unexpected.

    One at a time: parties may be threads of one process, and its verbosity, random numbers and default dtype, which
    loading sets for a while, are the process's.
    """
    with _one_at_a_time, without_reports():
        yield


@contextmanager
def without_reports() -> Iterator[None]:
    """Keep transformers' warnings and progress bars off the terminal inside the block."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def segment_class(
    cls: type[PreTrainedModel], segment: Segment, edit: Callable[[PreTrainedModel], None] | None = None
) -> tuple[type[PreTrainedModel], list[Channel]]:
    """Return a subclass of a task class that cuts itself as it is built, and where its channel is put then."""
    channels: list[Channel] = []

    def build(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        channels.append(cut(self, segment))
        if edit is not None:
            edit(self)
        kept = {n for n, _ in self.named_parameters(remove_duplicate=False)}
        kept |= {n for n, _ in self.named_buffers()}
        ties = self.all_tied_weights_keys
        self.all_tied_weights_keys = {a: b for a, b in ties.items() if a in kept and b in kept}

    body: dict[str, Any] = {"__init__": build, "__module__": cls.__module__}
    return cast("type[PreTrainedModel]", type(cls.__name__, (cls,), body)), channels


def _may_be_new(name: str, model: PreTrainedModel, task: TaskSettings) -> bool:
    """Whether fine-tuning may begin without this parameter: a classifier and its pooler may be new, nothing else."""
    outside_base = not name.startswith(model.base_model_prefix + ".")
    if model.base_model is model:  # then no name has the prefix
        outside_base = any(name.startswith(place.name + ".") for place in task_head_places(model))
    reads = task.kind.reads_whole_texts or task.kind is TaskKind.QUESTION_ANSWERING
    return reads and (outside_base or ".pooler." in name)


def _draw(model: PreTrainedModel, name: str, seed: int) -> None:
    parameter = model.get_parameter(name)
    with torch.no_grad():
        if parameter.dim() > 1:
            draw_normal(parameter, name, seed, float(getattr(model.config, "initializer_range", 0.02)))
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
