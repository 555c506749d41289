"""LoRA where experts are spread: what PEFT does to the whole model, bit for bit, and one adapter of it afterwards."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.experts.conftest import MOE, Company, House, batch_of
from vflair_flower.errors import CheckpointError, ConfigurationError
from vflair_flower.experts import EXPERT_TARGETS, expert_layer_names, merge_expert_adapters
from vflair_flower.memory import tensor_bytes
from vflair_flower.partition import Segment, load_config, load_segment, make_trainable, trained_state
from vflair_flower.settings import ExpertSettings, LoraSettings, WeightSettings

BLOCKS = 4
ATTENTION = {
    "deepseek-v2": ("q_proj", "kv_b_proj", "o_proj"),
    "deepseek-v3": ("q_b_proj", "kv_b_proj", "o_proj"),
}


def lora_of(family: str) -> LoraSettings:
    return LoraSettings(rank=4, alpha=8, target_modules=ATTENTION.get(family, ("q_proj", "v_proj")))


def whole_model(house: House) -> nn.Module:
    loaded = load_segment(
        house.source, Segment.whole(BLOCKS), house.spec.task, weights=house.spec.weights, seed=house.spec.seed
    )
    targets = EXPERT_TARGETS if house.spec.experts.trained == "all" else ()
    for parameter in loaded.model.parameters():
        parameter.data = parameter.data.clone()
    tuned = make_trainable(loaded, house.spec.tuning, house.spec.task, seed=house.spec.seed, target_parameters=targets)
    return tuned.train()


def joined(states: dict[str, dict[str, Tensor]], companies: list[Company], house: House, folder: Path) -> dict:
    """Return adapters as PEFT names them on the whole model: what a merged file of these tensors has."""
    config, placement = load_config(house.source, house.spec.task), house.placement([c.name for c in companies])
    merge_expert_adapters(folder, {}, states, placement, config=config, spec=house.spec)
    return load_file(folder / "adapter_model.safetensors")


def whole_gradients(whole: nn.Module) -> dict[str, Tensor]:
    return {n.replace(".default", ""): p.grad.clone() for n, p in whole.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("family", "count"), [*((family, 2) for family in MOE), ("qwen3-moe", 4), ("gpt-oss", 8), ("mixtral", 8)]
)
def test_lora_on_spread_experts_is_lora_on_the_whole_model(
    family: str, count: int, make_house: Callable[..., Any], tmp_path: Path
) -> None:
    """Logits, every gradient and three AdamW steps; with 8 hosts each has one expert of a layer."""
    house = make_house(family, tuning=lora_of(family))
    whole = whole_model(house)
    frozen = {n: p.detach().clone() for n, p in whole.named_parameters() if not p.requires_grad}
    optimizer = house.spec.optimizer.build([p for p in whole.parameters() if p.requires_grad])
    expected, logits, gradients = [], None, {}
    for step in range(3):
        optimizer.zero_grad()
        output = whole(**batch_of(step))
        output.loss.backward()
        if step == 0:
            logits, gradients = output.logits.detach().clone(), whole_gradients(whole)
        optimizer.step()
        expected.append(float(output.loss.detach()))
    assert all(bool((gradient != 0).any()) for name, gradient in gradients.items() if "lora_B" in name)

    with house.open(count) as companies:
        owner, *others = companies
        for other in others:
            other.caller.finish()
        for company in companies:
            trained = [n for n, p in company.host.module.named_parameters() if p.requires_grad]
            assert trained
            assert all("_lora.lora_" in name for name in trained)
        output = owner.model(**batch_of(0))
        output.loss.backward()
        assert torch.equal(output.logits, logits)
        pending = {
            c.name: {
                n: c.host._update.pending(owner.name).get(n, torch.zeros_like(p))
                for n, p in c.host._update.parameters.items()
            }
            for c in companies
        }
        found = {**whole_gradients(owner.model), **joined(pending, companies, house, tmp_path / "gradients")}
        assert found.keys() == gradients.keys()
        assert [name for name in found if not torch.equal(found[name], gradients[name])] == []
        for company in companies:
            company.host._update.drop(owner.name)
        owner.caller.rows_since_step = 0
        assert [owner.train(batch_of(step), step) for step in range(3)] == expected
        states = {c.name: c.host.trained_state() for c in companies}
        end = {**trained_state(owner.model), **joined(states, companies, house, tmp_path / "end")}
        placement, layers = house.placement(list(states)), expert_layer_names(owner.model.config, house.spec.task)
        for company in companies:
            experts = dict(zip(layers, placement.experts_of(company.name), strict=True))
            for name, parameter in company.host.module.named_parameters():
                if not parameter.requires_grad:
                    whole_name = ".base_layer.base_layer.".join(f"base_model.model.{name}".rsplit(".", 1))
                    assert torch.equal(parameter, frozen[whole_name][list(experts[name.rpartition(".")[0]])]), name
    want = trained_state(whole)
    assert end.keys() == want.keys()
    assert [name for name in end if not torch.equal(end[name], want[name])] == []
    assert all(torch.equal(p, frozen[n]) for n, p in whole.named_parameters() if n in frozen)


def test_experts_below_the_first_trained_layer_are_trained_too(make_house: Callable[..., Any], tmp_path: Path) -> None:
    """Nothing that the first layers' tokens went through is trained, and their experts are all the same."""
    house = make_house("mixtral", tuning=LoraSettings(rank=2, target_modules=("lm_head",)))
    whole = whole_model(house)
    whole(**batch_of(0)).loss.backward()
    expected = {n: g for n, g in whole_gradients(whole).items() if ".experts." in n}
    with house.open(2) as companies:
        owner = companies[0]
        owner.model(**batch_of(0)).loss.backward()
        pending = {c.name: c.host._update.pending(owner.name) for c in companies}
        found = joined(pending, companies, house, tmp_path)
        assert not any(c.host._kept for c in companies)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_adapters_of_half_weights_are_float32(make_house: Callable[..., Any]) -> None:
    house = make_house(
        "olmoe", tuning=lora_of("olmoe"), weights=WeightSettings(dtype="bfloat16"), wire_dtype="bfloat16"
    )
    whole = whole_model(house)
    output = whole(**batch_of(0))
    output.loss.backward()
    expected = {n.replace(".default", ""): p.grad for n, p in whole.named_parameters() if p.requires_grad}
    with house.open(3) as companies:
        found = companies[0].model(**batch_of(0))
        found.loss.backward()
        own = whole_gradients(companies[0].model)
        for company in companies:
            kinds = {p.dtype for p in company.host._update.parameters.values()}
            assert kinds == {g.dtype for g in company.host._update.pending("party-0").values()} == {torch.float32}
    assert torch.equal(found.logits, output.logits)
    assert [name for name in own if not torch.equal(own[name], expected[name])] == []


def test_frozen_experts_answer_and_never_change(make_house: Callable[..., Any]) -> None:
    """`trained="none"`: the owner's own training is that of the whole model with LoRA on attention alone."""
    house = make_house("olmoe", tuning=lora_of("olmoe"), experts=ExpertSettings(trained="none"))
    whole = whole_model(house)
    optimizer = house.spec.optimizer.build([p for p in whole.parameters() if p.requires_grad])
    expected = []
    for step in range(3):
        optimizer.zero_grad()
        loss = whole(**batch_of(step)).loss
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    with house.open(2) as companies:
        owner, host = companies
        host.caller.finish()
        before = [p.detach().clone() for p in host.host.module.parameters()]
        assert [owner.train(batch_of(step), step) for step in range(3)] == expected
        assert all(torch.equal(p, old) for p, old in zip(host.host.module.parameters(), before, strict=True))
        assert host.host.trained_state() == {}
        assert host.host.memory().gradients == host.host.memory().optimizer == 0
        state, want = trained_state(owner.model), trained_state(whole)
    assert [name for name in want if not torch.equal(state[name], want[name])] == []


def test_a_host_reports_adapters_as_trained_and_all_as_held(make_house: Callable[..., Any]) -> None:
    with make_house("mixtral", tuning=lora_of("mixtral")).open(2) as companies:
        owner, host = companies
        host.caller.finish()
        owner.train(batch_of(0))
        parts, module = host.host.memory(), host.host.module
        adapters = tensor_bytes(p for p in module.parameters() if p.requires_grad)
        whole = 4 * 4 * (192 * 64 + 64 * 96) * 4  # 4 layers of 4 experts here, in float32
        assert parts.parameters == whole + adapters
        assert adapters == 4 * 4 * 4 * ((64 + 192) + (96 + 64)) * 4  # of rank 4
        assert parts.gradients == adapters
        assert parts.optimizer == pytest.approx(2 * adapters, rel=0.01)  # two moments, and a count of steps


@pytest.mark.parametrize("family", ["olmoe", "gpt-oss"])
def test_one_adapter_of_the_whole_model_loads_with_plain_peft(
    family: str, make_house: Callable[..., Any], tmp_path: Path
) -> None:
    house = make_house(family, tuning=lora_of(family))
    with house.open(3) as companies:
        owner, *others = companies
        for other in others:
            other.caller.finish()
        for step in range(3):
            owner.train(batch_of(step), step)
        with torch.no_grad():
            expected = owner.model.eval()(**batch_of(7)).logits
        states = {c.name: c.host.trained_state() for c in companies}
        own, placement = trained_state(owner.model), house.placement(list(states))
    config = load_config(house.source, house.spec.task)
    merge_expert_adapters(tmp_path / "adapter", own, states, placement, config=config, spec=house.spec)
    plain = house.whole().eval()
    with torch.no_grad():
        untuned = plain(**batch_of(7)).logits
        found = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()(**batch_of(7)).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(found, untuned, atol=1e-3)


def test_adapters_that_do_not_fit_are_not_merged(make_house: Callable[..., Any], tmp_path: Path) -> None:
    house = make_house("mixtral", tuning=lora_of("mixtral"))
    with house.open(2) as companies:
        states = {c.name: c.host.trained_state() for c in companies}
        own, placement = trained_state(companies[0].model), house.placement(list(states))
    config = load_config(house.source, house.spec.task)

    def merge(states: dict, spec: Any = house.spec) -> None:
        merge_expert_adapters(tmp_path, own, states, placement, config=config, spec=spec)

    with pytest.raises(CheckpointError, match=r"'party-1' hosts the experts .* nothing came from it"):
        merge({"party-0": states["party-0"]})
    with pytest.raises(CheckpointError, match=r"\[32, 96\], and \[16, 96\] is this model's at this rank"):
        merge(states, replace(house.spec, tuning=replace(house.spec.tuning, rank=2)))
    with pytest.raises(ConfigurationError, match="trains all parameters"):
        merge(states, replace(house.spec, tuning=None))
