"""Gradients of single rows, held as numbers or as what they are products of.

B rows, T tokens, O and I sides of a matrix.  A linear layer's gradient of row b is sum_t left[b, t] right[b, t]^T: its
norm needs T x T products, and a weighted sum over the rows one product, so the B x O x I numbers need never exist
(ghost norm: Li et al., arXiv 2110.05679, section 4; clipped sums from the same pass, without a second one: Bu et al.,
arXiv 2210.00038).  What differs from both: uses of one parameter in several places are one gradient here, so tied
embeddings are clipped as what they are; and a ghost norm is rounded up, never down.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_ROUNDING = 8.0
"""Units in the last place that a ghost norm may be off by, as a part of the norms of what is multiplied."""


class RowGradient(Protocol):
    """One parameter's gradient of each of B rows."""

    @property
    def rows(self) -> int:
        """B."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row's gradient."""

    def squared_norms(self) -> Tensor:
        """Return each row's squared norm, [B], in float32 or better; never below the truth by more than rounding."""

    def weighted_sum(self, factors_B: Tensor) -> Tensor:
        """Return the sum of the rows' gradients, each times its factor."""

    def plus(self, other: "RowGradient") -> "RowGradient":
        """Return the gradient of a parameter that is used in two places."""


@dataclass(frozen=True, eq=False)
class Dense:
    """Rows' gradients as numbers.

    Parameters
    ----------
    values : Tensor
        [B, ...].
    """

    values: Tensor

    @property
    def rows(self) -> int:
        """B."""
        return len(self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row's gradient."""
        return tuple(self.values.shape[1:])

    def squared_norms(self) -> Tensor:
        """Return each row's squared norm, [B]."""
        flat = self.values.flatten(1)
        norms_B: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=_precise(flat.dtype))
        return norms_B.square()

    def weighted_sum(self, factors_B: Tensor) -> Tensor:
        """Return the sum of the rows' gradients, each times its factor."""
        return torch.einsum("b,b...->...", factors_B.to(self.values), self.values)

    def plus(self, other: RowGradient) -> "Dense":
        """Return the sum with another use's gradient."""
        return Dense(self.values + rows_of(other))


@dataclass(frozen=True, eq=False)
class Factors:
    """Rows' gradients as sums over tokens of left times right.

    Parameters
    ----------
    shape : (int, int)
        O, I.
    uses : tuple of (Tensor, Tensor)
        For each use of the parameter, left [B, T, O] and right [B, T, I]; a left of integers, [B, T], stands for
        vectors that are 1 at that place and 0 elsewhere, as a table's tokens are.
    """

    shape: tuple[int, int]
    uses: tuple[tuple[Tensor, Tensor], ...]

    @property
    def rows(self) -> int:
        """B."""
        return len(self.uses[0][0])

    def squared_norms(self) -> Tensor:
        """Return each row's squared norm, [B], in float32 or better, rounded up."""
        dtype = _precise(self.uses[0][1].dtype)
        uses = [(_precisely(left, dtype), right.to(dtype)) for left, right in self.uses]
        squared_B = torch.zeros(self.rows, dtype=dtype, device=uses[0][1].device)
        lengths_B = torch.zeros_like(squared_B)
        for index, (left, right_BTI) in enumerate(uses):
            lengths_B += (_lengths(left) * right_BTI.norm(dim=2)).sum(1)
            for before, (other, other_BSI) in enumerate(uses[: index + 1]):
                products_B = (_inner(left, other) * (right_BTI @ other_BSI.mT)).sum((1, 2))
                squared_B += products_B if before == index else 2.0 * products_B
        # Of products that cancel only their rounding is left, and a row would pass that is longer than its norm says.
        return squared_B.clamp(min=0.0) + _ROUNDING * torch.finfo(dtype).eps * lengths_B.square()

    def weighted_sum(self, factors_B: Tensor) -> Tensor:
        """Return the sum of the rows' gradients, each times its factor, [O, I], in float32 or better."""
        dtype = _precise(self.uses[0][1].dtype)
        total_OI = torch.zeros(self.shape, dtype=dtype, device=self.uses[0][1].device)
        for left, right_BTI in self.uses:
            weighted = (right_BTI.to(dtype) * factors_B.to(dtype)[:, None, None]).flatten(0, 1)
            if left.is_floating_point():
                total_OI.addmm_(left.to(dtype).flatten(0, 1).T, weighted)
            else:
                total_OI.index_add_(0, left.flatten(), weighted)
        return total_OI

    def plus(self, other: RowGradient) -> RowGradient:
        """Return the sum with another use's gradient: both uses, since a norm of a sum needs both."""
        if isinstance(other, Factors):
            return Factors(self.shape, (*self.uses, *other.uses))
        return other.plus(self)


def rows_of(gradient: RowGradient) -> Tensor:
    """Return all rows' gradients as numbers, [B, ...]; for few rows, or small ones."""
    if isinstance(gradient, Dense):
        return gradient.values
    return torch.stack([gradient.weighted_sum(row_B) for row_B in torch.eye(gradient.rows)])


def factored(weight: Tensor, module: nn.Module, went_in: Tensor, grad: Tensor) -> Factors | None:
    """Return the gradient of a matrix as factors, or None where numbers take less memory or the module has no matrix.

    Parameters
    ----------
    weight : Tensor
        The matrix.
    module : torch.nn.Module
        Whose it is.  Factors are known of linear layers, tables, and the transposed linear layers of GPT-2.
    went_in : Tensor
        [B, ..., I], or a table's ids, [B, ...].
    grad : Tensor
        Of what came out, [B, ..., O].
    """
    if not weight.requires_grad:
        return None
    if type(module) is nn.Embedding:
        ids_BT, grad_BTO = went_in.flatten(1), grad.reshape(len(grad), -1, grad.shape[-1])
        if module.padding_idx is not None:  # torch trains no padding
            grad_BTO = grad_BTO.masked_fill((ids_BT == module.padding_idx).unsqueeze(2), 0.0)
        left, right = ids_BT, grad_BTO
    elif type(module) in (nn.Linear, Conv1D):
        left, right = (one.reshape(len(one), -1, one.shape[-1]) for one in (grad, went_in))
        if type(module) is Conv1D:
            left, right = right, left
    else:
        return None
    shape = (weight.shape[0], weight.shape[1])
    held = left[0].numel() + right[0].numel()
    return Factors(shape, ((left, right),)) if len(left) and held < shape[0] * shape[1] else None


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _precisely(left: Tensor, dtype: torch.dtype) -> Tensor:
    return left.to(dtype) if left.is_floating_point() else left


def _lengths(left: Tensor) -> Tensor:
    return left.norm(dim=2) if left.is_floating_point() else torch.ones(left.shape, device=left.device)


def _inner(one: Tensor, other: Tensor) -> Tensor:
    """Return the inner products of one's vectors with the other's, [B, T, S]."""
    if not one.is_floating_point() and not other.is_floating_point():
        return one.unsqueeze(2) == other.unsqueeze(1)
    if not one.is_floating_point():
        return _inner(other, one).mT
    if not other.is_floating_point():
        return one.gather(2, other.unsqueeze(1).expand(-1, one.shape[1], -1))
    return one @ other.mT
