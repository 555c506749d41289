"""What hosts of experts saw of other parties' tokens, for one host or for several that tell each other.

U tokens of a call, R rows of it (a token once for each of the host's experts that it is routed to), N tokens that a
coalition saw of one layer in one forward pass, E experts of a layer, D hidden.
A host sees tokens in the order of the owner's batch, row by row, but not which are missing, where a row ends, or what
is padding.  Two hosts know a token that both saw by its numbers, which are the same bits.
Invariant: nothing but what these hosts were sent can be reached from a view; what is assumed beside is in `granted`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.experts.padding import Room, emptied, real_part
from vflair_flower.experts.placement import Placement
from vflair_flower.experts.protocol import Codec
from vflair_flower.remote.protocol import BACKWARD, FORWARD
from vflair_flower.session import Sighting
from vflair_flower.session.header import Kind
from vflair_flower.spec import SplitSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class HostCall:
    """One owner's tokens at one host, of one layer in one forward pass.

    Parameters
    ----------
    session, owner, host : str
        Of whose model, and who was asked.
    layer : int
        Place among the layers with experts.
    number : int
        The owner's count of its calls, which goes along with each.
    tokens_UD : Tensor
        Float32, the experts' inputs as sent, in the order of the owner's batch.
    expert_R, token_R : Tensor
        Int64: of each row the expert, and which of the tokens it is.
    weight_R : Tensor or None
        Float32, the router's weights, where they were sent.
    grad_UD : Tensor or None
        Float32, the gradient of the owner's loss by each token's weighted sum of outputs; None without a backward pass.
    """

    session: str
    owner: str
    host: str
    layer: int
    number: int
    tokens_UD: Tensor
    expert_R: Tensor
    token_R: Tensor
    weight_R: Tensor | None = None
    grad_UD: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Moment:
    """All that a coalition saw of one layer in one forward pass of one owner.

    Parameters
    ----------
    session, owner : str
        Whose pass.
    layer : int
        Place among the layers with experts.
    calls : tuple of HostCall
        At most one per host.
    place_of : tuple of Tensor
        For each call, int64 [U], ascending: which of the N tokens each of its tokens is.
    tokens_ND : Tensor
        Float32, the tokens, each once.  Their order is one that agrees with every host's; where two hosts saw
        different tokens between two that both saw, it is a guess.
    """

    session: str
    owner: str
    layer: int
    calls: tuple[HostCall, ...]
    place_of: tuple[Tensor, ...]
    tokens_ND: Tensor

    @classmethod
    def of(cls, calls: Sequence[HostCall]) -> "Moment":
        """Put calls of one layer and forward pass together."""
        places, count = _merged([call.tokens_UD for call in calls])
        tokens_ND = calls[0].tokens_UD.new_empty(count, calls[0].tokens_UD.shape[1])
        for call, place_U in zip(calls, places, strict=True):
            tokens_ND[place_U] = call.tokens_UD
        first = calls[0]
        return cls(
            session=first.session,
            owner=first.owner,
            layer=first.layer,
            calls=tuple(calls),
            place_of=tuple(places),
            tokens_ND=tokens_ND,
        )

    @property
    def gradients(self) -> Tensor | None:
        """The gradient by each token's output; None if a call had no backward pass."""
        grad_ND = torch.zeros_like(self.tokens_ND)
        for call, place_U in zip(self.calls, self.place_of, strict=True):
            if call.grad_UD is None:
                return None
            grad_ND[place_U] = call.grad_UD
        return grad_ND

    def hits(self, experts: int) -> Tensor:
        """Return, of each token, which of the coalition's experts it was sent to: bool [N, E]."""
        hits_NE = torch.zeros(len(self.tokens_ND), experts, dtype=torch.bool)
        for call, place_U in zip(self.calls, self.place_of, strict=True):
            hits_NE[place_U[call.token_R], call.expert_R] = True
        return hits_NE


@dataclass(frozen=True, kw_only=True, eq=False)
class Granted:
    """What an adversary is assumed to know of where tokens stand; nobody sends it.

    Parameters
    ----------
    places : tuple of Tensor
        For each moment of the view, int64 [N, 2]: the row of each token among all rows of its owner, and its position
        in that row's text, `NOTHING` for padding.
    lengths : tuple of int
        How many tokens each row has.
    """

    places: tuple[Tensor, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class HostView:
    """What a host of experts, or a coalition of hosts, saw.

    Parameters
    ----------
    hosts : tuple of str
        The coalition.
    placement : Placement
        Of the job, which every party knows.
    calls : tuple of HostCall
        In the order in which their owners made them.
    granted : Granted or None
        What is assumed beside.
    """

    hosts: tuple[str, ...]
    placement: Placement
    calls: tuple[HostCall, ...]
    granted: Granted | None = field(default=None)

    def __post_init__(self) -> None:
        if not self.calls:
            raise DataError(
                f"the hosts {', '.join(self.hosts)} saw no token of another party. Record a session in which others "
                "call them."
            )

    @cached_property
    def moments(self) -> tuple[Moment, ...]:
        """What was seen, put together over the coalition: by owner, pass and layer."""
        return tuple(Moment.of(calls) for calls in _gathered(self.calls, self.placement.hosts))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of which something was seen, ascending."""
        return tuple(sorted({call.layer for call in self.calls}))

    def at(self, *layers: int) -> "HostView":
        """Return what was seen of some layers alone."""
        granted = self.granted
        if granted is not None:
            pairs = zip(self.moments, granted.places, strict=True)
            places = tuple(place_N2 for moment, place_N2 in pairs if moment.layer in layers)
            granted = replace(granted, places=places)
        return replace(self, calls=tuple(call for call in self.calls if call.layer in layers), granted=granted)

    def held(self, layer: int) -> tuple[int, ...]:
        """Return the coalition's experts of a layer."""
        held = {expert for host in self.hosts for expert in self.placement.experts_of(host)[layer]}
        return tuple(sorted(held))

    def frontier(self, moment: int) -> "Frontier":
        """Return a walk over a moment's tokens in every order that agrees with what each host saw."""
        return Frontier(self.moments[moment].place_of)


class Frontier:
    """Which tokens of a moment can be next, when those before were taken."""

    def __init__(self, place_of: Sequence[Tensor]) -> None:
        self._queues = [place_U.tolist() for place_U in place_of]
        self._heads = [0] * len(self._queues)

    def ready(self) -> tuple[int, ...]:
        """Return the tokens that no host saw later than another one that is left, ascending; none at the end."""
        left = [queue[head:] for queue, head in zip(self._queues, self._heads, strict=True)]
        firsts = {queue[0] for queue in left if queue}
        later = {place for queue in left for place in queue[1:]}
        return tuple(sorted(firsts - later)) or tuple(sorted(firsts)[:1])

    def take(self, place: int) -> None:
        """Go on behind a token."""
        for index, queue in enumerate(self._queues):
            if self._heads[index] < len(queue) and queue[self._heads[index]] == place:
                self._heads[index] += 1


def host_view(
    sightings: Iterable[Sighting], *, hosts: Sequence[str], placement: Placement, spec: SplitSpec
) -> HostView:
    """Put together what some hosts saw.

    Parameters
    ----------
    sightings : iterable of Sighting
        Of a session, as a tap at the hub sees it; frames that do not go to these hosts are left out, and so are the
        coalition's own calls to each other.
    hosts : sequence of str
        The coalition.
    placement, spec
        Of the job.

    Raises
    ------
    ConfigurationError
        A host is unknown.
    DataError
        They saw no token of another party.
    """
    odd = [host for host in hosts if host not in placement.hosts]
    if odd or not hosts:
        raise ConfigurationError(f"the coalition is {list(hosts)}; choose from {', '.join(placement.hosts)}.")
    codec = Codec(spec)
    found: dict[tuple[str, str, int], HostCall] = {}
    sent: dict[tuple[str, str, int], Room] = {}
    for seen in sightings:
        to_us = seen.direction == "down" and seen.party in hosts and seen.source not in hosts
        if not to_us or seen.kind is not Kind.CALL or seen.operation not in (FORWARD, BACKWARD):
            continue
        key = (seen.session, seen.source, int(seen.meta["call"]))
        if seen.operation == FORWARD:
            sent[key] = real_part(seen.tensors)
        if key not in sent or sent[key].rows == 0:
            continue
        tensors = emptied(seen.tensors, sent[key])
        weight = tensors.get("weight")
        weight_R = None if weight is None else weight.to("cpu", torch.float32, copy=True)
        if seen.operation == FORWARD:
            found[key] = HostCall(
                session=seen.session,
                owner=seen.source,
                host=seen.party,
                layer=int(seen.meta["layer"]),
                number=key[2],
                tokens_UD=_unpacked(codec, "hidden", tensors),
                expert_R=tensors["expert"].to("cpu", torch.int64, copy=True),
                token_R=tensors["row"].to("cpu", torch.int64, copy=True),
                weight_R=weight_R,
            )
        elif key in found:
            call = found[key]
            given = call.weight_R if weight_R is None else weight_R
            found[key] = replace(call, grad_UD=_unpacked(codec, "grad", tensors), weight_R=given)
    ordered = sorted(found.items())
    return HostView(hosts=tuple(sorted(hosts)), placement=placement, calls=tuple(call for _, call in ordered))


def _unpacked(codec: Codec, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    return codec.unpack(name, tensors, torch.float32).to("cpu", copy=True)


def _gathered(calls: Sequence[HostCall], hosts: Sequence[str]) -> Iterator[list[HostCall]]:
    """Yield calls that an owner made at once: of one layer, to hosts in the order of names, counted one by one."""
    group: list[HostCall] = []
    for call in calls:
        last = group[-1] if group else call
        same = (call.session, call.owner, call.layer) == (last.session, last.owner, last.layer)
        between = hosts.index(call.host) - hosts.index(last.host)
        if group and not (same and 0 < call.number - last.number <= between):
            yield group
            group = []
        group.append(call)
    if group:
        yield group


def _merged(tokens: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """Return, for each host's tokens, their places in one order of all, and how many there are.

    Tokens with the same bits are one token; among tokens of one host with the same bits, which have the same experts
    everywhere, the i-th is the other host's i-th.
    """
    known: dict[tuple[bytes, int], int] = {}
    queues: list[list[int]] = []
    for tokens_UD in tokens:
        counts: dict[bytes, int] = {}
        queue = []
        for vector_D in tokens_UD.numpy():
            bits = vector_D.tobytes()
            counts[bits] = counts.get(bits, -1) + 1
            queue.append(known.setdefault((bits, counts[bits]), len(known)))
        queues.append(queue)
    place_of_id: dict[int, int] = {}
    heads = [0] * len(queues)
    holders: dict[int, list[int]] = {}
    for host, queue in enumerate(queues):
        for token in queue:
            holders.setdefault(token, []).append(host)
    while len(place_of_id) < len(known):
        fronts = {
            queue[head]: head / len(queue) for queue, head in zip(queues, heads, strict=True) if head < len(queue)
        }
        ready = [token for token in fronts if all(queues[h][heads[h]] == token for h in holders[token])]
        chosen = min(ready or list(fronts), key=lambda token: (fronts[token], token))
        place_of_id[chosen] = len(place_of_id)
        for host in holders[chosen]:
            while heads[host] < len(queues[host]) and queues[host][heads[host]] in place_of_id:
                heads[host] += 1
    places = [torch.tensor([place_of_id[token] for token in queue], dtype=torch.int64) for queue in queues]
    return places, len(known)
