"""A party's own experts alone are the whole model with the others' masked, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from simulations.local_grid import LocalGrid
from tests.experts.conftest import MOE, batch_of, save_writing_moe
from tests.experts.test_export import IDS, job, nodes_at, own_weights, spec_of
from tests.experts.writing_app import app
from vflair_flower.clients.store import PartyStore
from vflair_flower.errors import CheckpointError, ConfigurationError
from vflair_flower.experts import load_local, num_experts
from vflair_flower.experts.loading import layers_and_placement
from vflair_flower.experts.routing import prefer_experts
from vflair_flower.generation import write_texts
from vflair_flower.partition import load_tokenizer, resolve_model
from vflair_flower.partition.sources import load_config
from vflair_flower.settings import DecodingSettings, GenerationSettings, LoraSettings


def masked(placement: Any, party: str) -> dict[int, list[int]]:
    own = placement.experts_of(party)
    return {
        layer: [e for e in range(len(homes)) if e not in own[layer]] for layer, homes in enumerate(placement.host_of)
    }


@pytest.mark.parametrize("family", MOE)
def test_equals_the_whole_model_with_the_others_experts_masked(family: str, make_house: Callable[..., Any]) -> None:
    house = make_house(family)
    names = ["party-0", "party-1"]
    placement = house.placement(names)
    whole = house.whole().eval()
    inputs = {name: tensor for name, tensor in batch_of(0).items() if name != "labels"}
    answers = []
    for party in names:
        local = load_local(house.source, placement, party, house.spec)
        sizes = {name: p.shape for name, p in local.named_parameters() if name.endswith("experts.down_proj")}
        assert {shape[0] for shape in sizes.values()} == {num_experts(whole.config) // 2}
        with torch.no_grad(), prefer_experts(whole, masked=masked(placement, party)):
            answers.append(local(**inputs).logits)
            assert torch.equal(answers[-1], whole(**inputs).logits)
            ids = {"input_ids": inputs["input_ids"][1:], "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
            assert torch.equal(local.generate(**ids), whole.generate(**ids))
        assert not torch.equal(answers[-1], whole(**inputs).logits)
    assert not torch.equal(*answers)


@pytest.mark.parametrize(
    "tuning", [pytest.param(None, marks=pytest.mark.slow), LoraSettings(rank=2)], ids=["whole", "lora"]
)
def test_what_a_job_trained_is_used(tmp_path: Path, tuning: LoraSettings | None) -> None:
    """Four parties of eight experts, two for each token: just enough."""
    model = str(save_writing_moe(tmp_path / "model"))
    spec, grid = spec_of(model, tuning=tuning), LocalGrid(app, nodes_at(tmp_path, **{"shares-model": 1}))
    with job(spec) as strategy:
        strategy.start(grid)
        strategy.export(grid, tmp_path / "out", model_of="party-1")
    source = resolve_model(model)
    _, placement = layers_and_placement(load_config(source, spec.task), spec, [f"party-{i}" for i in range(4)])
    saved = PartyStore(tmp_path / "p1" / "models", job="job", party="party-1").load(2)
    local = load_local(source, placement, "party-1", spec, trained=saved)
    whole = own_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    tokenizer, decoding = load_tokenizer(source), DecodingSettings(max_new_tokens=8, do_sample=True, seed=2)
    ask = (tokenizer, ["lost my card", "why"], decoding, GenerationSettings(max_rows=4, max_length=32))
    with prefer_experts(whole, masked=masked(placement, "party-1")):
        expected = write_texts(whole, *ask).texts
    assert write_texts(local, *ask).texts == expected
    begun = load_local(source, placement, "party-1", spec)
    with torch.no_grad():
        assert not torch.equal(begun(IDS).logits, local(IDS).logits)
    with pytest.raises(CheckpointError, match="the trained experts do not fit"):
        load_local(source, placement, "party-1", spec, trained={**saved, "host": {"trained": {}}})


def test_too_few_own_experts_are_refused(make_house: Callable[..., Any]) -> None:
    house = make_house("mixtral")
    count = num_experts(load_config(house.source, house.spec.task))
    names = [f"party-{i}" for i in range(count)]
    with pytest.raises(ConfigurationError, match="1 of the 2 that it is routed to"):
        load_local(house.source, house.placement(names), "party-3", house.spec)
