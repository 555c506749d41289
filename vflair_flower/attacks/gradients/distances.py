"""How far two gradients are apart, tensor by tensor: what DLG, TAG and LAMP minimise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vflair_flower.errors import DataError

_NOISE = 1e-7
"""Relative to the largest tensor; below it lies the gradient of keys' biases, which is zero but for rounding."""


def squared(found: Sequence[Tensor], seen: Sequence[Tensor]) -> Tensor:
    """Return the sum of squared differences (DLG)."""
    return torch.stack([(one - other).square().sum() for one, other in zip(found, seen, strict=True)]).sum()


def absolute(found: Sequence[Tensor], seen: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted sum of absolute differences, a weight per tensor (TAG's second term)."""
    parts = zip(found, seen, weights, strict=True)
    return torch.stack([weight * (one - other).abs().sum() for one, other, weight in parts]).sum()


def turned(found: Sequence[Tensor], seen: Sequence[Tensor]) -> Tensor:
    """Return one minus the cosine, on the mean over tensors whose gradient is more than rounding (LAMP)."""
    lengths = [float(other.norm()) for other in seen]
    parts = []
    for one, other, length in zip(found, seen, lengths, strict=True):
        if length > _NOISE * max(lengths):
            parts.append(1 - (one * other).sum() / (one.norm() * length).clamp_min(1e-20))
    if not parts:
        raise DataError("every tensor of the gradient is zero, so it says nothing. Record a step with a loss.")
    return torch.stack(parts).mean()


def falling_weights(count: int, scale: float) -> list[float]:
    """Return weights that fall evenly from `scale` at the tensor nearest to the input to almost nothing (TAG)."""
    return [scale * (count - place) / count for place in range(count)]
