"""Write a model whose experts were at many parties as one checkpoint, as transformers' `save_pretrained` would.

E experts of a layer.  Layers come one after the other and go to disk in shards, so no more than one layer and one shard
are in memory: the whole model need not fit.
Invariant: names, shapes and values are those that `save_pretrained` writes of the whole model.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from vflair_flower.errors import ModelError
from vflair_flower.experts.modules import expert_layers, expert_modules
from vflair_flower.partition.export import copy_text_files, refuse_to_overwrite, write_tensors, written_at_once
from vflair_flower.partition.loading import task_class
from vflair_flower.partition.sources import ModelSource
from vflair_flower.settings import TaskSettings

Pieces = Mapping[tuple[int, ...], Mapping[str, Tensor]]
"""Parameters of one layer's experts by name, and which experts' they are, ascending."""


def write_checkpoint(
    folder: Path,
    source: ModelSource,
    config: PreTrainedConfig,
    task: TaskSettings,
    *,
    backbone: Callable[[], Mapping[str, Tensor]],
    experts: Callable[[int], Pieces],
    local: Collection[int] = (),
) -> None:
    """Write a whole model.

    Parameters
    ----------
    folder : pathlib.Path
        Must not exist, or be empty; left as it was if anything fails.
    source : ModelSource
        What the job began with; its tokenizer goes along.
    config : transformers.PreTrainedConfig
        The model's, for the task.
    task : TaskSettings
        Chooses the task class.
    backbone : callable
        Returns all tensors but the spread experts'.
    experts : callable
        Gets a place among the layers with experts, returns the pieces of that layer.
    local : collection of int
        The places of layers whose experts come with the backbone.

    Raises
    ------
    ModelError
        If tensors or experts are missing, or there is something in the folder.
    """
    refuse_to_overwrite(folder)
    with torch.device("meta"):
        model = task_class(config, task)(config)
    with written_at_once(folder) as draft:
        write_tensors(draft, _converted(model, backbone, experts, local))
        _write_settings(model, source, draft)


def _converted(
    model: PreTrainedModel,
    backbone: Callable[[], Mapping[str, Tensor]],
    experts: Callable[[int], Pieces],
    local: Collection[int],
) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors under their names on disk."""
    left_out = set(model._keys_to_ignore_on_save or ()) | model.all_tied_weights_keys.keys()
    inside = tuple(f"{name}." for layer, name in enumerate(expert_modules(model)) if layer not in local)
    like = {name: t for name, t in model.state_dict().items() if name not in left_out}
    own = {name: t for name, t in backbone().items() if name not in left_out}
    _check("the model without experts", own, {n: t for n, t in like.items() if not n.startswith(inside)})
    yield from _on_disk(model, own)
    for layer, name in enumerate(expert_layers(model)):
        if layer in local:
            continue
        wanted = {n: t for n, t in like.items() if n.startswith(f"{name}.")}
        whole = _joined(name, int(model.get_submodule(name).num_experts), experts(layer), wanted)  # type: ignore[arg-type]
        _check(name, whole, wanted)
        yield from _on_disk(model, whole)


def _joined(name: str, count: int, pieces: Pieces, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the experts of one layer in their places."""
    missing = sorted(set(range(count)) - {expert for some in pieces for expert in some})
    if missing:
        raise ModelError(f"nobody has handed over the experts {missing} of {name}; every host must.")
    whole: dict[str, Tensor] = {}
    for some, piece in pieces.items():
        for leaf, part in piece.items():
            like = wanted.get(leaf)
            if like is None or part.shape != (len(some), *like.shape[1:]):
                raise ModelError(
                    f"{len(some)} experts came as {leaf!r} of shape {tuple(part.shape)}, and the model has "
                    f"{'no such tensor' if like is None else f'{tuple(like.shape)} for all of them'}. Every party "
                    "needs the same version of vflair-flower and the same model."
                )
            full = whole.setdefault(leaf, torch.empty(like.shape, dtype=part.dtype))
            full[list(some)] = part
    return whole


def _check(what: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    odd = sorted(found.keys() ^ wanted.keys()) or [n for n, t in wanted.items() if t.shape != found[n].shape]
    if odd:
        raise ModelError(
            f"{len(odd)} tensors of {what} are missing, unknown or of another shape, the first is {odd[0]!r}. Every "
            "party needs the same version of vflair-flower and the same model."
        )


def _on_disk(model: PreTrainedModel, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in revert_weight_conversion(model, dict(state)).items():
        yield name, tensor.detach().clone(memory_format=torch.contiguous_format)


def _write_settings(model: PreTrainedModel, source: ModelSource, folder: Path) -> None:
    config = model.config
    config.architectures = [type(model).__name__]
    if config.pad_token_id is None:  # as load_segment does
        end = config.eos_token_id
        config.pad_token_id = end[0] if isinstance(end, list) else end
    copy_text_files(source, folder)
    config.save_pretrained(folder)
