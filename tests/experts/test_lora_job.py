"""LoRA jobs through Flower messages: what parties keep, what they share, and that nothing else of theirs changes."""

import dataclasses

import pytest
import torch
from flwr.serverapp.strategy import FedAvg

from tests.experts.test_job import PARTIES, kept, nodes, run, spec, tiny_moe  # noqa: F401
from tests.tiny import LABELS
from vflair_flower.errors import PartitionError
from vflair_flower.experts.adapters import ExpertLora
from vflair_flower.settings import ExpertSettings, LoraSettings, TrainingSettings
from vflair_flower.strategies import CollaborativeMoE

LORA = LoraSettings(rank=4, alpha=8)


@pytest.fixture
def lora_spec(spec):  # noqa: F811
    training = TrainingSettings(rounds=2, local_steps=4, batch_size=4, max_tokens=16)
    return dataclasses.replace(spec, tuning=LORA, training=training)


def is_adapter(name: str) -> bool:
    return ".lora_" in name or "_lora." in name


@pytest.mark.parametrize("averaging", ["none", pytest.param("round", marks=pytest.mark.slow), "step"])
def test_a_job_with_lora_learns_and_keeps_adapters_alone(nodes, lora_spec, averaging, monkeypatch):  # noqa: F811
    """Frozen experts are looked at when a session's last step is done, at every party."""
    from vflair_flower.clients import expert_party

    loaded, changed = [], []
    load, save = expert_party.load_experts, expert_party.PartyStore.save

    def remember(*args, **settings):
        shard = load(*args, **settings)
        loaded.append([(p, p.detach().clone()) for p in shard.parameters()])
        return shard

    def compare(store, server_round, state):
        changed.extend(p for pairs in loaded for p, before in pairs if not torch.equal(p, before))
        save(store, server_round, state)

    monkeypatch.setattr(expert_party, "load_experts", remember)
    monkeypatch.setattr(expert_party.PartyStore, "save", compare)
    training = dataclasses.replace(lora_spec.training, gradient_checkpointing=averaging == "step")
    spec = dataclasses.replace(lora_spec, averaging=averaging, training=training)  # noqa: F811
    strategy, metrics, _ = run(nodes, spec)
    losses = [record.train_metrics["loss"] for record in strategy.history]
    assert losses[-1] < losses[0]
    assert loaded
    assert changed == []
    assert 0.0 <= metrics["accuracy"] <= 1.0
    first = kept(nodes, "job", 2)
    for one in first:
        held = {**one["own"], **one["host"]["trained"]}
        assert {name for name in held if not is_adapter(name)} == {"base_model.model.score.weight"}
        assert any(bool((tensor != 0).any()) for name, tensor in held.items() if "lora_B" in name)
    shared = set(strategy.arrays)
    assert shared == (set() if averaging == "none" else set(first[0]["own"]))
    equal = all(torch.equal(t, first[1]["own"][n]) for n, t in first[0]["own"].items())
    assert equal is (averaging == "step")
    report = strategy.reports["party-0"]
    adapters = sum(t.numel() for t in (*first[0]["own"].values(), *first[0]["host"]["trained"].values()))
    assert report.parameters_trained == adapters < report.parameters_held / 5
    assert report.memory["parameters"] == 4 * report.parameters_held
    assert report.memory["optimizer"] == pytest.approx(2 * 4 * adapters, rel=0.01)  # moments, and counts of steps


def test_a_resume_goes_on_with_the_adapters_that_were_left(nodes, lora_spec, tmp_path):  # noqa: F811
    training = dataclasses.replace(lora_spec.training, local_steps=2)
    lora_spec = dataclasses.replace(lora_spec, training=training)
    whole, *_ = run(nodes, lora_spec, job="whole", checkpoint_dir=tmp_path / "whole")
    run(nodes, lora_spec, num_rounds=1, job="broken", checkpoint_dir=tmp_path / "broken")
    resumed, *_ = run(nodes, lora_spec, job="broken", checkpoint_dir=tmp_path / "broken", resume=True)
    losses = [[record.train_metrics["loss"] for record in strategy.history] for strategy in (whole, resumed)]
    assert losses[0] == losses[1]
    for one, other in zip(kept(nodes, "whole", 2), kept(nodes, "broken", 2), strict=True):
        assert all(torch.equal(t, other["host"]["trained"][n]) for n, t in one["host"]["trained"].items())
        assert all(torch.equal(t, other["own"][n]) for n, t in one["own"].items())


@pytest.mark.parametrize("method", ["dora", pytest.param("adalora", marks=pytest.mark.slow)])
def test_frozen_experts_let_parties_tune_their_own_models_as_they_like(nodes, lora_spec, method):  # noqa: F811
    tuning = LoraSettings(method=method, rank=4, dropout=0.1)
    spec = dataclasses.replace(lora_spec, tuning=tuning, experts=ExpertSettings(trained="none"))  # noqa: F811
    strategy, *_ = run(nodes, spec)
    losses = [record.train_metrics["loss"] for record in strategy.history]
    assert losses[-1] < losses[0]
    assert [state["host"]["trained"] for state in kept(nodes, "job", 2)] == [{}] * PARTIES


def test_a_family_without_known_modules_is_refused_before_anything_runs(lora_spec, tmp_path):
    from transformers import AutoModelForSequenceClassification

    from vflair_flower.certificate import TINY

    config = TINY["qwen3-moe"]()
    config.num_labels = len(LABELS)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    spec = dataclasses.replace(lora_spec, model=str(tmp_path))  # noqa: F811
    with pytest.raises(PartitionError, match="no default LoRA modules for the family 'qwen3_moe'"):
        CollaborativeMoE(spec=spec, aggregator=FedAvg(), parties=2)


def test_the_first_adapters_do_not_depend_on_the_placement():
    weight = torch.zeros(8, 6, 5)
    make = {"of": 8, "settings": LORA, "seed": 3, "transposed": False}
    whole = ExpertLora("layers.0.experts.down_proj", weight, tuple(range(8)), **make)
    some = ExpertLora("layers.0.experts.down_proj", weight[[1, 6]], (1, 6), **make)
    other = ExpertLora("layers.1.experts.down_proj", weight, tuple(range(8)), **make)
    assert torch.equal(some.lora_A, whole.lora_A[[1, 6]])
    assert not torch.equal(other.lora_A, whole.lora_A)
    assert not some.lora_B.any()
