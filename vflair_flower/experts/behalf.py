"""Calls in another's name, to hosts: the body's and, in hand-off, a lead's, for the party whose pass they run."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from vflair_flower.errors import SessionError
from vflair_flower.remote.protocol import BACKWARD, FORWARD
from vflair_flower.session import Caller, HubSession, Reply, Request
from vflair_flower.session.calls import HUB
from vflair_flower.session.header import Meta
from vflair_flower.settings import ExpertSettings

OWNER = "owner"
"""Names, in a call's meta, the party for which the body or a lead asks."""
_PATIENCE = 0.5
"""Part of a deadline that the body or a lead waits for a host, so that its own caller is still there to hear of it."""


class InName:
    """The link of whoever calls hosts in an owner's name.

    Parameters
    ----------
    link : Caller or HubSession
        What the calls are made with.
    owner : str
        In whose name.
    party : str
        Who makes them.
    deadline_s : float
        Of the calls that they are made for, in seconds.
    """

    def __init__(self, link: Caller | HubSession, owner: str, *, party: str, deadline_s: float) -> None:
        self.party = party
        self._link, self._owner, self._timeout_s = link, owner, _PATIENCE * deadline_s

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
        named: Meta = {**(meta or {}), OWNER: self._owner}
        return self._link.call(target, operation, tensors, named, timeout_s=timeout_s or self._timeout_s)


def on_behalf(request: Request, settings: ExpertSettings) -> Request:
    """Return a host's request as its owner's, if the body or a lead asks in that one's name.

    In hand-off every party may be another's lead, so any of a session may speak for any; its calls get numbers that are
    its own, so that nobody can go on with a call that another has made.

    Raises
    ------
    SessionError
        If anybody speaks for another who may not, or does more than running layers.
    """
    owner = request.meta.get(OWNER)
    if owner is None and request.source != HUB:
        return request
    runs = request.operation in (FORWARD, BACKWARD)
    if owner is not None and runs and settings.semantics != "return" and request.source not in (HUB, owner):
        own = int.from_bytes(hashlib.sha256(request.source.encode()).digest()[:8], "big") + 1
        meta = {**request.meta, "call": -((own << 64) | (int(request.meta["call"]) & (1 << 64) - 1))}
        return replace(request, source=str(owner), meta=meta)
    allowed = settings.backbone == "split" and request.source == HUB and runs
    if not allowed or owner is None:
        raise SessionError(
            f"'{request.source}' asked for a '{request.operation}' in the name of {owner!r}; only the model party of a "
            "job with backbone='split' speaks for others, or a lead in hand-off, and only to run layers."
        )
    return replace(request, source=str(owner))
