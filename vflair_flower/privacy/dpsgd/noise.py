"""Clipping and noise: the two lines of DP-SGD that make it private, the same at every party.

B rows.  Gradients by name; a row's norm is over all parameters of the segment together (flat clipping).
Invariant: one row changes the sum by at most the bound, and the noise's deviation is the multiplier times the bound.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vflair_flower.errors import SessionError
from vflair_flower.privacy.dpsgd.rows import RowGradients
from vflair_flower.privacy.secret import Noise


def clipped_sum(rows: RowGradients, bound: float) -> dict[str, Tensor]:
    """Scale each row's gradient down to the bound, and return the sum over the rows.

    Parameters
    ----------
    rows : dict of str to RowGradient
        By parameter.
    bound : float
        Of each row's norm.

    Raises
    ------
    SessionError
        A row's gradient is not finite: its norm is no number that could be bounded.
    """
    if not rows:
        return {}
    norms_B = torch.stack([gradient.squared_norms() for gradient in rows.values()]).sum(0).sqrt()
    if not bool(torch.isfinite(norms_B).all()):
        raise SessionError(
            "a row's gradient is not finite, and cannot be clipped; the loss has left all bounds. Lower the learning "
            "rate. Nothing was stepped."
        )
    factors_B = (bound / norms_B.clamp(min=1e-12)).clamp(max=1.0)
    return {name: gradient.weighted_sum(factors_B) for name, gradient in rows.items()}


def noised(
    sums: Mapping[str, Tensor], like: Iterable[tuple[str, Tensor]], *, deviation: float, noise: Noise
) -> dict[str, Tensor]:
    """Return sums with noise, for every parameter: also for one that no row reached.

    Each number is half the sum of four draws: a single draw in floating point has values that no other gradient could
    have led to, which would give it away (Mironov 2012; Holohan and Braghin, arXiv 2107.10138).

    Parameters
    ----------
    sums : mapping of str to Tensor
        By parameter; those that are missing are 0.
    like : iterable of (str, Tensor)
        All trained parameters.
    deviation : float
        Of the noise.
    noise : Noise
        Where it is drawn from: never torch's own generator, which the job's seed sets at every step.
    """
    if not 0.0 < deviation < math.inf:
        raise SessionError(f"noise of deviation {deviation} was to be added, which hides nothing. Nothing was stepped.")
    found = {}
    for name, parameter in like:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        drawn = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        generator = noise.on(parameter.device)
        for _ in range(4):
            drawn += torch.randn(parameter.shape, dtype=dtype, device=parameter.device, generator=generator)
        own = drawn * (deviation / 2.0)
        found[name] = (own if name not in sums else own + sums[name]).to(parameter.dtype)
    return found
