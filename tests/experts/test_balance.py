"""The load-balancing loss: transformers' own for one party, and of the joined batch for many that see their own."""

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from simulations.local_grid import LocalGrid
from tests.experts.conftest import WRITE, batch_of
from tests.experts.test_job import kept, whole_of
from tests.tiny import WORDS
from tests.tiny_app import state_dir
from tests.writers import save_writer
from vflair_flower.clients import ExpertParty, PartyRows
from vflair_flower.errors import ConfigurationError, SessionError
from vflair_flower.experts.balance import LoadCounter, load_balance
from vflair_flower.session import Request
from vflair_flower.settings import ExpertSettings, OptimizerSettings, TrainingSettings
from vflair_flower.spec import SplitSpec
from vflair_flower.strategies import CollaborativeMoE, HubSettings
from vflair_flower.tasks import BatchOrder, PromptRow, collate, encode_task

PARTIES, BLOCKS, EXPERTS = 4, 2, 8
COEFFICIENT = 0.5
SGD = OptimizerSettings(name="sgd", learning_rate=0.05, schedule="constant")


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3-moe", "gpt-oss"])
def test_one_partys_loss_is_that_of_transformers(family: str, make_house: Callable[..., Any]) -> None:
    house = make_house(family, experts=ExpertSettings(schedule="round-robin", balance_coefficient=COEFFICIENT))
    whole = house.whole()
    whole.router_aux_loss_coef = COEFFICIENT
    plain = float(whole(**batch_of(0)).loss.detach())
    loss = whole(**batch_of(0), output_router_logits=True).loss
    loss.backward()
    with house.open(2) as companies, load_balance(companies[0].model, house.spec):
        model = companies[0].model
        found = model(**batch_of(0)).loss
        found.backward()
        with torch.no_grad():
            unseen = float(model(**batch_of(0)).loss)
        evaluated = float(model.eval()(**batch_of(0)).loss.detach())
    own, expected = dict(model.named_parameters()), dict(whole.named_parameters())
    assert float(found.detach()) == float(loss.detach())
    assert float(loss.detach()) - plain > COEFFICIENT  # balanced at best, the loss is the experts per token
    assert unseen == evaluated == plain
    assert [name for name, p in own.items() if not torch.equal(p.grad, expected[name].grad)] == []
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_checkpoint_does_not_bring_its_own(make_house: Callable[..., Any]) -> None:
    """What its configuration says of the loss counts for nothing: the job's coefficient does."""
    house = make_house("mixtral")
    whole = house.whole()
    plain = float(whole(**batch_of(0)).loss.detach())
    with house.open(2) as companies:
        model = companies[0].model
        model.config.output_router_logits, model.router_aux_loss_coef = True, 1.0
        assert float(model(**batch_of(0)).loss.detach()) > plain
        with load_balance(model, house.spec):
            assert float(model(**batch_of(0)).loss.detach()) == plain


def test_a_loss_needs_labels(make_house: Callable[..., Any]) -> None:
    house = make_house("mixtral", experts=ExpertSettings(schedule="round-robin", balance_coefficient=0.1))
    batch = {name: tensor for name, tensor in batch_of(0).items() if name != "labels"}
    with house.open(1) as companies, load_balance(companies[0].model, house.spec):
        with pytest.raises(SessionError, match="called in training without labels"):
            companies[0].model(**batch)
        companies[0].model(**batch_of(0)).loss.backward()


# ---- four parties ----


def rows_of(index: int) -> tuple[PromptRow, ...]:
    """Rows of one party: others' have other words and other lengths, so that loads and items differ."""
    own = WORDS[8 * index : 8 * index + 8]
    return tuple(
        PromptRow(own[i % 8], " " + " ".join(own[(i + j) % 8] for j in range(1 + (i + 2 * index) % 7)), f"{index}-{i}")
        for i in range(16)
    )


def _rows(context: Context) -> PartyRows:
    rows = rows_of(int(context.node_config["partition-id"]))
    return PartyRows(train=rows, validation=rows[:4])


app = ClientApp()
ExpertParty(_rows, state_dir=state_dir).register(app)


@pytest.fixture(scope="module")
def tiny_writer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = save_writer(tmp_path_factory.mktemp("writer"))
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
        eos_token_id=3,
        router_aux_loss_coef=COEFFICIENT,
    )
    model = MixtralForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def spec(tiny_writer: str) -> SplitSpec:
    return SplitSpec(
        model=tiny_writer,
        task=WRITE,
        tuning=None,
        optimizer=SGD,
        training=TrainingSettings(rounds=1, local_steps=6, batch_size=4, max_tokens=16, evaluation_batch_size=4),
        experts=ExpertSettings(balance_coefficient=COEFFICIENT),
        averaging="step",
        seed=3,
    )


def centralised(spec: SplitSpec, balance: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train on the joined batches: with the loss of the ``"joined"`` batch, the parties' own (``"local"``), or none."""
    model = AutoModelForCausalLM.from_pretrained(spec.model).train()
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    encoded = [encode_task(WRITE.kind, rows_of(p), tokenizer, max_tokens=16) for p in range(PARTIES)]
    orders = [BatchOrder(num_rows=16, batch_size=4, seed=3, party=f"party-{p}") for p in range(PARTIES)]
    optimizer, losses = SGD.build(list(model.parameters())), []
    for step in range(6):
        parts = [[encoded[p][i] for i in orders[p].indices(step)] for p in range(PARTIES)]
        batches = parts if balance == "local" else [[row for part in parts for row in part]]
        collated = [collate(batch, pad_token_id=0).inputs for batch in batches]
        items = [int((inputs["labels"][:, 1:] != -100).sum()) for inputs in collated]
        for inputs, own in zip(collated, items, strict=True):
            loss = model(**inputs, output_router_logits=balance != "none").loss
            (loss * (own / sum(items))).backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert len(set(items)) == len(items)
    return {name: p.detach() for name, p in model.named_parameters()}, losses


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_four_parties_balance_the_joined_batch(spec: SplitSpec, tmp_path: Path) -> None:
    """SGD, gradients of own models averaged at every step; as near as float32 sums in another order are."""
    nodes = [{"partition-id": i, "state-dir": str(tmp_path / f"p{i}")} for i in range(PARTIES)]
    aggregator = FedAvg(min_train_nodes=PARTIES, min_evaluate_nodes=PARTIES, min_available_nodes=PARTIES)
    hub = HubSettings(bind="inproc")
    with CollaborativeMoE(spec=spec, aggregator=aggregator, parties=PARTIES, hub=hub, deadline_s=20.0) as strategy:
        strategy.start(LocalGrid(app, nodes))
    split = whole_of(kept(nodes, "job", 1), spec, owner=2)
    joined, _ = centralised(spec, "joined")
    local, _ = centralised(spec, "local")
    without, _ = centralised(spec, "none")
    assert distance(split, joined) < 4e-6
    assert distance(split, local) > 1e-3
    assert distance(split, without) > 1e-3
    crossed = [entry for entry in strategy.ledger.entries() if entry.operation == "balance"]
    assert {entry.tensor for entry in crossed} == {"header", "counts"}
    assert sum(e.bytes for e in crossed if e.tensor == "counts") == 2 * PARTIES * 6 * (EXPERTS + 2) * 8


# ---- the hub's end ----


def counts_of(*numbers: int) -> dict[str, torch.Tensor]:
    return {"counts": torch.tensor(numbers)}


def test_sums_wait_for_all_that_are_left() -> None:
    counter = LoadCounter(["a", "b", "c"], 10.0)
    found: dict[str, list[int]] = {}

    def count(party: str, *numbers: int) -> None:
        reply = counter(Request(party, "balance", counts_of(*numbers), {}))
        found[party] = reply.tensors["counts"].tolist()

    threads = [
        threading.Thread(target=count, args=("a", 3, 1, 4, 2)),
        threading.Thread(target=count, args=("b", 1, 1, 2, 1)),
    ]
    for thread in threads:
        thread.start()
    threads[0].join(0.3)
    assert found == {}
    counter.leave("c")
    for thread in threads:
        thread.join(10)
    assert found == {"a": [4, 2, 6, 3], "b": [4, 2, 6, 3]}
    counter(Request("b", "finish", {}, {}))
    count("a", 1, 0, 1, 1)
    assert found["a"] == [1, 0, 1, 1]


@pytest.mark.parametrize("numbers", [(3, -1, 2, 1), (3, 1, 4, 0)])
def test_counts_that_cannot_be_are_refused(numbers: tuple[int, ...]) -> None:
    with pytest.raises(SessionError, match=r"'a' counts .* a batch has at least one item"):
        LoadCounter(["a"], 1.0)(Request("a", "balance", counts_of(*numbers), {}))


@pytest.mark.parametrize("family", ["deepseek-v2", "deepseek-v3"])
def test_families_without_the_loss_are_refused_by_name(family: str, make_house: Callable[..., Any]) -> None:
    house = make_house(family, experts=ExpertSettings(balance_coefficient=0.01))
    with pytest.raises(ConfigurationError, match=f"the model family is '{family.replace('-', '_')}', for which"):
        CollaborativeMoE(spec=house.spec, aggregator=FedAvg(), parties=2)


def test_settings_that_cannot_be_are_refused(spec: SplitSpec) -> None:
    with pytest.raises(ConfigurationError, match=r"balance_coefficient is -0\.1"):
        ExpertSettings(balance_coefficient=-0.1)
    training = dataclasses.replace(spec.training, micro_batch_size=2)
    with pytest.raises(ConfigurationError, match="micro_batch_size 2; the load is that of whole batches"):
        CollaborativeMoE(spec=dataclasses.replace(spec, training=training), aggregator=FedAvg(), parties=PARTIES)
