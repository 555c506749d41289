"""The hub: the one listener, in the strategy's process, that all parties dial.

What it is: a door and a directory of sessions; one hub and one port live for a whole run while sessions come and go.
What it is not: trusted with more than it is given; it sees what it hosts and what it passes on.  Invariant: a stream
belongs to exactly one party of one session, for which a ticket was shown once.
"""

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from vflair_flower.errors import ConfigurationError
from vflair_flower.session.agreement import Agreement
from vflair_flower.session.calls import HUB, Handler
from vflair_flower.session.desk import Guard
from vflair_flower.session.emulation import LinkEmulation
from vflair_flower.session.grpc_plane import GrpcPlane, TlsServerFiles, host_of, is_loopback
from vflair_flower.session.hub_session import HubSession
from vflair_flower.session.link import Link, connect
from vflair_flower.session.seat import HubSeat, refusal
from vflair_flower.session.sighting import Tap
from vflair_flower.session.transport import INPROC, Hello, InprocPlane, Plane

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@-]{0,63}")


class Hub:
    """Listen for the parties of this run.

    Parameters
    ----------
    bind : str
        host:port to listen on; port 0 takes a free one.  "inproc" serves links of the same process without sockets.
    advertise : str | None
        host or host:port under which parties reach this hub, when that is not `bind`.
    tls : TlsServerFiles | None
        Certificate and key; required anywhere but on loopback.
    allow_plaintext : bool
        Whether to listen beyond loopback without TLS, for instance inside an encrypted tunnel.
    max_parties : int
        How many parties all open sessions may have together; each holds threads.
    emulate : LinkEmulation | None
        Slower links to parties than there are, for measurements.

    Raises
    ------
    ConfigurationError
        When `bind` is not loopback and there is no TLS, or when no party could dial the address.

    Examples
    --------
    >>> import torch
    >>> from vflair_flower.session import OperationSpec, Reply, TensorSpec
    >>> x = TensorSpec("x", (torch.float32,), (4,))
    >>> agreement = Agreement({"double": OperationSpec((x,), (x,))})
    >>> with Hub(bind="inproc") as hub:
    ...     hosts = {"body": lambda request: Reply({"x": 2 * request.tensors["x"]})}
    ...     with hub.open_session(["a"], agreement, hosts=hosts, deadline_s=10) as session:
    ...         with hub.connect(session, "a") as link:
    ...             print(link.call("body", "double", {"x": torch.ones(2)}).tensors["x"])
    tensor([2., 2.])
    """

    def __init__(
        self,
        *,
        bind: str = "127.0.0.1:0",
        advertise: str | None = None,
        tls: TlsServerFiles | None = None,
        allow_plaintext: bool = False,
        max_parties: int = 1024,
        emulate: LinkEmulation | None = None,
    ) -> None:
        if not isinstance(max_parties, int) or max_parties < 1:
            raise ConfigurationError(f"max_parties is {max_parties!r}; give 1 or more.")
        self._advertise = advertise
        self._emulate = emulate
        self._max_parties = max_parties
        self._plane: Plane
        if bind == INPROC:
            self._plane = InprocPlane()
        else:
            if tls is None and not allow_plaintext and not is_loopback(bind):
                raise ConfigurationError(
                    f"the hub would listen on {bind} in plain text, where others can read tensors and tickets; give "
                    "tls=TlsServerFiles(...), or allow_plaintext=True inside a tunnel that encrypts."
                )
            if advertise is None and host_of(bind) in ("0.0.0.0", "::"):
                raise ConfigurationError(
                    f"the hub would listen on {bind}, an address that no party can dial; give advertise=... with the "
                    "name under which parties reach this machine."
                )
            self._plane = GrpcPlane(bind=bind, tls=tls, max_streams=max_parties)
        self._lock = threading.Lock()
        self._sessions: dict[str, HubSession] = {}
        self._address: str | None = None

    @property
    def address(self) -> str:
        """Where parties dial: host:port, or inproc://id."""
        if self._address is None:
            raise ConfigurationError("the hub has no address, because it is not started or was closed; call start().")
        return self._address

    def start(self) -> None:
        """Listen; does nothing when the hub listens already.

        Raises
        ------
        ConfigurationError
            When the port cannot be had, or the TLS files cannot be used.
        """
        if self._address is not None:
            return
        bound = self._plane.start(self._admit)
        if self._advertise is None:
            self._address = bound
        elif re.search(r":\d+$", self._advertise):
            self._address = self._advertise
        else:
            self._address = f"{self._advertise}:{bound.rpartition(':')[2]}"

    def close(self) -> None:
        """Close all sessions and stop listening."""
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            session.close()
        self._plane.stop()
        self._address = None

    def open_session(
        self,
        parties: Sequence[str],
        agreement: Agreement,
        *,
        hosts: Mapping[str, Handler] | None = None,
        deadline_s: float,
        join_deadline_s: float = 60.0,
        on_lost: Callable[[str, str], None] | None = None,
        tap: Tap | None = None,
    ) -> HubSession:
        """Open a session for these parties.

        Parameters
        ----------
        parties : Sequence[str]
            Their names, each once.
        agreement : Agreement
            What may travel.
        hosts : Mapping[str, Handler] | None
            Endpoints answered in this process, by name.
        deadline_s : float
            Default deadline of a call that the hub makes, and how long a party may take no bytes.
        join_deadline_s : float
            A party that has not joined by then is lost.
        on_lost : Callable[[str, str], None] | None
            Called at once with name and reason when a party is lost; must return soon.
        tap : Tap | None
            Sees every frame of the session as the hub does (`vflair_flower.session.sighting`).

        Raises
        ------
        ConfigurationError
            When a name is unusable, or the hub has no room for so many parties.
        """
        hosts = hosts or {}
        names = [*parties, *hosts]
        unusable = [name for name in names if not isinstance(name, str) or not _NAME.fullmatch(name)]
        if unusable or HUB in parties or len(set(names)) != len(names) or not parties:
            raise ConfigurationError(
                f"a session is opened for the parties {list(parties)} and hosts {list(hosts)}; give one party or more, "
                f"and each a name of its own of 1 to 64 of A-Z a-z 0-9 _ . : @ - (no party is called '{HUB}')."
            )
        _ = self.address  # says what to do when the hub is not started
        with self._lock:
            seats = sum(len(session.tickets) for session in self._sessions.values()) + len(parties)
            if seats > self._max_parties:
                raise ConfigurationError(
                    f"the open sessions would have {seats} parties, but this hub holds {self._max_parties}; close "
                    "sessions that are over, or give the hub a larger max_parties."
                )
            session = HubSession(
                parties=parties,
                agreement=agreement,
                hosts=hosts,
                deadline_s=deadline_s,
                join_deadline_s=join_deadline_s,
                on_lost=on_lost,
                on_closed=self._forget,
                emulate=self._emulate,
                tap=tap,
            )
            self._sessions[session.id] = session
        return session

    def connect(self, session: HubSession, party: str, *, tap: Tap | None = None, guard: Guard | None = None) -> Link:
        """Join a session as a party in the hub's own process, as simulations and rehearsals do; see `connect`.

        Parameters
        ----------
        session : HubSession
            Open at this hub; its deadline is the link's.
        party : str
            Which has not joined yet.
        tap, guard
            As of `vflair_flower.session.connect`.
        """
        return connect(
            self.address,
            session=session.id,
            party=party,
            ticket=session.tickets[party],
            agreement=session.agreement,
            deadline_s=session.deadline_s,
            tap=tap,
            guard=guard,
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _admit(self, hello: Hello) -> HubSeat:
        with self._lock:
            session = self._sessions.get(hello.session)
        if session is None:
            raise refusal(hello)
        return session.admit(hello)

    def _forget(self, session: HubSession) -> None:
        with self._lock:
            self._sessions.pop(session.id, None)
