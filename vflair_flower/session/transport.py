"""The data plane: how chunks get from a link to the hub and back.

What it is: one interface, `Plane` on the hub's side and `Wire` on the link's, and its in-process implementation; the
gRPC one is grpc_plane.py.  What it is not: aware of frames, calls or ledgers.  Invariant: both planes carry the same
bytes through the same door, so that what holds on one holds on the other.
"""

import itertools
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from vflair_flower.errors import PartyLostError
from vflair_flower.session.outbox import Outbox

INPROC = "inproc"
INPROC_PREFIX = "inproc://"


@dataclass(frozen=True, kw_only=True)
class Hello:
    """What a party says at the door."""

    session: str
    party: str
    ticket: str
    agreement: str

    def __repr__(self) -> str:
        """Show who knocks, never the ticket."""
        return f"Hello(session={self.session!r}, party={self.party!r})"


class Seat(Protocol):
    """The hub's end of one admitted stream."""

    @property
    def outbox(self) -> Outbox:
        """What the stream carries to the party."""
        ...

    def receive(self, chunks: Iterator[bytes]) -> None:
        """Take what the party sends until its stream ends; runs on a thread of its own."""
        ...


Admit = Callable[[Hello], Seat]
"""Let a party in, or raise TicketError or FrameError."""


class Plane(Protocol):
    """The hub's side of a data plane."""

    def start(self, admit: Admit) -> str:
        """Open the door; return the address to dial."""
        ...

    def stop(self) -> None:
        """Close the door and end all streams."""
        ...


class Wire(Protocol):
    """The link's side of one admitted stream."""

    @property
    def outbox(self) -> Outbox:
        """What the stream carries to the hub."""
        ...

    def chunks(self) -> Iterator[bytes]:
        """Yield what the hub sends until it ends the stream; raise PartyLostError when the stream breaks."""
        ...

    def cancel(self) -> None:
        """Break the stream at once."""
        ...

    def close(self) -> None:
        """Free what the stream holds, after it has ended."""
        ...


class InprocPlane:
    """The hub's side of the plane within one process: no sockets, the same frames and checks."""

    _lock = threading.Lock()
    _open: dict[str, "InprocPlane"] = {}  # noqa: RUF012 - one directory for the process, as ports are

    def __init__(self) -> None:
        self._address = INPROC_PREFIX + secrets.token_hex(8)
        self._admit: Admit | None = None
        self._wires: set[InprocWire] = set()
        self._ids = itertools.count(1)

    def start(self, admit: Admit) -> str:
        """Open the door; return the address to dial."""
        self._admit = admit
        with self._lock:
            self._open[self._address] = self
        return self._address

    def stop(self) -> None:
        """Close the door and end all streams."""
        with self._lock:
            self._open.pop(self._address, None)
            wires = list(self._wires)
        for wire in wires:
            wire.cancel()
        for wire in wires:
            wire.join()

    @classmethod
    def dial(cls, address: str, hello: Hello) -> "InprocWire":
        """Knock at the door of a hub in this process.

        Raises
        ------
        TicketError, FrameError
            When the hub does not let this party in.
        PartyLostError
            When no hub listens there.
        """
        with cls._lock:
            plane = cls._open.get(address)
        if plane is None or plane._admit is None:
            raise PartyLostError("hub", f"no hub of this process listens at {address}; is it started, and still open?")
        seat = plane._admit(hello)
        wire = InprocWire(seat, name=f"vflair-hub-{hello.party}-{next(plane._ids)}", on_end=plane._forget)
        with cls._lock:
            plane._wires.add(wire)
        wire.start()
        return wire

    def _forget(self, wire: "InprocWire") -> None:
        with self._lock:
            self._wires.discard(wire)


class InprocWire:
    """Both sides of one stream within a process; a broken wire is two abandoned outboxes."""

    def __init__(self, seat: Seat, *, name: str, on_end: Callable[["InprocWire"], None]) -> None:
        self._seat = seat
        self._up = Outbox()
        self._on_end = on_end
        self._reader = threading.Thread(target=self._receive, name=name, daemon=True)

    @property
    def outbox(self) -> Outbox:
        """What the stream carries to the hub."""
        return self._up

    def start(self) -> None:
        """Let the hub read."""
        self._reader.start()

    def chunks(self) -> Iterator[bytes]:
        """Yield what the hub sends until it ends the stream."""
        try:
            yield from self._seat.outbox
        finally:
            # The hub has ended the stream: what is still underway to it has nowhere to go.
            self._up.abandon()

    def cancel(self) -> None:
        """Break the stream at once."""
        self._up.abandon()
        self._seat.outbox.abandon()

    def close(self) -> None:
        """Free what the stream holds, after it has ended."""
        self.cancel()
        self.join()

    def join(self) -> None:
        """Wait until the hub has read to the end."""
        if self._reader is not threading.current_thread():
            self._reader.join(5.0)

    def _receive(self) -> None:
        try:
            self._seat.receive(self._up)
        finally:
            self._on_end(self)
