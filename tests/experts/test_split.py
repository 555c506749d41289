"""Head-Body-Tail with spread experts: head and tail at data parties, the body at the strategy, experts at all hosts."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from simulations.local_grid import LocalGrid, ProcessGrid
from tests.experts.conftest import DEADLINE_S, Company, batch_of, merged, save_writing_moe
from tests.experts.moe_app import app as reading_app
from tests.experts.test_export import nodes_at, spec_of
from tests.experts.test_generation import BOUNDS, WAYS, whole_writes, written
from tests.experts.writing_app import app
from tests.tiny import LABELS, save_tiny, tiny_rows
from vflair_flower.certificate import TINY
from vflair_flower.errors import ConfigurationError, PartyLostError, RemoteError, SessionError
from vflair_flower.experts import (
    ExpertCaller,
    ExpertHost,
    expert_agreement,
    expert_layer_names,
    load_backbone,
    load_experts,
)
from vflair_flower.experts.body import BodyChannel, BodyLink, SpreadBody, StepsOfBoth, joint_agreement
from vflair_flower.experts.finished import joined_experts
from vflair_flower.experts.loading import layers_and_placement, own_segment
from vflair_flower.partition import PartitionPlan, resolve_model
from vflair_flower.partition.sources import load_config
from vflair_flower.partition.structure import num_blocks
from vflair_flower.remote import MODEL_PARTY, RemoteSegment, agreement_for
from vflair_flower.session import Hub, Link, Request
from vflair_flower.settings import ExpertSettings, LoraSettings, OptimizerSettings, TaskSettings, TrainingSettings
from vflair_flower.spec import SplitSpec
from vflair_flower.strategies import CollaborativeMoE, HubSettings
from vflair_flower.tasks import BatchOrder, collate, encode

SPLIT = ExpertSettings(backbone="split")


@contextlib.contextmanager
def open_split(house: Any, count: int, *, deadline_s: float = DEADLINE_S) -> Iterator[tuple[list[Company], SpreadBody]]:
    """As `House.open`, with a body at the hub."""
    spec, source = house.spec, house.source
    names = [f"party-{i}" for i in range(count)]
    config = load_config(source, spec.task)
    layers, placement = layers_and_placement(config, spec, names)
    agreement = joint_agreement(expert_agreement(spec, config), agreement_for(spec, config))
    middle, channel = spec.plan.model_party(num_blocks(config)), BodyChannel()
    loaded, _ = load_backbone(source, spec.task, seed=3, segment=middle, channel=channel)
    body = SpreadBody(loaded, channel, (len(layers), len(placement.host_of[0])), spec, deadline_s=deadline_s)
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(Hub(bind="inproc"))
        body.begin(names, server_round=1, training=True)
        session = hub.open_session(names, agreement, hosts={MODEL_PARTY: body}, deadline_s=deadline_s)
        stack.callback(session.close)
        body.opened(session, names)
        companies = []
        for name in names:
            own, calls = load_backbone(source, spec.task, seed=3, segment=own_segment(config, spec))
            held = placement.experts_of(name)
            shard = load_experts(source, dict(zip(layers, held, strict=True)), spec.task)
            host = ExpertHost(shard, layers, held, spec, deadline_s=deadline_s)
            host.begin(names, training=True)
            link = hub.connect(session, name)
            stack.callback(link.abandon)
            link.serve(host)
            caller = ExpertCaller(link, host, placement, spec)
            stack.callback(caller.close)
            remote = RemoteSegment(BodyLink(link), spec)
            stack.enter_context(calls.joined(caller))
            stack.enter_context(own.channel.joined(remote))
            both: Any = StepsOfBoth(caller, remote)
            optimizer = spec.optimizer.build(list(own.model.parameters()))
            company = Company(name=name, model=own.model.train(), host=host, caller=both, optimizer=optimizer)
            company.link = link  # type: ignore[attr-defined]
            companies.append(company)
        yield companies, body


def joined(companies: list[Company], body: SpreadBody, house: Any) -> dict[str, torch.Tensor]:
    """Return the whole model's parameters: of an owner, the body and all hosts."""
    return merged(companies, house) | {name: p.detach() for name, p in body.module.named_parameters()}


@pytest.mark.parametrize("mode", ["HBT", "HT"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3"])
def test_one_owner_is_the_whole_model_bit_for_bit(family: str, mode: str, make_house: Callable[..., Any]) -> None:
    """Losses, every gradient of experts in head, body and tail, and what three AdamW steps make of all parameters."""
    plan = PartitionPlan(mode=mode, tail_blocks=1 if mode == "HBT" else 0)
    house = make_house(family, experts=SPLIT, plan=plan)
    whole = house.whole()
    optimizer = house.spec.optimizer.build(list(whole.parameters()))
    expected, found = [], []
    for step in range(3):
        optimizer.zero_grad()
        loss = whole(**batch_of(step)).loss
        loss.backward()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in whole.named_parameters() if p.grad is not None}
        optimizer.step()
        expected.append(float(loss.detach()))
    with open_split(house, 3) as (companies, body):
        owner, *others = companies
        for other in others:
            other.caller.finish()
        first = owner.model(**batch_of(0)).loss
        first.backward()
        placement = house.placement([c.name for c in companies])
        layers = expert_layer_names(whole.config, house.spec.task)
        seen = set()
        for company in companies:
            for name, gradient in company.host._update.pending(owner.name).items():
                layer = next(i for i, own in enumerate(layers) if name.startswith(f"{own}."))
                assert torch.equal(gradient, gradients[name][list(placement.experts_of(company.name)[layer])]), name
                seen.add(layer)
            company.host._update.drop(owner.name)
        assert seen == set(range(len(layers)))
        for name, gradient in body.pending_gradients(owner.name).items():
            assert torch.equal(gradient, gradients[name]), name
        body.drop_gradients(owner.name)
        for step in range(3):
            found.append(owner.train(batch_of(step), step))
        end = joined(companies, body, house)
    assert found == expected
    assert end.keys() == dict(whole.named_parameters()).keys()
    assert [name for name, p in whole.named_parameters() if not torch.equal(end[name], p)] == []


def test_only_the_model_party_speaks_for_others(make_house: Callable[..., Any]) -> None:
    house = make_house("mixtral", experts=SPLIT, plan=PartitionPlan())
    with open_split(house, 2) as (companies, _):
        hidden = {"hidden": torch.zeros(1, 64), "row": torch.zeros(1, dtype=torch.int32)}
        tensors = {**hidden, "expert": torch.ones(1, dtype=torch.int32)}
        meta = {"layer": 0, "call": -1, "keep": False, "owner": "party-1"}
        with pytest.raises(RemoteError, match="only the model party of a job with backbone='split' speaks for others"):
            companies[0].link.call("party-1", "forward", tensors, meta)
        host = companies[1].host
        for operation, more in (("step", meta), ("forward", {"layer": 0, "call": -1, "keep": False})):
            with pytest.raises(SessionError, match="speaks for others"):
                host(Request("hub", operation, tensors, more))


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_writing_moe(tmp_path_factory.mktemp("moe")))


def run_job(spec: Any, nodes: list[dict], *, evaluate: float = 1.0, **more: Any) -> Any:
    count = len(nodes)
    aggregator = FedAvg(
        min_train_nodes=count,
        min_evaluate_nodes=count if evaluate else 0,
        min_available_nodes=count,
        fraction_evaluate=evaluate,
    )
    settings = {"hub": HubSettings(bind="inproc"), "deadline_s": 20.0, "parties": count, **more}
    return CollaborativeMoE(spec=spec, aggregator=aggregator, **settings)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny classifier with experts, of four blocks."""
    folder = save_tiny(tmp_path_factory.mktemp("moe"), "llama")
    torch.manual_seed(7)
    config = TINY["mixtral"]()
    config.vocab_size, config.pad_token_id, config.num_labels = (
        len(AutoTokenizer.from_pretrained(folder)),
        0,
        len(LABELS),
    )
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    return str(folder)


def reading(model: str, **more: Any) -> SplitSpec:
    settings = {
        "optimizer": OptimizerSettings(name="sgd", learning_rate=0.05, schedule="constant"),
        "training": TrainingSettings(rounds=2, local_steps=4, batch_size=4, max_tokens=16),
        "experts": SPLIT,
        "averaging": "step",
    }
    return SplitSpec(model=model, task=TaskSettings(label_names=LABELS), seed=3, **{"tuning": None, **settings, **more})


def whole_after(strategy: CollaborativeMoE, nodes: list[dict]) -> dict[str, torch.Tensor]:
    """Return the parameters of the whole model: what parties keep, and the body."""
    names = [f"party-{i}" for i in range(len(nodes))]
    folders = [Path(node["state-dir"]) / "models" / "job" / name for node, name in zip(nodes, names, strict=True)]
    states = [torch.load(folder / "round-00002.pt", weights_only=True) for folder in folders]
    config = load_config(resolve_model(strategy.spec.model), strategy.spec.task)
    trained = {name: state["host"]["trained"] for name, state in zip(names, states, strict=True)}
    return states[1]["own"] | strategy._body.trained_state() | joined_experts(config, strategy.spec, trained)


def test_four_parties_are_centralised_training_on_the_joined_batch(reader: str, tmp_path: Path) -> None:
    """As without a cut: sums over parties are taken in another order, a few float32 roundings a step."""
    spec, nodes = reading(reader), nodes_at(tmp_path)
    with run_job(spec, nodes) as strategy:
        strategy.start(LocalGrid(reading_app, nodes))
        split = whole_after(strategy, nodes)
        crossed = {(e.operation, e.tensor) for e in strategy.ledger.entries() if e.tensor != "header"}
    assert {operation for operation, _ in crossed} == {
        "forward", "backward", "body-forward", "body-backward", "average"
    }  # fmt: skip
    assert {tensor for operation, tensor in crossed if operation == "forward"} == {"hidden", "row", "expert", "output"}
    model = AutoModelForSequenceClassification.from_pretrained(reader).train()
    tokenizer = AutoTokenizer.from_pretrained(reader)
    encoded = [encode(tiny_rows(p).train, tokenizer, max_tokens=16) for p in range(4)]
    orders = [BatchOrder(num_rows=len(encoded[p]), batch_size=4, seed=3, party=f"party-{p}") for p in range(4)]
    optimizer = spec.optimizer.build(list(model.parameters()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for step in range(8):
        batch = collate([encoded[p][i] for p in range(4) for i in orders[p].indices(step)], pad_token_id=0)
        loss = model(**batch.inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    found = [record.train_metrics["loss"] for record in strategy.history]
    assert found == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4], rel=1e-5)
    whole = {name: p.detach() for name, p in model.named_parameters()}
    assert split.keys() == whole.keys()
    worst = max(float((whole[n] - split[n]).abs().max()) for n in whole)
    assert max(float((whole[n] - before[n]).abs().max()) for n in whole) > 1e-3
    assert worst < 4e-6


@pytest.mark.parametrize(
    "tuning", [pytest.param(None, marks=pytest.mark.slow), LoraSettings(rank=2)], ids=["whole", "lora"]
)
def test_tuned_and_with_blocks_computed_again_it_is_the_job_without_a_cut(
    reader: str, tmp_path: Path, tuning: LoraSettings | None
) -> None:
    losses = []
    for backbone in ("party", "split"):
        training = TrainingSettings(
            rounds=1, local_steps=4, batch_size=4, max_tokens=16, gradient_checkpointing=backbone == "split"
        )
        optimizer = OptimizerSettings(learning_rate=0.02)
        spec = reading(
            reader, tuning=tuning, training=training, optimizer=optimizer, experts=ExpertSettings(backbone=backbone)
        )
        with run_job(spec, nodes := nodes_at(tmp_path / backbone)) as strategy:
            strategy.start(LocalGrid(reading_app, nodes))
        losses.append((strategy.history[0].train_metrics["loss"], strategy.history[0].evaluate_metrics["loss"]))
    assert losses[0][1] != pytest.approx(losses[0][0], rel=1e-2)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_between_processes_over_grpc(writer: str, tmp_path: Path) -> None:
    nodes = nodes_at(tmp_path)
    grid = ProcessGrid("tests.experts.writing_app", nodes)
    spec = spec_of(writer, generation=BOUNDS, experts=SPLIT, averaging="round")
    try:
        with run_job(spec, nodes, hub=HubSettings()) as strategy:
            strategy.start(grid, num_rounds=1)
            strategy.generate(grid, WAYS["sampling"])
            strategy.export(grid, tmp_path / "out")
    finally:
        grid.close()
    for index in range(4):
        assert written(tmp_path, index) == whole_writes(tmp_path / "out", index, WAYS["sampling"])


@pytest.mark.slow
def test_a_resumed_job_goes_on_where_it_was(reader: str, tmp_path: Path) -> None:
    """Bodies, hosts and heads together; with AdamW, whose state all of them keep."""
    spec = reading(reader, optimizer=OptimizerSettings(learning_rate=2e-3), averaging="round")
    ends = []
    for rounds in ([2], [1, 2]):
        nodes = nodes_at(tmp_path / f"{len(rounds)}")
        for number in rounds:
            folder = tmp_path / f"{len(rounds)}" / "checkpoints"
            with run_job(spec, nodes, checkpoint_dir=folder, resume=number != rounds[0]) as strategy:
                strategy.start(LocalGrid(reading_app, nodes), num_rounds=number)
        ends.append(whole_after(strategy, nodes))
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


@pytest.mark.parametrize("way", ["greedy", "beam"])
def test_parties_write_what_the_whole_model_writes(writer: str, tmp_path: Path, way: str) -> None:
    nodes = nodes_at(tmp_path)
    for index in (2, 3):
        nodes[index] |= {"mute": 1}
    with run_job(spec_of(writer, generation=BOUNDS, experts=SPLIT), nodes) as strategy:
        strategy.generate(LocalGrid(app, nodes), WAYS[way])
    for index in (0, 1):
        assert written(tmp_path, index) == whole_writes(writer, index, WAYS[way])


@pytest.mark.slow
def test_the_checkpoint_is_the_split_model(writer: str, tmp_path: Path) -> None:
    nodes = nodes_at(tmp_path)
    grid = LocalGrid(app, nodes)
    with run_job(spec_of(writer, generation=BOUNDS, experts=SPLIT, averaging="round"), nodes) as strategy:
        strategy.start(grid)
        strategy.generate(grid, WAYS["greedy"])
        strategy.export(grid, tmp_path / "out")
    for index in range(4):
        assert written(tmp_path, index) == whole_writes(tmp_path / "out", index, WAYS["greedy"])
        assert written(tmp_path, index) != whole_writes(writer, index, WAYS["greedy"])


@pytest.mark.parametrize("on_host_lost", ["fail", "skip"])
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("fault", [pytest.param("silent", marks=pytest.mark.slow), "gone"])
def test_a_host_is_lost_while_the_body_calls_it(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, phase: str, on_host_lost: str
) -> None:
    """A host that answers parties, and not the body; the job ends as configured, within the deadlines."""
    deadline_s = 4.0
    answer, first = ExpertHost.__call__, threading.Event()
    lost: list[Any] = []

    def fail(host: ExpertHost, request: Request) -> Any:
        if request.source == "hub" and request.operation == phase and (not lost or lost[0] is host):
            lost[:] = [host]
            if fault == "gone" and not first.is_set():
                first.set()
                links[id(host)].abandon()
            if fault == "silent":
                time.sleep(deadline_s)
        return answer(host, request)

    links: dict[int, Any] = {}
    serve = Link.serve

    def remember(link: Any, handler: Any) -> None:
        links[id(handler)] = link
        serve(link, handler)

    monkeypatch.setattr(ExpertHost, "__call__", fail)
    monkeypatch.setattr(Link, "serve", remember)
    nodes = nodes_at(tmp_path)
    skip = on_host_lost == "skip"
    experts = ExpertSettings(backbone="split", on_host_lost=on_host_lost, k_min=0 if skip else 1)
    spec = reading(reader, experts=experts, averaging="round")
    started = time.monotonic()
    with run_job(spec, nodes, evaluate=0.0, deadline_s=deadline_s) as strategy:
        if skip:
            strategy.start(LocalGrid(reading_app, nodes), num_rounds=1)
            assert strategy.history[0].steps == 4
            assert list(strategy._body.lost_hosts) == [links[id(lost[0])].party]
            assert list(strategy.history[0].lost) == ([links[id(lost[0])].party] if fault == "gone" else [])
        else:
            with pytest.raises(PartyLostError, match="party-"):
                strategy.start(LocalGrid(reading_app, nodes), num_rounds=1)
    assert time.monotonic() - started < 6 * deadline_s


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schedule": "round-robin"}, "backbone is 'split', the schedule 'round-robin'"),
        ({"replicas": 2}, "replicas 2"),
        ({"local_tolerance": 0.1}, "local_tolerance 0.1"),
        ({"balance_coefficient": 0.1}, "balance_coefficient is 0.1 and backbone 'split'"),
        ({"backbone": "mine"}, "backbone is 'mine'"),
    ],
)
def test_what_cannot_be_split_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        dataclasses.replace(SPLIT, **change)
