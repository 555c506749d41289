"""One adapter of the whole model from what parties keep of theirs: an owner's, and all hosts' of their experts.

E experts of a layer, r rank, I what goes into a matrix, O what comes out.  PEFT keeps A of all experts as
``[E * r, I]``, and B as ``[O, r * E]``, experts last.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedConfig

from vflair_flower.errors import CheckpointError, ConfigurationError
from vflair_flower.experts.adapters import EXPERT_TARGETS, refuse_expert_tuning
from vflair_flower.experts.loading import expert_layer_names
from vflair_flower.experts.placement import Placement
from vflair_flower.partition import LoadedSegment, Segment, make_trainable
from vflair_flower.partition.adapters import save_merged_adapter, wrapped_parameters
from vflair_flower.partition.cut import cut
from vflair_flower.partition.loading import task_class
from vflair_flower.partition.structure import num_blocks
from vflair_flower.spec import SplitSpec


def merge_expert_adapters(
    folder: Path,
    own: Mapping[str, Tensor],
    hosts: Mapping[str, Mapping[str, Tensor]],
    placement: Placement,
    *,
    config: PreTrainedConfig,
    spec: SplitSpec,
) -> None:
    """Write one adapter that plain ``PeftModel.from_pretrained(whole_model, folder)`` loads.

    Parameters
    ----------
    folder : pathlib.Path
        Made if it does not exist; gets ``adapter_config.json`` and ``adapter_model.safetensors``.
    own : mapping
        The adapters of one party's own model: ``"own"`` in its file, or what the job has averaged.
    hosts : mapping of str to mapping
        By party, what it trained of its experts: ``"host"``, ``"trained"`` in its file.
    placement : Placement
        Who hosts what.
    config : transformers.PreTrainedConfig
        The model's.
    spec : SplitSpec
        The job.

    Raises
    ------
    ConfigurationError
        If the job does not tune by LoRA.
    CheckpointError
        If a host's adapters are missing or do not fit.
    """
    if spec.tuning is None or spec.experts is None:
        raise ConfigurationError(
            "the job trains all parameters, or has no experts; there are no adapters to merge. Export its parameters."
        )
    refuse_expert_tuning(spec)
    states: list[Mapping[str, Tensor]] = [own]
    targets: tuple[str, ...] = ()
    if spec.experts.trained == "all":
        layers = expert_layer_names(config, spec.task)
        states.append(_experts_state(hosts, placement, layers, config, spec))
        targets = EXPERT_TARGETS
    save_merged_adapter(folder, states, config, spec.tuning, spec.task, targets)


def _experts_state(
    hosts: Mapping[str, Mapping[str, Tensor]],
    placement: Placement,
    layers: tuple[str, ...],
    config: PreTrainedConfig,
    spec: SplitSpec,
) -> dict[str, Tensor]:
    segment = Segment.whole(num_blocks(config))
    with torch.device("meta"):
        model = task_class(config, spec.task)(config)
        loaded = LoadedSegment(model, segment, cut(model, segment), ())
        tuned = make_trainable(loaded, spec.tuning, spec.task, seed=spec.seed, target_parameters=EXPERT_TARGETS)
    assert isinstance(tuned, PeftModel)
    state = {}
    for parameter, (wrapper, module) in wrapped_parameters(tuned).items():
        layer = layers.index(parameter.rpartition(".")[0])
        if layer not in placement.spread:
            continue  # the owner's own
        a_ErI = _gathered(f"{parameter}_lora.lora_A", hosts, placement, layer)
        b_EOr = _gathered(f"{parameter}_lora.lora_B", hosts, placement, layer)
        name = f"base_model.model.{wrapper}"
        state[f"{name}.lora_A.weight"] = a_ErI.flatten(0, 1)
        state[f"{name}.lora_B.weight"] = b_EOr.permute(1, 2, 0).flatten(1, 2)
        for leaf in ("lora_A", "lora_B"):
            expected = list(module.get_parameter(f"{leaf}.default.weight").shape)
            found = list(state[f"{name}.{leaf}.weight"].shape)
            if found != expected:
                raise CheckpointError(
                    f"the adapters of {parameter!r} are of the shape {found}, and {expected} is this model's at this "
                    "rank. Use the job's own specification and model."
                )
    return state


def _gathered(name: str, hosts: Mapping[str, Mapping[str, Tensor]], placement: Placement, layer: int) -> Tensor:
    """Return all hosts' parts of one parameter, by expert."""
    parts: dict[int, Tensor] = {}
    for host in placement.hosts:
        experts = placement.experts_of(host)[layer]
        held = hosts.get(host, {}).get(name)
        if experts and (held is None or len(held) != len(experts)):
            raise CheckpointError(
                f"'{host}' hosts the experts {list(experts)} of {name!r}, and "
                f"{'nothing' if held is None else f'{len(held)} of them'} came from it. Give every party's file of the "
                "same round, and the placement that the job ran with."
            )
        if held is not None:
            parts |= dict(zip(experts, held, strict=True))
    return torch.stack([parts[expert] for expert in sorted(parts)])
