"""What a segment's training needs in memory, measured: parameters, gradients, optimiser state and activations.

Bytes throughout.  Not here: the process as a whole (interpreter, libraries), which `process_peak_bytes` tells.
"""

import resource
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class MemoryParts:
    """Peak bytes by what they are for; `total` is their sum."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations

    def to_json(self) -> dict[str, int]:
        """Return the parts by name."""
        return asdict(self)


class ActivationMeter:
    """Counts the bytes that autograd keeps for the backward pass; parameters are not counted.

    Measuring costs a Python call per kept tensor, so each input shape is measured once and remembered.  Forward passes
    must be measured one at a time; `release` may come from any thread.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._lock = threading.Lock()
        self._by_shape: dict[tuple[int, ...], int] = {}
        self.peak_bytes = 0
        self._live: dict[object, int] = {}

    @contextmanager
    def measure(self, shape: Iterable[int], key: object) -> Iterator[None]:
        """Measure the forward pass run inside; what it keeps counts as live until `release(key)`."""
        shape = tuple(shape)
        if shape in self._by_shape:
            yield
        else:
            # Asked for anew each time: a module may run on another copy of its parameters than the last time.
            with count_kept(self._module.parameters()) as kept_bytes:
                yield
            self._by_shape[shape] = kept_bytes()
        with self._lock:
            self._live[key] = self._by_shape[shape]
            self.peak_bytes = max(self.peak_bytes, sum(self._live.values()))

    def release(self, key: object) -> None:
        """Count what was kept under `key` as freed."""
        with self._lock:
            self._live.pop(key, None)


@contextmanager
def count_kept(excluded: Iterable[Tensor]) -> Iterator[Callable[[], int]]:
    """Yield a function that tells how many bytes autograd keeps of what is run inside the block.

    Parameters
    ----------
    excluded : iterable of Tensor
        What is in memory anyway, such as parameters.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        # A node that keeps its own output would hold itself, and a graph that nothing differentiates would stay.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(seen.values())


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, those that share storage counted once."""
    return sum({t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of an optimiser's state."""
    states = (v for state in optimizer.state.values() for v in state.values())
    return sum(v.numel() * v.element_size() for v in states if isinstance(v, Tensor))


def process_peak_bytes() -> int:
    """Return the most resident memory that this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
