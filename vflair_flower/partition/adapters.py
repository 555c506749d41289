"""What is trained in a segment: LoRA adapters and the task head, or everything.  Names are those of the whole model.

Because names are global, the adapters of all segments are simply the union of their tensors, and PEFT loads that union
on the full model.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import ParamWrapper
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from vflair_flower.errors import CheckpointError, PartitionError
from vflair_flower.partition.loading import LoadedSegment, draw_normal, generator_for, quiet
from vflair_flower.partition.plan import Mode, PartitionPlan, Segment
from vflair_flower.partition.structure import family_of, find_stacks, outside_stack, segments_of, task_head_places
from vflair_flower.settings import LoraSettings, TaskKind, TaskSettings

_PEFT_TASKS = {
    TaskKind.SEQUENCE_CLASSIFICATION: "SEQ_CLS",
    TaskKind.SEQUENCE_REGRESSION: "SEQ_CLS",
    TaskKind.QUESTION_ANSWERING: "QUESTION_ANS",
    TaskKind.CAUSAL_LM: "CAUSAL_LM",
    TaskKind.SEQ2SEQ_LM: "SEQ_2_SEQ_LM",
}


def lora_config(
    config: PreTrainedConfig,
    settings: LoraSettings,
    task: TaskSettings | None,
    modules_to_save: list[str],
    target_parameters: Sequence[str] = (),
) -> LoraConfig:
    """Return PEFT's configuration of a segment, or with a task that of the whole model.

    PEFT itself adds the task head to the modules that are trained whole when it is told the task, and would copy the
    holes that stand for it; a segment's configuration therefore names no task.
    """
    common: dict[str, Any] = {
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": target_modules(config, settings),
        "modules_to_save": modules_to_save or None,
        "target_parameters": list(target_parameters) or None,
        "task_type": None if task is None else _PEFT_TASKS.get(task.kind),
        "base_model_name_or_path": config.name_or_path or None,
        "inference_mode": task is not None,
    }
    if settings.method == "adalora":  # how long the job is, which PEFT wants to know, is said at each step
        return AdaLoraConfig(init_r=math.ceil(1.5 * settings.rank), target_r=settings.rank, total_step=10**9, **common)
    return LoraConfig(r=settings.rank, use_dora=settings.method == "dora", **common)


def target_modules(config: PreTrainedConfig, settings: LoraSettings) -> list[str]:
    """Return the names of the modules that get LoRA: the settings', else PEFT's choice for the family."""
    if settings.target_modules:
        return list(settings.target_modules)
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(config.get_text_config().model_type)
    if not known:
        raise PartitionError(
            f"PEFT has no default LoRA modules for the family {config.model_type!r}; name them in target_modules."
        )
    return list(known)


def trainable_head_modules(loaded: LoadedSegment, task: TaskSettings) -> list[str]:
    """Return the names of the modules that are trained whole beside LoRA: a task head that may be new."""
    new = task.kind.reads_whole_texts or task.kind is TaskKind.QUESTION_ANSWERING
    if not new or not loaded.segment.task_head:
        return []
    model = loaded.model
    names = [place.name for place in task_head_places(model)]
    pooler = getattr(model.base_model, "pooler", None)
    if pooler is not None and next(pooler.parameters(), None) is not None:
        names.append("pooler")
    return names


def refuse_trained_copies(
    config: PreTrainedConfig, plan: PartitionPlan, task: TaskSettings, tuning: LoraSettings | None
) -> None:
    """Raise PartitionError if training would change parameters of which both parties hold a copy, each its own.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        The model's.
    plan, task, tuning
        The cut, the task and what is trained.
    """
    text = config.get_text_config()
    if family_of(config).unroll is not None:
        raise PartitionError(
            f"the model family is {text.model_type!r}, in which one block's weights serve all {text.num_hidden_layers} "
            "layers; both parties would hold them and train them apart, and this version does not train them. Choose "
            "a model whose layers have weights of their own, such as BERT."
        )
    if family_of(config).shared_table is not None and plan.head_blocks + plan.tail_blocks and tuning is None:
        raise PartitionError(
            f"the model ({text.model_type}) keeps its relative position bias in the first block of a stack, and all "
            "blocks read it; both parties would hold a copy, all parameters are to be trained, and the two would drift "
            "apart. Use LoRA, which leaves it frozen."
        )
    shows_words = task.kind.writes or task.kind is TaskKind.MASKED_LM
    tied = bool(getattr(text, "tie_word_embeddings", False)) and shows_words
    if plan.mode is Mode.HT and tied and tuning is None:
        raise PartitionError(
            f"the cut is Head-Tail and the model ({text.model_type}) ties its embedding to its language-model head: "
            "the data party would hold the embedding, the model party a copy of it as the head, and all parameters are "
            "to be trained, so the two would drift apart. Use LoRA, which leaves both frozen, or Head-Body-Tail, where "
            "both stay with the data party."
        )


def make_trainable(
    loaded: LoadedSegment,
    settings: LoraSettings | None,
    task: TaskSettings,
    *,
    seed: int,
    scope: str = "full",
    target_parameters: Sequence[str] = (),
) -> nn.Module:
    """Make a loaded segment ready for training, in place.

    Parameters
    ----------
    loaded : LoadedSegment
        A segment as loaded.
    settings : LoraSettings or None
        None trains every own parameter and returns the model itself.
    task : TaskSettings
        Decides which modules are trained whole.
    seed : int
        LoRA's A matrices are drawn from it and their global names (Kaiming uniform, as PEFT does); B starts at zero.
    scope : str
        ``"local"`` freezes a segment without the embedding: the model party's.
    target_parameters : sequence of str
        Parameters that get LoRA by themselves, by the ends of their names: those of experts.

    Returns
    -------
    torch.nn.Module
        The `PeftModel`, or the model.

    Raises
    ------
    PartitionError
        If nothing in the segment matches LoRA's target modules.
    """
    if scope == "local" and not loaded.segment.embedding:
        loaded.model.requires_grad_(False)
        return loaded.model
    if settings is None:
        return loaded.model
    whole = trainable_head_modules(loaded, task)
    config = lora_config(loaded.model.config, settings, None, whole, target_parameters)
    try:
        with quiet():
            tuned: PeftModel = get_peft_model(loaded.model, config)
    except ValueError as error:
        raise PartitionError(
            f"no module of this segment ({loaded.segment.describe()}) gets LoRA: {error} "
            "Give every party at least one block, or train all parameters (no LoRA)."
        ) from error
    wrapped = {id(w.lora_A["default"].weight): name for name, (_, w) in wrapped_parameters(tuned).items()}
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if settings.method == "adalora":
                if ".lora_A." in name or ".lora_B." in name:  # the third matrix, E, starts at zero
                    draw_normal(parameter, name, seed, 0.02)
            elif ".lora_A." in name:
                draw_kaiming(parameter, wrapped.get(id(parameter), name), seed)
            elif ".lora_embedding_B." in name:  # of an embedding, A is the one that starts at zero
                draw_normal(parameter, name, seed, 1.0)
    return tuned


def draw_kaiming(matrix_rI: Tensor, name: str, seed: int) -> None:
    """Fill LoRA's A with what depends on the seed and the name alone: ``kaiming_uniform_(a=sqrt(5))``, as PEFT does."""
    bound = math.sqrt(1.0 / matrix_rI.shape[1])
    matrix_rI.uniform_(-bound, bound, generator=generator_for(seed, name))


def wrapped_parameters(tuned: PeftModel) -> dict[str, tuple[str, ParamWrapper]]:
    """Return, by the names of the parameters that got LoRA by themselves, the names of PEFT's wrappers, and these.

    PEFT wraps a module once for each of its parameters, and names a wrapper by how deep it lies.
    """
    return {
        f"{name.replace('.base_layer', '')}.{module.parameter_name}": (name, module)
        for name, module in tuned.get_base_model().named_modules()
        if isinstance(module, ParamWrapper)
    }


def freeze_part(model: PreTrainedModel, segment: Segment) -> None:
    """Freeze, in a whole model, what `segment` owns: what is another party's and not trained by it."""
    owned = segments_of(model.config, segment)
    for stack in find_stacks(model):
        for index in owned[stack.part].blocks:
            stack.blocks[index].requires_grad_(False)
        if segment.task_head:
            for place in outside_stack(stack.host, stack.name)[1]:
                place.module.requires_grad_(False)
    for place in task_head_places(model) if segment.task_head else ():
        place.module.requires_grad_(False)


def trained_state(model: nn.Module, *, copied: bool = True) -> dict[str, Tensor]:
    """Return what is trained, by global name: the adapters, or all trainable parameters.

    Detached, on the CPU.  A copy, in which bfloat16, which Flower's arrays do not know, is float32; or what the next
    step changes, as it is.
    """
    if isinstance(model, PeftModel):
        # PEFT's own choice asks the hub each time, and adds whole embeddings where they have adapters.
        with _at_full_rank(model):
            state = get_peft_model_state_dict(model, save_embedding_layers=False)
    else:
        state = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {name: tensor.detach().cpu() for name, tensor in sorted(state.items())}
    if not copied:
        return found
    return {name: t.float() if t.dtype is torch.bfloat16 else t.clone() for name, t in found.items()}


@contextmanager
def _at_full_rank(model: PeftModel) -> Iterator[None]:
    """Keep PEFT from cutting AdaLoRA's matrices to the ranks that are left: parties could not average them any more.

    What was taken away is zero, so a model that loads them whole computes the same.
    """
    config = model.active_peft_config
    pattern = getattr(config, "rank_pattern", None)
    if not isinstance(config, AdaLoraConfig) or pattern is None:
        yield
        return
    config.rank_pattern = None
    try:
        yield
    finally:
        config.rank_pattern = pattern


def load_trained_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what `trained_state` returned; raise CheckpointError if names or shapes differ from this segment's."""
    expected = trained_state(model, copied=False)
    odd = sorted(set(expected) ^ set(state)) or [n for n in expected if expected[n].shape != state[n].shape]
    if odd:
        raise CheckpointError(
            f"the trained state does not fit this segment: {len(odd)} names or shapes differ, the first is {odd[0]!r}. "
            "It comes from another cut, model or tuning; use the settings of the job that wrote it."
        )
    if isinstance(model, PeftModel):
        with _at_full_rank(model):
            set_peft_model_state_dict(model, dict(state))
        return
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)


def save_merged_adapter(
    folder: Path,
    states: list[Mapping[str, Tensor]],
    config: PreTrainedConfig,
    lora: LoraSettings,
    task: TaskSettings,
    target_parameters: Sequence[str] = (),
) -> None:
    """Write the adapters of all segments into one folder that plain PEFT loads on the full model.

    Parameters
    ----------
    folder : pathlib.Path
        Made if it does not exist; gets ``adapter_config.json`` and ``adapter_model.safetensors``.
    states : list of mappings
        One per segment, as `trained_state` returns them; empty where a segment was not trained.
    config, lora, task
        The model's, the tuning's and the task's settings.
    target_parameters : sequence of str
        As for `make_trainable`.
    """
    merged: dict[str, Tensor] = {}
    for state in states:
        twice = merged.keys() & state.keys()
        assert not twice, f"owned twice: {sorted(twice)[:3]}"
        merged.update(state)
    # Names look like base_model.model.classifier.weight: what is no LoRA matrix was trained whole.
    whole = {name.removeprefix("base_model.model.") for name in merged if ".lora_" not in name}
    modules = sorted({"pooler" if ".pooler." in name else name.split(".")[0] for name in whole})
    if not all(states):  # one segment was not trained, and a name such as "query" would mean its modules too
        adapted = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in merged if ".lora_" in name}
        lora = replace(lora, target_modules=tuple(sorted(adapted)))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in merged.items()}, folder / "adapter_model.safetensors")
    lora_config(config, lora, task, modules, target_parameters).save_pretrained(str(folder))
