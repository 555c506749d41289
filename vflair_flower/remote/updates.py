"""How a body that several data parties train at once is updated: three ways, one interface.

| mode          | optimiser steps                                                          | known as               |
|---------------|--------------------------------------------------------------------------|------------------------|
| `synchronous` | one per global step, on the mean over all parties' rows                  | centralised training   |
| `sequential`  | one per party's step, parties in turn                                    | SplitFed-V2            |
| `replicated`  | one per party's step on that party's own copy; copies averaged per round | SplitFed-V1            |

SplitFed: Thapa et al., arXiv 2004.12088.  Where we differ: `sequential` takes the parties in the order of their names,
not in random order, so that a run can be repeated; `replicated` copies only what is trained.
Invariant: the result does not depend on which party was quicker.
"""

import copy
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from vflair_flower.errors import ConfigurationError, PartyLostError
from vflair_flower.memory import optimizer_bytes, tensor_bytes
from vflair_flower.partition.ranks import RankBudget
from vflair_flower.remote.schedule import Barrier, Turns
from vflair_flower.settings import OptimizerSettings

Gradients = dict[str, Tensor]
Deferred = Callable[[], Gradients]


class BodyMode(StrEnum):
    """See the table above."""

    SYNCHRONOUS = "synchronous"
    SEQUENTIAL = "sequential"
    REPLICATED = "replicated"


@dataclass(frozen=True, kw_only=True)
class StepRequest:
    """A party's word that an optimiser step is due."""

    rows: int
    step: int
    total_steps: int
    noise: float = 0.0
    """The noise multiplier that the party asks for, under DP-SGD."""
    sample_rate: float = 0.0
    """At which it drew its rows, under DP-SGD."""

    @classmethod
    def read(cls, meta: Mapping[str, Any]) -> Self:
        """Return what a step call's plain values say; without DP-SGD they name no noise."""
        return cls(
            rows=int(meta["rows"]),
            step=int(meta["step"]),
            total_steps=int(meta["total_steps"]),
            noise=float(meta.get("noise", 0.0)),
            sample_rate=float(meta.get("sample_rate", 0.0)),
        )


class StepNoise(Protocol):
    """What adds noise to steps (`vflair_flower.privacy.dpsgd.BodyPrivacy`)."""

    def noised(
        self, means: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], requests: Mapping[str, StepRequest]
    ) -> Gradients:
        """Return a step's gradients with noise, for every parameter."""


@dataclass(frozen=True, kw_only=True)
class NormRequest:
    """The square of the norm of a party's own gradient, and the rows that it is the mean over."""

    squared: float
    rows: int


class Update(ABC):
    """Holds the trained parameters' optimisers over the whole job, and the parties' gradients within a session."""

    def __init__(self, module: nn.Module, optimizer: OptimizerSettings) -> None:
        self.module = module
        self.settings = optimizer
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.ranks = RankBudget.of(module)
        self.noise: StepNoise | None = None
        """Under DP-SGD, what adds noise to every step."""
        self.steps_taken = 0
        self.steps_without_gradient = False
        """Whether a parameter that no gradient came to steps with a gradient of zero, and not at all by default."""
        self.peak_gradient_bytes = 0
        """Of what waited for steps and was summed for one, at the most."""
        self.last_step: dict[str, tuple[int, tuple[str, ...]]] = {}
        """By party: the number of the last step that it took part in, and whose gradients that was taken with."""
        self._gradients: dict[str, Gradients] = {}
        self._deferred: dict[str, list[Deferred]] = {}
        self._norms: dict[str, float] = {}
        self._lock = threading.Lock()

    @abstractmethod
    def begin(self, parties: Sequence[str], deadline_s: float) -> None:
        """Start a training session."""

    def norm(self, party: str, request: NormRequest) -> float:
        """Return the norm of the gradient that the party's next step is taken with, over the whole model.

        The whole model is the party's own part and the body; the step will be clipped by this norm.
        """
        own = squared_norm(self.pending(party).values())
        return self._keep_norm(party, math.sqrt(own + request.squared))

    def _keep_norm(self, party: str, norm: float) -> float:
        with self._lock:
            self._norms[party] = norm
        return norm

    def has_norm(self, party: str) -> bool:
        """Whether the norm for the party's next step is known."""
        with self._lock:
            return party in self._norms

    @abstractmethod
    def step(self, party: str, request: StepRequest) -> None:
        """Take the party's step; returns when it is taken."""

    @abstractmethod
    def leave(self, party: str, *, lost: bool) -> None:
        """Let a party go that is done or lost; what it had not stepped with is dropped."""

    @abstractmethod
    def state(self, *, copied: bool = True) -> dict[str, object]:
        """Return the optimisers' state for a checkpoint: a copy, or what the next step changes."""

    @abstractmethod
    def load_state(self, state: Mapping[str, object], *, copied: bool = True) -> None:
        """Put back what `state` returned; where it is not copied, the caller gives it away."""

    def before_forward(self, party: str) -> None:  # noqa: B027 - most need not wait
        """Wait until the party may run a forward pass."""

    def parameters_of(self, party: str) -> dict[str, nn.Parameter]:
        """Return the trained parameters that the party's calls run on, by name."""
        return self.parameters

    def end(self) -> None:  # noqa: B027 - most have nothing to end
        """End the session; parties are gone."""

    def copies_bytes(self) -> int:
        """Return the bytes of parties' own copies of the trained parameters."""
        return 0

    def add_gradients(self, party: str, gradients: Gradients) -> None:
        """Add the gradients of one backward pass to what the party steps with next."""
        with self._lock:
            own = self._gradients.setdefault(party, {})
            for name, gradient in gradients.items():
                own[name] = own[name] + gradient if name in own else gradient
        self._note_gradients({})

    def defer(self, party: str, make: Deferred) -> None:
        """Let gradients be made only when the party's step is taken, so that parties' sums need the memory of one."""
        with self._lock:
            self._deferred.setdefault(party, []).append(make)

    def pending(self, party: str) -> Gradients:
        """Return the gradients that wait for the party's step, but for deferred ones."""
        with self._lock:
            return dict(self._gradients.get(party, {}))

    def _portions(self, party: str) -> Iterator[tuple[Gradients, bool]]:
        """Yield what waits for the party's step in portions, and whether a portion is only made as its turn comes."""
        yield self.pending(party), False
        with self._lock:
            deferred = list(self._deferred.get(party, ()))
        for make in deferred:
            yield make(), True

    def drop(self, party: str) -> None:
        """Forget the gradients that wait for the party's step."""
        self._take(party)

    def has_gradients(self, party: str) -> bool:
        """Whether the party has anything to step with."""
        with self._lock:
            return bool(self._gradients.get(party) or self._deferred.get(party))

    def _note_gradients(self, *summed: Gradients) -> None:
        """Note how much memory gradients need: those that wait, and what is summed just now, counted once."""
        with self._lock:
            held = tensor_bytes(g for own in (*self._gradients.values(), *summed) for g in own.values())
            self.peak_gradient_bytes = max(self.peak_gradient_bytes, held)

    def gradient_bytes(self) -> int:
        """Return the bytes of the gradients that wait for a step."""
        with self._lock:
            return sum(g.numel() * g.element_size() for own in self._gradients.values() for g in own.values())

    def optimizer_bytes(self) -> int:
        """Return the bytes of all optimisers' state."""
        return sum(optimizer_bytes(optimizer) for optimizer in self._optimizers())

    @abstractmethod
    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Return all optimisers."""

    def _take(self, party: str) -> Gradients:
        with self._lock:
            self._deferred.pop(party, None)
            return self._gradients.pop(party, {})

    def _take_clipped(self, party: str) -> Gradients:
        """Return the party's gradients, scaled down if the norm that was last asked for is too high."""
        with self._lock:
            factor = self.settings.clip_factor(self._norms.pop(party, 0.0))
        return _scaled(self._take(party), factor)

    def _apply(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        gradients: Gradients,
        request: StepRequest,
        together: Mapping[str, StepRequest],
    ) -> None:
        if self.noise is not None and parameters:
            gradients = self.noise.noised(gradients, parameters, together)
        rate = self.settings.learning_rate
        if request.total_steps:
            rate = self.settings.rate(request.step, request.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, parameter in parameters.items():
            gradient = gradients.get(name)
            parameter.grad = (
                torch.zeros_like(parameter) if gradient is None and self.steps_without_gradient else gradient
            )
        if self.ranks is not None:
            self.ranks.add_penalty()
        optimizer.step()
        if self.ranks is not None:
            self.ranks.after_step(request.step, request.total_steps)
        optimizer.zero_grad(set_to_none=True)
        with self._lock:
            self.steps_taken += 1


def squared_norm(gradients: Iterable[Tensor]) -> float:
    """Return the square of the norm of gradients taken together, summed in float32 tensor by tensor."""
    return sum(float(gradient.detach().float().square().sum()) for gradient in gradients)


def _scaled(gradients: Gradients, factor: float) -> Gradients:
    return gradients if factor == 1.0 else {name: gradient * factor for name, gradient in gradients.items()}


class _SharedOptimizer(Update):
    """One optimiser over one set of parameters."""

    def __init__(self, module: nn.Module, optimizer: OptimizerSettings) -> None:
        super().__init__(module, optimizer)
        self._optimizer = optimizer.build(list(self.parameters.values()))

    def state(self, *, copied: bool = True) -> dict[str, object]:
        optimizer = self._optimizer.state_dict()
        state: dict[str, object] = {
            "optimizer": copy.deepcopy(optimizer) if copied else optimizer,
            "steps": self.steps_taken,
        }
        return state if self.ranks is None else {**state, "ranks": self.ranks.state()}

    def load_state(self, state: Mapping[str, object], *, copied: bool = True) -> None:
        optimizer: dict[str, Any] = state["optimizer"]  # type: ignore[assignment]
        self._optimizer.load_state_dict(copy.deepcopy(optimizer) if copied else optimizer)
        self.steps_taken = int(state["steps"])  # type: ignore[call-overload]
        if self.ranks is not None:
            self.ranks.load_state(state["ranks"])  # type: ignore[arg-type]

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [self._optimizer]


class SynchronousUpdate(_SharedOptimizer):
    """One step when every party has stepped, on the mean over all their rows: centralised training on the joined batch.

    Each party's gradient is of the mean loss over its own rows; party p of n_p rows weighs n_p / sum(n).  Sums are
    taken in the order of the parties' names.  With one party nothing is multiplied, and the step is bit-equal to the
    unsplit model's.
    """

    def begin(self, parties: Sequence[str], deadline_s: float) -> None:
        self._gradients.clear()
        self._deferred.clear()
        self._barrier = Barrier(parties, deadline_s)
        self._requests: dict[str, StepRequest] = {}
        self._asked: dict[str, NormRequest] = {}
        self._factor = 1.0

    def norm(self, party: str, request: NormRequest) -> float:
        with self._lock:
            self._asked[party] = request
        self._barrier.arrive(party, self._norm_all)
        return self._keep_norm(party, self._joint_norm)

    def _norm_all(self, arrived: list[str]) -> None:
        """Work out the norm of the mean gradient over all rows.

        Of heads and tails only the norms are known here: the mean of their squares is exact where the parties have
        averaged their gradients (`averaging="step"`), and else what the square of the mean's norm is at most.
        """
        with self._lock:
            asked = {party: self._asked[party] for party in arrived}
        all_rows = sum(request.rows for request in asked.values())
        outside = sum(request.squared * request.rows / all_rows for request in asked.values())
        own = self._mean({party: request.rows / all_rows for party, request in asked.items()})
        self._joint_norm = math.sqrt(squared_norm(own.values()) + outside)
        self._factor = self.settings.clip_factor(self._joint_norm)

    def step(self, party: str, request: StepRequest) -> None:
        with self._lock:
            self._requests[party] = request
        self._barrier.arrive(party, self._step_all)

    def leave(self, party: str, *, lost: bool) -> None:
        self._barrier.leave(party)
        self._take(party)

    def _step_all(self, arrived: list[str]) -> None:
        with self._lock:
            requests = {party: self._requests[party] for party in arrived}
            self._norms.clear()
        all_rows = sum(r.rows for r in requests.values())
        total = self._mean({party: request.rows / all_rows for party, request in requests.items()})
        for party in requests:
            self._take(party)
        longest = max(requests.values(), key=lambda r: r.total_steps)
        self._apply(self._optimizer, self.parameters, _scaled(total, self._factor), longest, requests)
        self.last_step.update(dict.fromkeys(requests, (self.steps_taken, tuple(requests))))

    def _mean(self, weights: Mapping[str, float]) -> Gradients:
        """Return the weighted sum of the gradients that wait for parties' steps, in the order of the parties."""
        total: Gradients = {}
        ours: set[str] = set()  # what of the sum may be changed in place, for memory's sake
        for party, weight in weights.items():
            for portion, is_ours in self._portions(party):
                self._note_gradients(total, portion)
                for name in list(portion):
                    gradient = portion.pop(name)
                    fresh = is_ours or weight != 1.0
                    share = gradient if weight == 1.0 else gradient.mul_(weight) if is_ours else gradient * weight
                    if name in ours:
                        total[name].add_(share)
                        continue
                    if name in total or fresh:
                        ours.add(name)
                    total[name] = total[name] + share if name in total else share
        return total


class SequentialUpdate(_SharedOptimizer):
    """A step per party's batch; a party has the body to itself from its forward pass to its step."""

    def begin(self, parties: Sequence[str], deadline_s: float) -> None:
        self._gradients.clear()
        self._turns = Turns(parties, deadline_s)

    def before_forward(self, party: str) -> None:
        self._turns.take(party)

    def step(self, party: str, request: StepRequest) -> None:
        self._turns.take(party)
        self._apply(self._optimizer, self.parameters, self._take_clipped(party), request, {party: request})
        self.last_step[party] = (self.steps_taken, (party,))
        self._turns.give(party)

    def leave(self, party: str, *, lost: bool) -> None:
        self._take(party)
        self._turns.leave(party)


class ReplicatedUpdate(Update):
    """Each party trains a copy of the trained parameters; at the end of the round the copies are averaged by rows."""

    def __init__(self, module: nn.Module, optimizer: OptimizerSettings) -> None:
        super().__init__(module, optimizer)
        if self.ranks is not None:
            raise ConfigurationError(
                "body_mode is 'replicated' and the LoRA method 'adalora': each copy would choose other ranks, and they "
                "could not be averaged. Use 'lora' or 'dora', or another body_mode."
            )
        self._replicas: dict[str, dict[str, nn.Parameter]] = {}
        self._own_optimizers: dict[str, torch.optim.Optimizer] = {}
        self._rows: dict[str, int] = {}
        self._lost: set[str] = set()

    def begin(self, parties: Sequence[str], deadline_s: float) -> None:
        self._gradients.clear()
        self._rows = {}
        self._lost = set()
        for party in parties:
            if party not in self._replicas:
                self._add(party)
            with torch.no_grad():
                for name, parameter in self._replicas[party].items():
                    parameter.copy_(self.parameters[name])

    def parameters_of(self, party: str) -> dict[str, nn.Parameter]:
        return self._replicas.get(party, self.parameters)

    def step(self, party: str, request: StepRequest) -> None:
        optimizer, replica = self._own_optimizers[party], self._replicas[party]
        self._apply(optimizer, replica, self._take_clipped(party), request, {party: request})
        with self._lock:
            if party in self._lost:
                raise PartyLostError(party, "it left this round during its step")
            self._rows[party] = self._rows.get(party, 0) + request.rows

    def leave(self, party: str, *, lost: bool) -> None:
        self._take(party)
        if lost:  # its head and tail are lost as well, so its copy of the body would fit nothing
            with self._lock:
                self._lost.add(party)
                self._rows.pop(party, None)

    def end(self) -> None:
        all_rows = sum(self._rows.values())
        if not all_rows:
            return
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                mean = torch.zeros_like(parameter)
                for party, rows in sorted(self._rows.items()):
                    mean += self._replicas[party][name] * (rows / all_rows)
                parameter.copy_(mean)
        self._rows = {}

    def state(self, *, copied: bool = True) -> dict[str, object]:
        own = {party: optimizer.state_dict() for party, optimizer in self._own_optimizers.items()}
        return {"optimizers": copy.deepcopy(own) if copied else own, "steps": self.steps_taken}

    def load_state(self, state: Mapping[str, object], *, copied: bool = True) -> None:
        self.steps_taken = int(state["steps"])  # type: ignore[call-overload]
        for party, own in state["optimizers"].items():  # type: ignore[attr-defined]
            self._add(party)
            self._own_optimizers[party].load_state_dict(copy.deepcopy(own) if copied else own)

    def copies_bytes(self) -> int:
        return sum(tensor_bytes(replica.values()) for replica in self._replicas.values())

    def _add(self, party: str) -> None:
        replica = {name: nn.Parameter(p.detach().clone()) for name, p in self.parameters.items()}
        self._replicas[party] = replica
        self._own_optimizers[party] = self.settings.build(list(replica.values()))

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return list(self._own_optimizers.values())


UPDATES: dict[BodyMode, type[Update]] = {
    BodyMode.SYNCHRONOUS: SynchronousUpdate,
    BodyMode.SEQUENTIAL: SequentialUpdate,
    BodyMode.REPLICATED: ReplicatedUpdate,
}
