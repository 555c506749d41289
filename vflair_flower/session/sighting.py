"""Sightings: frames with tensors as somebody on their way saw them, for those who ask to see them.

What it is: one call per frame to whoever taps a session.  What it is not: on by default; a session without a tap keeps
nothing and copies nothing.  Invariant: a sighting holds what crossed and nothing of how it came about.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vflair_flower.session.frame import Frame, Parcel
from vflair_flower.session.header import DTYPES, Header, Kind, Meta, TensorHeader
from vflair_flower.session.ledger import Direction


@dataclass(frozen=True, kw_only=True, eq=False)
class Sighting:
    """One frame that was seen.

    Parameters
    ----------
    session : str
        The session's id.
    party, direction
        On whose stream it was, and which way: up leaves the party, towards the hub.
    kind : Kind
        CALL, REPLY, ERROR, NOTICE or BYE.
    call_id : int
        The same for a call and its answer on one stream.
    source, target : str
        Who sent it and to whom.
    operation : str
        Of the call.
    meta : mapping of str to str, int, float or bool
        Plain values sent along.
    tensors : mapping of str to Tensor
        On the CPU; those who keep them copy them, since whoever is called may change them.
    num_bytes : int
        Of the whole frame.
    time_s : float
        Monotonic, of the process that saw it.
    """

    session: str
    party: str
    direction: Direction
    kind: Kind
    call_id: int
    source: str
    target: str
    operation: str
    meta: Meta = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    num_bytes: int
    time_s: float = field(default_factory=time.monotonic)


Tap = Callable[[Sighting], None]
"""Sees every frame of a session, on the thread that carries it: it must return soon and may raise nothing."""


def of_frame(
    frame: Frame, header: Header, *, session: str, party: str, direction: Direction, overhead_bytes: int
) -> Sighting:
    """Return the sighting of a frame that came in; what goes up is the party's, whatever it says."""
    source = party if direction == "up" else frame.source
    return _sighting(header, source, frame.tensors, session, party, direction, overhead_bytes)


def of_parcel(parcel: Parcel, *, session: str, party: str, direction: Direction) -> Sighting:
    """Return the sighting of a frame that goes out; its tensors share the parcel's memory."""
    header = parcel.header
    tensors = {told.name: _tensor(told, part) for told, part in zip(header.tensors, parcel.payload, strict=True)}
    return _sighting(header, header.source, tensors, session, party, direction, parcel.overhead_bytes)


def _tensor(header: TensorHeader, part: memoryview) -> Tensor:
    if not part.nbytes:
        return torch.empty(header.shape, dtype=DTYPES[header.dtype])
    return torch.frombuffer(part, dtype=DTYPES[header.dtype]).view(header.shape)


def _sighting(
    header: Header,
    source: str,
    tensors: Mapping[str, Tensor],
    session: str,
    party: str,
    direction: Direction,
    overhead_bytes: int,
) -> Sighting:
    return Sighting(
        session=session,
        party=party,
        direction=direction,
        kind=header.kind,
        call_id=header.call_id,
        source=source,
        target=header.target,
        operation=header.operation,
        meta=dict(header.meta),
        tensors=tensors,
        num_bytes=overhead_bytes + header.payload_bytes,
    )
