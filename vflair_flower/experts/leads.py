"""A lead's end of hand-off: runs single blocks of its own model for other parties, and calls hosts in their names.

S sequences, T tokens, N = tokens that this party leads, D hidden.  The gradient of an owner's loss by this party's own
model waits here.  It counts once the owner has stepped, and is taken into the next step of this party's own optimiser:
so its model changes at its own steps alone, and each of its passes sees one model.
Invariants: what an owner has not stepped with is dropped when it leaves; a lead waits for a host for half a deadline,
so that its own caller is still there to hear of it.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vflair_flower.errors import SessionClosedError, SessionError
from vflair_flower.experts.behalf import OWNER, InName
from vflair_flower.experts.block_calls import BLOCK, BLOCK_BACKWARD, LEAD_DTYPE, BlockCalls
from vflair_flower.experts.blocks import SEQUENCE, TOKEN, BlockInput, BlockRunner, LentChannel
from vflair_flower.experts.caller import ExpertCaller
from vflair_flower.experts.dispatch import ExpertChannel
from vflair_flower.experts.handoff import HandOff
from vflair_flower.experts.host import ExpertHost
from vflair_flower.experts.placement import Placement
from vflair_flower.memory import MemoryParts, count_kept, tensor_bytes
from vflair_flower.partition import LoadedSegment
from vflair_flower.remote.protocol import FINISH, STEP
from vflair_flower.remote.refusals import not_open, not_training
from vflair_flower.session import Caller, Reply, Request
from vflair_flower.spec import WIRE_DTYPES, SplitSpec


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """A block that was run and may be differentiated."""

    index: int
    entered_STD: Tensor
    output_ND: Tensor
    inside_bytes: int
    """What autograd keeps between them."""


class Lead:
    """One party's part in hand-off: leads others' tokens, and is an owner whose tokens others lead.

    Parameters
    ----------
    loaded : LoadedSegment
        The party's own model, as `load_backbone` returned it with `channel`.
    model : torch.nn.Module
        The same, ready for training.
    channel : ExpertChannel
        Its.
    host : ExpertHost
        This party's experts; calls that are not for the lead go there.
    placement : Placement
        Who hosts what.
    spec : SplitSpec
        The job.
    party : str
        This party's name.
    waiting : mapping of str to torch.Tensor, optional
        What `state` returned after the round before.
    """

    def __init__(
        self,
        loaded: LoadedSegment,
        model: nn.Module,
        channel: ExpertChannel,
        host: ExpertHost,
        placement: Placement,
        spec: SplitSpec,
        *,
        party: str,
        waiting: Mapping[str, Tensor] | None = None,
    ) -> None:
        assert spec.experts is not None
        assert isinstance(channel, LentChannel)
        self.spec = spec
        self._host, self._channel, self._placement, self._party = host, channel, placement, party
        self._own_place = placement.hosts.index(party)
        self._by_token = spec.experts.semantics == TOKEN
        self._runner = BlockRunner(loaded.model, placement, TOKEN if self._by_token else SEQUENCE)
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        names = {id(p): name for name, p in self._parameters.items()}
        self._of_block = [[names[id(p)] for p in b.parameters() if id(p) in names] for b in self._runner.blocks]
        self._wire = WIRE_DTYPES[spec.wire_dtype]
        self._callers: dict[str, ExpertCaller] = {}
        self._kept: dict[tuple[str, int], _Kept] = {}
        self._pending: dict[str, dict[str, Tensor]] = {}
        devices = {name: p.device for name, p in self._parameters.items()}
        self._waiting = {name: gradient.to(devices[name]) for name, gradient in (waiting or {}).items()}
        self._peak_gradients = self._peak_kept = 0
        self._training = False
        self._changed = threading.Lock()

    @contextmanager
    def joined(self, link: Caller, owners: Sequence[str], *, training: bool, deadline_s: float) -> Iterator[HandOff]:
        """Lead for owners, and let them lead, inside the block."""
        self._training = training
        for owner in owners:
            if owner != self._party:
                called = InName(link, owner, party=link.party, deadline_s=deadline_s)
                self._callers[owner] = ExpertCaller(called, self._in_name(owner), self._placement, self.spec)
        calls = BlockCalls(link, self.spec, len(self._placement.hosts))
        own = HandOff(self._runner, calls, self._placement, self._party, lambda: self._host.take_turn(self._party))
        try:
            with own.joined():
                yield own
        finally:
            calls.close()
            callers, self._callers = self._callers, {}
            for caller in callers.values():
                caller.close()

    def __call__(self, request: Request) -> Reply:
        """Answer one call: a block's, or one to this party's experts."""
        if request.operation == BLOCK:
            return self._forward(request)
        if request.operation == BLOCK_BACKWARD:
            return self._backward(request)
        if request.operation == STEP and OWNER not in request.meta:
            self._stepped(request.source)  # before the host hands the turn on
        if request.operation == FINISH:
            self._drop(request.source)
        return self._host(request)

    def leave(self, owner: str, *, lost: bool) -> None:
        """Let an owner go; what it had not stepped with is dropped."""
        self._drop(owner)
        self._host.leave(owner, lost=lost)

    def add_gradients(self) -> None:
        """Add what came of others' steps to the gradients of this party's own model; call it before its own step."""
        with self._changed:
            waiting, self._waiting = self._waiting, {}
        for name, gradient in waiting.items():
            parameter = self._parameters[name]
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def state(self) -> dict[str, Tensor]:
        """Return what waits for this party's next step, for its own files."""
        with self._changed:
            return {name: gradient.cpu() for name, gradient in self._waiting.items()}

    def memory(self) -> MemoryParts:
        """Return the peak memory of what is kept for others beside this party's own model and experts."""
        return MemoryParts(parameters=0, gradients=self._peak_gradients, optimizer=0, activations=self._peak_kept)

    def pending(self, owner: str) -> dict[str, Tensor]:
        """Return the gradients by this party's own model that wait for an owner's step."""
        with self._changed:
            return dict(self._pending.get(owner, {}))

    def _in_name(self, owner: str) -> Any:
        """Return this party's own host, asked in an owner's name."""
        return lambda request: self._host(replace(request, meta={**request.meta, OWNER: owner}))

    def _forward(self, request: Request) -> Reply:
        owner, keep = request.source, bool(request.meta["keep"])
        caller = self._callers.get(owner)
        if caller is None:
            raise SessionClosedError(f"'{owner}' asked '{self._party}' to lead, and it has no part in this session.")
        if keep and not self._training:
            raise not_training(owner)
        if self._training:
            self._host.take_turn(owner)
        index, entered = int(request.meta["block"]), self._read(request, keep=keep)
        counting = count_kept(self._runner.blocks.parameters()) if keep else nullcontext(lambda: 0)
        with self._channel.lent(caller), torch.set_grad_enabled(keep), counting as inside_bytes:
            output_ND, lead = self._runner.run(index, entered)
        if keep:
            kept = _Kept(index=index, entered_STD=entered.hidden_STD, output_ND=output_ND, inside_bytes=inside_bytes())
            with self._changed:
                self._kept[owner, int(request.meta["call"])] = kept
                self._peak_kept = max(self._peak_kept, sum(kept.inside_bytes for kept in self._kept.values()))
        tensors = {"hidden": output_ND.detach().to("cpu", self._wire)}
        if lead is not None:
            tensors["lead"] = lead.to(LEAD_DTYPE)
        return Reply(tensors)

    def _read(self, request: Request, *, keep: bool) -> BlockInput:
        tensors, index = request.tensors, int(request.meta["block"])
        hidden_STD, led_ST = tensors["hidden"], tensors.get("led")
        shape, blocks = hidden_STD.shape[:2], len(self._runner.blocks)
        odd = [n for n in ("attention_mask", "position_ids", "led") if n in tensors and tensors[n].shape != shape]
        fits = not odd and 0 < index < blocks and (led_ST is not None) is self._by_token and hidden_STD.numel() > 0
        if not fits or (led_ST is not None and not bool(led_ST.any())):
            raise SessionError(
                f"'{request.source}' sent {tuple(hidden_STD.shape)} hidden states for block {index} with the tensors "
                f"{sorted(tensors)}{f', of which {odd[0]} has another shape' if odd else ''}; a lead runs the blocks 1 "
                f"to {blocks - 1}, and {'needs' if self._by_token else 'takes no'} 'led', with a token in it."
            )
        first: Tensor = next(self._runner.blocks[index].parameters())
        entered_STD = hidden_STD.to(first.device, self.spec.weights.torch_dtype).requires_grad_(keep)
        mask_ST, positions_ST = (
            None if name not in tensors else tensors[name].to(first.device, torch.int64)
            for name in ("attention_mask", "position_ids")
        )
        led = None if led_ST is None else led_ST.to(first.device, torch.bool)
        return BlockInput(hidden_STD=entered_STD, mask_ST=mask_ST, positions_ST=positions_ST, led_ST=led)

    def _backward(self, request: Request) -> Reply:
        key = (request.source, int(request.meta["call"]))
        with self._changed:
            kept = self._kept.pop(key, None)
        if kept is None:
            raise not_open(*key)
        grad_ND = request.tensors["grad"]
        if grad_ND.shape != kept.output_ND.shape:
            raise SessionError(
                f"'{request.source}' sent a gradient {tuple(grad_ND.shape)}, and call {key[1]} was answered with "
                f"{tuple(kept.output_ND.shape)}; send one vector for each."
            )
        names = self._of_block[kept.index]
        wanted = [kept.entered_STD, *(self._parameters[name] for name in names)]
        found = torch.autograd.grad(kept.output_ND, wanted, grad_ND.to(kept.output_ND), allow_unused=True)
        with self._changed:
            own = self._pending.setdefault(request.source, {})
            for name, gradient in zip(names, found[1:], strict=True):
                if gradient is not None:
                    own[name] = own[name] + gradient if name in own else gradient
            held = (self._waiting, *self._pending.values())
            self._peak_gradients = max(self._peak_gradients, sum(tensor_bytes(part.values()) for part in held))
        return Reply({"grad": found[0].to("cpu", self._wire)})

    def _stepped(self, owner: str) -> None:
        """Let an owner's gradients count."""
        with self._changed:
            for name, gradient in self._pending.pop(owner, {}).items():
                self._waiting[name] = self._waiting[name] + gradient if name in self._waiting else gradient
        self._drop(owner)

    def _drop(self, owner: str) -> None:
        with self._changed:
            self._pending.pop(owner, None)
            for key in [key for key in self._kept if key[0] == owner]:
                del self._kept[key]
