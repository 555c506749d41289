"""First and last layers whose experts every party has: the whole model's function, and nothing of them at hosts."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.experts.conftest import MOE, batch_of
from tests.experts.test_exact import steps
from tests.experts.test_export import pieces
from tests.experts.test_job import PARTIES, kept, nodes, run, spec, tiny_moe, whole_of  # noqa: F401
from tests.experts.test_lora import joined, lora_of, whole_gradients, whole_model
from vflair_flower.errors import ConfigurationError
from vflair_flower.experts import (
    count_coactivation,
    expert_layer_names,
    load_local,
    merge_expert_adapters,
    num_experts,
    place_by_coactivation,
    place_experts,
    prefer_experts,
)
from vflair_flower.experts.export import write_checkpoint
from vflair_flower.experts.placement import local_places
from vflair_flower.experts.routing import opted_out_experts
from vflair_flower.partition import load_config, resolve_model, trained_state
from vflair_flower.settings import ExpertSettings, TrainingSettings
from vflair_flower.spec import SplitSpec
from vflair_flower.strategies import CollaborativeMoE

ENDS = ExpertSettings(local_layers=1)
QUICK = ("mixtral", "deepseek-v3", "gpt-oss")


@pytest.mark.parametrize(
    "family", [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in MOE]
)
def test_logits_gradients_and_steps_are_the_whole_models(family: str, make_house: Callable[..., Any]) -> None:
    """Losses, every gradient and three AdamW steps, bit for bit."""
    house = make_house(family, experts=ENDS)
    expected, whole, found, end = steps(house, 2)
    assert found == expected
    assert end.keys() == whole.keys()
    assert [name for name, p in whole.items() if not torch.equal(end[name], p)] == []


@pytest.mark.parametrize("experts", [ENDS, ExpertSettings(local_layers=(2, 0))], ids=["ends", "first"])
def test_hosts_hold_and_hear_nothing_of_local_layers(experts: ExpertSettings, make_house: Callable[..., Any]) -> None:
    house = make_house("mixtral", experts=experts)
    layers = expert_layer_names(load_config(house.source, house.spec.task), house.spec.task)
    spread = [1, 2] if experts == ENDS else [2, 3]
    with house.open(2) as companies:
        owner, host = companies
        host.caller.finish()
        heard: list[int] = []
        owner.caller.watch = lambda _call, portion: heard.append(portion.layer)
        owner.train(batch_of(0))
        assert owner.caller.tokens == batch_of(0)["input_ids"].numel()
        held = {name.rpartition(".")[0] for name, _ in host.host.module.named_parameters()}
        own = {name for name, _ in owner.model.named_parameters() if ".experts." in name}
    assert sorted(set(heard)) == spread
    assert held == {layers[layer] for layer in spread}
    assert {name.rpartition(".")[0] for name in own} == {layers[x] for x in range(4) if x not in spread}


@pytest.mark.parametrize("family", ["mixtral", pytest.param("gpt-oss", marks=pytest.mark.slow)])
def test_lora_is_that_of_the_whole_model_and_loads_with_plain_peft(
    family: str, make_house: Callable[..., Any], tmp_path: Path
) -> None:
    house = make_house(family, experts=ENDS, tuning=lora_of(family))
    whole = whole_model(house)
    whole(**batch_of(0)).loss.backward()
    gradients = whole_gradients(whole)
    with house.open(2) as companies:
        owner, other = companies
        other.caller.finish()
        owner.model(**batch_of(0)).loss.backward()
        pending = {c.name: dict(c.host._update.pending(owner.name)) for c in companies}
        found = {**whole_gradients(owner.model), **joined(pending, companies, house, tmp_path / "gradients")}
        for company in companies:
            company.host._update.drop(owner.name)
        owner.train(batch_of(1))
        with torch.no_grad():
            expected = owner.model.eval()(**batch_of(7)).logits
        states = {c.name: c.host.trained_state() for c in companies}
        own, placement = trained_state(owner.model), house.placement(list(states))
    assert found.keys() == gradients.keys()
    assert [name for name in found if not torch.equal(found[name], gradients[name])] == []
    config = load_config(house.source, house.spec.task)
    merge_expert_adapters(tmp_path / "adapter", own, states, placement, config=config, spec=house.spec)
    with torch.no_grad():
        plain = PeftModel.from_pretrained(house.whole().eval(), str(tmp_path / "adapter")).eval()
        assert torch.equal(plain(**batch_of(7)).logits, expected)


def test_frozen_experts_are_frozen_in_local_layers_too(make_house: Callable[..., Any]) -> None:
    house = make_house("mixtral", experts=dataclasses.replace(ENDS, trained="none"))
    with house.open(2) as companies:
        companies[1].caller.finish()
        model = companies[0].model
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        companies[0].train(batch_of(0))
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert not any(".experts." in name for name in changed)


def test_the_exported_files_are_those_of_the_whole_model(make_house: Callable[..., Any], tmp_path: Path) -> None:
    house = make_house("olmoe", experts=ENDS)
    house.whole().save_pretrained(tmp_path / "whole")
    config = load_config(house.source, house.spec.task)
    with house.open(2) as companies:
        asked: list[int] = []
        given = pieces(companies, house)
        write_checkpoint(
            tmp_path / "out",
            house.source,
            config,
            house.spec.task,
            backbone=companies[0].model.state_dict,
            experts=lambda layer: asked.append(layer) or given(layer),
            local={0, 3},
        )
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert asked == [1, 2]
    assert found.keys() == expected.keys()
    assert [n for n, t in expected.items() if not torch.equal(t, found[n])] == []


def test_a_party_alone_has_all_experts_of_local_layers(make_house: Callable[..., Any]) -> None:
    house = make_house("mixtral", experts=ENDS)
    placement, whole = house.placement(["party-0", "party-1"]), house.whole().eval()
    own = placement.experts_of("party-1")
    count = num_experts(whole.config)
    others = {layer: [e for e in range(count) if e not in own[layer]] for layer in placement.spread}
    inputs = {"input_ids": batch_of(0)["input_ids"]}
    local = load_local(house.source, placement, "party-1", house.spec)
    with torch.no_grad(), prefer_experts(whole, masked=others):
        assert torch.equal(local(**inputs).logits, whole(**inputs).logits)
    assert sorted(others) == [1, 2]


def test_layers_keep_their_numbers_wherever_they_are_counted(make_house: Callable[..., Any]) -> None:
    house = make_house("mixtral", experts=ENDS)
    batch = {"input_ids": batch_of(0)["input_ids"]}
    expected = count_coactivation(house.whole(), [batch])
    with house.open(2, training=False) as companies:
        found = count_coactivation(companies[0].model, [batch])
    assert torch.equal(found, expected)
    table = place_by_coactivation(expected, 2)
    settings = ExpertSettings(local_layers=(1, 0), placement="table", table=table, opted_out=(1,))
    placement = place_experts(settings, ["a", "b"], layers=4, experts=num_experts(house.whole().config))
    assert placement.host_of == ((), *table[1:])
    assert placement.spread == (1, 2, 3)
    masked = opted_out_experts(placement)
    assert masked[0] == ()
    assert all(masked[layer] for layer in placement.spread)


def test_a_layer_is_left_to_spread() -> None:
    assert local_places(ExpertSettings(), 1) == frozenset()
    assert local_places(ExpertSettings(local_layers=(1, 2)), 4) == {0, 2, 3}
    with pytest.raises(ConfigurationError, match="has 4 layers with experts; none would be left"):
        local_places(ExpertSettings(local_layers=2), 4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"local_layers": -1}, "local_layers is -1; choose 0"),
        ({"local_layers": 1, "backbone": "split"}, "Set backbone to 'party'"),
        ({"local_layers": 1, "semantics": "hand-off-token", "schedule": "round-robin"}, "semantics to 'return'"),
    ],
)
def test_what_local_layers_do_not_go_with_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        ExpertSettings(**settings)


class TestJob:
    @pytest.fixture
    def local_spec(self, spec: SplitSpec) -> SplitSpec:  # noqa: F811
        training = TrainingSettings(rounds=2, local_steps=1, batch_size=4, max_tokens=16)
        first = ExpertSettings(local_layers=(1, 0))
        return dataclasses.replace(spec, experts=first, averaging="round", training=training)

    def test_averages_keeps_and_resumes(self, nodes, local_spec, tmp_path):  # noqa: F811
        whole, *_ = run(nodes, local_spec, job="whole", checkpoint_dir=tmp_path / "whole")
        run(nodes, local_spec, num_rounds=1, job="broken", checkpoint_dir=tmp_path / "broken")
        resumed, *_ = run(nodes, local_spec, job="broken", checkpoint_dir=tmp_path / "broken", resume=True)
        names = {name for name in whole.arrays if ".experts." in name}
        assert {name.split(".experts.")[0] for name in names} == {"model.layers.0.mlp"}
        averaged = whole.arrays.to_torch_state_dict()
        other = resumed.arrays.to_torch_state_dict()
        assert all(torch.equal(tensor, other[name]) for name, tensor in averaged.items())
        first = kept(nodes, "whole", 2)
        for one, again in zip(first, kept(nodes, "broken", 2), strict=True):
            assert all(torch.equal(t, again["host"]["trained"][n]) for n, t in one["host"]["trained"].items())
            assert all(torch.equal(t, again["own"][n]) for n, t in one["own"].items())
            assert all(".layers.1." in name for name in one["host"]["trained"])
        assert not torch.equal(first[0]["own"][min(names)], first[1]["own"][min(names)])  # averaged after it was kept
        model = resolve_model(local_spec.model)
        parameters = sum(tensor.numel() for tensor in whole_of(first, local_spec, 0).values())
        held = [whole.reports[f"party-{i}"].parameters_held for i in range(PARTIES)]
        config = load_config(model, local_spec.task)
        experts = sum(tensor.numel() for name, tensor in averaged.items() if ".experts." in name)
        assert held == [parameters - experts * (PARTIES - 1) // PARTIES] * PARTIES  # the two layers are alike
        assert num_experts(config) == 8

    def test_without_a_layer_left_is_refused_before_anything_runs(self, local_spec):
        from flwr.serverapp.strategy import FedAvg

        wrong = dataclasses.replace(local_spec, experts=ExpertSettings(local_layers=1))
        with pytest.raises(ConfigurationError, match="none would be left"):
            CollaborativeMoE(spec=wrong, aggregator=FedAvg(), parties=2)
