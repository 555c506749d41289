"""Which frames of a session belong together, and which of them are of a sample.

A forward pass is a call, or one per layer at a host of experts, or one per part of a model with an encoder; replies,
backward calls and all calls of its cache belong to it.  What carries tensors and belongs to no pass (gradients to
be averaged) is sampled by itself; frames without tensors are always of the sample.
Invariant: the choice depends on the order of a caller's calls alone, so all who see them choose alike.
"""

from collections import Counter

from vflair_flower.session.header import Kind
from vflair_flower.session.sighting import Sighting

_FORTH = {"backward": "forward", "body-backward": "body-forward", "block-backward": "block"}
"""A backward operation and the forward operation that it belongs to; together they share numbers of calls."""
_PARTS = {"encoder": 0, "decoder": 1}
_Caller = tuple[str, ...]


class Sampler:
    """Choose each n-th forward pass of every caller at everyone it calls, from the first on.

    Parameters
    ----------
    every : int
        n.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._counts: Counter[_Caller] = Counter()
        self._passes: dict[_Caller, tuple[int, bool]] = {}
        self._chosen: dict[tuple[str, ...], bool] = {}
        self._asked: dict[tuple[str, str, int], bool] = {}

    def keeps(self, seen: Sighting, *, may_begin: bool = True) -> bool:
        """Return whether a frame is of the sample; without `may_begin`, only if what it belongs to is already."""
        if seen.kind in (Kind.REPLY, Kind.ERROR):
            asked_on = "down" if seen.direction == "up" else "up"
            return self._asked.pop((seen.party, asked_on, seen.call_id), False)
        if seen.kind is not Kind.CALL:
            return may_begin
        kept = self._keeps_call(seen, may_begin)
        self._asked[seen.party, seen.direction, seen.call_id] = kept
        return kept

    def _keeps_call(self, seen: Sighting, may_begin: bool) -> bool:
        named = next((name for name in ("cache", "call") if name in seen.meta), None)
        operation = _FORTH.get(seen.operation, seen.operation)
        caller = (seen.source, str(seen.meta.get("owner", "")), seen.target, operation)
        if named is None:
            return self._begins(caller, may_begin) if seen.tensors else may_begin
        key = (*caller, named, str(seen.meta[named]))
        if key not in self._chosen:
            self._chosen[key] = self._goes_on(caller, _place(seen), may_begin)
        return self._chosen[key]

    def _goes_on(self, caller: _Caller, place: int, may_begin: bool) -> bool:
        """Choose as before where a call is a later part of the same pass, else anew."""
        before = self._passes.get(caller)
        kept = before[1] if before is not None and place > before[0] else self._begins(caller, may_begin)
        self._passes[caller] = (place, kept)
        return kept

    def _begins(self, caller: _Caller, may_begin: bool) -> bool:
        number = self._counts[caller]
        self._counts[caller] += 1
        return number % self._every == 0 and may_begin


def _place(seen: Sighting) -> int:
    """Return how far into its pass a call is."""
    for name in ("layer", "block"):
        if name in seen.meta:
            return int(seen.meta[name])
    return _PARTS.get(str(seen.meta.get("part", "")), 0)
