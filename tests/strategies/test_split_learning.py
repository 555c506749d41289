"""The strategy on an in-process grid: what it wraps, how it fails, how it goes on."""

import dataclasses
import shutil

import pytest
import torch
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian

from simulations.local_grid import LocalGrid
from tests.jobs import fedavg, job_nodes, job_spec, state_of
from tests.tiny_app import app
from vflair_flower.errors import CheckpointError, ConfigurationError, PartyLostError
from vflair_flower.partition import PartitionPlan
from vflair_flower.settings import LoraSettings, OptimizerSettings, TaskSettings, TrainingSettings
from vflair_flower.strategies import HubSettings, SplitLearning

PLANES = {"inproc": HubSettings(bind="inproc"), "grpc": HubSettings()}


@pytest.fixture
def nodes(tmp_path):
    return job_nodes(tmp_path, 3)


@pytest.fixture
def spec(tiny_bert):
    training = TrainingSettings(rounds=3, local_steps=3, batch_size=4, max_tokens=16)
    return job_spec(tiny_bert, tuning=LoraSettings(rank=4), training=training)


def run(grid, spec, **settings):
    settings = {"aggregator": fedavg(), "hub": PLANES["inproc"], "deadline_s": 20.0, **settings}
    with SplitLearning(spec=spec, **settings) as strategy:
        strategy.start(grid)
        metrics, reports = strategy.evaluate(grid, config=ConfigRecord({"split": "test", "report-rows": True}))
    return strategy, metrics, reports


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("body_mode", ["synchronous", "sequential", "replicated"])
def test_training_lowers_the_loss_and_repeats_itself(nodes, spec, body_mode):
    spec = dataclasses.replace(spec, training=TrainingSettings(rounds=3, local_steps=12, batch_size=4, max_tokens=16))
    first, metrics, reports = run(LocalGrid(app, nodes), spec, body_mode=body_mode, job="first")
    losses = [record.train_metrics["loss"] for record in first.history]
    assert losses[-1] < losses[0]
    assert metrics["accuracy"] == pytest.approx(
        sum(sum(r.scores) for r in reports) / sum(len(r.scores) for r in reports)
    )
    again, *_ = run(LocalGrid(app, nodes), spec, body_mode=body_mode, job="again")
    assert losses == [record.train_metrics["loss"] for record in again.history]
    assert_equal(state_of(first), state_of(again))


def test_body_modes_train_differently(nodes, spec):
    states = [
        state_of(run(LocalGrid(app, nodes), spec, body_mode=m, job=m)[0])
        for m in ("synchronous", "sequential", "replicated")
    ]
    name = next(n for n in states[0] if "layer.1." in n and "lora_B" in n)
    assert len({tuple(state[name].flatten().tolist()) for state in states}) == 3


def test_planes_give_the_same_result(nodes, spec):
    one, other = (run(LocalGrid(app, nodes), spec, hub=hub, job=name)[0] for name, hub in PLANES.items())
    assert_equal(state_of(one), state_of(other))
    assert one.ledger.total("up") == other.ledger.total("up") > 0


def test_body_at_a_node_equals_body_at_the_strategy(nodes, spec, tmp_path):
    here, *_ = run(LocalGrid(app, nodes), spec, job="here")
    model_node = {"role": "model party", "state-dir": str(tmp_path / "model")}
    there, _, reports = run(LocalGrid(app, [*nodes, model_node]), spec, model_party="node", job="there")
    assert_equal(state_of(here), state_of(there))
    assert there.reports["model-party"].parameters_held == here.reports["model-party"].parameters_held
    assert {r.party for r in reports} == {"party-0", "party-1", "party-2", "model-party"}


@pytest.mark.parametrize("aggregator", [FedAdam, FedMedian])
def test_wraps_other_aggregators(nodes, spec, aggregator):
    wrapped = aggregator(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
    strategy, *_ = run(LocalGrid(app, nodes), spec, aggregator=wrapped, job=aggregator.__name__)
    plain, *_ = run(LocalGrid(app, nodes), spec, job="plain")
    assert strategy.history[-1].train_metrics["loss"] < 2
    name = next(iter(dict(strategy.arrays.to_torch_state_dict())))
    assert not torch.equal(state_of(strategy)[name], state_of(plain)[name])


def test_samples_some_parties_as_the_aggregator_says(nodes, spec):
    some = FedAvg(fraction_train=0.4, min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=3)
    strategy, *_ = run(LocalGrid(app, nodes), spec, aggregator=some)
    uppers = {e.party for e in strategy.ledger.entries() if e.operation == "step"}
    assert 1 <= len(uppers) <= 3
    assert all(record.steps == 3 for record in strategy.history)


def test_parties_with_unequal_rows_end_their_passes_and_leave(nodes, spec):
    nodes[0]["num-train"], nodes[2]["num-train"] = 7, 40
    spec = dataclasses.replace(
        spec, training=TrainingSettings(rounds=2, passes=2.0, local_steps=0, batch_size=4, max_tokens=16)
    )
    strategy, *_ = run(LocalGrid(app, nodes), spec)
    assert strategy.reports["party-0"].steps == 2
    assert strategy.reports["party-2"].steps == 10
    assert strategy.reports["model-party"].steps == 10


def test_resume_repeats_the_loss_curve(nodes, spec, tmp_path):
    whole, *_ = run(LocalGrid(app, nodes), spec, job="whole", checkpoint_dir=tmp_path / "whole")
    short = dataclasses.replace(spec)
    with SplitLearning(
        spec=short, aggregator=fedavg(), hub=PLANES["inproc"], job="broken", checkpoint_dir=tmp_path / "broken"
    ) as strategy:
        strategy.start(LocalGrid(app, nodes), num_rounds=2)
    # A round that broke off half-way leaves files of its own at some parties; they must not count.
    broken = tmp_path / "state" / "broken" / "party-0"
    shutil.copyfile(broken / "round-00001.pt", broken / "round-00003.pt")
    resumed, *_ = run(LocalGrid(app, nodes), spec, job="broken", checkpoint_dir=tmp_path / "broken", resume=True)
    assert [r.server_round for r in resumed.history] == [1, 2, 3]
    assert [r.train_metrics for r in resumed.history] == [r.train_metrics for r in whole.history]
    assert [r.evaluate_metrics for r in resumed.history] == [r.evaluate_metrics for r in whole.history]
    assert_equal(state_of(whole), state_of(resumed))


def test_resume_with_other_settings_is_refused(nodes, spec, tmp_path):
    run(LocalGrid(app, nodes), spec, checkpoint_dir=tmp_path / "run")
    other = dataclasses.replace(spec, optimizer=OptimizerSettings(learning_rate=0.5))
    with pytest.raises(CheckpointError, match=r"optimizer\.learning_rate was 0\.005 and is 0\.5"):
        run(LocalGrid(app, nodes), other, checkpoint_dir=tmp_path / "run", resume=True)


def test_a_party_that_fails_is_named_and_the_others_go_on(nodes, spec, monkeypatch):
    _fail_in_round(monkeypatch, party="party-1", server_round=2)
    strategy, *_ = run(LocalGrid(app, nodes), spec, on_party_lost="continue")
    assert [sorted(r.lost) for r in strategy.history] == [[], ["party-1"], []]
    assert "disk on fire" in strategy.history[1].lost["party-1"]


def test_a_party_that_fails_stops_the_job_if_asked(nodes, spec, monkeypatch):
    _fail_in_round(monkeypatch, party="party-1", server_round=2)
    with pytest.raises(PartyLostError, match=r"party 'party-1' is lost.*disk on fire"):
        run(LocalGrid(app, nodes), spec, on_party_lost="stop")


def test_job_ends_when_all_parties_fail(nodes, spec, monkeypatch):
    _fail_in_round(monkeypatch, party="party-", server_round=1)
    with pytest.raises(PartyLostError, match=r"party-0, party-1, party-2"):
        run(LocalGrid(app, nodes), spec)


def _fail_in_round(monkeypatch, *, party, server_round):
    from vflair_flower.clients import data_party

    original = data_party.train_round

    def failing(session, *args):
        if session.party.startswith(party) and session.server_round == server_round:
            raise OSError("disk on fire")
        return original(session, *args)

    monkeypatch.setattr(data_party, "train_round", failing)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": TaskSettings(label_names=("card", "money"))}, "a task head of 3 classes, and the job's data has 2"),
        ({"task": TaskSettings(label_names=("money", "card", "parcel"))}, "their order differs"),
    ],
)
def test_data_that_does_not_fit_is_refused_before_training(nodes, spec, change, message, monkeypatch):
    trained = []
    monkeypatch.setattr("vflair_flower.clients.data_party.train_round", lambda *_: trained.append(1))
    with pytest.raises(ConfigurationError, match=message):
        run(LocalGrid(app, nodes), dataclasses.replace(spec, **change))
    assert trained == []


def test_cut_outside_the_model_is_refused_at_once(spec):
    bad = dataclasses.replace(spec, plan=PartitionPlan(head_blocks=3, tail_blocks=1))
    with pytest.raises(ConfigurationError, match="head_blocks is 3 and tail_blocks is 1, but the model has 4 blocks"):
        SplitLearning(spec=bad, aggregator=fedavg())


def test_missing_and_needless_model_parties_are_refused(nodes, spec, tmp_path):
    with pytest.raises(ConfigurationError, match="0 nodes with the role of model party"):
        run(LocalGrid(app, nodes), spec, model_party="node")
    extra = {"role": "model party", "state-dir": str(tmp_path)}
    with pytest.raises(ConfigurationError, match="1 nodes with the role of model party"):
        run(LocalGrid(app, [*nodes, extra]), spec)


def test_two_nodes_of_one_name_are_refused(nodes, spec):
    nodes[1]["partition-id"] = 0
    with pytest.raises(ConfigurationError, match="several nodes are called 'party-0'"):
        run(LocalGrid(app, nodes), spec)


@pytest.mark.parametrize(
    "settings", [{"body_mode": "parallel"}, {"model_party": "cloud"}, {"on_party_lost": "retry"}, {"resume": True}]
)
def test_unknown_settings_are_refused(spec, settings):
    with pytest.raises(ConfigurationError):
        SplitLearning(spec=spec, aggregator=fedavg(), **settings)


def test_averaging_at_every_step_keeps_parties_equal_and_survives_a_loss(nodes, spec, monkeypatch):
    spec = dataclasses.replace(spec, averaging="step")
    nodes[0]["num-train"] = 7
    _fail_in_round(monkeypatch, party="party-1", server_round=2)
    strategy, *_ = run(LocalGrid(app, nodes), spec)
    assert [sorted(r.lost) for r in strategy.history] == [[], ["party-1"], []]
    sizes = {e.max_shape for e in strategy.ledger.entries() if e.tensor == "gradient"}
    assert sizes == {(strategy.reports["party-0"].parameters_trained,)}
    again, *_ = run(LocalGrid(app, nodes), spec, job="again")
    assert_equal(state_of(strategy), state_of(again))


def test_averaging_at_every_step_needs_parties_that_step_at_once(spec):
    with pytest.raises(ConfigurationError, match="averaging is 'step' and body_mode is 'sequential'"):
        SplitLearning(spec=dataclasses.replace(spec, averaging="step"), aggregator=fedavg(), body_mode="sequential")


def test_ledger_holds_what_is_allowed_and_no_more(nodes, spec):
    strategy, *_ = run(LocalGrid(app, nodes), spec)
    crossed = {(e.operation, e.direction, e.tensor) for e in strategy.ledger.entries() if e.tensor != "header"}
    assert crossed == {
        ("forward", "up", "hidden"),
        ("forward", "up", "attention_mask"),
        ("forward", "down", "hidden"),
        ("backward", "up", "grad"),
        ("backward", "down", "grad"),
    }
    assert {e.max_shape[-1] for e in strategy.ledger.entries() if e.tensor == "hidden"} == {32}
