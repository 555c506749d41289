"""Head-Body-Tail with spread experts: a body whose layers call the hosts, on behalf of the party whose pass it runs.

The body itself has no experts.  A host takes such a call for the data party's own: its gradient is that of head, body
and tail together, and it steps once.  Who a call is for is fixed when the forward pass is made; its backward pass
asks in the same name, whatever thread runs it.
Invariants: only the hub's own process may speak for others; a body's call to a host ends before the call that it is
made for does.
"""

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from torch import Tensor

from vflair_flower.errors import PartyLostError, SessionClosedError
from vflair_flower.experts.behalf import InName
from vflair_flower.experts.caller import ExpertCaller
from vflair_flower.experts.dispatch import ExpertCalls, ExpertChannel
from vflair_flower.experts.placement import place_experts
from vflair_flower.experts.routing import opted_out_experts, prefer_experts
from vflair_flower.partition import LoadedSegment
from vflair_flower.remote import BodyMode, RemoteSegment, SegmentServer
from vflair_flower.remote.protocol import BACKWARD, FORWARD, MODEL_PARTY
from vflair_flower.session import Agreement, Caller, HubSession, Reply, Request
from vflair_flower.session.header import Meta
from vflair_flower.spec import SplitSpec

_BODY = "body-"
"""Begins the names of the body's operations where hosts have theirs in the same session."""


def joint_agreement(experts: Agreement, body: Agreement) -> Agreement:
    """Return the agreement of sessions in which parties call each other's experts and the body."""
    renamed = {f"{_BODY}{name}": body.operations[name] for name in (FORWARD, BACKWARD)}
    return Agreement(operations={**body.operations, **experts.operations, **renamed})


class BodyLink:
    """A data party's link, as its `RemoteSegment` sees it: the body's operations have names of their own."""

    def __init__(self, link: Caller) -> None:
        self.party = link.party
        self._link = link

    def call(
        self,
        target: str,
        operation: str,
        tensors: Mapping[str, Tensor],
        meta: Meta | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Reply:
        """Call the body."""
        name = f"{_BODY}{operation}" if operation in (FORWARD, BACKWARD) else operation
        return self._link.call(target, name, tensors, meta, timeout_s=timeout_s)


class StepsOfBoth:
    """A data party's step calls: to the hosts, then to the body (`vflair_flower.remote.segment.StepCalls`)."""

    def __init__(self, hosts: ExpertCaller, body: RemoteSegment) -> None:
        self._hosts, self._body = hosts, body

    @property
    def rows_since_step(self) -> int:
        """Over how many items the coming step's loss is the mean; rows, unless it is set."""
        return self._body.rows_since_step

    @rows_since_step.setter
    def rows_since_step(self, items: int) -> None:
        self._body.rows_since_step = items

    @property
    def tokens(self) -> int:
        """Tokens, padding not counted, that went through the model so far."""
        return self._body.tokens

    def step(self, *, step: int, total_steps: int) -> None:
        """Let all hosts step, and the body; returns when both are done."""
        self._hosts.rows_since_step = self._body.rows_since_step
        self._hosts.step(step=step, total_steps=total_steps)
        self._body.step(step=step, total_steps=total_steps)

    def joint_norm(self, squared: float) -> float:
        """Refuse, as `ExpertCaller.joint_norm`."""
        return self._hosts.joint_norm(squared)

    def finish(self) -> None:
        """Tell the body and all hosts that this party is done in this session."""
        self._body.finish()
        self._hosts.finish()


class BodyChannel(ExpertChannel):
    """Joins the body's layers to the calls in the name of whoever the thread's forward pass is for."""

    def __init__(self) -> None:
        self._current = threading.local()
        super().__init__()

    @property
    def calls(self) -> ExpertCalls | None:
        """What the layers call in this thread."""
        found: ExpertCalls | None = getattr(self._current, "calls", None)
        return found

    @calls.setter
    def calls(self, calls: ExpertCalls | None) -> None:
        self._current.calls = calls


class _OwnerGoneError(Exception):
    """Ends a pass that nobody waits for any more; no SessionError, so that no host counts as lost for it."""


class _Behalf(InName):
    """The hub's session, as a link of one data party for whom the body calls hosts.

    The body's calls have numbers below zero, and so never a number of the party's own.
    """

    def __init__(self, session: HubSession, owner: str) -> None:
        super().__init__(session, owner, party=MODEL_PARTY, deadline_s=session.deadline_s)

    def call(
        self,
        target: str,
        operation: str,
        tensors: Mapping[str, Tensor],
        meta: Meta | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Reply:
        """Call a host in the owner's name."""
        own = dict(meta or {})
        try:
            return super().call(target, operation, tensors, {**own, "call": -int(own["call"])}, timeout_s=timeout_s)
        except PartyLostError as error:
            if error.party == self._owner != target:  # no fault of the host, which others' passes go on asking
                raise _OwnerGoneError(str(error)) from error
            raise


class SpreadBody(SegmentServer):
    """A body without experts, at the hub: answers data parties as `SegmentServer` does, and calls hosts for them.

    Parameters
    ----------
    loaded : LoadedSegment
        The model party's segment, loaded with `channel`.
    channel : BodyChannel
        Of its layers.
    shape : tuple[int, int]
        Layers with experts of the whole model, and experts of each.
    spec : SplitSpec
        The job.
    deadline_s : float
        Longest wait of one party for another, in seconds.
    """

    def __init__(
        self, loaded: LoadedSegment, channel: BodyChannel, shape: tuple[int, int], spec: SplitSpec, *, deadline_s: float
    ) -> None:
        # Hosts compute their rows anew where the job says so; if the body's blocks did, they would call them again.
        own = replace(spec, training=replace(spec.training, gradient_checkpointing=False))
        super().__init__(loaded, own, body_mode=BodyMode.SYNCHRONOUS, deadline_s=deadline_s)
        self._channel, self._shape = channel, shape
        self._callers: dict[str, ExpertCaller] = {}
        self._routing = ExitStack()
        self.lost_hosts: dict[str, str] = {}
        """Hosts that did not answer the body well in the newest session, and what was seen."""

    def opened(self, session: HubSession, parties: Sequence[str]) -> None:
        """Call the hosts of this session from now on."""
        assert self.spec.experts is not None
        layers, experts = self._shape
        placement = place_experts(self.spec.experts, parties, layers=layers, experts=experts)
        self.lost_hosts = {}
        if placement.opted_out:
            self._routing.enter_context(prefer_experts(self._model, masked=opted_out_experts(placement)))
        for party in parties:
            caller = ExpertCaller(_Behalf(session, party), None, placement, self.spec)
            caller.lost = self.lost_hosts  # what one party's call has found out spares the others the wait
            self._callers[party] = caller

    def end(self) -> None:
        """Stop serving, and calling."""
        super().end()
        self._routing.close()
        for caller in self._callers.values():
            caller.close()
        self._callers.clear()

    def __call__(self, request: Request) -> Reply:
        """Answer one call; what it needs of hosts is asked in the caller's name."""
        caller = self._callers.get(request.source)
        if caller is None:
            raise SessionClosedError(f"'{request.source}' called the body, and it has no part in this session.")
        with self._channel.joined(caller):
            return super().__call__(replace(request, operation=request.operation.removeprefix(_BODY)))
