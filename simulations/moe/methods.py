"""The ways of training that are compared, all over the same number of tokens and from the same pretrained model.

| method               | data         | a party holds    | what is shared                                             |
|----------------------|--------------|------------------|------------------------------------------------------------|
| `centralised`        | in one place | the whole model  | everything                                                 |
| `isolated`           | a party's    | the whole model  | nothing                                                    |
| `fedavg`             | a party's    | the whole model  | the whole model, averaged each round (arXiv 1602.05629)    |
| `fedavg-experts`     | a party's    | the whole model  | the experts, averaged each round                           |
| `pc-moe`             | a party's    | 1/n of experts   | experts, called at their hosts; all parties at once        |
| `pc-moe-round-robin` | a party's    | 1/n of experts   | the same, one party's batch at a time, as in the paper     |

and variants of `pc-moe`: `-hand-off` trains by hand-off, sequence by sequence (its curve is measured so; at the end its
models are measured as all others, own model and all experts); `-averaged` averages the gradients of own models at every
step; `-int8` sends 8 bits per number; `-coactivation` places experts that are chosen together at one party; `-local`
prefers own experts within a tolerance; `-opt-out` does without the last party's experts.

J rows are in the joined batch, n parties: centralised training takes J rows a step, each of n parties J / n.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from simulations.baseline import JoinedOrder
from simulations.in_process import quiet_flower
from simulations.local_grid import LocalGrid
from simulations.moe.choices import perplexity, row_likelihoods
from vflair_flower.clients import ExpertParty, PartyRows
from vflair_flower.experts import count_coactivation, place_by_coactivation, route_locally
from vflair_flower.experts.finished import joined_experts
from vflair_flower.experts.loading import layers_and_placement
from vflair_flower.experts.modules import expert_modules
from vflair_flower.memory import ActivationMeter, MemoryParts, optimizer_bytes, tensor_bytes
from vflair_flower.partition import load_config, resolve_model
from vflair_flower.partition.loading import quiet
from vflair_flower.settings import ExpertSettings, OptimizerSettings, TaskKind, TaskSettings, TrainingSettings
from vflair_flower.spec import SplitSpec
from vflair_flower.strategies import CollaborativeMoE, HubSettings
from vflair_flower.tasks import BatchOrder, PromptRow, collate, encode_responses
from vflair_flower.training import train_steps

WRITE = TaskSettings(kind=TaskKind.CAUSAL_LM)
_EVALUATION_BATCH = 32
_COUNTED_ROWS = 32
"""Rows of each party that experts' choices are counted on."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training: rows of each party, what the curve is measured on, and how long.

    Parameters
    ----------
    model : str
        Folder of the pretrained model.
    rows : tuple[tuple[PromptRow, ...], ...]
        Of each party.
    curve_rows : tuple[PromptRow, ...]
        Held out; every party's model is measured on all of them after each round.
    training : TrainingSettings
        With the rows per party and step.
    optimizer : OptimizerSettings
        Of everybody.
    seed : int
        Of batch order.
    work_dir : pathlib.Path
        For parties' own files.
    deadline_s : float
        For calls between parties.
    wire_dtype : str
        Of what PC-MoE sends.
    local_tolerance : float
        Of `pc-moe-local`.
    """

    model: str
    rows: tuple[tuple[PromptRow, ...], ...]
    curve_rows: tuple[PromptRow, ...]
    training: TrainingSettings
    optimizer: OptimizerSettings
    seed: int
    work_dir: Path
    deadline_s: float
    wire_dtype: str
    local_tolerance: float


@dataclass(kw_only=True)
class Outcome:
    """What a training gave.

    Parameters
    ----------
    models : callable
        Returns each party's model in turn, whole; only one of them needs to be in memory at a time.
    curve : list[tuple[int, float]]
        Tokens trained on so far by all, and the perplexity of the held-out rows then, geometric mean over parties.
    memory : MemoryParts
        Of the party that needs most.
    tokens, steps, sent_bytes : int
        Trained on, padding counted; optimiser steps of each party; bytes sent to anybody.
    seconds : float
        Of training alone.
    """

    models: Callable[[], Iterator[PreTrainedModel]]
    curve: list[tuple[int, float]] = field(default_factory=list)
    memory: MemoryParts = field(
        default_factory=lambda: MemoryParts(parameters=0, gradients=0, optimizer=0, activations=0)
    )
    tokens: int = 0
    steps: int = 0
    sent_bytes: int = 0
    seconds: float = 0.0


class _Learner:
    """One whole model in training on encoded rows."""

    def __init__(self, job: Job, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[PromptRow]], name: str):
        self.job, self.name = job, name
        self.pad = int(tokenizer.pad_token_id)
        self.model: PreTrainedModel = load_whole(job.model).train()
        parts = [encode_responses(part, tokenizer, max_tokens=job.training.max_tokens) for part in rows]
        self.encoded = [row for part in parts for row in part]
        self.tokens_of = [len(row.input_ids) for row in self.encoded]
        self.order: BatchOrder | JoinedOrder
        if len(parts) > 1:
            self.order = JoinedOrder([len(part) for part in parts], self.encoded, job.training, job.seed)
        else:
            self.order = BatchOrder(
                num_rows=len(self.encoded), batch_size=job.training.batch_size, seed=job.seed, party=name
            )
        self.optimizer = job.optimizer.build(list(self.model.parameters()))
        self.meter = ActivationMeter(self.model)
        self.seconds = 0.0
        self.tokens = 0

    def train_round(self, server_round: int) -> None:
        """Take a round's steps."""
        training = self.job.training
        steps = training.steps_of_round(server_round, len(self.encoded))
        self.model.train()
        started = time.monotonic()
        train_steps(
            self.model,
            self.encoded,
            kind=TaskKind.CAUSAL_LM,
            steps=steps,
            total_steps=training.total_steps(len(self.encoded)),
            order=self.order,
            optimizer=self.optimizer,
            settings=self.job.optimizer,
            pad_token_id=self.pad,
            seed=self.job.seed,
            name=self.name,
            meter=self.meter,
        )
        self.seconds += time.monotonic() - started
        for step in steps:
            lengths = [self.tokens_of[i] for i in self.order.indices(step)]
            self.tokens += len(lengths) * max(lengths)

    def memory(self) -> MemoryParts:
        """Return the peak memory by part."""
        own = tensor_bytes(self.model.parameters())
        return MemoryParts(
            parameters=own,
            gradients=own,
            optimizer=optimizer_bytes(self.optimizer),
            activations=self.meter.peak_bytes,
        )


def load_whole(folder: str) -> PreTrainedModel:
    """Load a whole model."""
    with quiet():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def centralised(job: Job, tokenizer: PreTrainedTokenizerBase) -> Outcome:
    """Train one model on the joined batches."""
    learner = _Learner(job, tokenizer, job.rows, "party-0")
    return _rounds(job, tokenizer, [learner], lambda _: None, shared_bytes=0)


def isolated(job: Job, tokenizer: PreTrainedTokenizerBase) -> Outcome:
    """Let each party train a whole model on its own rows."""
    return _rounds(job, tokenizer, _learners(job, tokenizer), lambda _: None, shared_bytes=0)


def fedavg(job: Job, tokenizer: PreTrainedTokenizerBase) -> Outcome:
    """Let each party train a whole model on its own rows, and average them after each round."""
    learners = _learners(job, tokenizer)
    shared = [name for name, _ in learners[0].model.named_parameters()]
    return _averaged(job, tokenizer, learners, shared)


def fedavg_experts(job: Job, tokenizer: PreTrainedTokenizerBase) -> Outcome:
    """As `fedavg`, with the experts alone averaged and everything else a party's own."""
    learners = _learners(job, tokenizer)
    layers = tuple(expert_modules(learners[0].model))
    shared = [n for n, _ in learners[0].model.named_parameters() if any(n.startswith(f"{layer}.") for layer in layers)]
    return _averaged(job, tokenizer, learners, shared)


def pc_moe(job: Job, experts: ExpertSettings, *, averaging: str = "none") -> Outcome:
    """Train by `CollaborativeMoE`, its parties as threads of this process."""
    parties = len(job.rows)
    spec = SplitSpec(
        model=job.model,
        task=WRITE,
        tuning=None,
        optimizer=job.optimizer,
        training=job.training,
        experts=experts,
        wire_dtype=job.wire_dtype,
        averaging=averaging,
        seed=job.seed,
    )
    app = ClientApp()
    ExpertParty(
        lambda context: PartyRows(train=job.rows[_index(context)], validation=job.curve_rows), state_dir=_own_dir
    ).register(app)
    nodes = [{"partition-id": i, "state-dir": str(job.work_dir / f"party-{i}")} for i in range(parties)]
    grid = LocalGrid(app, nodes)
    with (
        quiet_flower(),
        CollaborativeMoE(
            spec=spec,
            aggregator=FedAvg(min_train_nodes=parties, min_evaluate_nodes=parties, min_available_nodes=parties),
            parties=parties,
            hub=HubSettings(bind="inproc"),
            deadline_s=job.deadline_s,
            job="cell",
        ) as strategy,
    ):
        strategy.start(grid)
    grid.close()
    outcome = Outcome(models=lambda: _joined_models(spec, job, parties))
    for record in strategy.history:
        outcome.tokens += record.tokens
        outcome.seconds += record.seconds["train"]
        outcome.sent_bytes += record.sent_bytes
        outcome.curve.append((outcome.tokens, math.exp(record.evaluate_metrics["loss"])))
    memories = [MemoryParts(**report.memory) for report in strategy.reports.values()]
    outcome.memory = max(memories, key=lambda memory: memory.total)
    outcome.steps = job.training.rounds * job.training.local_steps
    return outcome


def _learners(job: Job, tokenizer: PreTrainedTokenizerBase) -> list[_Learner]:
    return [_Learner(job, tokenizer, [rows], f"party-{i}") for i, rows in enumerate(job.rows)]


def _averaged(job: Job, tokenizer: PreTrainedTokenizerBase, learners: list[_Learner], shared: list[str]) -> Outcome:
    def average(own: list[_Learner]) -> None:
        states = [dict(learner.model.named_parameters()) for learner in own]
        with torch.no_grad():
            for name in shared:
                mean = torch.stack([state[name] for state in states]).mean(0)
                for state in states:
                    state[name].copy_(mean)

    parameters = dict(learners[0].model.named_parameters())
    size = sum(parameters[name].numel() * parameters[name].element_size() for name in shared)
    return _rounds(job, tokenizer, learners, average, shared_bytes=2 * size * len(learners))


def _rounds(
    job: Job,
    tokenizer: PreTrainedTokenizerBase,
    learners: list[_Learner],
    after: Callable[[list[_Learner]], None],
    *,
    shared_bytes: int,
) -> Outcome:
    """Train round by round; `shared_bytes` go over the wire in each."""
    outcome = Outcome(models=lambda: (learner.model for learner in learners))
    for server_round in range(1, job.training.rounds + 1):
        for learner in learners:
            learner.train_round(server_round)
        after(learners)
        found = [
            perplexity(row_likelihoods(own.model, tokenizer, job.curve_rows, job.training.max_tokens))
            for own in learners
        ]
        outcome.curve.append((sum(own.tokens for own in learners), math.exp(sum(map(math.log, found)) / len(found))))
    outcome.tokens = sum(own.tokens for own in learners)
    outcome.seconds = sum(own.seconds for own in learners)
    outcome.sent_bytes = shared_bytes * job.training.rounds
    outcome.steps = job.training.rounds * job.training.local_steps
    outcome.memory = max((own.memory() for own in learners), key=lambda memory: memory.total)
    return outcome


def _joined_models(spec: SplitSpec, job: Job, parties: int) -> Iterator[PreTrainedModel]:
    """Yield each party's own model with all hosts' experts in it: what it computes when it calls them."""
    assert spec.experts is not None
    names = [f"party-{i}" for i in range(parties)]
    config = load_config(resolve_model(spec.model), spec.task)
    _, placement = layers_and_placement(config, spec, names)
    states = {name: _newest(job.work_dir / name / "models" / "cell" / name) for name in names}
    model = load_whole(job.model)
    held = dict(model.named_parameters())
    with torch.no_grad():
        trained = {name: state["host"]["trained"] for name, state in states.items()}
        for name, experts in joined_experts(config, spec, trained, base=held).items():
            held[name].copy_(experts)
    for name, state in states.items():
        own = copy.deepcopy(model)
        nn.Module.load_state_dict(own, state["own"], strict=False)
        with route_locally(own, spec.experts, placement, name):
            yield own


def _newest(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(max(folder.glob("round-*.pt")), weights_only=True)
    return state


def _index(context: Context) -> int:
    return int(context.node_config["partition-id"])


def _own_dir(context: Context) -> Path:
    return Path(str(context.node_config["state-dir"]))


_BASELINES = {
    "centralised": centralised,
    "isolated": isolated,
    "fedavg": fedavg,
    "fedavg-experts": fedavg_experts,
}


def train(method: str, job: Job, tokenizer: PreTrainedTokenizerBase) -> Outcome:
    """Train by the method of a name."""
    if method in _BASELINES:
        return _BASELINES[method](job, tokenizer)
    averaging = "step" if method == "pc-moe-averaged" else "none"
    return pc_moe(job, _variant(method, job, tokenizer), averaging=averaging)


def _variant(method: str, job: Job, tokenizer: PreTrainedTokenizerBase) -> ExpertSettings:
    if method == "pc-moe-coactivation":
        return ExpertSettings(placement="table", table=_coactivation_table(job, tokenizer))
    variants: dict[str, ExpertSettings] = {
        "pc-moe-round-robin": ExpertSettings(schedule="round-robin"),
        "pc-moe-hand-off": ExpertSettings(schedule="round-robin", semantics="hand-off-sequence"),
        "pc-moe-int8": ExpertSettings(codec="int8"),
        "pc-moe-local": ExpertSettings(local_tolerance=job.local_tolerance),
        "pc-moe-opt-out": ExpertSettings(opted_out=(len(job.rows) - 1,)),
    }
    return variants.get(method, ExpertSettings())


def _coactivation_table(job: Job, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], ...]:
    """Return a placement by what the pretrained model chooses together on some rows of every party."""
    rows = [row for part in job.rows for row in part[:_COUNTED_ROWS]]
    encoded = encode_responses(rows, tokenizer, max_tokens=job.training.max_tokens)
    batches = [
        collate(encoded[start : start + _EVALUATION_BATCH], pad_token_id=int(tokenizer.pad_token_id)).inputs
        for start in range(0, len(encoded), _EVALUATION_BATCH)
    ]
    return place_by_coactivation(count_coactivation(load_whole(job.model), batches), len(job.rows))
