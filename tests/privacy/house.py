"""A data party with defences and a model party in one process, joined by a real hub and a real link."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from vflair_flower.clients.data_party import PartyRows
from vflair_flower.partition import (
    LoadedSegment,
    PartitionPlan,
    load_config,
    load_segment,
    load_tokenizer,
    make_trainable,
    resolve_model,
)
from vflair_flower.partition.cut import states_at_cut
from vflair_flower.partition.structure import num_blocks
from vflair_flower.privacy import Policy, Secret, Shield
from vflair_flower.privacy.opening import open_shield, prepare_defences
from vflair_flower.remote import BodyMode, RemoteSegment, SegmentServer, agreement_for
from vflair_flower.remote.protocol import MODEL_PARTY
from vflair_flower.session import Hub, Link, Sighting
from vflair_flower.settings import TaskKind, TaskSettings
from vflair_flower.spec import SplitSpec
from vflair_flower.tasks import Batch, Encoded, collate, encode_task

PARTY = "alpha"
DEADLINE_S = 30.0


@dataclass
class Defended:
    """A data party in an open session; `seen` holds every frame that left it."""

    spec: SplitSpec
    own: LoadedSegment
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    shield: Shield
    remote: RemoteSegment
    link: Link
    server: SegmentServer
    seen: list[Sighting] = field(default_factory=list)

    @property
    def sent(self) -> list[tuple[str, str, Tensor]]:
        """Operation, name and values of every tensor that left."""
        return [(one.operation, name, tensor) for one in self.seen for name, tensor in one.tensors.items()]

    def values(self, name: str) -> list[Tensor]:
        """Return what left under a name."""
        return [tensor for _, own_name, tensor in self.sent if own_name == name]

    def encode(self, rows: PartyRows) -> list[Encoded]:
        return list(encode_task(self.spec.task.kind, rows.train, self.tokenizer, max_tokens=16))

    def batch(self, rows: PartyRows, count: int = 4, start: int = 0) -> Batch:
        return collate(self.encode(rows)[start : start + count], pad_token_id=int(self.tokenizer.pad_token_id))

    def prepare(self, rows: PartyRows) -> None:
        """Let defences learn what they need from a party's rows."""
        prepare_defences(
            self.shield, self.encode(rows), self.model, self.own.channel, self.remote,
            pad_token_id=int(self.tokenizer.pad_token_id),
        )  # fmt: skip

    @torch.no_grad()
    def head(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return the true hidden states at the cut."""
        with self.shield.resting():
            return states_at_cut(self.model, self.own.channel, {"input_ids": ids_BT, "attention_mask": mask_BT})


@contextmanager
def defended(
    model: str | Path,
    defences: str = "",
    *,
    task: TaskSettings | None = None,
    plan: PartitionPlan | None = None,
    policy: Policy | None = None,
    secret: Secret | None = None,
    training: bool = True,
    change: Callable[[SplitSpec], SplitSpec] = lambda spec: spec,
) -> Iterator[Defended]:
    """Open a session of one data party; dropout is off, and the same secret gives the same noise."""
    task = task or TaskSettings(kind=TaskKind.SEQUENCE_CLASSIFICATION, label_names=("card", "money", "parcel"))
    spec = change(
        SplitSpec(
            model=str(model), plan=plan or PartitionPlan(head_blocks=1, tail_blocks=1), task=task, defences=defences
        )
    )
    source = resolve_model(spec.model)
    blocks = num_blocks(load_config(source, spec.task))
    own = load_segment(source, spec.plan.data_party(blocks), spec.task, seed=spec.seed)
    body = load_segment(source, spec.plan.model_party(blocks), spec.task, seed=spec.seed)
    tuned = make_trainable(own, spec.tuning, spec.task, seed=spec.seed)
    server = SegmentServer(body, spec, body_mode=BodyMode.SYNCHRONOUS, deadline_s=DEADLINE_S)
    agreement = agreement_for(spec, own.model.config)
    shield = open_shield(
        spec, own, source, party=PARTY, occasion="test", secret=secret or Secret(b"0" * 32), policy=policy
    )
    shield.train(training)
    tuned.train(training)
    seen: list[Sighting] = []

    def tap(one: Sighting) -> None:
        if one.direction == "up":
            seen.append(one)

    with (
        Hub(bind="inproc") as hub,
        hub.open_session([PARTY], agreement, hosts={MODEL_PARTY: server}, deadline_s=DEADLINE_S) as session,
    ):
        server.begin([PARTY], server_round=1, training=training)
        with (
            hub.connect(session, PARTY, tap=tap, guard=shield.guard) as link,
            shield.watching(tuned, own.channel),
        ):
            remote = RemoteSegment(link, spec, shield=shield)
            with own.channel.joined(remote):
                yield Defended(
                    spec=spec,
                    own=own,
                    model=tuned,
                    tokenizer=load_tokenizer(source),
                    shield=shield,
                    remote=remote,
                    link=link,
                    server=server,
                    seen=seen,
                )
