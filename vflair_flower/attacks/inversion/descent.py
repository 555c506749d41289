"""Adam on rows of numbers, from which rows that are done drop out.

Adam treats every number by itself, so a row goes the same way whatever other rows are in its batch, but for rounding.
"""

import math

import torch
from torch import Tensor

_KEEP_MEAN, _KEEP_SQUARE = 0.9, 0.99
_SMALL = 1e-12


class RowDescent:
    """Numbers on their way to a minimum, with Adam's two averages of their gradients.

    Parameters
    ----------
    start : Tensor
        Float, rows first; it is copied.
    rate : float
        The step size at first; it falls to 0 as half a cosine.
    steps : int
        How many there will be at most.
    """

    def __init__(self, start: Tensor, *, rate: float, steps: int) -> None:
        self.value = start.detach().clone().requires_grad_()
        self._mean = torch.zeros_like(start)
        self._square = torch.zeros_like(start)
        self._rate = rate
        self._steps = steps
        self._done = 0

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """Go one step against a gradient."""
        rate = self._rate * (1 + math.cos(math.pi * self._done / self._steps)) / 2
        self._done += 1
        self._mean.lerp_(gradient, 1 - _KEEP_MEAN)
        self._square.mul_(_KEEP_SQUARE).addcmul_(gradient, gradient, value=1 - _KEEP_SQUARE)
        scale = (self._square / (1 - _KEEP_SQUARE**self._done)).sqrt_().add_(_SMALL)
        self.value.addcdiv_(self._mean, scale, value=-rate / (1 - _KEEP_MEAN**self._done))

    def keep(self, kept: Tensor) -> None:
        """Go on with some of the rows (int64 places)."""
        self.value = self.value.detach()[kept].requires_grad_()
        self._mean, self._square = self._mean[kept], self._square[kept]
