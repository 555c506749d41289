"""The model party in a terminal: holds its segment, and lets data parties write with it (`vflair serve`).

Each data party has a session of its own, for which it holds a ticket that works once; when it has gone, a new ticket
is handed out.  Invariant: nobody's cache outlives their session.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from vflair_flower.certificate import load_admitted_config
from vflair_flower.errors import ConfigurationError
from vflair_flower.generation.adapters import Adapter, load_own_part
from vflair_flower.generation.tickets import Ticket, model_fingerprint
from vflair_flower.partition import load_segment, resolve_model
from vflair_flower.partition.structure import num_blocks
from vflair_flower.remote import MODEL_PARTY, BodyMode, SegmentServer, agreement_for
from vflair_flower.session import Hub, HubSession, TlsServerFiles
from vflair_flower.settings import GenerationSettings, TaskKind, TaskSettings
from vflair_flower.spec import SplitSpec

WRITING = TaskSettings(kind=TaskKind.CAUSAL_LM)
_POLL_S = 0.1
_LONGEST = 4096


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Where a model party listens and whom it lets in.

    Parameters
    ----------
    parties : tuple[str, ...]
        Names of the data parties.
    bind, advertise, tls, allow_plaintext
        As for `vflair_flower.session.Hub`.
    root_certificates : pathlib.Path or None
        PEM file that the parties trust; by default the certificate itself.
    deadline_s : float
        For every call, and for a cache that nobody uses, in seconds.
    ticket_s : float
        How long a ticket is good, in seconds; then there is a new one.
    once : bool
        Whether to end when every party has come and gone, or has let its ticket lapse.
    """

    parties: tuple[str, ...]
    bind: str = "127.0.0.1:0"
    advertise: str | None = None
    tls: TlsServerFiles | None = None
    root_certificates: Path | None = None
    allow_plaintext: bool = False
    deadline_s: float = 120.0
    ticket_s: float = 86400.0
    once: bool = False

    def __post_init__(self) -> None:
        if not self.parties or len(set(self.parties)) != len(self.parties) or MODEL_PARTY in self.parties:
            raise ConfigurationError(
                f"the parties are {', '.join(self.parties) or 'none'}; name one or more, each once, and none "
                f"'{MODEL_PARTY}'."
            )

    def trusted_pem(self) -> str:
        """Return the PEM text that parties are told to trust; empty without TLS."""
        return "" if self.tls is None else (self.root_certificates or self.tls.certificate_chain).read_text()


class ModelServer:
    """A model party that serves until it is stopped.

    Parameters
    ----------
    spec : SplitSpec
        Model, cut and bounds; `tuning` is taken from the adapter, and a `max_length` that the model has no room for
        is refused.
    settings : ServeSettings
        Where and for whom.
    adapter : Adapter or None
        A finished job's.
    hand_out : callable
        Gets each ticket as it becomes good.

    Raises
    ------
    ConfigurationError
        If the model cannot be cut or read, the adapter does not fit, or the hub may not listen there.
    """

    def __init__(
        self,
        spec: SplitSpec,
        settings: ServeSettings,
        *,
        adapter: Adapter | None = None,
        hand_out: Callable[[Ticket], None],
    ) -> None:
        self.settings = settings
        self.spec = replace(spec, tuning=None if adapter is None else adapter.tuning)
        source = resolve_model(spec.model)
        config = load_admitted_config(source, spec.task)
        self.segment = spec.plan.model_party(num_blocks(config))
        self._adapter, self._hand_out = adapter, hand_out
        self._fingerprint = model_fingerprint(config)
        self._agreement = agreement_for(self.spec, config)
        self._hub = Hub(
            bind=settings.bind,
            advertise=settings.advertise,
            tls=settings.tls,
            allow_plaintext=settings.allow_plaintext,
        )
        loaded = load_segment(source, self.segment, spec.task, weights=spec.weights)
        self._server = SegmentServer(loaded, self.spec, body_mode=BodyMode.SYNCHRONOUS, deadline_s=settings.deadline_s)
        if adapter is not None:
            load_own_part(self._server.module, self.segment, adapter)
        self._sessions: dict[str, HubSession] = {}
        self._stop = threading.Event()

    @property
    def address(self) -> str:
        """Where the hub listens."""
        return self._hub.address

    def __enter__(self) -> Self:
        self._hub.start()
        self._server.begin([], server_round=1, training=False)
        for party in self.settings.parties:
            self._open(party)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hub.close()
        self._server.end()

    def run(self) -> None:
        """Serve until `stop` is called or, if so set, all parties have gone."""
        while self._sessions and not self._stop.wait(_POLL_S):
            for party, session in list(self._sessions.items()):
                if party in session.finished or party in session.lost:
                    self._close(party)
                    if not self.settings.once:
                        self._open(party)

    def stop(self) -> None:
        """Let `run` return."""
        self._stop.set()

    def _open(self, party: str) -> None:
        settings = self.settings
        session = self._hub.open_session(
            [party],
            self._agreement,
            hosts={MODEL_PARTY: self._server},
            deadline_s=settings.deadline_s,
            join_deadline_s=settings.ticket_s,
            on_lost=lambda lost, _reason: self._server.leave(lost, lost=True),
        )
        self._server.join(party)
        self._sessions[party] = session
        ticket = Ticket(
            address=self._hub.address,
            session=session.id,
            party=party,
            ticket=session.tickets[party],
            spec=self.spec.to_json(),
            model=self._fingerprint,
            adapter="" if self._adapter is None else self._adapter.fingerprint,
            deadline_s=float(settings.deadline_s),
            root_certificates=settings.trusted_pem(),
            allow_plaintext=settings.allow_plaintext,
        )
        self._hand_out(ticket)

    def _close(self, party: str) -> None:
        self._server.leave(party, lost=False)
        self._sessions.pop(party).close()


def bounds_for(model: str, *, max_rows: int, max_length: int) -> GenerationSettings:
    """Return the bounds to agree on; a `max_length` of 0 takes the model's own context, at most 4096 tokens."""
    config = load_admitted_config(resolve_model(model), WRITING).get_text_config()
    room = int(getattr(config, "max_position_embeddings", None) or _LONGEST)
    if max_length > room:
        raise ConfigurationError(
            f"max_length is {max_length}, but the model has room for {room} tokens; choose {room} or fewer."
        )
    return GenerationSettings(max_rows=max_rows, max_length=max_length or min(room, _LONGEST))


def serve(
    spec: SplitSpec,
    settings: ServeSettings,
    *,
    adapter: Adapter | None,
    hand_out: Callable[[Ticket], None],
    say: Callable[[str], None],
) -> None:
    """Serve until interrupted; `say` gets a line about what is served where."""
    with ModelServer(spec, settings, adapter=adapter, hand_out=hand_out) as server:
        say(f"serving {server.segment.describe()} of {spec.model} at {server.address}; end with Ctrl-C")
        server.run()


def names(parties: Sequence[str]) -> tuple[str, ...]:
    """Return the parties' names; one called "me" where none is named."""
    return tuple(parties) or ("me",)
