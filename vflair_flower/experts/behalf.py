"""Calls in another's name: the body's, to hosts, for the data party whose pass it runs."""

from dataclasses import replace

from vflair_flower.errors import SessionError
from vflair_flower.remote.protocol import BACKWARD, FORWARD
from vflair_flower.session import Request
from vflair_flower.session.calls import HUB
from vflair_flower.settings import ExpertSettings

OWNER = "owner"
"""Names, in a call's meta, the party for which the body asks."""


def on_behalf(request: Request, settings: ExpertSettings) -> Request:
    """Return a host's request as its owner's, if the body asks in that one's name.

    Raises
    ------
    SessionError
        If anybody but the hub's own process speaks for another, or it does more than a body may.
    """
    owner = request.meta.get(OWNER)
    if owner is None and request.source != HUB:
        return request
    allowed = settings.backbone == "split" and request.source == HUB and request.operation in (FORWARD, BACKWARD)
    if not allowed or owner is None:
        raise SessionError(
            f"'{request.source}' asked for a '{request.operation}' in the name of {owner!r}; only the model party of a "
            "job with backbone='split' speaks for others, and does nothing but run its layers."
        )
    return replace(request, source=str(owner))
