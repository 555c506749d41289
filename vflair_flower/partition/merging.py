"""Put what a job trained into the whole model: a checkpoint that plain `from_pretrained` loads.

The whole model is in memory meanwhile, so this is for whoever may hold it: a simulation, or parties that all agree.
"""

from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from vflair_flower.errors import CheckpointError
from vflair_flower.partition.loading import load_segment, load_tokenizer
from vflair_flower.partition.plan import Segment
from vflair_flower.partition.sources import load_config, resolve_model
from vflair_flower.partition.structure import num_blocks
from vflair_flower.settings import WeightSettings
from vflair_flower.spec import SplitSpec

SPEC_FILE = "split_spec.json"
"""The job's specification, beside the adapter that it trained."""
TRAINED_FILE = "trained.safetensors"


def merge_model(adapter: Path, out: Path, *, model: str | None = None, base_dir: Path | None = None) -> PreTrainedModel:
    """Write the whole model with what a job trained, and its tokenizer; returns the model.

    Parameters
    ----------
    adapter : pathlib.Path
        What `SplitLearning.save_adapter` wrote: folder `adapter` of a run.
    out : pathlib.Path
        Folder to write; must not exist, or be empty.
    model : str, optional
        Where the base model is; by default where the job had it.
    base_dir : pathlib.Path, optional
        What a relative model folder is relative to.

    Raises
    ------
    CheckpointError
        If `adapter` is none, does not fit the model, or `out` is not empty.
    ModelError
        If the base model cannot be read.
    """
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"the folder {out} is not empty. Name one that does not exist, so that nothing is lost.")
    try:
        spec = SplitSpec.from_json((adapter / SPEC_FILE).read_text())
        trained = load_file(adapter / TRAINED_FILE) if spec.tuning is None else {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{adapter} is not what a run left of its training ({error}). Name the folder `adapter` of a run."
        ) from error
    source = resolve_model(model or spec.model, base_dir)
    segment = Segment.whole(num_blocks(load_config(source, spec.task)))
    # Merged at the weights' own dtype: what was rounded to 8 or 4 bits for training is not rounded in the result.
    weights = WeightSettings(dtype=spec.weights.dtype)
    whole = load_segment(source, segment, spec.task, weights=weights, seed=spec.seed).model
    if spec.tuning is None:
        _put(whole, trained, adapter)
    else:
        whole = PeftModel.from_pretrained(whole, str(adapter)).merge_and_unload()
    whole.save_pretrained(out)
    load_tokenizer(source).save_pretrained(out)
    return whole


def _put(model: PreTrainedModel, trained: dict[str, torch.Tensor], adapter: Path) -> None:
    own = dict(model.named_parameters())
    odd = [name for name, tensor in trained.items() if name not in own or own[name].shape != tensor.shape]
    if odd:
        raise CheckpointError(
            f"{len(odd)} tensors of {adapter} do not fit the model, the first is {odd[0]!r}. Name the model that the "
            "job trained."
        )
    with torch.no_grad():
        for name, tensor in trained.items():
            own[name].copy_(tensor)
