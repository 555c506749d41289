"""Load a party's two parts of a mixture-of-experts model: the model without experts, and its own experts alone."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from vflair_flower.errors import ModelError
from vflair_flower.experts.adapters import tune_own
from vflair_flower.experts.dispatch import ExpertChannel, RemoteExperts
from vflair_flower.experts.modules import expert_layers, expert_modules, keep_experts, num_experts
from vflair_flower.experts.placement import Placement, local_places, place_experts
from vflair_flower.partition import LoadedSegment, ModelSource, Segment, load_segment
from vflair_flower.partition.cut import cut
from vflair_flower.partition.export import fetch_files, tensor_files
from vflair_flower.partition.holes import put
from vflair_flower.partition.loading import quiet, task_class
from vflair_flower.partition.sources import load_config
from vflair_flower.partition.structure import num_blocks
from vflair_flower.settings import ExpertSettings, TaskSettings, WeightSettings
from vflair_flower.spec import SplitSpec

_LAYER, _EXPERT = re.compile(r"\.layers\.(\d+)\."), re.compile(r"\.experts\.(\d+)\.")


def load_backbone(
    source: ModelSource,
    task: TaskSettings,
    *,
    weights: WeightSettings | None = None,
    seed: int = 0,
    segment: Segment | None = None,
    channel: ExpertChannel | None = None,
    experts: ExpertSettings | None = None,
) -> tuple[LoadedSegment, ExpertChannel]:
    """Load all of a model, or of a segment, but spread experts, and the channel that its layers call theirs through.

    Experts are spread in all layers, but for those that `experts` keeps local.

    Raises
    ------
    ModelError
        If the checkpoint cannot be read, or its model has no experts.
    ConfigurationError
        If `experts` leaves no layer to spread.
    """
    channel = channel or ExpertChannel()
    config = load_config(source, task)
    layers = expert_layer_names(config, task)
    local = local_places(experts or ExpertSettings(), len(layers))

    def edit(model: PreTrainedModel) -> None:
        _spread(model, channel, layers, local)

    own = segment or Segment.whole(num_blocks(config))
    loaded = load_segment(source, own, task, weights=weights, seed=seed, edit=edit)
    for module in expert_modules(loaded.model).values():
        for parameter in module.parameters():  # where they lie in a file changes the last bits
            parameter.data = parameter.data.clone()
    return loaded, channel


def own_segment(config: PreTrainedConfig, spec: SplitSpec) -> Segment:
    """Return what a data party has of the model without experts."""
    assert spec.experts is not None
    blocks = num_blocks(config)
    return spec.plan.data_party(blocks) if spec.experts.backbone == "split" else Segment.whole(blocks)


def _spread(model: PreTrainedModel, channel: ExpertChannel, layers: Sequence[str], local: Collection[int]) -> None:
    """Let what a model has of the layers with experts, named in order, call theirs, but for local ones."""
    for name in expert_modules(model):
        if layers.index(name) in local:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, RemoteExperts(channel, layers.index(name)))


def backbone_parameters(config: PreTrainedConfig, spec: SplitSpec) -> int:
    """Return how many parameters a party trains of what it has, spread experts left out; built on the meta device."""
    assert spec.experts is not None
    segment = own_segment(config, spec)
    with torch.device("meta"):
        model = task_class(config, spec.task)(config)
        layers = expert_layers(model)
        loaded = LoadedSegment(model, segment, cut(model, segment), ())
        _spread(model, ExpertChannel(), layers, local_places(spec.experts, len(layers)))
        tuned = tune_own(loaded, spec)
    return sum(p.numel() for p in {id(p): p for p in tuned.parameters() if p.requires_grad}.values())


def expert_layer_names(config: PreTrainedConfig, task: TaskSettings) -> tuple[str, ...]:
    """Return the names of a model's experts modules, first layer first; raise ModelError if it has none."""
    with torch.device("meta"):
        return expert_layers(task_class(config, task)(config))


def layers_and_placement(
    config: PreTrainedConfig, spec: SplitSpec, parties: Sequence[str]
) -> tuple[tuple[str, ...], Placement]:
    """Return the names of a model's experts modules, first layer first, and which of a job's parties hosts what."""
    assert spec.experts is not None
    layers = expert_layer_names(config, spec.task)
    return layers, place_experts(spec.experts, parties, layers=len(layers), experts=num_experts(config))


def load_experts(
    source: ModelSource,
    experts: Mapping[str, tuple[int, ...]],
    task: TaskSettings,
    *,
    weights: WeightSettings | None = None,
) -> nn.Module:
    """Load some experts of each layer; no other tensor is read.

    Parameters
    ----------
    source : ModelSource
        The checkpoint, in safetensors.
    experts : mapping of str to tuple[int, ...]
        By the name of each experts module (`expert_layer_names`), which ones, ascending.
    task : TaskSettings
        Chooses the task class, whose names the parameters get.
    weights : WeightSettings, optional
        Their dtype; never quantised.

    Returns
    -------
    torch.nn.Module
        A tree of experts modules under their names in the whole model; a layer without own experts is not there.

    Raises
    ------
    ModelError
        If the checkpoint cannot be read or lacks an expert.
    """
    config = load_config(source, task)
    own = {int(found[1]): list(chosen) for name, chosen in experts.items() if (found := _LAYER.search(f".{name}."))}
    files = tensor_files(source)
    wanted = {name: file for name, file in files.items() if _is_own(name, own)}
    fetch_files(source, wanted.values())
    dtype = (weights or WeightSettings()).torch_dtype
    shard_class = _shard_class(task_class(config, task), experts)
    try:
        opened: dict[str, Any] = {}
        state: dict[str, Any] = {}
        for name, file in wanted.items():
            held = opened.setdefault(str(file), safe_open(file, framework="pt"))
            state |= _renumbered(name, held.get_slice(name), own)
        with quiet():
            loaded: Any = shard_class.from_pretrained(
                None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the experts of {source.location!r} could not be read: {error}") from error
    model, info = loaded
    if info["missing_keys"]:
        raise ModelError(
            f"the checkpoint {source.location!r} lacks {len(info['missing_keys'])} tensors of this party's experts, "
            f"the first is {sorted(info['missing_keys'])[0]!r}. It belongs to another architecture, or is not whole."
        )
    shard = nn.Module()
    for name, module in expert_modules(model).items():
        if module.num_experts:
            put(shard, name, module)
    return shard


def _is_own(name: str, own: Mapping[int, list[int]]) -> bool:
    layer, expert = _LAYER.search(name), _EXPERT.search(name)
    if ".experts." not in name or layer is None:
        return False
    chosen = own.get(int(layer[1]), [])
    return bool(chosen) if expert is None else int(expert[1]) in chosen


def _renumbered(name: str, tensor: Any, own: Mapping[int, list[int]]) -> dict[str, Any]:
    """Return a tensor under the name that it has where there are no other experts; of fused ones, its own rows."""
    layer, expert = _LAYER.search(name), _EXPERT.search(name)
    assert layer is not None
    chosen = own[int(layer[1])]
    if expert is not None:
        return {f"{name[: expert.start(1)]}{chosen.index(int(expert[1]))}{name[expert.end(1) :]}": tensor}
    return {name: torch.stack([tensor[index] for index in chosen])}


def _shard_class(cls: type[PreTrainedModel], own: Mapping[str, tuple[int, ...]]) -> type[PreTrainedModel]:
    """Return a subclass of a task class that keeps, as it is built, some experts and nothing else."""

    def build(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        kept = {name for name, experts in own.items() if experts}
        modules = expert_modules(self)
        for name, module in modules.items():
            keep_experts(module, own[name])
        for name in [name for name, _ in self.named_modules()]:
            above = any(keep.startswith(f"{name}.") for keep in kept)
            inside = any(f"{name}.".startswith(f"{keep}.") for keep in kept)
            if not name or above or inside:
                continue
            parent, _, leaf = name.rpartition(".")
            try:
                place = self.get_submodule(parent)
            except AttributeError:
                continue  # went with what it was in
            if leaf in place._modules:
                setattr(place, leaf, nn.Identity())
        inner = set(modules.values())
        for place in self.modules():
            for name in () if place in inner else list(place._parameters):
                place._parameters[name] = None
        self.all_tied_weights_keys = {}

    body: dict[str, Any] = {"__init__": build, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), body)
