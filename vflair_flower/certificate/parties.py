"""One tiny model whole and, from the same checkpoint, its data party and its model party in an open session.

The parties are the ones of a job: loaded by `load_segment`, joined by a hub, with every tensor checked against the
agreement; only the network is left out.
"""

import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from vflair_flower.partition import LoadedSegment, Mode, ModelSource, PartitionPlan, Segment, load_segment
from vflair_flower.partition.loading import task_class
from vflair_flower.partition.sources import load_config, set_task
from vflair_flower.partition.structure import num_blocks
from vflair_flower.remote import MODEL_PARTY, BodyMode, RemoteSegment, SegmentServer, agreement_for
from vflair_flower.session import Hub
from vflair_flower.settings import GenerationSettings, OptimizerSettings, TaskKind, TaskSettings
from vflair_flower.spec import SplitSpec

PARTY = "party"
LABELS = ("a", "b", "c")
DEADLINE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Parties:
    """The whole model, its parties, and the session that joins them."""

    spec: SplitSpec
    whole: PreTrainedModel
    own: LoadedSegment
    server: SegmentServer
    remote: RemoteSegment

    @property
    def data_party(self) -> PreTrainedModel:
        """The data party's model with its hole."""
        return self.own.model


def task_settings(kind: TaskKind) -> TaskSettings:
    """Return the settings of a tiny task."""
    return TaskSettings(kind=kind, label_names=LABELS if kind is TaskKind.SEQUENCE_CLASSIFICATION else ())


def plan_of(mode: Mode) -> PartitionPlan:
    """Return the cut of the matrix: 1|2|1 in Head-Body-Tail, 1|3 in Head-Tail."""
    return PartitionPlan(mode=mode, head_blocks=1, tail_blocks=1 if mode is Mode.HBT else 0)


@contextmanager
def checkpoint(config: PreTrainedConfig, kind: TaskKind) -> Iterator[ModelSource]:
    """Write a random checkpoint of a task model; it is deleted afterwards."""
    task = task_settings(kind)
    set_task(config, task, "tiny")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = task_class(config, task)(config)
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases other than 1 and 0, weights that matter
                parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.dim() == 1 else 0.1))
    with tempfile.TemporaryDirectory(prefix="vflair-certificate-") as folder:
        model.save_pretrained(folder)
        yield ModelSource(name=Path(folder).name, location=folder)


@contextmanager
def open_parties(
    source: ModelSource, kind: TaskKind, plan: PartitionPlan, *, frozen: Collection[str] = ()
) -> Iterator[Parties]:
    """Load the whole model and its parties, and join them in a training session; `frozen` names what is not trained."""
    spec = SplitSpec(
        model=source.name,
        plan=plan,
        task=task_settings(kind),
        tuning=None,
        optimizer=OptimizerSettings(learning_rate=0.01, weight_decay=0.01, warmup_fraction=0.5),
        generation=GenerationSettings(max_rows=12, max_length=64),
        seed=3,
    )
    blocks = num_blocks(load_config(source, spec.task))
    whole = load_segment(source, Segment.whole(blocks), spec.task, seed=3).model
    own = load_segment(source, plan.data_party(blocks), spec.task, seed=3)
    body = load_segment(source, plan.model_party(blocks), spec.task, seed=3)
    for model in (whole, own.model, body.model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
    server = SegmentServer(body, spec, body_mode=BodyMode.SYNCHRONOUS, deadline_s=DEADLINE_S)
    agreement = agreement_for(spec, own.model.config)
    hosts = {MODEL_PARTY: server}
    with Hub(bind="inproc") as hub, hub.open_session([PARTY], agreement, hosts=hosts, deadline_s=DEADLINE_S) as session:
        server.begin([PARTY], server_round=1, training=True)
        with hub.connect(session, PARTY) as link:
            remote = RemoteSegment(link, spec)
            for model in (whole, own.model):
                model.train()
            with own.channel.joined(remote):
                yield Parties(spec=spec, whole=whole, own=own, server=server, remote=remote)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters of a model by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
