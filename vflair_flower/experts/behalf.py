"""Calls in another's name, to hosts: the body's and, in hand-off, a lead's, for the party whose pass they run."""

import hashlib
from dataclasses import replace

from vflair_flower.errors import SessionError
from vflair_flower.remote.protocol import BACKWARD, FORWARD
from vflair_flower.session import Request
from vflair_flower.session.calls import HUB
from vflair_flower.settings import ExpertSettings

OWNER = "owner"
"""Names, in a call's meta, the party for which the body or a lead asks."""


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
