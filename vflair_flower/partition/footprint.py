"""Who will hold what, before anything is loaded: parameters, memory and bytes per step, by formula.

Models are built on torch's meta device, which holds shapes and no numbers; a 70-billion-parameter model is planned in
seconds on a laptop.  B rows per party and step, T tokens per row, D hidden.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from vflair_flower.partition.adapters import make_trainable, refuse_trained_copies
from vflair_flower.partition.cut import cut
from vflair_flower.partition.loading import LoadedSegment, task_class
from vflair_flower.partition.plan import Mode, Segment
from vflair_flower.partition.quantization import saved_bytes
from vflair_flower.partition.sources import ModelSource, load_config
from vflair_flower.partition.structure import answer_shape, hidden_size, num_blocks, stack_lengths
from vflair_flower.spec import WIRE_DTYPES, SplitSpec

_MOMENTS = {"adamw": 2, "sgd": 0}


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one party holds."""

    owns: str
    parameters: int
    trained: int
    parameter_bytes: int
    training_bytes: int
    """Gradients and optimiser state."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """A plan in numbers; bytes per step are those of one party's step, both directions, headers not counted."""

    model: str
    family: str
    num_blocks: int
    whole_parameters: int
    whole_trained: int
    data_party: Share
    model_party: Share
    up_bytes_per_step: int
    down_bytes_per_step: int


def footprint(source: ModelSource, spec: SplitSpec) -> Footprint:
    """Work out who holds what.

    Parameters
    ----------
    source : ModelSource
        Only its configuration is read.
    spec : SplitSpec
        The job; batches are taken full and `max_tokens` long, without position ids, so traffic is an upper bound.

    Raises
    ------
    ConfigurationError
        If the model is unknown or the cut misses it.
    """
    config = load_config(source, spec.task)
    refuse_trained_copies(config, spec.plan, spec.task, spec.tuning)
    blocks = num_blocks(config)
    whole_share = _share(source, Segment.whole(blocks), spec)
    rows, tokens = spec.training.batch_size, spec.training.max_tokens
    item = WIRE_DTYPES[spec.wire_dtype].itemsize
    hidden = rows * tokens * hidden_size(config) * item
    shown = math.prod(answer_shape(config, spec.task, rows, tokens)) * item
    answer = hidden if spec.plan.mode is Mode.HBT else shown
    up, down = hidden + rows * tokens + answer, answer + hidden
    if len(stack_lengths(config)) == 2:  # the decoder's hole carries the encoder's states and their gradient as well
        up, down = 2 * up + hidden + rows * tokens + (hidden if spec.plan.tail_blocks else 0), 2 * down + hidden
    return Footprint(
        model=source.name,
        family=config.model_type,
        num_blocks=blocks,
        whole_parameters=whole_share.parameters,
        whole_trained=whole_share.trained,
        data_party=_share(source, spec.plan.data_party(blocks), spec),
        model_party=_share(source, spec.plan.model_party(blocks), spec),
        up_bytes_per_step=up,
        down_bytes_per_step=down,
    )


def _share(source: ModelSource, segment: Segment, spec: SplitSpec) -> Share:
    config = load_config(source, spec.task)
    with torch.device("meta"):
        model = task_class(config, spec.task)(config)
        nn.Module.to(model, dtype=spec.weights.torch_dtype)
        loaded = LoadedSegment(model, segment, cut(model, segment), ())
        saved = saved_bytes(model, spec.weights)
        tuned: nn.Module = make_trainable(loaded, spec.tuning, spec.task, seed=spec.seed, scope=spec.scope)
    parameters = list({id(p): p for p in tuned.parameters()}.values())
    own = [p for p in parameters if p.requires_grad]
    return Share(
        owns=segment.describe(),
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in own),
        parameter_bytes=_bytes(parameters) - saved,
        training_bytes=_bytes(own) * (1 + _MOMENTS[spec.optimizer.name]),
    )


def _bytes(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)
