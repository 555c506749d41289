"""The seat: the place that the hub keeps for one party of one session.

What it is: a ticket, an outbox and the end of the party's stream.  What it is not: a decision; who may sit is for the
session to say.  Invariant: the ticket is random, 256 bits long, and compared in constant time.
"""

import hashlib
import hmac
import secrets
import threading
from collections.abc import Callable, Collection, Iterator

from vflair_flower.errors import FrameError, TicketError
from vflair_flower.session.calls import HUB
from vflair_flower.session.emulation import LinkEmulation
from vflair_flower.session.frame import Frame
from vflair_flower.session.header import Kind
from vflair_flower.session.outbox import Outbox
from vflair_flower.session.transport import Hello

_MAX_STRANGERS = 16
"""How many names that do not exist a party may call; each becomes a line of the ledger."""


class HubSeat:
    """The place of one party; waits for it from the start, so that what is sent early is not lost.

    Parameters
    ----------
    party : str
        For whom.
    receive : Callable[[str, Iterator[bytes]], None]
        Takes what the party sends.
    emulate : LinkEmulation | None
        A slower link to it than there is.
    """

    def __init__(
        self,
        party: str,
        receive: Callable[[str, Iterator[bytes]], None],
        emulate: LinkEmulation | None = None,
    ) -> None:
        self.party = party
        self.ticket = secrets.token_urlsafe(32)
        self.outbox = Outbox(held=True, emulate=emulate)
        self.done = threading.Event()
        self._strangers: set[str] = set()
        self._digest = _digest_of(self.ticket)
        self._receive = receive

    def receive(self, chunks: Iterator[bytes]) -> None:
        """Take what the party sends until its stream ends."""
        try:
            self._receive(self.party, chunks)
        finally:
            self.done.set()

    def check_target(self, frame: Frame, parties: Collection[str], hosts: Collection[str]) -> None:
        """Raise `FrameError` when the party sends a frame where it has nothing to send."""
        if frame.kind is not Kind.CALL and frame.target not in parties and frame.target != HUB:
            raise FrameError(
                f"party '{self.party}' sends a {frame.kind.name} to '{frame.target[:80]}', who asked nothing of it."
            )
        if frame.kind is Kind.CALL and frame.target not in parties and frame.target not in hosts:
            self._strangers.add(frame.target)
            if len(self._strangers) > _MAX_STRANGERS:
                raise FrameError(f"party '{self.party}' calls one name after the other that does not exist.")


def shows_ticket(seat: HubSeat | None, hello: Hello) -> bool:
    """Say whether the ticket shown is that of the seat; takes as long when there is no such seat."""
    right = hmac.compare_digest(_digest_of(hello.ticket), seat._digest if seat is not None else bytes(32))
    return right and seat is not None


def refusal(hello: Hello) -> TicketError:
    """Return the one error that every refused party sees, whatever was wrong."""
    return TicketError(
        f"the hub refused party '{hello.party[:80]}' in session '{hello.session[:80]}': the ticket is wrong, was used "
        "before, or belongs to another party or to a session that has ended. Use the ticket of this round, once."
    )


def _digest_of(ticket: str) -> bytes:
    # Digests are of one length, whatever a stranger sends.
    return hashlib.sha256(ticket.encode("utf-8", "replace")).digest()
