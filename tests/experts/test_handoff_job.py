"""Hand-off through Flower messages: parties train each other's blocks in turn, and go on where they were."""

import dataclasses

import pytest
import torch
from flwr.serverapp.strategy import FedAvg

from simulations.local_grid import LocalGrid
from tests.experts.test_job import PARTIES, kept, nodes, run, spec, tiny_moe  # noqa: F401 - fixtures
from vflair_flower.errors import ConfigurationError
from vflair_flower.settings import ExpertSettings, LoraSettings, TrainingSettings
from vflair_flower.strategies import CollaborativeMoE


def handed(spec, semantics, rounds=1, **more):  # noqa: F811
    return dataclasses.replace(
        spec,
        experts=ExpertSettings(semantics=semantics, schedule="round-robin", **more),
        training=TrainingSettings(rounds=rounds, local_steps=3, batch_size=4, max_tokens=16),
    )


def crossed(strategy):
    entries = strategy.ledger.entries()
    return {(e.operation, e.tensor) for e in entries if e.operation.startswith("block") and e.tensor != "header"}


def test_a_job_by_sequences_learns_and_evaluates(nodes, spec):  # noqa: F811
    """Parties train in turn, and evaluate one after the other: were they at it at once, each could wait for another."""
    strategy, metrics, _ = run(nodes, handed(spec, "hand-off-sequence", rounds=3))
    losses = [record.train_metrics["loss"] for record in strategy.history]
    assert losses[-1] < losses[0]
    assert 0.0 <= metrics["accuracy"] <= 1.0
    assert crossed(strategy) == {
        ("block", "hidden"), ("block", "attention_mask"), ("block", "lead"), ("block-backward", "grad")
    }  # fmt: skip


@pytest.mark.slow
def test_a_job_by_tokens_learns_and_a_resume_goes_on(nodes, spec, tmp_path):  # noqa: F811
    spec = handed(spec, "hand-off-token", rounds=2)
    whole, *_ = run(nodes, spec, job="whole", checkpoint_dir=tmp_path / "whole")
    losses = [record.train_metrics["loss"] for record in whole.history]
    assert losses[-1] < losses[0]
    assert len(whole.arrays) == 0  # nothing of anybody's model came to the strategy
    assert crossed(whole) >= {("block", "led")}
    run(nodes, spec, num_rounds=1, job="broken", checkpoint_dir=tmp_path / "broken")
    assert any(state["waiting"] for state in kept(nodes, "broken", 1))
    resumed, *_ = run(nodes, spec, job="broken", checkpoint_dir=tmp_path / "broken", resume=True)
    assert [record.train_metrics["loss"] for record in resumed.history] == losses
    first, again = kept(nodes, "whole", 2), kept(nodes, "broken", 2)
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(tensor, other["own"][name]) for name, tensor in one["own"].items())
        assert all(torch.equal(t, other["host"]["trained"][n]) for n, t in one["host"]["trained"].items())
        assert all(torch.equal(tensor, other["waiting"][name]) for name, tensor in one["waiting"].items())
    names = first[0]["own"]
    assert all(any(not torch.equal(first[0]["own"][n], state["own"][n]) for n in names) for state in first[1:])
    assert {state["host"]["update"]["steps"] for state in first} == {2 * 3 * PARTIES}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tuning": LoraSettings(method="adalora"), "trained": "none"}, "the LoRA method 'adalora'"),
        ({"tuning": LoraSettings(dropout=0.1), "trained": "none"}, "dropout 0.1"),
        ({"training": TrainingSettings(gradient_checkpointing=True)}, "gradient_checkpointing is set"),
        ({"averaging": "step"}, "averaging is 'step'"),
    ],
)
def test_jobs_that_do_not_go_with_it_are_refused(spec, change, message):  # noqa: F811
    trained = change.pop("trained", "all")
    wrong = dataclasses.replace(handed(spec, "hand-off-token", trained=trained), **change)
    with pytest.raises(ConfigurationError, match=message):
        CollaborativeMoE(spec=wrong, aggregator=FedAvg(), parties=PARTIES)


def test_writing_is_refused(nodes, spec):  # noqa: F811
    from tests.experts.moe_app import app

    with (
        CollaborativeMoE(spec=handed(spec, "hand-off-token"), aggregator=FedAvg(), parties=PARTIES) as strategy,
        pytest.raises(ConfigurationError, match="key-value caches"),
    ):
        strategy.generate(LocalGrid(app, nodes))
