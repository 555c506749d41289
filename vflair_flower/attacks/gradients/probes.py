"""Which vectors went into a layer: those that lie in the span of its weight's gradient.

N texts of T tokens each, D what a layer reads, R rank.  A weight's gradient is a sum over tokens of outer products with
the layer's inputs, so its rows span these inputs where tokens are fewer than D and none has a gradient of zero.  A
`Probe` tells of the last tokens of texts how far their input, on the surrogate, is from such a span.

In a classifier's last block one token of a row is asked, and a row's keys and values have few directions of gradient,
one or two for each head: a row of more tokens than that is not told there.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from vflair_flower.attacks.gradients.view import GradientView
from vflair_flower.experts.modules import expert_modules
from vflair_flower.partition.structure import find_stacks

_ATTENTION = (("q_proj", "k_proj", "v_proj"), ("c_attn",), ("qkv_proj",), ("query_key_value",))
"""What attention reads its input with, by family."""


@dataclass(frozen=True, eq=False)
class Span:
    """A subspace.

    Parameters
    ----------
    basis_DR : Tensor
        Float64, orthonormal columns.
    """

    basis_DR: Tensor

    @property
    def is_everything(self) -> bool:
        """Whether every vector lies in it."""
        return self.basis_DR.shape[1] >= self.basis_DR.shape[0]

    def distances(self, vectors_ND: Tensor) -> Tensor:
        """Return how far vectors are from it, float64 [N], relative to their length: 0 inside, 1 at a right angle."""
        unit_ND = nn.functional.normalize(vectors_ND.double(), dim=-1)
        far_N: Tensor = torch.linalg.vector_norm(unit_ND - (unit_ND @ self.basis_DR) @ self.basis_DR.T, dim=-1)
        return far_N


def span_of(gradients: Sequence[Tensor], tolerance: float) -> Span:
    """Return the span of the rows of gradients [*, D], each of which counts the same; below `tolerance` is rounding."""
    width = gradients[0].shape[-1]
    own = [one.double() / one.double().norm() for one in gradients if float(one.norm()) > 0]
    if not own:
        return Span(torch.zeros(width, 0, dtype=torch.float64))
    _, sizes, rows_RD = torch.linalg.svd(torch.cat(own), full_matrices=False)
    return Span(rows_RD[sizes > tolerance * sizes[0]].T.contiguous())


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """A layer whose inputs can be told from others.

    Parameters
    ----------
    block : int
        Which of the model's blocks it is in.
    module : torch.nn.Module
        Called with the layer's input.
    span : Span
        Of the inputs that the victim had.  With experts, see `by_expert`.
    by_expert : mapping of int to Span
        Of each expert that the view shows: of the inputs that were routed to it.  Empty for attention.
    """

    block: int
    module: nn.Module
    span: Span | None = None
    by_expert: Mapping[int, Span] = field(default_factory=dict)

    def distances(self, called: tuple[Any, ...], rows: int) -> Tensor:
        """Return how far the last tokens' inputs are, float64 [N]; NaN for one that went to no expert of the view."""
        vectors_ND = called[0].reshape(rows, -1, called[0].shape[-1])[:, -1]
        if self.span is not None:
            return self.span.distances(vectors_ND)
        chosen_NK = called[1].reshape(rows, -1, called[1].shape[-1])[:, -1]
        farthest_N = torch.full((rows,), float("nan"), dtype=torch.float64)
        for expert, span in self.by_expert.items():
            routed_N = (chosen_NK == expert).any(-1)
            if bool(routed_N.any()):
                far = span.distances(vectors_ND[routed_N])
                farthest_N[routed_N] = torch.fmax(farthest_N[routed_N], far)
        return farthest_N


def attention_probes(model: nn.Module, view: GradientView, tolerance: float) -> list[Probe]:
    """Return a probe for each block whose attention's gradients are in the view, first block first."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = []
    for index, block in enumerate(find_stacks(_bare(model))[-1].blocks):
        parts = dict(block.named_modules())
        readers = [m for path, m in parts.items() if path.rpartition(".")[2] in _readers(parts)]
        seen = [(m, view.gradients.get(names.get(id(m.weight), ""))) for m in readers]
        rows = [(g.T if isinstance(m, Conv1D) else g) for m, g in seen if g is not None]
        if rows:
            found.append(Probe(block=index, module=readers[0], span=span_of(rows, tolerance)))
    return found


def expert_probes(model: nn.Module, view: GradientView, tolerance: float) -> list[Probe]:
    """Return a probe for each layer of whose experts the view has gradients.

    The last block's is left out where there are others: nothing behind its experts looks at another token, so tokens
    that no label belongs to have no gradient there.
    """
    blocks = {id(m): i for i, block in enumerate(find_stacks(_bare(model))[-1].blocks) for m in block.modules()}
    found = []
    for name, module in expert_modules(model).items():
        parameter = f"{name}.{'gate_up_proj' if module.has_gate else 'up_proj'}"
        if parameter not in view.gradients:
            continue
        gradient_EFD = view.gradients[parameter]
        if module.is_transposed:
            gradient_EFD = gradient_EFD.transpose(1, 2)
        which = view.experts.get(parameter, tuple(range(len(gradient_EFD))))
        spans = {expert: span_of([one], tolerance) for expert, one in zip(which, gradient_EFD, strict=True)}
        told = {expert: span for expert, span in spans.items() if not span.is_everything}
        if told:
            found.append(Probe(block=blocks[id(module)], module=module, by_expert=told))
    return [probe for probe in found if probe.block < max(blocks.values())] or found


@torch.no_grad()
def far_from(model: nn.Module, probes: Sequence[Probe], ids_NT: Tensor, *, first_position: int = 0) -> Tensor:
    """Return how far the last tokens of texts are from what was seen, float64 [N]; see `Probe.distances`.

    Parameters
    ----------
    model : torch.nn.Module
        The surrogate; runs no further than the last probe.
    probes : sequence of Probe
        The farthest counts.
    ids_NT : Tensor
        The texts, int64.
    first_position : int
        Where in a text they begin.
    """
    positions_NT = (torch.arange(ids_NT.shape[1], device=ids_NT.device) + first_position).expand_as(ids_NT)
    farthest_N = torch.full((len(ids_NT),), float("nan"), dtype=torch.float64)
    with _captured(probes) as called, suppress(_EnoughSeen):
        model(input_ids=ids_NT, position_ids=positions_NT, use_cache=False)
    for probe, inputs in zip(probes, called, strict=True):
        farthest_N = torch.fmax(farthest_N, probe.distances(inputs, len(ids_NT)).cpu())
    return farthest_N


class _EnoughSeen(Exception):  # noqa: N818 - no error: how a forward pass ends at the last probe
    pass


@contextmanager
def _captured(probes: Sequence[Probe]) -> Iterator[list[tuple[Any, ...]]]:
    """Keep what the probes' modules are called with."""
    called: list[tuple[Any, ...]] = [()] * len(probes)

    def keep(place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called[place] = (*args, *kwargs.values())
        if all(called):
            raise _EnoughSeen

    with ExitStack() as stack:
        for place, probe in enumerate(probes):

            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], place: int = place) -> None:
                keep(place, args, kwargs)

            stack.callback(probe.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield called


def _readers(parts: Mapping[str, nn.Module]) -> tuple[str, ...]:
    leaves = {path.rpartition(".")[2] for path in parts}
    return next((names for names in _ATTENTION if set(names) <= leaves), ())


def _bare(model: nn.Module) -> Any:
    """Return a model without PEFT's wrapper."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()
