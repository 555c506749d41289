"""Whoever watches encrypted traffic between owners and hosts of experts: sizes and times of frames, and nothing else.

U tokens that go to a host for one layer, R rows of them, K candidate texts.
Invariant: no tensor and no plain value of a frame can be reached from a view.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from vflair_flower.attacks.experts.public import PublicModel
from vflair_flower.attacks.guesses import TextGuess
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.registry import Goal, attack
from vflair_flower.errors import DataError
from vflair_flower.experts.padding import Room, rooms
from vflair_flower.experts.placement import Placement
from vflair_flower.experts.protocol import INDEX_DTYPE, Codec
from vflair_flower.session import Sighting
from vflair_flower.session.frame import ALIGN_BYTES
from vflair_flower.settings import TaskKind
from vflair_flower.spec import SplitSpec
from vflair_flower.tasks import Encoded

_OVERHEADS = range(0, 1025, ALIGN_BYTES)
"""What a frame may have on top of its numbers: a header, filled up to a multiple."""


@dataclass(frozen=True, kw_only=True)
class WireFrame:
    """One frame: whose stream, which way, how many bytes, and when, in seconds from the first."""

    party: str
    direction: str
    num_bytes: int
    time_s: float


@dataclass(frozen=True, kw_only=True, eq=False)
class WireView:
    """What somebody saw who watches the streams of some hosts, and knows the job.

    Parameters
    ----------
    placement : Placement
        Of the job.
    frames : tuple of WireFrame
        In the order in which they came by.
    bytes_per_token, bytes_per_row : int
        Of a call, by the job's wire and codec.
    padding : str
        To what calls are filled up, which the job says.
    candidates : tuple of Encoded
        Assumed beside: each text that was sent is one of these.
    """

    placement: Placement
    frames: tuple[WireFrame, ...]
    bytes_per_token: int
    bytes_per_row: int
    candidates: tuple[Encoded, ...]
    padding: str = "none"

    def __post_init__(self) -> None:
        if not self.frames or not self.candidates:
            raise DataError(
                f"there are {len(self.frames)} frames and {len(self.candidates)} candidate texts; at least one of each "
                "is needed."
            )


def wire_view(
    sightings: Iterable[Sighting],
    *,
    hosts: Sequence[str],
    placement: Placement,
    spec: SplitSpec,
    hidden: int,
    candidates: Sequence[Encoded],
) -> WireView:
    """Take sizes and times of the frames to and from some hosts; `hidden` is D."""
    assert spec.experts is not None
    seen = [one for one in sightings if one.party in hosts and one.tensors]  # what joins and ends a session is small
    first_s = seen[0].time_s if seen else 0.0
    frames = tuple(
        WireFrame(party=one.party, direction=one.direction, num_bytes=one.num_bytes, time_s=one.time_s - first_s)
        for one in seen
    )
    packed = Codec(spec).pack("hidden", torch.zeros(1, hidden)).values()
    per_row = 2 * INDEX_DTYPE.itemsize + (torch.float32.itemsize if spec.experts.combine == "host" else 0)
    return WireView(
        placement=placement,
        frames=frames,
        bytes_per_token=sum(tensor.nbytes for tensor in packed),
        bytes_per_row=per_row,
        candidates=tuple(candidates),
        padding=spec.experts.padding,
    )


@attack(
    "size-time",
    goal=Goal.TEXT,
    sees=WireView,
    paper="own; the network's analogue of expert loads in MoEcho, arXiv 2508.15036",
    kinds=(TaskKind.CAUSAL_LM,),
)
def size_time(view: WireView, knows: Knowledge, *, seed: int = 0) -> TextGuess:
    """Guess which of the candidates each text was, by how large the calls to each host are in each layer.

    Assumed: texts are run one by one, without gradients.  A host that would get nothing of a text in a layer is not
    called (unless calls are filled up), so that candidates differ in how many frames they explain too; texts are told
    apart as they are guessed, and what all frames have on top is what explains them best.  Of times only their order is
    used: on one machine they say nothing about hosts that are far apart.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`; a row of the guess is a text.
    """
    public = PublicModel(knows.surrogate)
    hosts = tuple(sorted({frame.party for frame in view.frames}))
    queues = [
        [float(one.num_bytes) for one in view.frames if one.party == host and one.direction == "down"] for host in hosts
    ]
    expected = [_expected(public, view, hosts, row) for row in view.candidates]
    found = min((_explained(queues, expected, overhead) for overhead in _OVERHEADS), key=lambda one: one[0])[1]
    return TextGuess(ids=tuple(torch.tensor(view.candidates[place].input_ids) for place in found), aligned=False)


def _explained(
    queues: Sequence[Sequence[float]], expected: Sequence[Sequence[Sequence[float]]], overhead: float
) -> tuple[float, list[int]]:
    """Return the candidates that explain all frames best, one after the other, and how badly they do."""
    found: list[int] = []
    total, heads = 0.0, [0] * len(queues)
    while any(head < len(queue) for head, queue in zip(heads, queues, strict=True)):
        left = [queue[head:] for head, queue in zip(heads, queues, strict=True)]
        apart = [_apart(left, sizes, overhead) for sizes in expected]
        best = min(range(len(expected)), key=apart.__getitem__)
        if apart[best] == math.inf:  # frames are left that no candidate explains
            best = min(range(len(expected)), key=lambda k: sum(map(len, expected[k])))
        else:
            total += apart[best]
        heads = [head + max(1, len(sizes)) for head, sizes in zip(heads, expected[best], strict=True)]
        found.append(best)
    return total, found


def _apart(queues: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], overhead: float) -> float:
    """Return how badly a candidate explains the next frames to each host, in bytes per frame."""
    if any(len(queue) < len(wanted) for queue, wanted in zip(queues, sizes, strict=True)):
        return math.inf
    left = [
        abs(seen - byte - overhead)
        for queue, wanted in zip(queues, sizes, strict=True)
        for seen, byte in zip(queue, wanted, strict=False)
    ]
    return sum(left) / len(left) if left else math.inf


def _expected(public: PublicModel, view: WireView, hosts: Sequence[str], row: Encoded) -> list[list[float]]:
    """Return the bytes of tokens and rows of each call that a text makes, by host, first layer first."""
    layers = view.placement.spread
    entered = public.entered(torch.tensor([row.input_ids]), layers=layers)
    found: dict[str, list[float]] = {host: [] for host in hosts}
    for layer in layers:
        expert_TK = entered[layer].expert_BTK[0].cpu()
        held = {host: view.placement.experts_of(host)[layer] for host in view.placement.called}
        held = {host: own for host, own in held.items() if own}
        hits = {host: torch.isin(expert_TK, torch.tensor(own)) for host, own in held.items()}
        sent = {host: Room(tokens=int(hit.any(-1).sum()), rows=int(hit.sum())) for host, hit in hits.items()}
        if view.padding != "none":
            counts = {host: len(own) for host, own in held.items()}
            sent = rooms(view.padding, sent, counts, tokens=len(expert_TK), per_token=expert_TK.shape[1])
        for host in hosts:
            if host in sent and sent[host].tokens:
                one = sent[host]
                found[host].append(float(one.tokens * view.bytes_per_token + one.rows * view.bytes_per_row))
    return list(found.values())
