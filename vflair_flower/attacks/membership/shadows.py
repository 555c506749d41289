"""Shadow models: what the adversary trains itself, as the victim did, on rows that it chose.

The job's settings are known to every party.  Not as in the job: one party's rows at a time make the batches, the model
is not cut, and ranks are not pruned (AdaLoRA is trained as LoRA).
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from vflair_flower.memory import ActivationMeter
from vflair_flower.partition import Channel, LoadedSegment, Segment, freeze_part, make_trainable
from vflair_flower.partition.structure import num_blocks
from vflair_flower.spec import SplitSpec
from vflair_flower.tasks import BatchOrder, Encoded
from vflair_flower.training import train_steps


def fine_tuned(
    base: PreTrainedModel, encoded: Sequence[Encoded], spec: SplitSpec, *, pad_token_id: int, seed: int
) -> PreTrainedModel:
    """Return a copy of a model that was trained on rows; the model itself stays as it is.

    Parameters
    ----------
    base : PreTrainedModel
        The whole model that training begins with.
    encoded : sequence of Encoded
        The rows.
    spec : SplitSpec
        How to train: tuning, scope, optimiser, passes and batch size.
    pad_token_id : int
        Fills rows up.
    seed : int
        Of adapters, batches and dropout.

    Returns
    -------
    PreTrainedModel
        In evaluation mode, frozen, with its adapters merged.
    """
    whole = copy.deepcopy(base).requires_grad_(True)
    blocks = num_blocks(whole.config)
    tuning = spec.tuning
    if tuning is not None and tuning.method == "adalora":
        tuning = replace(tuning, method="lora")
    loaded = LoadedSegment(whole, Segment.whole(blocks), Channel(), ())
    model = make_trainable(loaded, tuning, spec.task, seed=seed)
    if spec.scope == "local":
        freeze_part(whole, spec.plan.model_party(blocks))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = spec.optimizer.build(trained)

    def before_step(*_: object) -> None:
        if spec.optimizer.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained, spec.optimizer.max_grad_norm)

    optimizer.register_step_pre_hook(before_step)
    steps = spec.training.total_steps(len(encoded))
    model.train()
    train_steps(
        model,
        encoded,
        kind=spec.task.kind,
        steps=range(steps),
        total_steps=steps,
        order=BatchOrder(num_rows=len(encoded), batch_size=spec.training.batch_size, seed=seed, party="shadow"),
        optimizer=optimizer,
        settings=spec.optimizer,
        pad_token_id=pad_token_id,
        seed=seed,
        name="shadow",
        meter=ActivationMeter(model),
        micro_batch_size=spec.training.micro_batch_size or None,
    )
    merged = model.merge_and_unload() if isinstance(model, PeftModel) else model
    return cast("PreTrainedModel", merged.eval().requires_grad_(False))
