"""Who may act when, among parties that train one body together: a barrier and a turn, both of which parties may leave.

No tensors here.  Invariants: nobody waits longer than the deadline; a party that leaves never holds the others up; the
order of turns depends on the parties' names alone, not on who was quicker.
"""

import threading
from collections.abc import Callable, Iterable

from vflair_flower.errors import DeadlineError, PartyLostError, SessionError


class Barrier:
    """All members arrive with something; the last one to arrive acts for all; then all go on."""

    def __init__(self, members: Iterable[str], deadline_s: float) -> None:
        self._members = set(members)
        self._arrived: set[str] = set()
        self._cycle = 0
        self._failure: BaseException | None = None
        self._deadline_s = deadline_s
        self._changed = threading.Condition()

    def arrive(self, member: str, act: Callable[[list[str]], None]) -> None:
        """Wait until every member has arrived or left; `act` runs once, before anyone goes on.

        Parameters
        ----------
        member : str
            Who arrives.
        act : callable
            Gets the names of those who arrived and have not left since, in order.

        Raises
        ------
        PartyLostError
            If the member itself was taken out, before or while it waited.
        DeadlineError
            If others did not come in time; names them.
        """
        with self._changed:
            if member not in self._members:
                raise PartyLostError(member, "it has left this round and may not step any more")
            cycle = self._cycle
            self._arrived.add(member)
            self._act = act
            self._release_if_complete()
            gone_on = self._changed.wait_for(
                lambda: self._cycle != cycle or member not in self._members, self._deadline_s
            )
            if not gone_on:
                late = sorted(self._members - self._arrived)
                self._arrived.discard(member)
                raise DeadlineError(
                    f"waited {self._deadline_s:g} s for the step of {', '.join(late)}; the body steps when every "
                    "party has. Raise deadline_s if that party is merely slow."
                )
            if self._cycle == cycle:
                raise PartyLostError(member, "it left this round while its step was waiting for others")
            if self._failure is not None:
                raise SessionError(f"the body's optimiser step failed: {self._failure}") from self._failure

    def leave(self, member: str) -> None:
        """Take a member out; whoever waits for it goes on."""
        with self._changed:
            self._members.discard(member)
            self._arrived.discard(member)
            self._release_if_complete()
            self._changed.notify_all()

    def _release_if_complete(self) -> None:
        if not self._arrived or self._members - self._arrived:
            return
        try:
            self._act(sorted(self._arrived))
            self._failure = None
        except Exception as error:
            self._failure = error
        self._arrived.clear()
        self._cycle += 1
        self._changed.notify_all()


class Turns:
    """One member acts at a time, in the order of their names, round and round, until all have left."""

    def __init__(self, members: Iterable[str], deadline_s: float) -> None:
        self._queue = sorted(members)
        self._holding = False
        self._deadline_s = deadline_s
        self._changed = threading.Condition()

    def take(self, member: str) -> None:
        """Wait for the member's turn; returns at once if it already has it.

        Raises
        ------
        PartyLostError
            If the member itself was taken out.
        DeadlineError
            If the turn did not come in time; names who has it.
        """
        with self._changed:
            in_time = self._changed.wait_for(
                lambda: member not in self._queue or self._queue[0] == member, self._deadline_s
            )
            if not in_time:
                raise DeadlineError(
                    f"'{member}' waited {self._deadline_s:g} s for its turn; '{self._queue[0]}' has it. "
                    "Raise deadline_s if that party is merely slow."
                )
            if member not in self._queue:
                raise PartyLostError(member, "it has left this round and gets no more turns")
            self._holding = True

    def give(self, member: str) -> None:
        """Hand the turn on."""
        with self._changed:
            if self._holding and self._queue and self._queue[0] == member:
                self._queue.append(self._queue.pop(0))
                self._holding = False
                self._changed.notify_all()

    def leave(self, member: str) -> None:
        """Take a member out; if it had the turn, the next one gets it."""
        with self._changed:
            if member in self._queue:
                self._holding = self._holding and self._queue[0] != member
                self._queue.remove(member)
                self._changed.notify_all()
