"""The model party's end of a cut: answers forward, backward and step calls on its segment, for many data parties.

B batch, T tokens, S tokens that an encoder has read, D hidden.  Each differentiable forward call keeps its graph until
its backward call, its party's step, or its party's leaving.  Knows nothing of streams: it is a `Handler`, at the hub or
at a node of its own.
Invariant: what a party gets back does not depend on what other parties do between its steps.
"""

import hashlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vflair_flower.errors import PartyLostError, SessionError
from vflair_flower.memory import ActivationMeter, MemoryParts, tensor_bytes
from vflair_flower.partition import (
    LoadedSegment,
    SegmentRunner,
    checkpoint_blocks,
    load_trained_state,
    make_trainable,
    trained_state,
)
from vflair_flower.partition.holes import EncoderStates
from vflair_flower.partition.structure import Part, segments_of
from vflair_flower.remote import protocol
from vflair_flower.remote.caches import PartyCaches
from vflair_flower.remote.private import PrivateServing
from vflair_flower.remote.refusals import not_open, not_training
from vflair_flower.remote.updates import UPDATES, BodyMode, NormRequest, StepRequest
from vflair_flower.session import HubSession, Reply, Request
from vflair_flower.spec import WIRE_DTYPES, SplitSpec


@dataclass
class _Graph:
    hidden_BTD: Tensor
    output: Tensor
    parameters: dict[str, nn.Parameter]
    encoder_BSD: Tensor | None = None
    taken: object = None
    """Under DP-SGD, what is taken of the rows' gradients."""


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
        self.module = make_trainable(loaded, spec.tuning, spec.task, seed=spec.seed, scope=spec.scope)
        self._model = loaded.model
        if spec.training.gradient_checkpointing:
            checkpoint_blocks(loaded)
        self._run = SegmentRunner(loaded.model, loaded.segment)
        self._update = UPDATES[body_mode](self.module, spec.optimizer)
        self._places = _places(self.module, self._update.parameters)
        self._meter = ActivationMeter(self.module)
        self._wire = WIRE_DTYPES[spec.wire_dtype]
        self._dtype = spec.weights.torch_dtype
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._graphs: dict[tuple[str, int], _Graph] = {}
        writing = list(segments_of(loaded.model.config, loaded.segment).values())[-1]
        self._caches = PartyCaches(loaded.model.config, writing.blocks, spec.generation, deadline_s)
        self._open: set[str] = set()
        self._training = False
        self._round = 0
        self._tokens = 0
        self._first_step = 0
        self._gradient_bytes = 0
        self._private = PrivateServing.of(self.module, self._update, loaded, spec)

    def begin(self, parties: Sequence[str], *, server_round: int, training: bool) -> None:
        """Start serving a session of these parties."""
        self.module.train(training)
        with self._lock:
            self._graphs.clear()
            self._caches.clear()
            self._open = set(parties)
        self._round = server_round
        self._tokens = 0
        self._first_step = self._update.steps_taken
        self._training = training
        if training:
            self._update.begin(parties, self._deadline_s)
            if self._private is not None:
                self._place(self._update.parameters)
                self._private.begin(self._run, server_round=server_round)

    def opened(self, session: HubSession, parties: Sequence[str]) -> None:
        """Know the session that serves it at the hub, before anybody calls; most bodies call nobody."""

    def end(self) -> None:
        """Stop serving; takes out whoever has not finished and, where copies were trained, averages them."""
        for party in sorted(self._open):
            self.leave(party, lost=True)
        if self._training:
            self._update.end()
        self._place(self._update.parameters)

    def join(self, party: str) -> None:
        """Let a party into a session that does not train; one that left may come back, and begins with nothing."""
        assert not self._training
        with self._lock:
            self._open.add(party)

    def leave(self, party: str, *, lost: bool) -> None:
        """Let a party go, so that nobody waits for it; a party that has left before is ignored."""
        with self._lock:
            if party not in self._open:
                return
            self._open.discard(party)
        self._drop_graphs(party)
        self._caches.leave(party)
        if self._training:
            self._update.leave(party, lost=lost)

    def __call__(self, request: Request) -> Reply:
        """Answer one call (`vflair_flower.remote.protocol`)."""
        if request.operation == protocol.FORWARD:
            return self._forward(request)
        if request.operation == protocol.BACKWARD:
            return self._backward(request)
        if request.operation == protocol.NORM:
            return self._norm(request)
        if request.operation == protocol.STEP:
            return self._step(request)
        if request.operation == protocol.FINISH:
            self.leave(request.source, lost=False)
            return Reply({})
        raise SessionError(f"the operation {request.operation!r} is unknown to the model party's segment.")

    def pending_gradients(self, party: str) -> dict[str, Tensor]:
        """Return what the party's next step will be taken with, by name."""
        return self._update.pending(party)

    def drop_gradients(self, party: str) -> None:
        """Forget what the party has sent since its last step."""
        self._update.drop(party)

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
        private = {} if self._private is None else {"privacy": self._private.noise.state()}
        return {"trained": self.trained_state(), "update": self._update.state(), **private}

    def privacy(self) -> dict[str, float]:
        """Return what this segment's training has cost under DP-SGD, for a report; else nothing."""
        return {} if self._private is None else self._private.noise.summary()

    def load_state(self, state: Mapping[str, object]) -> None:
        """Put back what `state` returned."""
        if self._private is not None:
            self._private.noise.load_state(state.get("privacy"))  # type: ignore[arg-type]
        load_trained_state(self.module, state["trained"])  # type: ignore[arg-type]
        self._update.load_state(state["update"])  # type: ignore[arg-type]

    def _forward(self, request: Request) -> Reply:
        hidden_BTD = request.tensors["hidden"].to(self._dtype)
        if "cache" in request.meta:
            return self._write(request, hidden_BTD)
        mask_BT = request.tensors.get("attention_mask")
        if mask_BT is None:
            raise SessionError(f"'{request.source}' sent a hidden state without a mask, which only a cache may.")
        positions_BT = _positions(request, hidden_BTD, mask_BT)
        keep = bool(request.meta["keep"])
        if keep and not self._training:
            raise not_training(request.source)
        part, encoder = self._part(request), _encoder_states(request, self._dtype)
        with self._lock:
            self._tokens += int(mask_BT.sum())
        parameters = self._update.parameters
        if self._training:
            self._refuse_if_left(request.source)
            self._update.before_forward(request.source)
            parameters = self._update.parameters_of(request.source)
        if not keep:
            with torch.no_grad():
                output = self._run(
                    hidden_BTD,
                    mask_BT,
                    positions_BT,
                    part=part,
                    encoder=encoder,
                    within=self._without_dropout(parameters),
                )
            return Reply({self._answer: output.to(self._wire)})
        key = (request.source, int(request.meta["call"]))
        hidden_BTD.requires_grad_()
        encoder_BSD = None if encoder is None else encoder.hidden_BSD.requires_grad_()
        shape = (*hidden_BTD.shape, *(() if encoder_BSD is None else encoder_BSD.shape))
        taken: list[object] = []
        with torch.enable_grad():
            output = self._run(
                hidden_BTD,
                mask_BT,
                positions_BT,
                part=part,
                encoder=encoder,
                within=self._as_party(key, parameters, shape, taken),
            )
        with self._lock:
            if request.source in self._open:
                self._graphs[key] = _Graph(hidden_BTD, output, parameters, encoder_BSD, next(iter(taken), None))
            else:
                self._meter.release(key)
        return Reply({self._answer: output.detach().to(self._wire)})

    def _write(self, request: Request, hidden_BTD: Tensor) -> Reply:
        """Answer a forward call with a cache: the new tokens of texts that are being written."""
        party, new = request.source, request.tensors.get("attention_mask", torch.ones(hidden_BTD.shape[:2]))
        positions_BT = _positions(request, hidden_BTD, new)
        unmasked = bool(request.meta.get("unmasked"))
        with self._lock:
            if party not in self._open:
                raise PartyLostError(party, "it has left this session and may not generate any more")
            self._tokens += int(new.sum())
        self._caches.finish(party, [int(n) for n in str(request.meta.get("finished", "")).split(",") if n])
        parameters = self._update.parameters_of(party) if self._training else self._update.parameters
        number = int(request.meta["cache"])
        try:
            cache = self._caches.get(party, number, tokens=int(request.meta["cached"]))
            taken_back = request.meta.get("taken_back")
            cache.follow(
                rows_B=request.tensors.get("cache_rows"),
                taken_back=None if taken_back is None else int(taken_back),
                records_past=bool(request.meta.get("records_past", False)),
            )
            mask_BT = cache.grown(new, tokens=int(request.meta["cached"]), max_length=self.spec.generation.max_length)
            if request.meta.get("counted"):
                positions_BT = protocol.counted_positions(mask_BT)[:, -new.shape[1] :]
            encoder = cache.encoder_states(hidden_BTD.shape[-1]) or _encoder_states(request, self._dtype)
            if encoder is not None:
                cache.encoder_mask_BS = encoder.mask_BS
            with torch.no_grad():
                output = self._run(
                    hidden_BTD,
                    None if unmasked else mask_BT,
                    positions_BT,
                    part=self._part(request),
                    encoder=encoder,
                    cache=cache.states,
                    logits_to_keep=int(request.meta.get("logits_to_keep", 0)),
                    within=self._without_dropout(parameters),
                )
            cache.mask_BT = mask_BT
        except Exception:
            self._caches.finish(party, [number])  # half of its layers may have changed
            raise
        with self._lock:
            left = party not in self._open
        if left:  # while the call ran
            self._caches.leave(party)
        return Reply({self._answer: output.to(self._wire)})

    def _backward(self, request: Request) -> Reply:
        key = (request.source, int(request.meta["call"]))
        with self._lock:
            graph = self._graphs.pop(key, None)
        if graph is None:
            raise not_open(*key)
        wants_grad = bool(request.meta["wants_grad"])
        wanted = {"grad": graph.hidden_BTD} if wants_grad else {}
        if graph.encoder_BSD is not None and request.meta.get("wants_encoder_grad"):
            wanted["encoder_grad"] = graph.encoder_BSD
        inputs = [*graph.parameters.values(), *wanted.values()]
        outputs, grads = [graph.output], [_like(graph.output, request.tensors.get("grad"), request.source)]
        if graph.encoder_BSD is not None and "encoder_grad" in request.tensors:
            # Autograd runs the newest node first: what the blocks behind the hole made of the encoder's states is where
            # the sum over this segment's blocks begins, as in the whole model.
            with torch.enable_grad():
                outputs.append(graph.encoder_BSD.view_as(graph.encoder_BSD))
            grads.append(_like(graph.encoder_BSD, request.tensors["encoder_grad"], request.source))
        with self._recomputing(graph.parameters):
            if self._private is None:
                gradients = torch.autograd.grad(outputs, inputs, grads, allow_unused=True) if inputs else ()
                own = {n: g for n, g in zip(graph.parameters, gradients, strict=False) if g is not None}
            else:
                gradients, own = self._private.backward(outputs, inputs, grads, graph.parameters, graph.taken)
        self._meter.release(key)
        self._update.add_gradients(request.source, own)
        held_bytes = self._update.gradient_bytes()
        with self._lock:
            self._gradient_bytes = max(self._gradient_bytes, held_bytes)
        back = dict(zip(wanted, gradients[len(graph.parameters) :], strict=True))
        return Reply({name: grad.to(self._wire) for name, grad in back.items() if grad is not None})

    def _norm(self, request: Request) -> Reply:
        """Answer with the norm of the whole model's gradient, by which the party and this segment will both clip."""
        self._refuse_unless_training(request)
        squared, rows = float(request.meta["squared"]), int(request.meta["rows"])
        if not 0.0 <= squared < math.inf or rows < 1:
            raise SessionError(
                f"'{request.source}' sent {squared} as the square of its gradient's norm over {rows} rows; it must be "
                "a finite number over at least one row. Lower the learning rate if the loss has left all bounds."
            )
        return Reply({}, {"norm": self._update.norm(request.source, NormRequest(squared=squared, rows=rows))})

    def _refuse_unless_training(self, request: Request) -> None:
        if not self._training:
            raise SessionError(f"'{request.source}' asked for a {request.operation} in a session that does not train.")
        self._refuse_if_left(request.source)

    def _step(self, request: Request) -> Reply:
        self._refuse_unless_training(request)
        if self.spec.optimizer.max_grad_norm and not self._update.has_norm(request.source):
            raise SessionError(
                f"'{request.source}' asked for a step without the norm of its gradient, and max_grad_norm is "
                f"{self.spec.optimizer.max_grad_norm}. Call PartySession.before_step (attach does) before each step."
            )
        asked = StepRequest.read(request.meta)
        empty = False
        if self._private is not None:
            self._private.check(request.source, asked)
            empty = bool(request.meta.get("empty", False)) and bool(self._update.parameters)
        wants = bool(self._update.parameters) and not self._update.has_gradients(request.source)
        if asked.rows < 1 or wants is not empty:
            raise SessionError(
                f"'{request.source}' asked for a step over {asked.rows} rows, and "
                f"{'some' if self._update.has_gradients(request.source) else 'no'} gradient has come from it since its "
                "last one; the step would count for nothing. Run the forward and backward pass of a batch before it."
            )
        self._drop_graphs(request.source)
        self._update.step(request.source, asked)
        return Reply({}, {} if self._private is None else {"noise": self._private.noise.used(request.source)})

    def _refuse_if_left(self, party: str) -> None:
        with self._lock:
            if party not in self._open:
                raise PartyLostError(party, "it has left this round, or was never in it, and may not train any more")

    def _part(self, request: Request) -> Part:
        """Return which stack a forward call is for."""
        name = request.meta.get("part", Part.ONLY.value)
        try:
            return Part(str(name))
        except ValueError:
            raise SessionError(f"'{request.source}' names the part {str(name)[:80]!r}, which no model has.") from None

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
        self, key: tuple[str, int], parameters: Mapping[str, nn.Parameter], shape: Sequence[int], taken: list[object]
    ) -> Iterator[None]:
        """Run a forward pass on a party's parameters, with dropout that depends on party, round and call alone."""
        text = f"{self.spec.seed}|{self._round}|{key[0]}|{key[1]}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
        self._place(parameters)
        with torch.random.fork_rng(), self._meter.measure(shape, key):
            torch.manual_seed(seed)
            if self._private is None:
                yield
                return
            with self._private.capturing(shape[0], taken):
                yield

    @contextmanager
    def _recomputing(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Let a backward pass compute blocks anew, on the parameters of its forward pass, while no other pass runs.

        bitsandbytes' matrices of 8 bits keep what a pass is at in the module, as do the hooks of DP-SGD: there, too,
        one runs at a time.
        """
        recomputes = self.spec.training.gradient_checkpointing or self.spec.weights.quantization == "int8"
        if not recomputes and self._private is None:
            yield
            return
        with self._run.alone():
            self._place(parameters)
            self.module.train(self._training)
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


def _positions(request: Request, hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor | None:
    """Return a call's position ids, if it has some; raise SessionError if they or the mask do not fit its tokens."""
    positions_BT = request.tensors.get("position_ids")
    if mask_BT.shape != hidden_BTD.shape[:2] or (positions_BT is not None and positions_BT.shape != mask_BT.shape):
        raise SessionError(
            f"'{request.source}' sent a hidden state of shape {tuple(hidden_BTD.shape)} with a mask of shape "
            f"{tuple(mask_BT.shape)}; mask and position ids need one value per token."
        )
    return positions_BT


def _encoder_states(request: Request, dtype: torch.dtype) -> EncoderStates | None:
    """Return the encoder's states of a decoder's call, if it brings them."""
    hidden_BSD, mask_BS = (request.tensors.get(name) for name in ("encoder_hidden", "encoder_mask"))
    if hidden_BSD is None and mask_BS is None:
        return None
    rows = request.tensors["hidden"].shape[0]
    if hidden_BSD is None or mask_BS is None or mask_BS.shape != hidden_BSD.shape[:2] or len(mask_BS) != rows:
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (hidden_BSD, mask_BS)]
        raise SessionError(
            f"'{request.source}' sent encoder states of shape {shapes[0]} with a mask of shape {shapes[1]} for {rows} "
            "rows of the decoder; both must come together, with one mask value per token."
        )
    return EncoderStates(hidden_BSD=hidden_BSD.to(dtype), mask_BS=mask_BS.to(torch.int64))


def _like(tensor: Tensor, grad: Tensor | None, party: str) -> Tensor:
    """Return a gradient that came for `tensor`; raise SessionError if it does not fit."""
    if grad is None or grad.shape != tensor.shape:
        raise SessionError(
            f"'{party}' sent a gradient of shape {None if grad is None else tuple(grad.shape)} for a tensor of shape "
            f"{tuple(tensor.shape)}; send the gradient of what the forward call returned."
        )
    return grad.to(tensor.dtype)


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
    """Return how many parameters a module holds, and how many of them are trained; two of 4 bits share a byte."""
    own = {id(p): p for p in module.parameters()}.values()
    packed = {id(p): math.prod(state.shape) for p in own if (state := getattr(p, "quant_state", None)) is not None}
    held = sum(packed.get(id(p), p.numel()) for p in own)
    return held, sum(p.numel() for p in own if p.requires_grad)


__all__ = ["SegmentServer", "ServedCounts", "parameter_counts"]
