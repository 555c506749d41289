"""Tensors of a finished model in Flower messages, as they are: Flower's arrays know no bfloat16."""

import json

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor


def to_records(state: dict[str, Tensor]) -> RecordDict:
    """Return tensors for a Flower message, which does not know bfloat16: such become float32, and are named."""
    found = {name: tensor.detach().cpu() for name, tensor in state.items()}
    halved = [name for name, tensor in found.items() if tensor.dtype is torch.bfloat16]
    arrays = ArrayRecord({name: t.float() if name in halved else t.contiguous() for name, t in found.items()})
    return RecordDict({"arrays": arrays, "config": ConfigRecord({"bfloat16": json.dumps(halved)})})


def from_records(content: RecordDict) -> dict[str, Tensor]:
    """Return the tensors that `to_records` was given."""
    halved = set(json.loads(str(content["config"]["bfloat16"])))
    state = content.array_records["arrays"].to_torch_state_dict()
    return {name: t.bfloat16() if name in halved else t for name, t in state.items()}
