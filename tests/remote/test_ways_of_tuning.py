"""Other weights, other trained parameters, clipping and recomputing: split is still the whole model."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from vflair_flower.errors import ConfigurationError, PartitionError, SessionError
from vflair_flower.partition import Mode
from vflair_flower.remote import BodyMode, parameter_counts
from vflair_flower.settings import LoraSettings, OptimizerSettings, TrainingSettings, WeightSettings

DORA = LoraSettings(method="dora", rank=2, alpha=4)
LORA = LoraSettings(rank=2, alpha=4)
RECOMPUTE = TrainingSettings(gradient_checkpointing=True)
CLIP = OptimizerSettings(learning_rate=0.01, max_grad_norm=0.05)
WAYS: dict[str, dict[str, Any]] = {
    "dora": {"tuning": DORA},
    "bfloat16": {"weights": WeightSettings(dtype="bfloat16")},
    "bfloat16-lora": {"tuning": LORA, "weights": WeightSettings(dtype="bfloat16")},
    "int8": {"tuning": LORA, "weights": WeightSettings(quantization="int8")},
    "nf4-dora-bfloat16": {"tuning": DORA, "weights": WeightSettings(dtype="bfloat16", quantization="nf4")},
    "local": {"scope": "local"},
    "local-lora": {"scope": "local", "tuning": LORA},
    "recompute": {"training": RECOMPUTE},
    "recompute-lora": {"tuning": LORA, "training": RECOMPUTE},
}
by_cut = pytest.mark.parametrize("cut_mode", list(Mode), ids=str)


def begin(server: Any, *parties: Any) -> None:
    server.begin([party.name for party in parties], server_round=1, training=True)
    for party in parties:
        party.join()


def step_whole(whole: nn.Module, optimizer: torch.optim.Optimizer, batch: dict, highest: float = 0.0) -> float:
    optimizer.zero_grad()
    loss = whole(**batch).loss
    loss.backward()
    if highest:
        nn.utils.clip_grad_norm_(whole.parameters(), highest)
    optimizer.step()
    return float(loss.detach())


def parts_of(*models: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for model in models for name, p in model.named_parameters() if p.requires_grad}


@by_cut
@pytest.mark.parametrize("way", list(WAYS))
def test_split_is_bit_equal_to_the_whole_model(way: str, cut_mode: Mode, make_house: Callable[..., Any]) -> None:
    house = make_house(mode=cut_mode, **WAYS[way])
    server = house.server()
    party, whole = house.party("p1", server), house.whole()
    before = {name: p.detach().clone() for name, p in parts_of(whole).items()}
    optimizer = house.spec.optimizer.build(list(parts_of(whole).values()))
    begin(server, party)
    for step in range(3):
        assert party.train(step) == step_whole(whole, optimizer, party.batch(step))
    split, expected = parts_of(party.model, server.module), parts_of(whole)
    assert split.keys() == expected.keys()
    assert all(torch.equal(split[name], p) for name, p in expected.items())
    assert any(not torch.equal(before[name], p) for name, p in expected.items())
    assert bool(parts_of(server.module)) is (house.spec.scope == "full")


def test_other_weights_are_other_numbers(make_house: Callable[..., Any]) -> None:
    """Or the comparisons above would compare float32 with itself."""
    losses = {}
    for name in ("plain", "bfloat16-lora", "int8", "nf4-dora-bfloat16"):
        house = make_house(lora=True, **WAYS.get(name, {}))
        party = house.party("p1", house.server())
        with torch.no_grad():
            losses[name] = float(house.whole()(**party.batch(0)).loss)
    assert len(set(losses.values())) == len(losses)
    assert all(abs(loss - losses["plain"]) < 0.2 for loss in losses.values())


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantised_weights_take_less_memory_as_planned(quantization: str, make_house: Callable[..., Any]) -> None:
    from vflair_flower.memory import tensor_bytes
    from vflair_flower.partition.footprint import footprint

    house = make_house(tuning=LORA, weights=WeightSettings(quantization=quantization))
    module = house.server().module
    held = tensor_bytes(module.parameters())
    planned = footprint(house.source, house.spec).model_party.parameter_bytes
    plain = footprint(house.source, replace(house.spec, weights=WeightSettings())).model_party.parameter_bytes
    assert parameter_counts(module)[0] == parameter_counts(make_house(tuning=LORA).server().module)[0]
    scales = planned - held  # are no parameters of the module
    assert 0 <= scales < 0.1 * plain
    assert planned < 0.6 * plain


@by_cut
@pytest.mark.parametrize("mode", list(BodyMode), ids=str)
def test_clipping_is_that_of_the_whole_model(mode: BodyMode, cut_mode: Mode, make_house: Callable[..., Any]) -> None:
    house = make_house(mode=cut_mode, optimizer=replace(CLIP, name="sgd"))
    server = house.server(mode)
    party, whole = house.party("p1", server), house.whole()
    optimizer = house.spec.optimizer.build(list(whole.parameters()))
    begin(server, party)
    for step in range(3):
        assert party.train(step) == pytest.approx(step_whole(whole, optimizer, party.batch(step), 0.05), rel=1e-6)
    party.remote.finish()
    server.end()
    assert min(party.norms) > 0.05  # it was clipped
    split = parts_of(party.model, server.module)
    for name, p in whole.named_parameters():
        torch.testing.assert_close(split[name], p, rtol=1e-6, atol=1e-7)


def test_clipping_of_several_parties_bounds_the_joined_step(
    make_house: Callable[..., Any], at_once: Callable[..., list]
) -> None:
    """The body's step is at most as long as the highest norm allows, and what it would be unclipped is longer."""
    moved = {}
    for highest in (0.0, 0.05):
        house = make_house(optimizer=OptimizerSettings(name="sgd", learning_rate=1.0, max_grad_norm=highest))
        server = house.server()
        parties = [house.party(f"p{i}", server) for i in range(3)]
        before = [p.detach().clone() for p in server.module.parameters()]
        begin(server, *parties)
        at_once(*(lambda party=party: party.train(0) for party in parties))
        squares = [(p - b).square().sum() for p, b in zip(server.module.parameters(), before, strict=True)]
        moved[highest] = float(torch.stack(squares).sum().sqrt())
        norms = [party.norms for party in parties]
        assert all(norm == norms[0] for norm in norms)  # all are told the same
    assert moved[0.05] <= 0.05 < moved[0.0]


def test_a_step_without_its_norm_is_refused(make_house: Callable[..., Any]) -> None:
    house = make_house(optimizer=CLIP)
    server = house.server()
    party = house.party("p1", server)
    begin(server, party)
    party.loss(0).backward()
    with pytest.raises(SessionError, match=r"without the norm .* max_grad_norm is 0.05"):
        party.remote.step(step=0, total_steps=0)
    with pytest.raises(SessionError, match="sent nan as the square"):
        party.remote.joint_norm(float("nan"))


@pytest.mark.parametrize("mode", list(BodyMode), ids=str)
def test_the_body_recomputes_on_each_partys_parameters_and_dropout(
    mode: BodyMode, make_house: Callable[..., Any], at_once: Callable[..., list]
) -> None:
    ends, kept = [], []
    for training in (TrainingSettings(), RECOMPUTE):
        house = make_house("dropout", training=training)
        server = house.server(mode)
        parties = [house.party(f"p{i}", server) for i in range(3)]
        begin(server, *parties)

        def play(party: Any) -> None:
            party.model.eval()  # threads of one process share what dropout is drawn from
            for step in range(3):
                party.train(step)
            party.remote.finish()

        at_once(*(lambda party=party, play=play: play(party) for party in parties))
        server.end()
        ends.append([p.detach() for model in (server.module, *(p.model for p in parties)) for p in model.parameters()])
        kept.append(server.memory().activations)
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
    assert kept[1] < 0.5 * kept[0]


def test_a_data_party_recomputes_its_dropout(make_house: Callable[..., Any]) -> None:
    ends = []
    for training in (TrainingSettings(), RECOMPUTE):
        house = make_house("dropout", training=training)
        server = house.server()
        party = house.party("p1", server)
        begin(server, party)
        torch.manual_seed(0)
        losses = [party.train(step) for step in range(3)]
        ends.append((losses, [p.detach() for p in party.model.parameters()]))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(one, other) for one, other in zip(ends[0][1], ends[1][1], strict=True))


def test_no_head_blocks_can_be_recomputed_too(make_house: Callable[..., Any]) -> None:
    house = make_house(training=RECOMPUTE)
    house.spec = replace(house.spec, plan=replace(house.spec.plan, head_blocks=0))
    server = house.server()
    party, whole = house.party("p1", server), house.whole()
    optimizer = house.spec.optimizer.build(list(whole.parameters()))
    begin(server, party)
    for step in range(2):
        assert party.train(step) == step_whole(whole, optimizer, party.batch(step))


def test_what_cannot_be_is_refused(make_house: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="quantization is 'int8' and all parameters"):
        make_house(weights=WeightSettings(quantization="int8"))
    with pytest.raises(ConfigurationError, match="quantization is 'int8' and the LoRA method 'dora'"):
        make_house(tuning=DORA, weights=WeightSettings(quantization="int8"))
    with pytest.raises(ConfigurationError, match="dtype is 'float8'"):
        WeightSettings(dtype="float8")
    with pytest.raises(ConfigurationError, match="scope is 'partial'"):
        make_house(scope="partial")
    house = make_house(tuning=LORA, weights=WeightSettings(quantization="nf4"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'vflair-flower\[quantization\]'"):
        house.server()
    monkeypatch.undo()
    monkeypatch.setattr("transformers.PreTrainedModel.supports_gradient_checkpointing", False)
    monkeypatch.setattr("transformers.LlamaForSequenceClassification.supports_gradient_checkpointing", False)
    with pytest.raises(PartitionError, match="gradient_checkpointing is set, and the model family 'llama'"):
        make_house(training=RECOMPUTE).server()
