"""The oracle: one backward pass per row, against which rows' gradients are held before anything is trained.

What it is not: a proof for all inputs.  It finds hooks that miss a layer, modules that mix rows, and gradients that are
of another shape or value, whatever a library's own validator says of them.
Invariant: parameters, dropout and gradients are afterwards what they were.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vflair_flower.errors import ConfigurationError, SessionError
from vflair_flower.privacy.dpsgd.gradients import RowGradient, rows_of
from vflair_flower.privacy.dpsgd.rows import RowSampler

TOLERANCE = 1e-4
"""Of the largest number in the oracle's gradient of the whole segment; float32 differs by about 1e-6."""
_TOO_LONG = 0.05
"""By how much a norm that was rounded up may be above the truth, as a part of the longest row's."""


def check_rows(
    sampler: RowSampler, module: nn.Module, loss_of: Callable[[slice], Tensor], rows: int, *, segment: str
) -> float:
    """Compare rows' gradients with one backward pass per row.

    Parameters
    ----------
    sampler : RowSampler
        Of the module.
    module : torch.nn.Module
        A segment, as it is trained.
    loss_of : callable
        Runs a slice of the rows and returns the sum of their losses.
    rows : int
        How many there are, at least two: with one, no mixing could show.
    segment : str
        Whose it is, for errors.

    Returns
    -------
    float
        The largest difference, as a part of the largest gradient.

    Raises
    ------
    ConfigurationError
        They differ, are missing, or Opacus fails on the segment; the parameter is named.
    """
    assert rows >= 2
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    with _awake(trained.values()), _without_dropout(module):
        try:
            sampler.begin(rows)
            together = loss_of(slice(0, rows))
            taken = sampler.taken  # a model whose own hooks begin a pass has begun another
            assert taken is not None
            assert taken.rows == rows
            together.backward()
            found = sampler.take(taken, {name: p.grad for name, p in trained.items()})
        except SessionError as error:
            raise ConfigurationError(f"at {segment}, {error}") from error
        except (RuntimeError, TypeError, IndexError, AttributeError, ValueError, NotImplementedError) as error:
            raise ConfigurationError(
                f"at {segment}, Opacus cannot take rows' gradients: {type(error).__name__}: {str(error)[:300]}. Freeze "
                "the part in question, or tune by LoRA."
            ) from error
        finally:
            _forget(trained.values())
        alone: dict[str, Tensor] = {}
        apart = torch.zeros(())
        for row in range(rows):
            with sampler.off():
                loss = loss_of(slice(row, row + 1))
                loss.backward()
            apart = apart + loss.detach().cpu()
            for name, parameter in trained.items():
                if parameter.grad is not None:
                    own = alone.setdefault(name, torch.zeros(rows, *parameter.shape, device=parameter.device))
                    own[row] = parameter.grad
            _forget(trained.values())
    return _compare(found, alone, float(together.detach()), float(apart), segment)


def _compare(
    found: Mapping[str, RowGradient], alone: dict[str, Tensor], together: float, apart: float, segment: str
) -> float:
    largest = max((float(one.abs().max()) for one in alone.values()), default=0.0)
    if not 0.0 < largest < float("inf"):
        raise ConfigurationError(
            f"at {segment}, the largest gradient of the rows that DP-SGD was tried on is {largest}; nothing can be "
            "compared with it. Look at the loss."
        )
    longest = max(float(one.flatten(1).norm(dim=1).max()) for one in alone.values())
    worst = 0.0
    for name, own in alone.items():
        if name not in found:
            raise ConfigurationError(
                f"at {segment}, no hook took the rows' gradients of the parameter {name!r}, which a backward pass "
                "reaches: its updates would not be private. Freeze it, or tune by LoRA."
            )
        difference = float((rows_of(found[name]).to(own) - own).abs().max()) / largest
        if not difference <= TOLERANCE:
            raise ConfigurationError(
                f"at {segment}, the rows' gradients of the parameter {name!r} differ from those of one backward pass "
                f"per row by {difference:.1e} of the largest gradient (at most {TOLERANCE:.0e} is rounding): its rows "
                "are mixed, or its hook is wrong. Freeze it, or tune by LoRA."
            )
        more_B = (found[name].squared_norms().sqrt().to(own) - own.flatten(1).norm(dim=1)) / longest
        if not (float(more_B.min()) >= -TOLERANCE and float(more_B.max()) <= _TOO_LONG):
            raise ConfigurationError(
                f"at {segment}, the norms of the rows' gradients of the parameter {name!r} are off by "
                f"{', '.join(f'{one:.1e}' for one in more_B.tolist())} of the longest row: clipping by them bounds "
                "nothing. Freeze it, or tune by LoRA."
            )
        worst = max(worst, difference)
    if abs(together - apart) > 1e-3 * max(1.0, abs(apart)):
        raise ConfigurationError(
            f"at {segment}, the loss of some rows together is {together:.6f}, and of each alone {apart:.6f} in sum: "
            "rows change each other's results, so clipping a row's gradient bounds nothing. Choose another model."
        )
    return worst


def _forget(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


@contextmanager
def _awake(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let no parameter be all zeros inside the block: LoRA's B is at first, and A then has no gradient to compare."""
    asleep = [p for p in parameters if not bool(p.detach().any())]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in asleep:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in asleep:
                parameter.zero_()


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """Turn dropout off inside the block, and nothing else: hooks work in training mode alone."""
    before: list[tuple[nn.Module, str, float]] = []
    for one in module.modules():
        names = ["p"] if isinstance(one, nn.modules.dropout._DropoutNd) else [n for n in vars(one) if "drop" in n]
        for name in names:
            value = getattr(one, name)
            if isinstance(value, float) and value > 0.0:
                before.append((one, name, value))
                setattr(one, name, 0.0)
    try:
        yield
    finally:
        for one, name, value in before:
            setattr(one, name, value)
