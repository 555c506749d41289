"""What hosts are sent and answer: once per host, by itself, and what happens when an answer does not come."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.experts.conftest import Company, House, batch_of
from vflair_flower.errors import ConfigurationError, DeadlineError, PartyLostError, SessionClosedError, SessionError
from vflair_flower.experts import expert_layer_names, place_experts
from vflair_flower.memory import tensor_bytes
from vflair_flower.partition.sources import load_config
from vflair_flower.session import Reply, Request
from vflair_flower.settings import ExpertSettings, TrainingSettings, WeightSettings

HOSTS = ("a", "b", "c")


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_half_weights_are_bit_equal_too(make_house: Callable[..., Any]) -> None:
    house = make_house("olmoe", weights=WeightSettings(dtype="bfloat16"), wire_dtype="bfloat16")
    whole = house.whole()
    output = whole(**batch_of(0))
    output.loss.backward()
    with house.open(4) as companies:
        found = companies[0].model(**batch_of(0))
        found.loss.backward()
        own = gradients(companies[0].model)
    assert torch.equal(found.logits, output.logits)
    expected = gradients(whole)
    assert [name for name in own if not torch.equal(own[name], expected[name])] == []


@pytest.mark.parametrize(
    ("experts", "more", "bound"),
    [
        (ExpertSettings(combine="host"), {}, 0.0),  # a sum of two has no order
        (ExpertSettings(), {"wire_dtype": "bfloat16"}, 3e-2),
        (ExpertSettings(codec="int8"), {}, 6e-2),
        (ExpertSettings(codec="int8", combine="host"), {}, 6e-2),
    ],
    ids=["combined", "bfloat16", "int8", "int8-combined"],
)
def test_cheaper_ways_are_near_and_no_nearer(
    experts: ExpertSettings, more: dict, bound: float, make_house: Callable[..., Any]
) -> None:
    """Relative error of all gradients together; that of the cheapest is not nothing, or it would not be in use."""
    house = make_house("qwen3-moe", experts=experts, **more)
    whole = house.whole()
    output = whole(**batch_of(0))
    output.loss.backward()
    expected = gradients(whole)
    with house.open(3) as companies:
        companies[0].model(**batch_of(0)).loss.backward()
        own = gradients(companies[0].model)
    error = torch.cat([(own[name] - expected[name]).reshape(-1) for name in own]).norm()
    size = torch.cat([expected[name].reshape(-1) for name in own]).norm()
    assert error / size <= bound
    assert bool(error > 0) is (bound > 0)


@pytest.mark.parametrize("combine", ["owner", "host"])
def test_a_token_goes_to_a_host_once(combine: str, make_house: Callable[..., Any]) -> None:
    house = make_house("olmoe", experts=ExpertSettings(combine=combine))
    with house.open(2) as companies:
        owner, host = companies
        host.caller.finish()
        seen: list[Request] = []
        answer = host.host.__call__
        host.caller._link._handler = lambda request: seen.append(request) or answer(request)
        owner.train(batch_of(0))
        sent = [request for request in seen if request.operation == "forward"]
        assert len(sent) == 4  # layers
        for request in sent:
            tokens, rows = len(request.tensors["hidden"]), request.tensors["row"].tolist()
            assert tokens <= 27
            assert sorted(set(rows)) == list(range(tokens))
            assert len(rows) > tokens  # some token has both of its experts there
        back = [request for request in seen if request.operation == "backward"]
        assert [len(b.tensors["grad"]) for b in reversed(back)] == [len(f.tensors["hidden"]) for f in sent]


def test_own_experts_are_not_sent_anywhere(make_house: Callable[..., Any]) -> None:
    with make_house().open(1) as companies:
        companies[0].train(batch_of(0))
        crossed = {entry.operation for entry in companies[0].caller._link.ledger.entries()}
        assert not crossed & {"forward", "backward", "step"}


def test_answers_do_not_depend_on_what_others_send(make_house: Callable[..., Any]) -> None:
    house = make_house("deepseek-v3")
    with house.open(3) as companies:
        quiet = []
        for company in companies:
            output = company.model(**batch_of(0))
            output.loss.backward()
            quiet.append((output.logits.detach().clone(), gradients(company.model)))
            company.optimizer.zero_grad()
        busy: list[Any] = [None] * 3

        def work(index: int) -> None:
            for round_ in range(3):
                output = companies[index].model(**batch_of(10 * index + round_, rows=1 + index))
                output.loss.backward()
                companies[index].optimizer.zero_grad()
            output = companies[index].model(**batch_of(0))
            output.loss.backward()
            busy[index] = (output.logits.detach().clone(), gradients(companies[index].model))

        threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    for (logits, grads), (other_logits, other_grads) in zip(quiet, busy, strict=True):
        assert torch.equal(logits, other_logits)
        assert all(torch.equal(grads[name], other_grads[name]) for name in grads)


def test_recomputing_at_the_host_keeps_less_and_does_the_same(make_house: Callable[..., Any]) -> None:
    ends, kept = [], []
    for recompute in (False, True):
        training = TrainingSettings(
            batch_size=8, max_tokens=16, evaluation_batch_size=8, gradient_checkpointing=recompute
        )
        with make_house("mixtral", training=training).open(2) as companies:
            companies[1].caller.finish()
            for step in range(2):
                companies[0].train(batch_of(step), step)
            ends.append([p.detach().clone() for c in companies for p in c.host.module.parameters()])
            kept.append(companies[1].host.memory().activations)
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
    assert 0 < kept[1] < kept[0]


def test_owners_gradients_need_the_memory_of_one(make_house: Callable[..., Any]) -> None:
    """Four owners at once: a host holds one sum, and of what is added to it one layer at a time."""
    with make_house("olmoe").open(4) as companies:
        threads = [threading.Thread(target=company.train, args=(batch_of(i),)) for i, company in enumerate(companies)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for company in companies:
            memory = company.host.memory()
            assert company.host.steps_taken == 1
            assert memory.optimizer == pytest.approx(2 * memory.parameters, rel=1e-3)
            assert 0 < memory.gradients <= memory.parameters * 1.25


def test_each_party_holds_its_share_alone(make_house: Callable[..., Any]) -> None:
    house = make_house("olmoe")
    whole = house.whole()
    experts = sum(p.numel() for name, p in whole.named_parameters() if ".experts." in name)
    with house.open(4) as companies:
        for company in companies:
            assert not [name for name, _ in company.model.named_parameters() if ".experts." in name]
            assert sum(p.numel() for p in company.host.module.parameters()) == experts / 4
            company_bytes = company.host.memory().parameters
            assert company_bytes == tensor_bytes(company.host.module.parameters()) == experts


def lose(host: Company, way: str, operation: str) -> None:
    """Let a host fail in one way, at one operation."""
    answer = host.host.__call__

    def handle(request: Request) -> Reply:
        if request.operation != operation:
            return answer(request)
        if way == "killed":
            threading.Thread(target=host.caller._link.abandon).start()
            time.sleep(1.3)
        if way == "refuses":
            raise RuntimeError("the disk is full")
        if way == "slow":
            time.sleep(1.3)
        reply = answer(request)
        # A step is answered by nothing: there, what is wrong is a tensor that nobody agreed on.
        tensors = dict(reply.tensors) or {"output": torch.zeros(2, 64)}
        if way == "nan":
            return Reply({name: torch.full_like(t, float("nan")) for name, t in tensors.items()})
        if way == "shape":
            return Reply({name: t[:-1] for name, t in tensors.items()})
        return reply

    host.caller._link._handler = handle


def faulty_house(make_house: Callable[..., Any], policy: str) -> House:
    """Three hosts and two experts per token: if the last one, of a single expert, is lost, no token has lost both."""
    table = ((0, 0, 0, 1, 1, 1, 1, 2),) * 4
    replicas = 2 if policy == "replica" else 1
    settings = ExpertSettings(placement="table", table=table, on_host_lost=policy, replicas=replicas)
    return make_house("mixtral", experts=settings)


@pytest.mark.parametrize("policy", ["fail", "skip", "replica"])
@pytest.mark.parametrize(
    ("way", "operation"),
    [
        (way, operation)
        for way in ("killed", "slow", "nan", "shape", "refuses")
        for operation in ("forward", "backward", "step")
    ],
)
def test_a_faulty_host_ends_as_configured_within_the_deadline(
    way: str, operation: str, policy: str, make_house: Callable[..., Any]
) -> None:
    house = faulty_house(make_house, policy)
    with house.open(3, deadline_s=1.0) as companies:
        owner, *others = companies
        for other in others:
            other.caller.finish()
        # Of the experts of party-1, the copies are at party-2; of those of party-2, at the owner itself.
        faulty = companies[1 if policy == "replica" else 2]
        lose(faulty, way, operation)
        started = time.monotonic()
        if policy == "fail":
            with pytest.raises((PartyLostError, DeadlineError, SessionClosedError, SessionError)):
                owner.train(batch_of(0, rows=6))
        else:
            losses = [owner.train(batch_of(0, rows=6), step) for step in range(6)]
            assert list(owner.caller.lost) == [faulty.name]
            assert owner.caller.lost[faulty.name].startswith(f"the host '{faulty.name}' did not answer '{operation}'")
            assert all(torch.isfinite(torch.tensor(losses)))
            assert losses[-1] < losses[0]  # it goes on learning with the experts that are left
        assert time.monotonic() - started < 20.0
        if policy == "replica":
            expected, whole = trained_whole(house, 6)
            assert losses == expected
            assert_held(whole, house, [company for company in companies if company is not faulty])
            for name, parameter in owner.model.named_parameters():
                assert torch.equal(parameter, whole[name]), name


def trained_whole(house: House, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the losses and the last parameters of the unsplit model on one batch."""
    whole = house.whole()
    optimizer = house.spec.optimizer.build(list(whole.parameters()))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = whole(**batch_of(0, rows=6)).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: p.detach() for name, p in whole.named_parameters()}


def assert_held(whole: dict[str, torch.Tensor], house: House, companies: list[Company]) -> None:
    """Check that every expert at these companies, copies included, is bit for bit that of the whole model."""
    placement = house.placement([f"party-{i}" for i in range(3)])
    layers = expert_layer_names(load_config(house.source, house.spec.task), house.spec.task)
    for company in companies:
        for name, parameter in company.host.module.named_parameters():
            layer = next(i for i, own in enumerate(layers) if name.startswith(f"{own}."))
            experts = list(placement.experts_of(company.name)[layer])
            assert torch.equal(parameter, whole[name][experts]), (company.name, name)


def test_too_few_experts_fail_even_where_they_may_be_skipped(make_house: Callable[..., Any]) -> None:
    house = make_house("mixtral", experts=ExpertSettings(on_host_lost="skip", k_min=2))
    with house.open(2, deadline_s=2.0) as companies:
        lose(companies[-1], "nan", "forward")
        with pytest.raises(PartyLostError, match=r"answered 'forward' with numbers .* k_min is 2"):
            companies[0].train(batch_of(0))


def test_skipping_renormalises_the_weights_that_are_left(make_house: Callable[..., Any]) -> None:
    """Of three tokens, one has lost an expert, one none, and one all."""
    from vflair_flower.experts.dispatch import _more

    weight_R = torch.tensor([0.7, 0.3, 0.6, 0.4, 0.5, 0.5], requires_grad=True)
    answered_R = torch.tensor([True, False, True, True, False, False])
    grown = weight_R * answered_R * _more(weight_R, answered_R, torch.tensor([0, 0, 1, 1, 2, 2]), 3)
    torch.testing.assert_close(grown, torch.tensor([1.0, 0.0, 0.6, 0.4, 0.0, 0.0]))
    grown.sum().backward()
    assert bool(torch.isfinite(weight_R.grad).all())


@pytest.mark.parametrize(
    ("tensors", "meta", "message"),
    [
        ({"expert": torch.tensor([1], dtype=torch.int32)}, {}, r"the experts \[1\] of layer 0"),
        ({"row": torch.tensor([3], dtype=torch.int32)}, {}, "1 rows of 1 tokens"),
        ({}, {"layer": 9}, "of layer 9"),
        (
            {"row": torch.tensor([0, 0], dtype=torch.int32), "expert": torch.tensor([2, 0], dtype=torch.int32)},
            {},
            "not sorted by expert",
        ),
        ({"weight": torch.ones(1)}, {}, "sent rows with weights"),
    ],
)
def test_a_lying_owner_is_refused(tensors: dict, meta: dict, message: str, make_house: Callable[..., Any]) -> None:
    with make_house().open(2) as companies:
        honest = {
            "hidden": torch.zeros(1, 64),
            "row": torch.zeros(1, dtype=torch.int32),
            "expert": torch.zeros(1, dtype=torch.int32),
        }
        request = Request("party-1", "forward", {**honest, **tensors}, {"layer": 0, "call": 1, "keep": True, **meta})
        with pytest.raises(SessionError, match=message):
            companies[0].host(request)


@pytest.mark.parametrize("layers", [1, 3])
def test_round_robin_deals_every_expert_once_and_evenly(layers: int) -> None:
    placed = place_experts(ExpertSettings(), HOSTS, layers=layers, experts=8)
    for layer in range(layers):
        owned = [placed.experts_of(host)[layer] for host in HOSTS]
        assert sorted(expert for own in owned for expert in own) == list(range(8))
        assert sorted(map(len, owned)) == [2, 3, 3]
    again = place_experts(ExpertSettings(), reversed(HOSTS), layers=layers, experts=8)
    assert again == placed


@pytest.mark.parametrize(
    ("capacities", "shares"),
    [((1.0, 1.0, 2.0), [2, 2, 4]), ((1.0, 1.0, 100.0), [1, 1, 6]), ((3.0, 3.0, 3.0), [3, 3, 2])],
)
def test_capacity_gives_shares_of_the_whole(capacities: tuple, shares: list) -> None:
    settings = ExpertSettings(placement="capacity", capacities=capacities)
    placed = place_experts(settings, HOSTS, layers=2, experts=8)
    assert [len(placed.experts_of(host)[1]) for host in HOSTS] == shares


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: ExpertSettings(placement="nearest"), "placement is 'nearest'"),
        (lambda: ExpertSettings(capacities=(1.0,)), "capacities goes with the placement 'capacity'"),
        (lambda: ExpertSettings(placement="capacity", capacities=(1.0, 0.0)), "each is a number above 0"),
        (lambda: ExpertSettings(k_min=-1), "k_min is -1"),
        (
            lambda: place_experts(ExpertSettings(placement="table", table=((0, 3),)), HOSTS[:2], layers=1, experts=2),
            "names host 3, and there are 2 parties",
        ),
        (
            lambda: place_experts(ExpertSettings(placement="table", table=((0,),)), HOSTS, layers=2, experts=8),
            "has 1 layers, the first of 1 experts; the model has 2 of 8",
        ),
    ],
)
def test_placements_that_cannot_be(settings: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        settings()
