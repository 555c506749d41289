"""Frozen weights of 8 or 4 bits, by bitsandbytes through transformers.

What is trained whole, and embeddings, are not rounded: a task head keeps the dtype of the weights.
"""

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from vflair_flower.errors import ConfigurationError
from vflair_flower.partition.structure import task_head_places
from vflair_flower.settings import WeightSettings


def quantized(cls: type[PreTrainedModel], config: PreTrainedConfig, weights: WeightSettings) -> dict[str, Any]:
    """Return what `from_pretrained` is to be told beside the dtype; raise ConfigurationError without bitsandbytes."""
    if weights.quantization == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigurationError(
            f"quantization is {weights.quantization!r}, and bitsandbytes is not installed. Install it "
            "(pip install 'vflair-flower[quantization]') at every party, or set quantization to 'none'."
        )
    with torch.device("meta"):
        kept = _kept(cls(config))
    if weights.quantization == "int8":
        chosen = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    else:
        chosen = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=weights.torch_dtype,
            llm_int8_skip_modules=kept,
        )
    return {"quantization_config": chosen}


def saved_bytes(model: PreTrainedModel, weights: WeightSettings) -> int:
    """Return how many bytes of a model's weights quantisation saves: by formula, on the meta device too."""
    if weights.quantization == "none":
        return 0
    kept, saved = _kept(model), 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and not any(f"{name}.".startswith(f"{keep}.") for keep in kept):
            matrix = module.weight
            if weights.quantization == "int8":
                rounded = matrix.numel() + 4 * matrix.shape[0]  # a float32 scale per row
            else:
                rounded = matrix.numel() // 2 + 4 * -(-matrix.numel() // 64)  # a float32 scale per 64 numbers
            saved += matrix.numel() * matrix.element_size() - rounded
    return saved


def _kept(model: PreTrainedModel) -> list[str]:
    """Name the modules that may be trained whole."""
    pooler = getattr(model.base_model, "pooler", None)
    poolers = [name for name, module in model.named_modules() if pooler is not None and module is pooler]
    return [*(place.name for place in task_head_places(model)), *poolers]
