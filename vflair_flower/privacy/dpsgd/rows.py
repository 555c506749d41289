"""Gradients of single rows: what one party takes from one backward pass over its segment.

Opacus' grad samplers make them, and where that would hold more numbers, they stay what they are products of
(`vflair_flower.privacy.dpsgd.gradients`).

B rows of a call.  The loss is a sum over rows.  Opacus' own hooks keep what went into a module on the module, last in,
first out, so that calls of several parties would mix, and miss a module whose output another hook has read before them.
Here a hook on the output itself keeps it, for the call that it belongs to (`Taken`).
Invariant: `take` returns every row's gradient of every trained parameter that the pass reached, or raises an error that
names the parameter.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vflair_flower.errors import ConfigurationError, SessionError
from vflair_flower.privacy.dpsgd.gradients import Dense, RowGradient, factored
from vflair_flower.privacy.dpsgd.opacus import (
    GradSampleHooks,
    ft_compute_per_sample_gradient,
    prepare_layer,
)

RowGradients = dict[str, RowGradient]


@dataclass(eq=False)
class Taken:
    """What is taken of one call: how many rows it has, and the rows' gradients by parameter so far."""

    rows: int
    found: RowGradients = field(default_factory=dict)


class RowSampler:
    """Per-row gradients of a module's trained parameters.

    Parameters
    ----------
    module : torch.nn.Module
        A segment; hooks are put on what is trained.

    Raises
    ------
    ConfigurationError
        A part of it mixes rows, or Opacus cannot take it; the part is named.
    """

    def __init__(self, module: nn.Module) -> None:
        refuse_unsupported(module)
        self._module = module
        self.taken: Taken | None = None
        """Of the newest forward pass."""
        self._off = False
        self._canonical: dict[str, str] = {}
        first: dict[int, str] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            self._canonical[name] = first.setdefault(id(parameter), name)  # of one that is tied, the first
        self.hooks = []
        for name, one in _trained_modules(module):
            if isinstance(one, nn.Embedding):
                self.hooks.append(one.register_forward_pre_hook(self._one_per_row))
            if type(one) not in GradSampleHooks.GRAD_SAMPLERS:
                prepare_layer(one)
            self.hooks.append(one.register_forward_hook(partial(self._went_in, name)))

    def begin(self, rows: int) -> Taken:
        """Expect a forward pass over so many rows, and return what will be taken of it."""
        self.taken = Taken(rows)
        return self.taken

    def end(self) -> None:
        """Let forward passes go by until the next one begins."""
        self.taken = None

    def take(self, taken: Taken, reached: Mapping[str, Tensor | None]) -> RowGradients:
        """Return the rows' gradients of a backward pass.

        Parameters
        ----------
        taken : Taken
            Of the forward pass.
        reached : mapping of str to Tensor or None
            By name of the trained parameter, the gradient that autograd itself found; None where the pass never came.

        Raises
        ------
        SessionError
            A parameter that has a gradient has none per row, or not one for each row.
        """
        for name, total in reached.items():
            own = taken.found.get(name)
            shape = None if own is None else (own.rows, *own.shape)
            if total is not None and shape != (taken.rows, *total.shape):
                raise SessionError(
                    f"the parameter {name!r} has a gradient, and per row "
                    f"{'nothing' if shape is None else shape} instead of {(taken.rows, *total.shape)}: it "
                    "cannot be clipped row by row, and a step with it would not be private. Nothing was stepped. "
                    "Freeze it, or tune by LoRA."
                )
        return {name: own for name, own in taken.found.items() if name in reached}

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let passes inside the block go by, whatever begins there."""
        before, self._off = self._off, True
        try:
            yield
        finally:
            self._off = before

    def _went_in(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.taken is None or self._off or not torch.is_grad_enabled():
            return
        if not isinstance(output, Tensor) or not args or not isinstance(args[0], Tensor):
            raise SessionError(
                f"the module {name!r} ({type(module).__name__}) has parameters of its own that are trained, and takes "
                "or returns more than one tensor, which Opacus cannot follow. Freeze it, or tune by LoRA."
            )
        if output.requires_grad:
            went_in = [one.detach() for one in args if isinstance(one, Tensor)]
            output.register_hook(partial(self._came_back, name, module, went_in, self.taken))

    def _came_back(self, name: str, module: nn.Module, went_in: list[Tensor], taken: Taken, grad: Tensor) -> None:
        prefix = f"{name}." if name else ""
        names = {id(p): self._canonical[prefix + own] for own, p in module.named_parameters()}
        for parameter, gradient in _rows_gradients(module, went_in, grad.detach()).items():
            if parameter.requires_grad:
                key = names[id(parameter)]
                taken.found[key] = taken.found[key].plus(gradient) if key in taken.found else gradient

    def _one_per_row(self, _module: nn.Module, args: tuple[Any, ...]) -> Any:
        # transformers asks a position table once for all rows, [1, T] or [T]: its gradient would have no rows (Opacus
        # issue 841).
        rows = 0 if self.taken is None or self._off else self.taken.rows
        if not (torch.is_grad_enabled() and args and isinstance(args[0], Tensor) and rows > 1):
            return None
        ids = args[0]
        if ids.dim() == 1 or (ids.dim() == 2 and ids.shape[0] == 1):
            return (ids.expand(rows, ids.shape[-1]), *args[1:])
        return None


def _rows_gradients(module: nn.Module, went_in: list[Tensor], grad: Tensor) -> dict[nn.Parameter, RowGradient]:
    own = dict(module.named_parameters(recurse=False))
    factors = factored(own["weight"], module, went_in[0], grad) if "weight" in own else None
    if factors is not None:
        found: dict[nn.Parameter, RowGradient] = {own["weight"]: factors}
        if "bias" in own:
            found[own["bias"]] = Dense(grad.reshape(len(grad), -1, grad.shape[-1]).sum(1))
        return found
    sampler = GradSampleHooks.GRAD_SAMPLERS.get(type(module), ft_compute_per_sample_gradient)
    samples: Mapping[nn.Parameter, Tensor] = sampler(module, went_in, grad)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        for sample in samples.values():  # torch trains no padding; Opacus' sampler forgets that
            sample[:, module.padding_idx] = 0.0
    return {parameter: Dense(sample.detach()) for parameter, sample in samples.items()}


def _trained_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield modules with trained parameters of their own; what is below one that functorch takes belongs to it."""
    if _trains(module):
        yield name, module
        if type(module) not in GradSampleHooks.GRAD_SAMPLERS:
            return
    for child, one in module.named_children():
        yield from _trained_modules(one, f"{name}.{child}" if name else child)


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))


def refuse_unsupported(module: nn.Module) -> None:
    """Raise ConfigurationError for modules whose rows are not apart, or that Opacus cannot take, by name."""
    for name, one in module.named_modules():
        if isinstance(one, nn.modules.batchnorm._BatchNorm):
            raise ConfigurationError(
                f"the module {name!r} is a {type(one).__name__}: it reads the mean of a batch, so one row changes what "
                "all other rows' gradients are, even if its own parameters are frozen. DP-SGD cannot bound that. "
                "Choose a model with layer or group normalisation."
            )
        if isinstance(one, nn.RNNBase | nn.EmbeddingBag) and _trains(one):
            raise ConfigurationError(
                f"the module {name!r} is a {type(one).__name__}, whose rows' gradients Opacus takes only from its own "
                "replacement. Freeze it, or choose another model."
            )
        if _trains(one) and next(one.buffers(), None) is not None:
            raise ConfigurationError(
                f"the module {name!r} ({type(one).__name__}) is trained and has buffers, whose changes no noise would "
                "cover. Freeze it, or tune by LoRA."
            )
    experts = [name for name, p in module.named_parameters() if p.requires_grad and p.dim() >= 3 and "expert" in name]
    if experts:
        raise ConfigurationError(
            f"the parameter {experts[0]!r} holds several experts at once, where tokens have lost their rows. Freeze "
            "the experts, or tune by LoRA modules that leave them out."
        )
