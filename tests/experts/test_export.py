"""What all parties trained becomes one checkpoint that plain transformers loads, if every one of them agrees."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from simulations.local_grid import LocalGrid
from tests.experts.conftest import MOE, batch_of, save_writing_moe
from tests.experts.writing_app import app
from vflair_flower.errors import ConfigurationError, ModelError
from vflair_flower.experts import expert_layer_names
from vflair_flower.experts.export import write_checkpoint
from vflair_flower.partition.sources import load_config
from vflair_flower.settings import (
    ExpertSettings,
    LoraSettings,
    OptimizerSettings,
    TaskKind,
    TaskSettings,
    TrainingSettings,
)
from vflair_flower.spec import SplitSpec
from vflair_flower.strategies import CollaborativeMoE, HubSettings

PARTIES = 4
IDS = torch.arange(5, 25).view(2, 10)


def pieces(companies: list[Any], house: Any) -> Callable[[int], Any]:
    """What hosts hand over of a layer."""
    placement = house.placement([c.name for c in companies])
    names = expert_layer_names(load_config(house.source, house.spec.task), house.spec.task)

    def of(layer: int) -> dict[tuple[int, ...], dict[str, torch.Tensor]]:
        return {
            placement.experts_of(c.name)[layer]: {
                n: t for n, t in c.host.trained_state().items() if n.startswith(f"{names[layer]}.")
            }
            for c in companies
        }

    return of


def own_weights(model: torch.nn.Module) -> torch.nn.Module:
    """The same model, its weights in memory of their own: where they lie in a file changes the last bits."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


@pytest.mark.parametrize("family", MOE)
def test_files_are_those_of_save_pretrained(family: str, make_house: Callable[..., Any], tmp_path: Path) -> None:
    house = make_house(family)
    whole = house.whole()
    optimizer = house.spec.optimizer.build(list(whole.parameters()))
    whole(**batch_of(0)).loss.backward()
    optimizer.step()
    whole.save_pretrained(tmp_path / "whole")
    with house.open(3) as companies:
        owner, *others = companies
        for other in others:
            other.caller.finish()
        owner.train(batch_of(0))
        config = load_config(house.source, house.spec.task)
        write_checkpoint(
            tmp_path / "out",
            house.source,
            config,
            house.spec.task,
            backbone=owner.model.state_dict,
            experts=pieces(companies, house),
        )
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert found.keys() == expected.keys()
    assert [n for n, t in expected.items() if t.dtype != found[n].dtype or not torch.equal(t, found[n])] == []
    loaded = own_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, whole.eval()(IDS).logits)


def test_nothing_is_written_without_every_expert(make_house: Callable[..., Any], tmp_path: Path) -> None:
    house = make_house("mixtral")
    config = load_config(house.source, house.spec.task)
    with house.open(2, training=False) as companies:
        backbone, given = companies[0].model.state_dict, pieces(companies, house)

        def write(experts: Callable[[int], Any], own: Callable[[], Any] = backbone) -> None:
            write_checkpoint(tmp_path / "out", house.source, config, house.spec.task, backbone=own, experts=experts)

        with pytest.raises(ModelError, match=r"nobody has handed over the experts .* of model.layers.0"):
            write(lambda layer: dict(list(given(layer).items())[:1]))
        with pytest.raises(ModelError, match=r"of shape \(1, .* for all of them"):
            write(lambda layer: {k: {n: t[:1] for n, t in v.items()} for k, v in given(layer).items()})
        with pytest.raises(ModelError, match=r"1 tensors of the model without experts.*'lm_head.weight'"):
            write(given, lambda: {n: t for n, t in backbone().items() if n != "lm_head.weight"})
        assert list(tmp_path.iterdir()) == []
        write(given)
        with pytest.raises(ModelError, match="nothing is overwritten"):
            write(given)


@pytest.fixture(scope="module")
def writing_moe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_writing_moe(tmp_path_factory.mktemp("moe")))


def job(spec: SplitSpec, hub: HubSettings | None = None) -> CollaborativeMoE:
    aggregator = FedAvg(min_train_nodes=PARTIES, min_evaluate_nodes=PARTIES, min_available_nodes=PARTIES)
    hub = hub or HubSettings(bind="inproc")
    return CollaborativeMoE(spec=spec, aggregator=aggregator, hub=hub, deadline_s=20.0, parties=PARTIES)


def spec_of(model: str, **more: Any) -> SplitSpec:
    training = TrainingSettings(rounds=2, local_steps=2, batch_size=4, max_tokens=16)
    settings = {"tuning": None, "training": training, "experts": ExpertSettings(), "averaging": "none", "seed": 3}
    return SplitSpec(model=model, task=TaskSettings(kind=TaskKind.CAUSAL_LM), **{**settings, **more})


def nodes_at(folder: Path, **more: Any) -> list[dict]:
    common = {"num-partitions": PARTIES, "out": str(folder), **more}
    return [{"partition-id": i, "state-dir": str(folder / f"p{i}"), **common} for i in range(PARTIES)]


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What each party's model answered, through its session, in the newest evaluation."""
    from vflair_flower.clients import data_party

    seen: dict[str, torch.Tensor] = {}
    evaluate_rows = data_party.evaluate_rows

    def look(session: Any, rows: Any) -> Any:
        with torch.no_grad():
            seen[session.party] = session.model.eval()(IDS).logits
        return evaluate_rows(session, rows)

    monkeypatch.setattr(data_party, "evaluate_rows", look)
    return seen


def test_after_a_job_the_checkpoint_is_the_collaborative_model(
    writing_moe: str, tmp_path: Path, logits: dict[str, torch.Tensor]
) -> None:
    nodes = nodes_at(tmp_path)
    nodes[1]["shares-model"] = 1
    grid = LocalGrid(app, nodes)
    with job(spec_of(writing_moe)) as strategy:
        strategy.start(grid)
        strategy.export(grid, tmp_path / "out", model_of="party-1")
        with pytest.raises(ConfigurationError, match=r"'party-0' does not share its own model.*share_model=True"):
            strategy.export(grid, tmp_path / "average")
    assert not (tmp_path / "average").exists()
    model = own_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits["party-1"])
        assert not torch.equal(model(IDS).logits, logits["party-0"])
        assert not torch.equal(model(IDS).logits, AutoModelForCausalLM.from_pretrained(writing_moe)(IDS).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("lost my card").input_ids


def test_adapters_are_in_the_checkpoint(writing_moe: str, tmp_path: Path, logits: dict[str, torch.Tensor]) -> None:
    """Not bit-equal: a matrix with its adapter added rounds in other places than the two beside each other."""
    grid = LocalGrid(app, nodes_at(tmp_path))
    spec = spec_of(
        writing_moe, tuning=LoraSettings(rank=2), optimizer=OptimizerSettings(learning_rate=0.05), averaging="round"
    )
    with job(spec) as strategy:
        strategy.start(grid)
        strategy.export(grid, tmp_path / "out")
    model, begun = (own_weights(AutoModelForCausalLM.from_pretrained(f)) for f in (tmp_path / "out", writing_moe))
    with torch.no_grad():
        found = model(IDS).logits
        assert float((found - begun(IDS).logits).abs().max()) > 0.1
    assert model.num_parameters() == begun.num_parameters()
    torch.testing.assert_close(found, logits["party-2"], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_where_the_job_averages_all_parties_have_the_checkpoint(
    writing_moe: str, tmp_path: Path, logits: dict[str, torch.Tensor]
) -> None:
    grid = LocalGrid(app, nodes_at(tmp_path))
    with job(spec_of(writing_moe, averaging="round")) as strategy:
        strategy.start(grid)
        strategy.export(grid, tmp_path / "out")
    model = own_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    with torch.no_grad():
        assert all(torch.equal(model(IDS).logits, found) for found in logits.values())


@pytest.mark.slow
def test_own_models_are_averaged_and_a_resumed_job_exports(writing_moe: str, tmp_path: Path) -> None:
    """Before any training, the average of equal models is that model, and the whole is the model that they began with.

    After training it is the mean of what the parties keep.
    """
    grid = LocalGrid(app, nodes_at(tmp_path, **{"shares-model": 1}))
    with job(spec_of(writing_moe)) as strategy:
        strategy.export(grid, tmp_path / "before")
        strategy.start(grid)
        strategy.export(grid, tmp_path / "after")
    begun, before, after = (
        load_file(Path(folder) / "model.safetensors")
        for folder in (writing_moe, tmp_path / "before", tmp_path / "after")
    )
    assert before.keys() == begun.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in begun.items())
    stores = [tmp_path / f"p{i}" / "models" / "job" / f"party-{i}" / "round-00002.pt" for i in range(PARTIES)]
    heads = [torch.load(store, weights_only=True)["own"]["lm_head.weight"] for store in stores]
    assert not torch.equal(heads[0], heads[1])
    torch.testing.assert_close(after["lm_head.weight"], torch.stack(heads).mean(0))


def test_a_party_that_does_not_agree_is_named_and_nothing_is_written(writing_moe: str, tmp_path: Path) -> None:
    nodes = nodes_at(tmp_path, **{"shares-model": 1})
    nodes[2]["keeps-experts"] = 1
    handed_over = []

    class Watched(LocalGrid):
        def pull_messages(self, message_ids):
            replies = list(super().pull_messages(message_ids))
            handed_over.extend(r for r in replies if r.has_content() and r.content.array_records.get("arrays"))
            return replies

    grid = Watched(app, nodes)
    with job(spec_of(writing_moe)) as strategy:
        strategy.start(grid, num_rounds=1)
        handed_over.clear()
        with pytest.raises(ConfigurationError, match=r"'party-2' does not share its experts.*share_experts=True"):
            strategy.export(grid, tmp_path / "out", model_of="party-0")
        with pytest.raises(ConfigurationError, match="model_of is 'nobody'; the parties are party-0, party-1"):
            strategy.export(grid, tmp_path / "out", model_of="nobody")
    assert handed_over == []
    assert not (tmp_path / "out").exists()
