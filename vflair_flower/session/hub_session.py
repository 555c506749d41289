"""One session at the hub: who may come, who has come, who has gone, and where each call goes.

What it is: the hub's half of every stream of a session, the same on every data plane.  What it is not: a place where
tensors stay; the hub holds a frame only until it has gone out again.  Invariant: every party is at any time awaited,
joined, finished or lost; and each call is answered, fails with its party, or is given up by its caller.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

import torch

from vflair_flower.errors import (
    ConfigurationError,
    FrameError,
    PartyLostError,
    SessionClosedError,
    SessionError,
)
from vflair_flower.session.agreement import Agreement
from vflair_flower.session.calls import (
    HUB,
    CallTable,
    Deadline,
    Handler,
    PendingCall,
    Reply,
    check_seconds,
    error_frame,
    notice,
)
from vflair_flower.session.desk import Desk
from vflair_flower.session.emulation import LinkEmulation
from vflair_flower.session.frame import Frame, FrameAssembler, Parcel, pack
from vflair_flower.session.header import Kind, Meta
from vflair_flower.session.ledger import Ledger
from vflair_flower.session.routing import OpenCall, OpenCalls
from vflair_flower.session.seat import HubSeat, refusal, shows_ticket
from vflair_flower.session.sighting import Tap, of_frame, of_parcel
from vflair_flower.session.transport import Hello

logger = logging.getLogger(__name__)

_CLOSE_S = 5.0


class HubSession:
    """Exchange calls with, and between, the parties of one session; made by `Hub.open_session`.

    Attributes
    ----------
    id : str
        Name of the session.
    tickets : dict[str, str]
        For each party the ticket with which it may join, once.
    ledger : Ledger
        What crossed on the streams of all parties.
    """

    def __init__(
        self,
        *,
        parties: Sequence[str],
        agreement: Agreement,
        hosts: Mapping[str, Handler],
        deadline_s: float,
        join_deadline_s: float,
        on_lost: Callable[[str, str], None] | None,
        on_closed: Callable[["HubSession"], None],
        emulate: LinkEmulation | None = None,
        tap: Tap | None = None,
    ) -> None:
        check_seconds("deadline_s", deadline_s)
        check_seconds("join_deadline_s", join_deadline_s)
        self.id = secrets.token_hex(8)
        self.agreement = agreement
        self.ledger = Ledger()
        self.deadline_s = deadline_s
        self._digest = agreement.digest
        self._hosts = dict(hosts)
        self._on_lost = on_lost
        self._on_closed = on_closed
        self._tap = tap
        self._seats = {party: HubSeat(party, self._receive, emulate) for party in parties}
        self.tickets = {party: seat.ticket for party, seat in self._seats.items()}
        self._changed = threading.Condition(threading.RLock())
        self._joined: set[str] = set()
        self._lost: dict[str, str] = {}
        self._finished: set[str] = set()
        self._closed = False
        self._own = CallTable()
        self._calls = OpenCalls(agreement.max_calls_in_flight)
        self._desk = Desk(f"vflair-hub-{self.id}", agreement)
        for party in parties:
            self._notify(party, notice("welcome", target=party))
        self._join_deadline_s = join_deadline_s
        self._join_timer = threading.Timer(join_deadline_s, self._lose_absent)
        self._join_timer.daemon = True
        self._join_timer.start()

    @property
    def joined(self) -> frozenset[str]:
        """The parties that came, whether or not they are still here."""
        with self._changed:
            return frozenset(self._joined)

    @property
    def lost(self) -> dict[str, str]:
        """The parties that went without a goodbye or never came, and what was seen of it."""
        with self._changed:
            return dict(self._lost)

    @property
    def finished(self) -> set[str]:
        """The parties that said goodbye."""
        with self._changed:
            return set(self._finished)

    def wait_joined(self, timeout_s: float) -> bool:
        """Wait until every party has come or is lost; say whether that is so."""
        return self._wait(lambda: self._seats.keys() <= self._joined | self._lost.keys(), timeout_s)

    def wait_gone(self, timeout_s: float) -> bool:
        """Wait until every party has said goodbye or is lost; say whether that is so."""
        return self._wait(lambda: self._seats.keys() <= self._finished | self._lost.keys(), timeout_s)

    def call(
        self,
        target: str,
        operation: str,
        tensors: Mapping[str, torch.Tensor],
        meta: Meta | None = None,
        timeout_s: float | None = None,
    ) -> Reply:
        """Call a party from the hub's own process.

        Parameters
        ----------
        target : str
            Name of a party of this session.
        operation : str
            Name of an agreed operation.
        tensors : Mapping[str, torch.Tensor]
            The tensors agreed for its request.
        meta : Mapping[str, str | int | float | bool] | None
            Plain values to send along.
        timeout_s : float | None
            Seconds to wait; None waits for the session's `deadline_s`.

        Raises
        ------
        FrameError
            When this call was not agreed; nothing was sent.
        PartyLostError, DeadlineError, RemoteError, SessionClosedError
            When there is no reply.
        """
        if target not in self._seats:
            raise ConfigurationError(f"'{target}' is no party of this session; call one of {sorted(self._seats)}.")
        deadline = Deadline(self.deadline_s if timeout_s is None else timeout_s)

        def send(call: PendingCall) -> None:
            with self._changed:
                gone = self._gone(target)
                if gone is not None:
                    raise gone
                entry = self._calls.open(HUB, call.call_id, target, operation, limited=False)
            frame = Frame(
                kind=Kind.CALL,
                call_id=entry.hub_id,
                source=HUB,
                target=target,
                operation=operation,
                tensors=tensors,
                meta=meta or {},
            )
            try:
                self._send(target, pack(frame, self.agreement), timeout_s=deadline.left_s)
            except BaseException:
                self._calls.cancel(HUB, call.call_id)
                raise

        return self._own.call(target, operation, deadline, send, lambda call: self._cancel(HUB, call.call_id))

    def expel(self, party: str, reason: str) -> None:
        """Count a party as lost that is known, from elsewhere, to be gone; one that has left already is left alone.

        Raises
        ------
        ConfigurationError
            When there is no such party.
        """
        if party not in self._seats:
            raise ConfigurationError(f"'{party}' is no party of this session; expel one of {sorted(self._seats)}.")
        self._lose(party, reason)

    def abort(self, reason: str) -> None:
        """End the session at once; every call fails with SessionClosedError, and so does `Link.wait_closed`."""
        self._stop("aborted", f"the hub ended the session: {reason}")

    def close(self) -> None:
        """End the session in good order, and wait until its streams and handlers have ended."""
        self._stop("closed", "the session is closed; open a new one for further calls")
        self._desk.close(_CLOSE_S)
        end = time.monotonic() + _CLOSE_S
        for party in self.joined:
            if not self._seats[party].done.wait(max(0.0, end - time.monotonic())):
                self._seats[party].outbox.abandon()
        self._on_closed(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.abort(f"its process met {type(error).__name__}")
        self.close()

    def admit(self, hello: Hello) -> HubSeat:
        """Let a party take its seat, if its ticket is right; called by the data plane."""
        seat = self._seats.get(hello.party)
        right = shows_ticket(seat, hello)
        with self._changed:
            fresh = hello.party not in self._joined and hello.party not in self._lost and not self._closed
            if seat is None or not right or not fresh:
                logger.warning("%r was refused: right ticket %s, awaited %s", hello, right, fresh)
                raise refusal(hello)
            agreed = hello.agreement == self._digest
            if agreed:
                self._joined.add(hello.party)
                self._changed.notify_all()
            if self._joined >= self._seats.keys():
                self._join_timer.cancel()
        if not agreed:
            self._lose(hello.party, "it came with another agreement")
            raise FrameError(
                f"party '{hello.party}' came with an agreement that differs from the hub's; pass on unchanged what the "
                "hub's Agreement.to_json() gave."
            )
        seat.outbox.release()
        return seat

    def _receive(self, party: str, chunks: Iterator[bytes]) -> None:
        assembler = FrameAssembler(self.agreement)
        reason = "its stream ended without a goodbye"
        try:
            for chunk in chunks:
                frame = assembler.feed(chunk)
                if frame is not None:
                    self._seats[party].check_target(frame, self._seats.keys(), self._hosts.keys())
                    assert assembler.header is not None
                    self.ledger.record_frame(
                        party=party,
                        peer=frame.target,
                        direction="up",
                        header=assembler.header,
                        overhead_bytes=assembler.overhead_bytes,
                    )
                    if self._tap is not None:
                        self._tap(
                            of_frame(
                                frame,
                                assembler.header,
                                session=self.id,
                                party=party,
                                direction="up",
                                overhead_bytes=assembler.overhead_bytes,
                            )
                        )
                    self._take(party, frame)
                    if frame.kind is Kind.BYE:
                        return
                del frame  # it holds tensors, and the next chunk may be long in coming
        except FrameError as error:
            farewell = notice("refused", target=party, details={"text": str(error)})
            self._lose(party, f"it broke the agreement: {error}", farewell=farewell)
            return
        except Exception as error:
            logger.exception("the stream of party '%s' failed", party)
            reason = f"its stream failed at the hub ({type(error).__name__})"
        self._lose(party, reason)

    def _take(self, party: str, frame: Frame) -> None:
        match frame.kind:
            case Kind.CALL:
                self._take_call(party, replace(frame, source=party))
            case Kind.REPLY | Kind.ERROR:
                self._take_answer(party, frame)
            case Kind.NOTICE:
                self._cancel(party, frame.call_id)
            case Kind.BYE:
                self._take_bye(party)

    def _take_call(self, party: str, frame: Frame) -> None:
        with self._changed:
            gone = self._gone(frame.target) if frame.target in self._seats else None
            if gone is None and frame.target not in self._hosts and frame.target not in self._seats:
                known = sorted((self._seats.keys() | self._hosts.keys()) - {party})
                gone = SessionError(f"nobody in this session is called '{frame.target[:80]}'; call one of {known}")
            if gone is None:
                entry = self._calls.open(party, frame.call_id, frame.target, frame.operation)
        if gone is not None:
            self._send(party, pack(error_frame(frame, frame.target, gone), self.agreement))
        elif frame.target in self._hosts:
            self._desk.put(entry.hub_id, frame, self._hosts[frame.target], lambda parcel: self._respond(entry, parcel))
        else:
            self._send(frame.target, pack(replace(frame, call_id=entry.hub_id), self.agreement))

    def _respond(self, entry: OpenCall, parcel: Parcel) -> None:
        if self._calls.take(entry.hub_id, entry.target) is not None:
            self._send(entry.caller, parcel)

    def _take_answer(self, party: str, frame: Frame) -> None:
        entry = self._calls.take(frame.call_id, party)
        if entry is None:
            return  # given up by its caller, or the caller is gone
        if frame.operation != entry.operation or frame.target != entry.caller:
            raise FrameError(
                f"party '{party}' answers '{frame.operation}' of '{frame.target}', but was asked '{entry.operation}' "
                f"by '{entry.caller}'."
            )
        frame = replace(frame, call_id=entry.caller_id, source=party)
        if entry.caller == HUB:
            self._own.resolve(frame)
        else:
            self._send(entry.caller, pack(frame, self.agreement))

    def _cancel(self, caller: str, caller_id: int) -> None:
        entry = self._calls.cancel(caller, caller_id)
        if entry is None:
            return
        self._desk.withdraw(entry.hub_id)
        if entry.target in self._seats:
            self._notify(entry.target, notice("cancelled", target=entry.target, call_id=entry.hub_id))

    def _take_bye(self, party: str) -> None:
        with self._changed:
            if self._closed or party in self._lost:
                return
            self._finished.add(party)
            dropped = self._calls.drop(party)
            self._changed.notify_all()
        for call in dropped:
            self._desk.withdraw(call.hub_id)
        self._seats[party].outbox.finish()
        self._own.fail_target(party, lambda: _left(party))
        self._notify_others(party, "left", {})

    def _lose(self, party: str, reason: str, *, farewell: Frame | None = None) -> None:
        with self._changed:
            if self._closed or party in self._lost or party in self._finished:
                return
            self._lost[party] = reason
            dropped = self._calls.drop(party)
            self._changed.notify_all()
        logger.warning("party '%s' of session %s is lost: %s", party, self.id, reason)
        for call in dropped:
            self._desk.withdraw(call.hub_id)
        if farewell is None:
            self._seats[party].outbox.abandon()
        else:
            self._notify(party, farewell)
            self._seats[party].outbox.finish()
        self._own.fail_target(party, lambda: PartyLostError(party, reason))
        self._notify_others(party, "lost", {"reason": reason})
        if self._on_lost is not None:
            try:
                self._on_lost(party, reason)
            except Exception:
                logger.exception("on_lost failed for party '%s'", party)

    def _lose_absent(self) -> None:
        for party in self._seats.keys() - self.joined:
            self._lose(party, f"it did not join within {self._join_deadline_s:g} s")

    def _gone(self, party: str) -> SessionError | None:
        if party in self._lost:
            return PartyLostError(party, self._lost[party])
        return _left(party) if party in self._finished else None

    def _stop(self, event: str, reason: str) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._join_timer.cancel()
        self._own.end(lambda: SessionClosedError(reason))
        for party, seat in self._seats.items():
            self._notify(party, notice(event, target=party, details={"reason": reason}))
            seat.outbox.finish()

    def _notify_others(self, party: str, event: str, details: Mapping[str, str]) -> None:
        for other in self._seats:
            if other != party:
                self._notify(other, notice(event, target=other, details={"party": party, **details}))

    def _notify(self, party: str, frame: Frame) -> None:
        self._send(party, pack(frame, self.agreement), urgent=True)

    def _send(self, party: str, parcel: Parcel, *, timeout_s: float | None = None, urgent: bool = False) -> None:
        header, overhead_bytes = parcel.header, parcel.overhead_bytes
        if self._tap is not None:
            self._tap(of_parcel(parcel, session=self.id, party=party, direction="down"))

        def record() -> None:
            self.ledger.record_frame(
                party=party, peer=header.source, direction="down", header=header, overhead_bytes=overhead_bytes
            )

        limit_s = self.deadline_s if timeout_s is None else timeout_s
        try:
            self._seats[party].outbox.send(parcel.chunks(), on_taken=record, timeout_s=limit_s, urgent=urgent)
        except TimeoutError:
            if timeout_s is not None:
                raise
            self._lose(party, f"it took no bytes for {limit_s:g} s")

    def _wait(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._closed or ready(), timeout_s) and ready()


def _left(party: str) -> SessionClosedError:
    return SessionClosedError(f"party '{party}' has said goodbye to this session; nothing can be asked of it any more")
