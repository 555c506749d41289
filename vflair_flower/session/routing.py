"""Routing: which call is whose, while it is underway through the hub.

What it is: the hub's table of open calls, each under a number that the hub chose.  What it is not: a queue; tensors
pass by it.  Invariant: an answer is taken at most once, and only from the party that was asked.
"""

import threading
from dataclasses import dataclass

from vflair_flower.errors import FrameError


@dataclass(frozen=True, kw_only=True)
class OpenCall:
    """A call that the hub has passed on and that was not answered yet."""

    hub_id: int
    caller: str
    caller_id: int
    target: str
    operation: str


class OpenCalls:
    """Keep the open calls; safe for use from many threads.

    Parameters
    ----------
    limit : int
        How many one caller may have open at once.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._by_hub_id: dict[int, OpenCall] = {}
        self._by_caller: dict[str, dict[int, OpenCall]] = {}
        self._next_id = 0

    def open(self, caller: str, caller_id: int, target: str, operation: str, *, limited: bool = True) -> OpenCall:
        """Enter a call.

        Raises
        ------
        FrameError
            When the caller uses a number twice, or has more calls open than agreed.
        """
        with self._lock:
            mine = self._by_caller.setdefault(caller, {})
            if caller_id in mine:
                raise FrameError(
                    f"party '{caller}' opens call {caller_id} twice; every call needs a number of its own."
                )
            if limited and len(mine) >= self._limit:
                raise FrameError(
                    f"party '{caller}' opens more than {self._limit} calls at once, as agreed; "
                    "await replies first, or agree a larger max_calls_in_flight."
                )
            self._next_id += 1
            call = OpenCall(
                hub_id=self._next_id, caller=caller, caller_id=caller_id, target=target, operation=operation
            )
            mine[caller_id] = call
            self._by_hub_id[call.hub_id] = call
            return call

    def take(self, hub_id: int, target: str) -> OpenCall | None:
        """Take out the call that `target` answers; None when nobody awaits that answer of it."""
        with self._lock:
            call = self._by_hub_id.get(hub_id)
            if call is None or call.target != target:
                return None
            self._remove(call)
            return call

    def cancel(self, caller: str, caller_id: int) -> OpenCall | None:
        """Take out a call that its caller gave up."""
        with self._lock:
            call = self._by_caller.get(caller, {}).get(caller_id)
            if call is not None:
                self._remove(call)
            return call

    def drop(self, party: str) -> list[OpenCall]:
        """Take out all calls of a party and all calls to it."""
        with self._lock:
            dropped = [call for call in self._by_hub_id.values() if party in (call.caller, call.target)]
            for call in dropped:
                self._remove(call)
            return dropped

    def _remove(self, call: OpenCall) -> None:
        del self._by_hub_id[call.hub_id]
        del self._by_caller[call.caller][call.caller_id]
