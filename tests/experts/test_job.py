"""PC-MoE through Flower messages: parties train beside each other, keep what is theirs, and go on where they were."""

import dataclasses
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from transformers import AutoTokenizer, MixtralConfig, MixtralForSequenceClassification

from simulations.local_grid import LocalGrid
from tests.experts.moe_app import app
from tests.tiny import LABELS, save_tiny, tiny_rows
from tests.tiny_app import rows, state_dir
from vflair_flower.clients import ExpertParty, data_party
from vflair_flower.errors import ConfigurationError, PartyLostError
from vflair_flower.experts.finished import joined_experts
from vflair_flower.experts.loading import layers_and_placement
from vflair_flower.partition import Segment, load_config, load_segment, resolve_model
from vflair_flower.settings import ExpertSettings, LoraSettings, OptimizerSettings, TaskSettings, TrainingSettings
from vflair_flower.spec import SplitSpec
from vflair_flower.strategies import CollaborativeMoE, HubSettings
from vflair_flower.tasks import BatchOrder, collate, encode

PARTIES, BLOCKS, EXPERTS = 4, 2, 8
TASK = TaskSettings(label_names=LABELS)


@pytest.fixture(scope="module")
def tiny_moe(tmp_path_factory) -> str:
    folder = save_tiny(tmp_path_factory.mktemp("moe"), "llama")
    torch.manual_seed(7)
    config = MixtralConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(folder)),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        pad_token_id=0,
        num_labels=len(LABELS),
    )
    model = MixtralForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def nodes(tmp_path):
    return [
        {"partition-id": i, "num-partitions": PARTIES, "state-dir": str(tmp_path / f"p{i}")} for i in range(PARTIES)
    ]


@pytest.fixture
def spec(tiny_moe):
    return SplitSpec(
        model=tiny_moe,
        task=TASK,
        tuning=None,
        optimizer=OptimizerSettings(learning_rate=2e-3),
        training=TrainingSettings(rounds=2, local_steps=4, batch_size=4, max_tokens=16),
        experts=ExpertSettings(),
        averaging="none",
        seed=3,
    )


def run(nodes, spec, *, num_rounds=None, app=app, **settings):
    aggregator = FedAvg(min_train_nodes=PARTIES, min_evaluate_nodes=PARTIES, min_available_nodes=PARTIES)
    grid = LocalGrid(app, nodes)
    more = {"hub": HubSettings(bind="inproc"), "deadline_s": 20.0, "parties": PARTIES, **settings}
    with CollaborativeMoE(spec=spec, aggregator=aggregator, **more) as strategy:
        strategy.start(grid, num_rounds=num_rounds)
        metrics, reports = strategy.evaluate(grid, config=ConfigRecord({"split": "test", "report-rows": True}))
    return strategy, metrics, reports


def kept(nodes: list[dict], job: str, server_round: int) -> list[dict]:
    """What each party keeps on its own disk after a round."""
    folders = [Path(node["state-dir"]) / "models" / job / f"party-{i}" for i, node in enumerate(nodes)]
    return [torch.load(folder / f"round-{server_round:05d}.pt", weights_only=True) for folder in folders]


def whole_of(states: list[dict], spec: SplitSpec, owner: int) -> dict[str, torch.Tensor]:
    """Put one party's own model and all hosts' experts together."""
    trained = {f"party-{i}": state["host"]["trained"] for i, state in enumerate(states)}
    return states[owner]["own"] | joined_experts(load_config(resolve_model(spec.model), spec.task), spec, trained)


def break_in_round_2(monkeypatch, *, goes):
    """Let a party fail before it trains in round 2; if it goes, its line is cut before it can say so."""
    train_round = data_party.train_round

    def failing(session, *args):
        if session.party == "party-2" and session.server_round == 2:
            if goes:
                session._link.abandon()
            raise RuntimeError("power cut" if goes else "the disk is full")
        return train_round(session, *args)

    monkeypatch.setattr(data_party, "train_round", failing)


@pytest.mark.parametrize(
    "experts",
    [ExpertSettings(), ExpertSettings(combine="host"), ExpertSettings(local_layers=(0, 1), padding="bucket")],
    ids=["owner", "host", "defended"],
)
def test_concurrent_is_centralised_training_on_the_joined_batch(nodes, spec, experts, tmp_path):
    """SGD, four parties, gradients of their own models averaged at every step.

    Not bit-equal: sums over parties are taken in another order than over the joined batch; a few float32 roundings a
    step.
    """
    sgd = OptimizerSettings(name="sgd", learning_rate=0.05, schedule="constant")
    spec = dataclasses.replace(spec, optimizer=sgd, averaging="step", experts=experts)
    strategy, *_ = run(nodes, spec)
    assert [record.steps for record in strategy.history] == [4, 4]
    source = resolve_model(spec.model)
    model = load_segment(source, Segment.whole(BLOCKS), TASK, seed=3).model.train()
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    encoded = [encode(tiny_rows(p).train, tokenizer, max_tokens=16) for p in range(PARTIES)]
    orders = [BatchOrder(num_rows=len(encoded[p]), batch_size=4, seed=3, party=f"party-{p}") for p in range(PARTIES)]
    optimizer = sgd.build(list(model.parameters()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for step in range(8):
        batch = collate([encoded[p][i] for p in range(PARTIES) for i in orders[p].indices(step)], pad_token_id=0)
        loss = model(**batch.inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    found = [record.train_metrics["loss"] for record in strategy.history]
    assert found == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4], rel=1e-5)
    split = whole_of(kept(nodes, "job", 2), spec, owner=2)
    whole = {name: p.detach() for name, p in model.named_parameters()}
    assert split.keys() == whole.keys()
    assert max(float((whole[n] - before[n]).abs().max()) for n in whole) > 1e-3
    assert max(float((whole[n] - split[n]).abs().max()) for n in whole) < 4e-6


@pytest.mark.parametrize("schedule", ["concurrent", "round-robin"])
def test_own_models_stay_private_and_a_resume_goes_on(nodes, spec, schedule, tmp_path):
    spec = dataclasses.replace(
        spec,
        experts=ExpertSettings(schedule=schedule),
        training=TrainingSettings(rounds=3, local_steps=3, batch_size=4, max_tokens=16),
    )
    whole, metrics, _ = run(nodes, spec, job="whole", checkpoint_dir=tmp_path / "whole")
    losses = [record.train_metrics["loss"] for record in whole.history]
    assert losses[-1] < losses[0]
    assert 0.0 <= metrics["accuracy"] <= 1.0
    assert len(whole.arrays) == 0  # nothing of anybody's model came to the strategy
    run(nodes, spec, num_rounds=1, job="broken", checkpoint_dir=tmp_path / "broken")
    resumed, *_ = run(nodes, spec, job="broken", checkpoint_dir=tmp_path / "broken", resume=True)
    assert [record.train_metrics["loss"] for record in resumed.history] == losses
    first, again = kept(nodes, "whole", 3), kept(nodes, "broken", 3)
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(tensor, other["own"][name]) for name, tensor in one["own"].items())
        assert all(torch.equal(t, other["host"]["trained"][n]) for n, t in one["host"]["trained"].items())
    assert not torch.equal(first[0]["own"]["score.weight"], first[1]["own"]["score.weight"])
    steps = 3 * 3 * (PARTIES if schedule == "round-robin" else 1)
    assert {state["host"]["update"]["steps"] for state in first} == {steps}


def test_only_agreed_vectors_cross(nodes, spec):
    """The ledger has hidden states and gradients between parties, and neither ids, labels nor parameters."""
    strategy, *_ = run(nodes, spec)
    crossed = {(entry.operation, entry.tensor) for entry in strategy.ledger.entries()}
    assert {tensor for operation, tensor in crossed if operation == "forward"} == {
        "header", "hidden", "row", "expert", "output"
    }  # fmt: skip
    assert {tensor for operation, tensor in crossed if operation == "backward"} == {"header", "grad", "weight"}
    assert {operation for operation, tensor in crossed if tensor != "header"} == {"forward", "backward"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": None, "averaging": "round"}, "experts is not set"),
        ({"tuning": LoraSettings(method="dora")}, "the LoRA method is 'dora'"),
        ({"tuning": LoraSettings(method="adalora")}, "the LoRA method is 'adalora'"),
        ({"tuning": LoraSettings(dropout=0.1)}, "the LoRA dropout is 0.1"),
        ({"averaging": "step", "experts": ExpertSettings(schedule="round-robin")}, "averaging is 'step'"),
        ({"optimizer": OptimizerSettings(max_grad_norm=1.0)}, "max_grad_norm is 1.0"),
        ({"experts": ExpertSettings(placement="capacity", capacities=(1.0, 2.0))}, "2 numbers for 4 parties"),
        ({"experts": ExpertSettings(replicas=5)}, "replicas is 5"),
        (
            {"experts": ExpertSettings(placement="table", table=((0,) * 5 + (1, 2, 3),) * 2, opted_out=(0, 1, 2))},
            "7 of 8 experts are masked or opted out",
        ),
        (
            {"experts": ExpertSettings(placement="table", table=((0, 0, 1, 1, 2, 2, 2, 3),) * 2, routing_gap=2)},
            "left with 1 of the 2",
        ),
        (
            {"experts": ExpertSettings(placement="capacity", capacities=(3.0, 1.0, 3.0, 1.0), private_share=0.2)},
            "left with 1 of the 2",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(spec, change, message):
    with pytest.raises(ConfigurationError, match=message):
        CollaborativeMoE(spec=dataclasses.replace(spec, **change), aggregator=FedAvg(), parties=PARTIES)


def test_all_parties_are_needed_in_every_round(nodes, spec):
    with (
        CollaborativeMoE(
            spec=spec, aggregator=FedAvg(fraction_train=0.5), parties=PARTIES, hub=HubSettings(bind="inproc")
        ) as strategy,
        pytest.raises(ConfigurationError, match="has sampled 2 parties for round 1, and the experts are placed at 4"),
    ):
        strategy.start(LocalGrid(app, nodes))


def test_a_host_that_is_skipped_does_not_end_the_round(nodes, spec, monkeypatch):
    """One party's process goes in the middle of round 2; the others end it without its experts, and it is named."""
    break_in_round_2(monkeypatch, goes=True)
    spec = dataclasses.replace(spec, experts=ExpertSettings(on_host_lost="skip", k_min=0))
    aggregator = FedAvg(min_train_nodes=PARTIES, min_evaluate_nodes=PARTIES, min_available_nodes=PARTIES)
    hub = HubSettings(bind="inproc")
    with CollaborativeMoE(spec=spec, aggregator=aggregator, parties=PARTIES, hub=hub, deadline_s=5.0) as strategy:
        strategy.start(LocalGrid(app, nodes), num_rounds=2)
    assert list(strategy.history[1].lost) == ["party-2"]
    assert strategy.history[1].steps == 4


def test_copies_stand_in_for_a_lost_party_and_it_does_not_come_back_with_old_ones(nodes, spec, monkeypatch):
    """A party goes in round 2; its experts are trained on at the others, equally, and in round 3 its own are old."""
    break_in_round_2(monkeypatch, goes=True)
    spec = dataclasses.replace(
        spec,
        experts=ExpertSettings(on_host_lost="replica", replicas=2),
        training=TrainingSettings(rounds=3, local_steps=4, batch_size=4, max_tokens=16),
    )
    aggregator = FedAvg(min_train_nodes=PARTIES, min_evaluate_nodes=PARTIES, min_available_nodes=PARTIES)
    hub = HubSettings(bind="inproc")
    with CollaborativeMoE(spec=spec, aggregator=aggregator, parties=PARTIES, hub=hub, deadline_s=20.0) as strategy:
        strategy.start(LocalGrid(app, nodes))
    assert [list(record.lost) for record in strategy.history] == [[], ["party-2"], ["party-2"]]
    assert "has not ended round" in strategy.history[2].lost["party-2"]
    assert [record.steps for record in strategy.history] == [4, 4, 4]
    names = [f"party-{i}" for i in range(PARTIES)]
    layers, placement = layers_and_placement(load_config(resolve_model(spec.model), spec.task), spec, names)
    seen: dict[tuple[str, int], torch.Tensor] = {}
    compared = 0
    left = [node for i, node in enumerate(nodes) if i != 2]
    for party, folder in zip(["party-0", "party-1", "party-3"], left, strict=True):
        path = Path(folder["state-dir"]) / "models" / "job" / party / "round-00003.pt"
        state = torch.load(path, weights_only=True)["host"]
        assert state["update"]["steps"] == 12
        for name, tensor in state["trained"].items():
            layer = next(i for i, own in enumerate(layers) if name.startswith(f"{own}."))
            for place, expert in enumerate(placement.experts_of(party)[layer]):
                compared += (name, expert) in seen
                assert torch.equal(seen.setdefault((name, expert), tensor[place]), tensor[place])
    assert len(seen) == 2 * BLOCKS * EXPERTS  # every expert is still somewhere
    assert compared > 0


def test_preferences_apply_in_a_job_and_send_less(nodes, spec):
    """Party 1 has opted out, and all prefer their own experts: fewer rows travel, and party 1's experts stay."""
    sent = []
    for job, experts in (("plain", ExpertSettings()), ("own", ExpertSettings(opted_out=(1,), local_tolerance=1.0))):
        strategy, *_ = run(nodes, dataclasses.replace(spec, experts=experts), num_rounds=1, job=job)
        sent.append(sum(entry.bytes for entry in strategy.ledger.entries() if entry.tensor == "hidden"))
    assert sent[1] < 0.9 * sent[0]
    steps = [state["host"]["update"]["steps"] for state in kept(nodes, "own", 1)]
    assert steps == [4, 0, 4, 4]


def test_gaps_and_private_tokens_in_a_job_send_less(nodes, spec):
    """Each in training and evaluation: by the job's share of rare tokens, or by a party's own rule."""
    nothing = ClientApp()
    ExpertParty(rows, state_dir=state_dir, private_tokens=lambda ids: torch.ones_like(ids).bool()).register(nothing)
    kinds = {
        "plain": (ExpertSettings(), app),
        "gap": (ExpertSettings(routing_gap=3), app),
        "half": (ExpertSettings(private_share=0.5), app),
        "all": (ExpertSettings(private_share=1.0), app),
        "own": (ExpertSettings(), nothing),
    }
    sent, short = {}, TrainingSettings(rounds=1, local_steps=1, batch_size=4, max_tokens=16)
    for job, (experts, with_app) in kinds.items():
        given = dataclasses.replace(spec, experts=experts, training=short)
        strategy, *_ = run(nodes, given, num_rounds=1, job=job, app=with_app)
        sent[job] = sum(entry.bytes for entry in strategy.ledger.entries() if entry.tensor in ("hidden", "grad"))
    assert sent["gap"] < 0.6 * sent["plain"]
    assert sent["plain"] > sent["half"] > 2 * sent["all"]
    assert sent["own"] == 0


def test_too_many_parties_and_models_without_experts_are_refused(spec, tiny_bert):
    with pytest.raises(ConfigurationError, match="9 parties are to host the 8 experts"):
        CollaborativeMoE(spec=spec, aggregator=FedAvg(), parties=9)
    with pytest.raises(ConfigurationError, match="the model family is 'bert'"):
        CollaborativeMoE(spec=dataclasses.replace(spec, model=tiny_bert), aggregator=FedAvg(), parties=2)


def test_a_party_that_fails_ends_the_job_and_is_named(nodes, spec, monkeypatch):
    break_in_round_2(monkeypatch, goes=False)
    with pytest.raises(PartyLostError, match="party-2"):
        run(nodes, spec)
