"""Calls: what one party asks of another, who still waits for an answer, and how an error travels.

What it is: the part of a call that the hub and the links share.  What it is not: routing; that is the hub's.
Invariant: every call that was opened ends exactly once, with a reply, an error or its deadline.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import torch

from vflair_flower.errors import (
    ConfigurationError,
    DeadlineError,
    PartyLostError,
    RemoteError,
    SessionClosedError,
    SessionError,
)
from vflair_flower.session.frame import Frame
from vflair_flower.session.header import Kind, Meta

HUB = "hub"
"""Name of the hub's own process as a caller, and in errors and ledgers."""

_MAX_TEXT_CHARS = 300


@dataclass(frozen=True)
class Request:
    """What a handler is asked.

    Parameters
    ----------
    source : str
        Who asks; vouched for by the hub.
    operation : str
        Name of an agreed operation.
    tensors : Mapping[str, torch.Tensor]
        Its tensors, on the CPU; they belong to the handler, which may change them.
    meta : Mapping[str, str | int | float | bool]
        Plain values sent along.
    """

    source: str
    operation: str
    tensors: Mapping[str, torch.Tensor]
    meta: Meta = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What a handler answers.

    Parameters
    ----------
    tensors : Mapping[str, torch.Tensor]
        The tensors agreed for the reply of this operation.
    meta : Mapping[str, str | int | float | bool]
        Plain values sent along.
    """

    tensors: Mapping[str, torch.Tensor]
    meta: Meta = field(default_factory=dict)


class Handler(Protocol):
    """Answer calls.

    Calls of one party arrive in order and one at a time; calls of different parties arrive at once, on threads of
    their own.  So a handler may wait for other parties, but must not wait for a later call of the same party.
    """

    def __call__(self, request: Request) -> Reply:
        """Answer one call; what is raised reaches the caller as an error."""
        ...


class Caller(Protocol):
    """Make calls as one party: its `Link`, or what stands for it."""

    party: str

    def call(
        self,
        target: str,
        operation: str,
        tensors: Mapping[str, torch.Tensor],
        meta: Meta | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Reply:
        """Make a call and wait for its reply; see `Link.call`."""
        ...


@dataclass(frozen=True, kw_only=True)
class PendingCall:
    """A call that waits for its answer."""

    call_id: int
    target: str
    operation: str
    future: Future[Reply]


class CallTable:
    """Keep the calls that await their answers; safe for use from many threads.

    Parameters
    ----------
    limit : int | None
        How many may wait at once.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._changed = threading.Condition()
        self._pending: dict[int, PendingCall] = {}
        self._next_id = 0
        self._ended: Callable[[], SessionError] | None = None

    def call(
        self,
        target: str,
        operation: str,
        deadline: "Deadline",
        send: Callable[[PendingCall], None],
        cancel: Callable[[PendingCall], None],
    ) -> Reply:
        """Make a call and wait for its end.

        Parameters
        ----------
        target, operation : str
            Whom to ask for what.
        deadline : Deadline
            When to give up.
        send : Callable[[PendingCall], None]
            Send the call; may raise TimeoutError when there is no room in time.
        cancel : Callable[[PendingCall], None]
            Tell the other side that nobody waits any more.

        Raises
        ------
        DeadlineError
            When the deadline passes.
        SessionError
            What the other side, or the hub, answers instead of a reply.
        """
        try:
            call = self.open(target, operation, deadline.left_s)
        except TimeoutError:
            raise deadline.missed(target, operation) from None
        try:
            send(call)
            return call.future.result(deadline.left_s)
        except TimeoutError:
            cancel(call)
            raise deadline.missed(target, operation) from None
        finally:
            self.forget(call)

    def open(self, target: str, operation: str, timeout_s: float) -> PendingCall:
        """Enter a call, once there is room for it.

        Raises
        ------
        TimeoutError
            When there was no room in time.
        SessionError
            When the table was ended.
        """
        with self._changed:
            free = self._changed.wait_for(
                lambda: self._ended is not None or self._limit is None or len(self._pending) < self._limit, timeout_s
            )
            if self._ended is not None:
                raise self._ended()
            if not free:
                raise TimeoutError
            self._next_id += 1
            call = PendingCall(call_id=self._next_id, target=target, operation=operation, future=Future())
            self._pending[call.call_id] = call
            return call

    def resolve(self, frame: Frame) -> None:
        """Hand a reply or error to the call that it answers; an answer that nobody awaits is dropped."""
        with self._changed:
            call = self._pending.get(frame.call_id)
        if call is None or frame.source != call.target or frame.operation != call.operation:
            return
        if frame.kind is Kind.REPLY:
            self._finish(call, lambda: call.future.set_result(Reply(frame.tensors, frame.meta)))
        else:
            self._finish(call, lambda: call.future.set_exception(error_from_frame(frame)))

    def forget(self, call: PendingCall) -> None:
        """Give a call up; its answer will be dropped."""
        self._finish(call, lambda: None)

    def fail_target(self, target: str, error: Callable[[], SessionError]) -> None:
        """End all calls to one target with an error."""
        with self._changed:
            calls = [call for call in self._pending.values() if call.target == target]
        for call in calls:
            self._fail(call, error())

    def end(self, error: Callable[[], SessionError]) -> None:
        """End all calls with an error, and refuse new ones with it."""
        with self._changed:
            if self._ended is None:
                self._ended = error
            calls = list(self._pending.values())
            self._changed.notify_all()
        for call in calls:
            self._fail(call, error())

    def _fail(self, call: PendingCall, error: SessionError) -> None:
        self._finish(call, lambda: call.future.set_exception(error))

    def _finish(self, call: PendingCall, settle: Callable[[], None]) -> None:
        with self._changed:
            mine = self._pending.pop(call.call_id, None) is call
            self._changed.notify_all()
        if mine:
            settle()


class Deadline:
    """A moment that all waiting within one call shares.

    Parameters
    ----------
    timeout_s : float
        Seconds from now.
    """

    def __init__(self, timeout_s: float) -> None:
        check_seconds("timeout_s", timeout_s)
        self.timeout_s = timeout_s
        self._at = time.monotonic() + timeout_s

    @property
    def left_s(self) -> float:
        """Seconds that are left, at least 0."""
        return max(0.0, self._at - time.monotonic())

    def missed(self, target: str, operation: str) -> DeadlineError:
        """Return the error that says that this deadline passed."""
        return DeadlineError(
            f"operation '{operation}' at '{target}' gave no answer within {self.timeout_s:g} s; it may be slow, busy "
            "with other calls or stuck. Allow more time (deadline_s, timeout_s), or look at that party's log."
        )


def check_seconds(what: str, seconds: float) -> None:
    """Raise `ConfigurationError` unless `seconds` is a finite positive number that a wait accepts."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
        raise ConfigurationError(f"{what} is {seconds!r}; give a finite number of seconds.")
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise ConfigurationError(f"{what} is {seconds} s; give more than 0 and at most {threading.TIMEOUT_MAX:.0f}.")


def notice(
    event: str, *, target: str, source: str = HUB, call_id: int = 0, details: Mapping[str, str] | None = None
) -> Frame:
    """Return a notice of an event between the hub and a link."""
    meta = {"event": event, **{name: shorten(text) for name, text in (details or {}).items()}}
    return Frame(kind=Kind.NOTICE, call_id=call_id, source=source, target=target, meta=meta)


def error_frame(request: Frame, source: str, error: BaseException) -> Frame:
    """Return the frame that tells the caller of `request` what was raised at `source`."""
    meta: dict[str, str | int | float | bool] = {
        "type": shorten(type(error).__name__),
        "text": shorten(str(error)),
    }
    if isinstance(error, PartyLostError):
        meta |= {"party": shorten(error.party), "reason": shorten(error.reason)}
    return Frame(
        kind=Kind.ERROR,
        call_id=request.call_id,
        source=source,
        target=request.source,
        operation=request.operation,
        meta=meta,
    )


def error_from_frame(frame: Frame) -> SessionError:
    """Return the error that an error frame tells of."""
    kind, text = str(frame.meta.get("type", "")), str(frame.meta.get("text", ""))
    where = f"operation '{frame.operation}' at '{frame.source}'"
    if kind == PartyLostError.__name__ and "party" in frame.meta:
        return PartyLostError(str(frame.meta["party"]), str(frame.meta.get("reason", "")))
    if kind == DeadlineError.__name__:
        return DeadlineError(f"{where} waited in vain itself: {text}")
    if kind == SessionClosedError.__name__:
        return SessionClosedError(f"{where} met an end of the session: {text}")
    return RemoteError(f"{where} raised {kind}: {text} (its log has the traceback)")


def anew(error: SessionError) -> SessionError:
    """Return an equal error: one exception must not be raised on two threads."""
    if isinstance(error, PartyLostError):
        return PartyLostError(error.party, error.reason)
    return type(error)(str(error))


def shorten(text: str) -> str:
    """Cut text so that it always fits a header, and make it printable."""
    clean = text.encode("utf-8", "replace").decode("utf-8")
    return clean if len(clean) <= _MAX_TEXT_CHARS else clean[: _MAX_TEXT_CHARS - 3] + "..."
