"""What an adversary sees of a training step where gradients are shared: the mean over a batch, parameter by parameter.

B rows of the batch.  The aggregating server of federated learning sees all trained parameters; the hub's operator
those of heads and tails (`vflair_flower.remote.averaging`); a host of experts those of its own.
Invariant: no tensor of a view shares memory with the victim's model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from vflair_flower.errors import DataError


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientView:
    """One gradient of one batch.

    Parameters
    ----------
    gradients : mapping of str to Tensor
        Float32, by the parameter's name in the whole model, as the party sends it: of the batch's mean loss.
    rows : int
        B, which the protocol says.
    lengths : tuple of int or None
        Tokens of each row, special ones included; None if the adversary does not know them.
    labels : Tensor or None
        The rows' classes, int64 [B], or numbers, float32 [B]; None if it does not know them.
    experts : mapping of str to tuple of int
        By the names of those parameters that hold some experts of a layer alone, ``[E, ...]``: which, ascending.
    """

    gradients: Mapping[str, Tensor]
    rows: int
    lengths: tuple[int, ...] | None = None
    labels: Tensor | None = None
    experts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.gradients:
            raise DataError("the adversary saw the gradient of no parameter. Record a step that trains some.")
        for name, gradient in self.gradients.items():
            if gradient.dtype is not torch.float32:
                raise DataError(f"the gradient of {name!r} is {gradient.dtype}; a view holds float32.")
            held = self.experts.get(name)
            if held is not None and len(held) != len(gradient):
                raise DataError(f"the gradient of {name!r} is of {len(gradient)} experts, and {len(held)} are named.")
        for what, known in (("lengths", self.lengths), ("labels", self.labels)):
            if known is not None and len(known) != self.rows:
                raise DataError(f"the batch has {self.rows} rows and {len(known)} {what}. Give one for each row.")
        object.__setattr__(self, "gradients", MappingProxyType(dict(self.gradients)))
        object.__setattr__(self, "experts", MappingProxyType(dict(self.experts)))
