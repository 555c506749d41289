"""The model party's end of a cut: answers forward, backward and step calls on its segment, for many data parties.

B batch, T tokens, D hidden.  Each differentiable forward call keeps its graph until its backward call, its party's
step, or its party's leaving.  Knows nothing of streams: it is a `Handler`, at the hub or at a node of its own.
Invariant: what a party gets back does not depend on what other parties do between its steps.
"""

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vflair_flower.errors import PartyLostError, SessionError
from vflair_flower.memory import ActivationMeter, MemoryParts, tensor_bytes
from vflair_flower.partition import LoadedSegment, SegmentRunner, load_trained_state, make_trainable, trained_state
from vflair_flower.remote import protocol
from vflair_flower.remote.updates import UPDATES, BodyMode, StepRequest
from vflair_flower.session import Reply, Request
from vflair_flower.spec import WIRE_DTYPES, SplitSpec


@dataclass
class _Graph:
    hidden_BTD: Tensor
    output: Tensor
    parameters: dict[str, nn.Parameter]


@dataclass(frozen=True, kw_only=True)
class ServedCounts:
    """What a segment server has done in its newest session."""

    steps: int
    tokens: int


class SegmentServer:
    """Holds a segment for a whole job and serves it in sessions, one after another.

    Parameters
    ----------
    loaded : LoadedSegment
        The model party's segment, as loaded; made trainable here.
    spec : SplitSpec
        The job.
    body_mode : BodyMode
        How several parties' training is combined.
    deadline_s : float
        Longest wait of one party for another, in seconds.
    """

    def __init__(self, loaded: LoadedSegment, spec: SplitSpec, *, body_mode: BodyMode, deadline_s: float) -> None:
        self.spec = spec
        self.segment = loaded.segment
        self.module = make_trainable(loaded, spec.tuning, spec.task, seed=spec.seed)
        self._model = loaded.model
        self._run = SegmentRunner(loaded.model, loaded.segment)
        self._update = UPDATES[body_mode](self.module, spec.optimizer)
        self._places = _places(self.module, self._update.parameters)
        self._meter = ActivationMeter(self.module)
        self._wire = WIRE_DTYPES[spec.wire_dtype]
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._graphs: dict[tuple[str, int], _Graph] = {}
        self._open: set[str] = set()
        self._training = False
        self._round = 0
        self._tokens = 0
        self._first_step = 0
        self._gradient_bytes = 0

    def begin(self, parties: Sequence[str], *, server_round: int, training: bool) -> None:
        """Start serving a session of these parties."""
        self.module.train(training)
        with self._lock:
            self._graphs.clear()
            self._open = set(parties)
        self._round = server_round
        self._tokens = 0
        self._first_step = self._update.steps_taken
        self._training = training
        if training:
            self._update.begin(parties, self._deadline_s)

    def end(self) -> None:
        """Stop serving; takes out whoever has not finished and, where copies were trained, averages them."""
        for party in sorted(self._open):
            self.leave(party, lost=True)
        if self._training:
            self._update.end()
        self._place(self._update.parameters)

    def leave(self, party: str, *, lost: bool) -> None:
        """Let a party go, so that nobody waits for it; a party that has left before is ignored."""
        with self._lock:
            if party not in self._open:
                return
            self._open.discard(party)
        self._drop_graphs(party)
        if self._training:
            self._update.leave(party, lost=lost)

    def __call__(self, request: Request) -> Reply:
        """Answer one call (`vflair_flower.remote.protocol`)."""
        if request.operation == protocol.FORWARD:
            return self._forward(request)
        if request.operation == protocol.BACKWARD:
            return self._backward(request)
        if request.operation == protocol.STEP:
            return self._step(request)
        if request.operation == protocol.FINISH:
            self.leave(request.source, lost=False)
            return Reply({})
        raise SessionError(f"the operation {request.operation!r} is unknown to the model party's segment.")

    def counts(self) -> ServedCounts:
        """Return steps taken and tokens served since `begin`."""
        return ServedCounts(steps=self._update.steps_taken - self._first_step, tokens=self._tokens)

    def memory(self) -> MemoryParts:
        """Return the peak memory of the segment, by part; parties' own copies of parameters count as parameters."""
        return MemoryParts(
            parameters=tensor_bytes(self.module.parameters()) + self._update.copies_bytes(),
            gradients=self._gradient_bytes,
            optimizer=self._update.optimizer_bytes(),
            activations=self._meter.peak_bytes,
        )

    def trained_state(self) -> dict[str, Tensor]:
        """Return what is trained here, by global name."""
        return trained_state(self.module)

    def state(self) -> dict[str, object]:
        """Return all that a checkpoint needs; readable by ``torch.load(weights_only=True)``."""
        return {"trained": self.trained_state(), "update": self._update.state()}

    def load_state(self, state: Mapping[str, object]) -> None:
        """Put back what `state` returned."""
        load_trained_state(self.module, state["trained"])  # type: ignore[arg-type]
        self._update.load_state(state["update"])  # type: ignore[arg-type]

    def _forward(self, request: Request) -> Reply:
        hidden_BTD = request.tensors["hidden"].to(torch.float32)
        mask_BT = request.tensors["attention_mask"]
        positions_BT = request.tensors.get("position_ids")
        if mask_BT.shape != hidden_BTD.shape[:2] or (positions_BT is not None and positions_BT.shape != mask_BT.shape):
            raise SessionError(
                f"'{request.source}' sent a hidden state of shape {tuple(hidden_BTD.shape)} with a mask of shape "
                f"{tuple(mask_BT.shape)}; mask and position ids need one value per token."
            )
        keep = bool(request.meta["keep"])
        if keep and not self._training:
            raise SessionError(
                f"'{request.source}' asked for a differentiable forward pass in a session that does not train. "
                "Evaluate under torch.no_grad()."
            )
        with self._lock:
            self._tokens += int(mask_BT.sum())
        parameters = self._update.parameters
        if self._training:
            self._refuse_if_left(request.source)
            self._update.before_forward(request.source)
            parameters = self._update.parameters_of(request.source)
        if not keep:
            with torch.no_grad():
                output = self._run(hidden_BTD, mask_BT, positions_BT, within=self._without_dropout(parameters))
            return Reply({self._answer: output.to(self._wire)})
        key = (request.source, int(request.meta["call"]))
        hidden_BTD.requires_grad_()
        with torch.enable_grad():
            output = self._run(
                hidden_BTD, mask_BT, positions_BT, within=self._as_party(key, parameters, hidden_BTD.shape)
            )
        with self._lock:
            if request.source in self._open:
                self._graphs[key] = _Graph(hidden_BTD, output, parameters)
            else:
                self._meter.release(key)
        return Reply({self._answer: output.detach().to(self._wire)})

    def _backward(self, request: Request) -> Reply:
        key = (request.source, int(request.meta["call"]))
        with self._lock:
            graph = self._graphs.pop(key, None)
        if graph is None:
            raise SessionError(
                f"'{request.source}' sent the gradient of call {key[1]}, which is not open: it was never made, was "
                "differentiated before, or its step has been taken. Run backward once per forward, before the step."
            )
        wants_grad = bool(request.meta["wants_grad"])
        inputs = list(graph.parameters.values()) + ([graph.hidden_BTD] if wants_grad else [])
        outputs_grad = request.tensors["grad"].to(graph.output.dtype)
        gradients = torch.autograd.grad(graph.output, inputs, outputs_grad, allow_unused=True)
        self._meter.release(key)
        own = {n: g for n, g in zip(graph.parameters, gradients, strict=False) if g is not None}
        self._update.add_gradients(request.source, own)
        held_bytes = self._update.gradient_bytes()
        with self._lock:
            self._gradient_bytes = max(self._gradient_bytes, held_bytes)
        hidden_grad = gradients[-1] if wants_grad else None
        return Reply({} if hidden_grad is None else {"grad": hidden_grad.to(self._wire)})

    def _step(self, request: Request) -> Reply:
        if not self._training:
            raise SessionError(f"'{request.source}' asked for a step in a session that does not train.")
        self._refuse_if_left(request.source)
        rows = int(request.meta["rows"])
        if rows < 1 or not self._update.has_gradients(request.source):
            raise SessionError(
                f"'{request.source}' asked for a step over {rows} rows, and "
                f"{'some' if self._update.has_gradients(request.source) else 'no'} gradient has come from it since its "
                "last one; the step would count for nothing. Run the forward and backward pass of a batch before it."
            )
        self._drop_graphs(request.source)
        self._update.step(
            request.source,
            StepRequest(
                rows=rows,
                step=int(request.meta["step"]),
                total_steps=int(request.meta["total_steps"]),
            ),
        )
        return Reply({})

    def _refuse_if_left(self, party: str) -> None:
        with self._lock:
            if party not in self._open:
                raise PartyLostError(party, "it has left this round, or was never in it, and may not train any more")

    @property
    def _answer(self) -> str:
        return protocol.returned_name(self.spec.plan.mode)

    def _drop_graphs(self, party: str) -> None:
        with self._lock:
            for key in [key for key in self._graphs if key[0] == party]:
                del self._graphs[key]
                self._meter.release(key)

    @contextmanager
    def _as_party(
        self, key: tuple[str, int], parameters: Mapping[str, nn.Parameter], shape: Sequence[int]
    ) -> Iterator[None]:
        """Run a forward pass on a party's parameters, with dropout that depends on party, round and call alone."""
        text = f"{self.spec.seed}|{self._round}|{key[0]}|{key[1]}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
        self._place(parameters)
        with torch.random.fork_rng(), self._meter.measure(shape, key):
            torch.manual_seed(seed)
            yield

    @contextmanager
    def _without_dropout(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Run a forward pass that nobody will differentiate: an evaluation, also in a session that trains."""
        self._place(parameters)
        self.module.eval()
        try:
            yield
        finally:
            self.module.train(self._training)

    def _place(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, places in self._places.items():
            for owner, leaf in places:
                setattr(owner, leaf, parameters[name])


def _places(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Where each trained parameter hangs; one that is tied hangs in several places."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in parameters}
    for path, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in names:
            owner, _, leaf = path.rpartition(".")
            found[names[id(parameter)]].append((module.get_submodule(owner), leaf))
    return found


def parameter_counts(module: nn.Module) -> tuple[int, int]:
    """Return how many parameters a module holds, and how many of them are trained."""
    own = {id(p): p for p in module.parameters()}.values()
    held = sum(p.numel() for p in own)
    return held, sum(p.numel() for p in own if p.requires_grad)


__all__ = ["SegmentServer", "ServedCounts", "parameter_counts"]
