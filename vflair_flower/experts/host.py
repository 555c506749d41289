"""The host's end of remote experts: answers owners' calls on the experts that it holds, and steps them.

U tokens, R rows sorted by expert, D hidden.  Each call is computed by itself, never together with another owner's, so
that nobody's answer depends on what others send meanwhile.
Invariant: a forward call that nobody will differentiate leaves nothing behind.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vflair_flower.errors import DeadlineError, PartyLostError, SessionError
from vflair_flower.experts.adapters import ExpertLora
from vflair_flower.experts.behalf import on_behalf
from vflair_flower.experts.modules import expert_modules, run_experts
from vflair_flower.experts.padding import Room, emptied, filled, opened
from vflair_flower.experts.private import PrivateExperts, check_texts
from vflair_flower.experts.protocol import Codec
from vflair_flower.memory import MemoryParts, count_kept, tensor_bytes
from vflair_flower.remote.protocol import BACKWARD, FINISH, FORWARD, STEP
from vflair_flower.remote.refusals import not_open, not_training
from vflair_flower.remote.updates import UPDATES, BodyMode, Gradients, StepRequest
from vflair_flower.session import Reply, Request
from vflair_flower.spec import SplitSpec

_MODES = {"concurrent": BodyMode.SYNCHRONOUS, "round-robin": BodyMode.SEQUENTIAL}


@dataclass(kw_only=True)
class _Call:
    """What an owner sent, and what was made of it."""

    hidden_UD: Tensor
    row_R: Tensor
    expert_R: Tensor
    weight_R: Tensor | None
    layer: int
    room: Room | None = None
    """To what answers are filled up."""
    entered: Tensor | None = None
    output: Tensor | None = None
    """None, as `entered`, where it is computed again in the backward pass."""
    grad: Tensor | None = None
    """What the owner sent back, [U, D], and its weights, [R], where it combines."""
    back_weight_R: Tensor | None = None
    text_U: Tensor | None = None
    """Under DP-SGD, to which of the owner's rows each token belongs."""
    inside_bytes: int = 0
    """What autograd keeps between `entered` and `output`."""

    @property
    def num_bytes(self) -> int:
        """Bytes kept for the backward pass."""
        held = (self.hidden_UD, self.row_R, self.expert_R, self.weight_R, self.output, self.grad)
        inside = 0 if self.output is None else self.inside_bytes
        return inside + tensor_bytes(tensor for tensor in held if tensor is not None)

    def part(self, own_U: Tensor) -> tuple["_Call", Tensor]:
        """Return the call of some of its tokens alone, in training, and which of its rows that has, [N]."""
        assert self.grad is not None
        place_U = torch.full((len(self.hidden_UD),), -1)
        place_U[own_U] = torch.arange(len(own_U))
        own_N = torch.nonzero(place_U[self.row_R] >= 0).flatten()

        def of_rows(weights: Tensor | None) -> Tensor | None:
            return None if weights is None else weights.detach()[own_N].clone()

        call = _Call(
            hidden_UD=self.hidden_UD[own_U],
            row_R=place_U[self.row_R[own_N]],
            expert_R=self.expert_R[own_N],
            weight_R=of_rows(self.weight_R),
            layer=self.layer,
            grad=self.grad[own_U],
            back_weight_R=of_rows(self.back_weight_R),
        )
        return call, own_N

    def row_grad(self) -> Tensor:
        """Return the gradient of `output`."""
        assert self.grad is not None
        if self.back_weight_R is None:
            return self.grad
        return self.grad[self.row_R] * self.back_weight_R.unsqueeze(-1)


class ExpertHost:
    """Holds some experts of each layer for a whole job and serves them in sessions, one after another.

    Parameters
    ----------
    module : torch.nn.Module
        As `load_experts` returns it, after `tune_experts`.
    names : sequence of str
        The experts modules of the whole model, first layer first.
    experts : sequence of tuple[int, ...]
        Per layer, which experts are here, ascending.
    spec : SplitSpec
        The job.
    deadline_s : float
        Longest wait of one owner for another, in seconds.
    private : PrivateExperts, optional
        Where the job trains by DP-SGD: clips and adds noise.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        experts: Sequence[tuple[int, ...]],
        spec: SplitSpec,
        *,
        deadline_s: float,
        private: PrivateExperts | None = None,
    ) -> None:
        assert spec.experts is not None
        self.spec = spec
        self.module = module
        held = expert_modules(module)
        self._modules = [held.get(name) for name in names]
        self._place_of = [_places(layer) for layer in experts]
        self._update = UPDATES[_MODES[spec.experts.schedule]](module, spec.optimizer)
        # Experts that no token came to have a gradient of zero, as in the whole model: AdamW moves them all the same.
        self._update.steps_without_gradient = True
        self._codec = Codec(spec)
        self._fills = spec.experts.padding != "none"
        self._dtype = spec.weights.torch_dtype
        # LoRA makes new matrices for each call, and autograd would keep a layer's experts once more for each.
        self._adapted = any(isinstance(inner, ExpertLora) for inner in module.modules())
        # Under DP-SGD each row's tokens are run again by themselves.
        self._recompute = spec.training.gradient_checkpointing or self._adapted or private is not None
        self._private = private
        if private is not None:
            self._update.noise = private.noise
        self._deadline_s = deadline_s
        self._changed = threading.Condition()
        self._kept: dict[tuple[str, int], _Call] = {}
        self._deferred: dict[str, list[_Call]] = {}
        self._open: set[str] = set()
        self._owners = 0
        self._training = False
        self._heard = 0.0
        self._peak_kept = 0

    def begin(self, owners: Sequence[str], *, training: bool) -> None:
        """Start serving a session of these owners."""
        self.module.train(training)
        with self._changed:
            self._kept.clear()
            self._deferred.clear()
            self._open = set(owners)
            self._owners = len(self._open)
        self._training = training
        if training:
            self._update.begin(owners, self._deadline_s)

    def __call__(self, request: Request) -> Reply:
        """Answer one call (`vflair_flower.experts.protocol`)."""
        assert self.spec.experts is not None
        request = on_behalf(request, self.spec.experts)
        self._heard = time.monotonic()
        with self._changed:
            if request.source not in self._open:
                raise PartyLostError(request.source, "it has left this session, or was never in it")
        if request.operation == FORWARD:
            return self._forward(request)
        if request.operation == BACKWARD:
            return self._backward(request)
        if request.operation == STEP:
            return self._step(request)
        if request.operation == FINISH:
            self.leave(request.source, lost=False)
            return Reply({})
        raise SessionError(f"the operation {request.operation!r} is unknown to a host of experts.")

    def leave(self, party: str, *, lost: bool) -> None:
        """Let an owner go, so that nobody waits for it; one that has left before is ignored."""
        with self._changed:
            if party not in self._open:
                return
            self._open.discard(party)
            for key in [key for key in self._kept if key[0] == party]:
                del self._kept[key]
            self._deferred.pop(party, None)
            self._changed.notify_all()
        if self._training:
            self._update.leave(party, lost=lost)

    def take_turn(self, owner: str) -> None:
        """Wait until it is an owner's turn to run its model, where they do so one after another (hand-off).

        In training a turn lasts until the owner's step; else until it has finished.

        Raises
        ------
        DeadlineError
            If the turn does not come in time.
        """
        if self._training:
            self._update.before_forward(owner)
        else:
            self.wait_for_owners(self._deadline_s, before=owner)

    def wait_for_owners(self, timeout_s: float, *, before: str | None = None) -> None:
        """Wait until every owner has finished or is lost, as long as others are at work; raises DeadlineError.

        With `before`, owners whose names come after it are not waited for.
        """
        began = time.monotonic()
        with self._changed:
            while any(before is None or owner < before for owner in self._open):
                left_s = max(began, self._heard) + timeout_s - time.monotonic()
                if left_s <= 0.0:
                    raise DeadlineError(
                        f"the owners {', '.join(sorted(self._open))} have not finished, and nobody has called for "
                        f"{timeout_s:g} s. Raise deadline_s if they are merely slow."
                    )
                self._changed.wait(left_s)

    def memory(self) -> MemoryParts:
        """Return the peak memory of the experts, by part."""
        return MemoryParts(
            parameters=tensor_bytes(self.module.parameters()),
            gradients=self._update.peak_gradient_bytes,
            optimizer=self._update.optimizer_bytes(),
            activations=self._peak_kept,
        )

    @property
    def steps_taken(self) -> int:
        """Optimiser steps over the whole job."""
        return self._update.steps_taken

    def trained_state(self) -> dict[str, Tensor]:
        """Return the trained parameters by their names in the whole model; each holds this host's experts alone."""
        return {name: p.detach().cpu().clone() for name, p in self._update.parameters.items()}

    def state(self) -> dict[str, object]:
        """Return all that a checkpoint needs, readable by ``torch.load(weights_only=True)``; the next step changes it.

        A copy would double what a host needs.
        """
        trained = {name: p.detach().cpu() for name, p in self._update.parameters.items()}
        state: dict[str, object] = {"trained": trained, "update": self._update.state(copied=False)}
        return state if self._private is None else {**state, "privacy": self._private.noise.state()}

    def load_state(self, state: Mapping[str, object]) -> None:
        """Put back what `state` returned; the caller gives it away."""
        trained: dict[str, Tensor] = state["trained"]  # type: ignore[assignment]
        with torch.no_grad():
            for name, tensor in trained.items():
                self._update.parameters[name].copy_(tensor)
        self._update.load_state(state["update"], copied=False)  # type: ignore[arg-type]
        if self._private is not None:
            self._private.noise.load_state(state.get("privacy"))  # type: ignore[arg-type]

    def _forward(self, request: Request) -> Reply:
        call = self._read(request)
        keep = bool(request.meta["keep"])
        if keep and not self._training:
            raise not_training(request.source)
        if keep and self._private is not None:
            check_texts(call.text_U, len(call.hidden_UD), source=request.source)
        if keep:
            self._update.before_forward(request.source)
        remember = keep and not self._recompute
        counting = count_kept(self.module.parameters()) if remember else nullcontext(lambda: 0)
        with torch.set_grad_enabled(remember), counting as inside_bytes:
            entered, output = self._run(call)
        if remember:
            call.entered, call.output, call.inside_bytes = entered, output, inside_bytes()
        if keep:
            with self._changed:
                if request.source in self._open:
                    self._kept[request.source, int(request.meta["call"])] = call
                    self._note_kept()
        return Reply(self._filled("output", output, call))

    def _filled(self, name: str, vectors: Tensor, call: _Call) -> dict[str, Tensor]:
        """Pack an answer of one vector for each row, or (where this host combines) for each token."""
        return filled(self._codec.pack(name, vectors), call.room, by_row=call.weight_R is None)

    def _read(self, request: Request) -> _Call:
        tensors, room = opened(request.tensors) if self._fills else (request.tensors, None)
        hidden_UD = self._codec.unpack("hidden", tensors, self._dtype)
        row_R, expert_R = (tensors[name].to(torch.int64) for name in ("row", "expert"))
        weight_R = tensors.get("weight")
        layer = int(request.meta["layer"])
        place_E = self._place_of[layer] if 0 <= layer < len(self._place_of) else _places(())
        place_R = place_E[expert_R.clamp(0, len(place_E) - 1)]
        place_R = torch.where((expert_R >= 0) & (expert_R < len(place_E)), place_R, -1)
        strange = torch.unique(expert_R[place_R < 0]).tolist()
        fits = row_R.shape == expert_R.shape and (weight_R is None or weight_R.shape == row_R.shape)
        fits = fits and not bool(((row_R < 0) | (row_R >= len(hidden_UD))).any())
        if strange or not fits or (len(row_R) == 0 and room is None):
            raise SessionError(
                f"'{request.source}' sent {len(row_R)} rows of {len(hidden_UD)} tokens for the experts "
                f"{strange or torch.unique(expert_R).tolist()} of layer {layer}; this host has "
                f"{torch.nonzero(place_E >= 0).flatten().tolist()} there, and each row needs an expert and one of the "
                "tokens sent."
            )
        if bool((place_R[1:] < place_R[:-1]).any()):
            raise SessionError(f"'{request.source}' sent rows that are not sorted by expert; sort them, stably.")
        if self.spec.experts is not None and (self.spec.experts.combine == "host") is (weight_R is None):
            raise SessionError(
                f"'{request.source}' sent rows {'without' if weight_R is None else 'with'} weights, and the job "
                f"combines at the {self.spec.experts.combine}."
            )
        weights = None if weight_R is None else weight_R.to(self._dtype).clone()
        return _Call(
            hidden_UD=hidden_UD,
            row_R=row_R,
            expert_R=place_R,
            weight_R=weights,
            layer=layer,
            room=room,
            text_U=tensors.get("text"),
        )

    def _run(self, call: _Call) -> tuple[Tensor, Tensor]:
        """Return what the gradient is wanted of, rows or (where this host combines) tokens, and the answer."""
        if len(call.row_R) == 0:
            return call.hidden_UD, call.hidden_UD
        module = self._modules[call.layer]
        assert module is not None
        if call.weight_R is None:
            rows_RD = call.hidden_UD[call.row_R].requires_grad_(torch.is_grad_enabled())
            return rows_RD, run_experts(module, rows_RD, call.expert_R)
        entered_UD = call.hidden_UD.detach().requires_grad_(torch.is_grad_enabled())
        call.weight_R.requires_grad_(torch.is_grad_enabled())
        out_RD = run_experts(module, entered_UD[call.row_R], call.expert_R)
        sums_UD = torch.zeros_like(entered_UD).index_add(0, call.row_R, out_RD * call.weight_R.unsqueeze(-1))
        return entered_UD, sums_UD

    def _backward(self, request: Request) -> Reply:
        key = (request.source, int(request.meta["call"]))
        with self._changed:
            call = self._kept.pop(key, None)
        if call is None:
            raise not_open(*key)
        tensors = request.tensors
        if call.room is not None:
            tensors = emptied(tensors, Room(tokens=len(call.hidden_UD), rows=len(call.row_R)))
        grad = self._codec.unpack("grad", tensors, self._dtype)
        weight_R = tensors.get("weight")
        if len(grad) != len(call.hidden_UD) or (call.weight_R is None) is (weight_R is None):
            raise SessionError(
                f"'{request.source}' sent the gradient of {len(grad)} tokens "
                f"{'without' if weight_R is None else 'with'} weights, and call {key[1]} was of {len(call.hidden_UD)}; "
                "send one per token, and weights where the owner combines."
            )
        if len(call.row_R) == 0:  # all filling: the answer is nothing, filled up
            nothing = {} if call.weight_R is None else {"weight_grad": call.weight_R.detach().float()}
            return Reply({**self._filled("grad", grad, call), **filled(nothing, call.room)})
        call.grad, call.back_weight_R = grad, None if weight_R is None else weight_R.to(self._dtype)
        if self._private is not None:
            return self._backward_privately(request.source, call, self._private)
        with torch.enable_grad():
            if call.output is None:
                call.entered, call.output = self._run(call)
        assert call.entered is not None
        later = self._training_together()
        parameters = {} if later else self._update.parameters
        weights = () if call.weight_R is None else (call.weight_R,)
        wanted = [call.entered, *weights, *parameters.values()]
        keep_graph = later and not self._recompute
        found = torch.autograd.grad(call.output, wanted, call.row_grad(), allow_unused=True, retain_graph=keep_graph)
        if later:
            self._defer(request.source, call)
        else:
            own = dict(zip(parameters, found[1 + len(weights) :], strict=True))
            self._update.add_gradients(request.source, {name: g for name, g in own.items() if g is not None})
        back = self._filled("grad", found[0], call)
        if weights:
            back |= filled({"weight_grad": found[1].float()}, call.room)
        return Reply(back)

    def _backward_privately(self, owner: str, call: _Call, private: PrivateExperts) -> Reply:
        """Differentiate a call row by row of the owner's texts, and keep the clipped sum for the step."""
        assert call.grad is not None
        assert call.text_U is not None
        parameters = self._update.parameters
        by_row = call.weight_R is None
        back_XD = torch.zeros_like(call.grad[call.row_R] if by_row else call.grad)
        weight_grad_R = torch.zeros(len(call.row_R))

        def row_pass(own_U: Tensor) -> Gradients:
            part, own_N = call.part(own_U)
            with torch.enable_grad():
                entered, output = self._run(part)
            weights = () if part.weight_R is None else (part.weight_R,)
            wanted = [entered, *weights, *parameters.values()]
            found = torch.autograd.grad(output, wanted, part.row_grad(), allow_unused=True)
            back_XD[own_N if by_row else own_U] = found[0]
            if weights:
                weight_grad_R[own_N] = found[1].float()
            own = zip(parameters, found[1 + len(weights) :], strict=True)
            return {name: gradient for name, gradient in own if gradient is not None}

        self._update.add_gradients(owner, private.gradients(call.text_U, row_pass))
        back = self._filled("grad", back_XD, call)
        return Reply(back if by_row else back | filled({"weight_grad": weight_grad_R}, call.room))

    def _training_together(self) -> bool:
        """Whether other owners' gradients will be in the same step, and too large to keep one for each."""
        if self._adapted or not self._update.parameters:
            return False
        settings = self.spec.experts
        assert settings is not None
        with self._changed:
            # Copies sum in one order, at whatever moment each of them hears that an owner has gone.
            owners = self._owners if settings.replicas > 1 else len(self._open)
        return settings.schedule == "concurrent" and owners > 1

    def _defer(self, owner: str, call: _Call) -> None:
        """Keep a call until the step, which adds its gradient to the others'.

        A gradient for each owner would need the memory of all experts of the model, whatever share of them is here;
        sums taken as gradients come would depend on who was quicker.
        """
        if self._recompute:
            call.entered = call.output = None
        with self._changed:
            self._deferred.setdefault(owner, []).append(call)
            self._note_kept()
        self._update.defer(owner, lambda: self._gradients_of(call))

    def _gradients_of(self, call: _Call) -> dict[str, Tensor]:
        """Return the gradients of a call that has been deferred, and free what it kept."""
        with torch.enable_grad():
            output = self._run(call)[1] if call.output is None else call.output
        parameters = self._update.parameters
        found = torch.autograd.grad(output, list(parameters.values()), call.row_grad(), allow_unused=True)
        call.entered = call.output = call.grad = None
        return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}

    def _note_kept(self) -> None:
        held = [*self._kept.values(), *(call for calls in self._deferred.values() for call in calls)]
        self._peak_kept = max(self._peak_kept, sum(call.num_bytes for call in held))

    def _step(self, request: Request) -> Reply:
        asked = StepRequest.read(request.meta)
        if not self._training or asked.rows < 1:
            raise SessionError(
                f"'{request.source}' asked for a step over {asked.rows} rows in a session that "
                f"{'trains' if self._training else 'does not train'}. Run a batch before it, in training."
            )
        with self._changed:
            for key in [key for key in self._kept if key[0] == request.source]:
                del self._kept[key]
        if self._private is not None:
            self._private.noise.check(request.source, asked)
        self._update.step(request.source, asked)
        with self._changed:
            self._deferred.pop(request.source, None)
        if self.spec.experts is not None and self.spec.experts.replicas > 1:
            taken, owners = self._update.last_step[request.source]
            return Reply({}, {"steps": taken, "owners": ", ".join(owners)})
        return Reply({}, {} if self._private is None else {"noise": self._private.noise.used(request.source)})


def _places(experts: Sequence[int]) -> Tensor:
    """Return, for each expert's number, its place among some of them, or -1; as long as the highest number needs."""
    place_E = torch.full((max(experts, default=0) + 1,), -1)
    place_E[list(experts)] = torch.arange(len(experts))
    return place_E
