"""The view: what an adversary saw, as an attack gets it, and nothing else.

B rows of a batch, T tokens, D hidden, C classes, V vocabulary.  A view is made from sightings of a real session (after
all defences), for one adversary, and holds copies: no tensor of it shares memory with what the victim has.
Invariant: nothing but what that adversary saw can be reached from a view; the truth goes to the scorer alone
(`vflair_flower.attacks.scoring`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vflair_flower.errors import DataError
from vflair_flower.partition.plan import Mode, PartitionPlan
from vflair_flower.remote.protocol import BACKWARD, FORWARD, MODEL_PARTY, returned_name
from vflair_flower.session import Sighting
from vflair_flower.session.header import Kind
from vflair_flower.session.ledger import Direction
from vflair_flower.settings import TaskSettings


@dataclass(frozen=True, kw_only=True, eq=False)
class Exchange:
    """One batch of one party at the cut: what the model party was sent and what it answered.

    Parameters
    ----------
    party : str
        Whose batch.
    hidden_BTD : Tensor
        Float32, the smashed data that came up; of a text that was written token by token, all of its positions.
    attention_mask_BT : Tensor
        Int64, 1 for tokens and 0 for padding.
    position_ids_BT : Tensor or None
        Int64, where positions were sent.
    answer : Tensor or None
        What went back: hidden states [B, T, D] (Head-Body-Tail), or logits [B, C] or [B, T, V] (Head-Tail).
    answer_grad : Tensor or None
        The gradient of the party's loss by `answer`, which came up; None where nothing was trained.
    hidden_grad_BTD : Tensor or None
        The gradient by `hidden_BTD` that went back.
    prompt_tokens : int or None
        Of a text that was written: how many positions came at once, padding included; the others were written.
    """

    party: str
    hidden_BTD: Tensor
    attention_mask_BT: Tensor
    position_ids_BT: Tensor | None = None
    answer: Tensor | None = None
    answer_grad: Tensor | None = None
    hidden_grad_BTD: Tensor | None = None
    prompt_tokens: int | None = None

    @property
    def rows(self) -> int:
        """B."""
        return self.hidden_BTD.shape[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitView:
    """What the model party of a job in Head-Tail or Head-Body-Tail saw.

    Parameters
    ----------
    plan : PartitionPlan
        The cut.
    num_blocks : int
        Of the whole model.
    task : TaskSettings
        What is trained.
    exchanges : tuple of Exchange
        In the order in which they were seen.
    """

    plan: PartitionPlan
    num_blocks: int
    task: TaskSettings
    exchanges: tuple[Exchange, ...]

    def __post_init__(self) -> None:
        if not self.exchanges:
            raise DataError("the adversary saw no batch, so there is nothing to attack. Record a session with some.")

    @property
    def rows(self) -> int:
        """Rows of all exchanges."""
        return sum(one.rows for one in self.exchanges)


def split_view(
    sightings: Iterable[Sighting],
    *,
    plan: PartitionPlan,
    num_blocks: int,
    task: TaskSettings,
    model_party: str = MODEL_PARTY,
    limit: int | None = None,
) -> SplitView:
    """Put together what the model party saw.

    Parameters
    ----------
    sightings : iterable of Sighting
        Of one session or several; frames that the model party did not see are left out.
    plan, num_blocks, task
        Of the job, which every party knows.
    model_party : str
        Its name.
    limit : int, optional
        The most exchanges to take.

    Raises
    ------
    DataError
        The model party saw no batch.
    """
    exchanges: dict[tuple[str, ...], _Open] = {}
    asked: dict[tuple[str, str, int], tuple[str, ...]] = {}
    for seen in sightings:
        if model_party not in (seen.source, seen.target) or seen.operation not in (FORWARD, BACKWARD):
            continue
        stream = (seen.session, seen.party, seen.call_id)
        if seen.kind is Kind.CALL:
            key = exchange_key(seen)
            asked[stream] = key
            if seen.operation == FORWARD:
                exchanges.setdefault(key, _Open(party=seen.source)).take_call(seen)
            elif key in exchanges:
                exchanges[key].answer_grad = _copy(seen.tensors["grad"])
        elif seen.kind is Kind.REPLY and stream in asked and asked[stream] in exchanges:
            opened = exchanges[asked[stream]]
            if seen.operation == FORWARD:
                opened.answers.append(_copy(seen.tensors[returned_name(plan.mode)]))
            elif "grad" in seen.tensors:
                opened.hidden_grad = _copy(seen.tensors["grad"])
    whole = [one.close(plan.mode) for one in list(exchanges.values())[:limit]]
    return SplitView(plan=plan, num_blocks=num_blocks, task=task, exchanges=tuple(whole))


@dataclass(frozen=True, kw_only=True)
class NetworkFrame:
    """One frame as somebody on an encrypted line sees it.

    Parameters
    ----------
    time_s : float
        When; of a clock with any beginning.
    direction : {"up", "down"}
        Up leaves the party, towards the hub.
    party : str
        Whose line it was on.
    num_bytes : int
        How long it was.
    """

    time_s: float
    direction: Direction
    party: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class NetworkView:
    """What an observer of the network saw: when how many bytes went which way, and nothing of what they were.

    Parameters
    ----------
    frames : tuple of NetworkFrame
        In the order of time.
    """

    frames: tuple[NetworkFrame, ...]

    def __post_init__(self) -> None:
        if not self.frames:
            raise DataError("the observer saw no frame, so there is nothing to attack. Record a session with some.")


def network_view(sightings: Iterable[Sighting]) -> NetworkView:
    """Put together what an observer of the network saw.

    Parameters
    ----------
    sightings : iterable of Sighting
        Of one session or several; all but time, direction, party and size is left out.

    Raises
    ------
    DataError
        There are none.
    """
    frames = [
        NetworkFrame(time_s=seen.time_s, direction=seen.direction, party=seen.party, num_bytes=seen.num_bytes)
        for seen in sightings
    ]
    return NetworkView(frames=tuple(sorted(frames, key=lambda frame: frame.time_s)))


@dataclass(kw_only=True)
class _Open:
    """An exchange while its frames come in."""

    party: str
    hiddens: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    positions: list[Tensor | None] = field(default_factory=list)
    answers: list[Tensor] = field(default_factory=list)
    answer_grad: Tensor | None = None
    hidden_grad: Tensor | None = None
    cached: bool = False

    def take_call(self, seen: Sighting) -> None:
        hidden_BTD = _copy(seen.tensors["hidden"])
        mask = seen.tensors.get("attention_mask")
        positions = seen.tensors.get("position_ids")
        rows = seen.tensors.get("cache_rows")
        if rows is not None:  # beam search goes on from other rows
            chosen = rows.to(torch.int64)
            self.hiddens = [part[chosen] for part in self.hiddens]
            self.masks = [part[chosen] for part in self.masks]
            self.positions = [None if part is None else part[chosen] for part in self.positions]
            self.answers = [part[chosen] for part in self.answers]
        self.cached = "cache" in seen.meta
        self.hiddens.append(hidden_BTD)
        self.masks.append(torch.ones(hidden_BTD.shape[:2], dtype=torch.int64) if mask is None else _integers(mask))
        self.positions.append(None if positions is None else _integers(positions))

    def close(self, mode: Mode) -> Exchange:
        positions = [part for part in self.positions if part is not None]
        joins = mode is Mode.HBT or (bool(self.answers) and self.answers[0].dim() == 3)
        answer = None
        if self.answers:
            answer = torch.cat(self.answers, dim=1) if joins and len(self.answers) > 1 else self.answers[0]
        return Exchange(
            party=self.party,
            hidden_BTD=torch.cat(self.hiddens, dim=1),
            attention_mask_BT=torch.cat(self.masks, dim=1),
            position_ids_BT=torch.cat(positions, dim=1) if len(positions) == len(self.hiddens) else None,
            answer=answer,
            answer_grad=self.answer_grad,
            hidden_grad_BTD=self.hidden_grad,
            prompt_tokens=self.hiddens[0].shape[1] if self.cached else None,
        )


def exchange_key(seen: Sighting) -> tuple[str, ...]:
    """Return what all forward and backward calls of one exchange have in common: session, party and number."""
    meta: Mapping[str, object] = seen.meta
    what = ("cache", meta["cache"]) if "cache" in meta else ("call", meta.get("call", ""))
    return (seen.session, seen.source, *map(str, what))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _integers(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.int64, copy=True)
