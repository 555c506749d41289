"""Copies of experts at several parties: mirrored without a parameter crossing, asked one after the other, and never
silently apart.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.experts.conftest import batch_of, merged
from tests.experts.test_dispatch import assert_held, faulty_house, lose, trained_whole
from vflair_flower.errors import ConfigurationError, PartyLostError, SessionError
from vflair_flower.experts import place_experts
from vflair_flower.session import Reply, Request
from vflair_flower.settings import ExpertSettings, OptimizerSettings

HOSTS = ("a", "b", "c")


@pytest.mark.parametrize("replicas", [2, 3])
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_copies_are_mirrored_and_training_is_that_of_the_whole_model(
    family: str, replicas: int, make_house: Callable[..., Any]
) -> None:
    house = make_house(family, experts=ExpertSettings(replicas=replicas))
    expected, whole = trained_whole(house, 3)
    with house.open(3) as companies:
        for other in companies[1:]:
            other.caller.finish()
        assert [companies[0].train(batch_of(0, rows=6), step) for step in range(3)] == expected
        assert_held(whole, house, companies)
        held = sum(p.numel() for company in companies for p in company.host.module.parameters())
        crossed = {entry.tensor for entry in companies[0].caller._link.ledger.entries()}
    assert held == replicas * sum(p.numel() for name, p in whole.items() if ".experts." in name)
    assert crossed == {"header", "hidden", "row", "expert", "output", "grad", "weight"}


def test_owners_that_train_at_once_leave_equal_copies(make_house: Callable[..., Any]) -> None:
    house = make_house("mixtral", experts=ExpertSettings(replicas=2), optimizer=OptimizerSettings(learning_rate=0.01))
    with house.open(3) as companies:

        def work(index: int) -> None:
            for step in range(3):
                companies[index].train(batch_of(10 * index + step, rows=1 + index), step)
            companies[index].caller.finish()

        threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        first = merged(companies, house)
        assert_held(first, house, companies)  # whichever copy `merged` has taken, the others are equal to it
        before = house.whole()
        assert not torch.equal(
            first["model.layers.0.mlp.experts.down_proj"], before.model.layers[0].mlp.experts.down_proj
        )
        assert companies[0].caller.lost == {}


@pytest.mark.parametrize("owner", [0, 1])
def test_without_gradients_one_copy_is_asked_and_the_next_when_it_is_lost(
    owner: int, make_house: Callable[..., Any]
) -> None:
    """Who was asked at first is lost; experts that the owner holds itself are asked of nobody."""
    house = faulty_house(make_house, "replica")
    asked: list[tuple[str, int]] = []
    expected = house.whole().eval()(**batch_of(0)).logits.detach()
    with house.open(3, training=False) as companies:
        asking = companies[owner]
        asking.model.eval()

        def watch(company: Any) -> None:
            answer = company.host.__call__

            def handle(request: Request) -> Reply:
                if company.name == broken:
                    raise RuntimeError("power cut")
                asked.extend((company.name, int(e)) for e in torch.unique(request.tensors["expert"]))
                return answer(request)

            company.caller._link._handler = handle

        broken = ""
        for company in companies:
            watch(company)
        with torch.no_grad():
            for _ in range(2):
                broken = asked[0][0] if asked else ""
                asked.clear()
                assert torch.equal(asking.model(**batch_of(0)).logits, expected)
                own = set(house.placement([c.name for c in companies]).experts_of(asking.name)[0])
                assert {expert for _, expert in asked} == set(range(8)) - own
                pairs = set(asked)
                assert len({expert for _, expert in pairs}) == len(pairs)  # never two copies of one
        assert list(asking.caller.lost) == [broken]


@pytest.mark.parametrize("operation", ["forward", "backward", "step"])
def test_when_the_last_copy_is_lost_the_call_fails_and_says_which(
    operation: str, make_house: Callable[..., Any]
) -> None:
    with faulty_house(make_house, "replica").open(3, deadline_s=5.0) as companies:
        owner, *others = companies
        for other in others:
            other.caller.finish()
            lose(other, "refuses", operation)
        with pytest.raises(
            PartyLostError, match=r"expert [3-6] of layer \d was at party-1, party-2, and no copy is left"
        ):
            owner.train(batch_of(0, rows=6))
        assert sorted(owner.caller.lost) == ["party-1", "party-2"]


@pytest.mark.parametrize(("liar", "counts"), [(1, True), (2, False)])
def test_the_first_copy_that_is_alive_counts(liar: int, counts: bool, make_house: Callable[..., Any]) -> None:
    """Of experts 3 to 6 the host is party-1 and party-2 has the copies; expert 7 is at party-2 and at the owner."""
    house = faulty_house(make_house, "replica")
    expected, _ = trained_whole(house, 2)
    with house.open(3) as companies:
        owner, *others = companies
        for other in others:
            other.caller.finish()
        answer = companies[liar].host.__call__
        companies[liar].caller._link._handler = lambda request: Reply(
            {name: 2 * tensor for name, tensor in answer(request).tensors.items()}, {"steps": 1, "owners": "party-0"}
        )
        assert (owner.train(batch_of(0, rows=6)) != expected[0]) is counts


@pytest.mark.parametrize(("policy", "goes_on"), [("fail", False), ("skip", True)])
def test_copies_serve_under_the_other_policies_too(policy: str, goes_on: bool, make_house: Callable[..., Any]) -> None:
    house = make_house("mixtral", experts=ExpertSettings(on_host_lost=policy, replicas=2))
    with house.open(3, deadline_s=5.0) as companies:
        owner, *others = companies
        for other in others:
            other.caller.finish()
        lose(companies[1], "nan", "backward")
        if goes_on:
            expected, _ = trained_whole(house, 2)
            assert [owner.train(batch_of(0, rows=6), step) for step in range(2)] == expected
        else:
            with pytest.raises(SessionError, match="not finite"):
                owner.train(batch_of(0, rows=6))


def test_copies_that_have_parted_end_the_job(make_house: Callable[..., Any]) -> None:
    """The third party has told one host of its step, and is lost before it tells another."""
    house = make_house("mixtral", experts=ExpertSettings(on_host_lost="replica", replicas=2))
    errors: list[Exception] = []
    with house.open(3) as companies:
        for company in companies:
            company.caller._link.on_lost(lambda party, _reason, host=company.host: host.leave(party, lost=True))

        def work(index: int) -> None:
            try:
                companies[index].train(batch_of(index))
            except SessionError as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        link = companies[2].caller._link
        link.call("party-0", "step", {}, {"rows": 5, "step": 0, "total_steps": 0})
        for other in ("party-0", "party-1"):
            companies[2].host.leave(other, lost=True)  # its process is gone, and with it those who wait there
        link.abandon()
        for thread in threads:
            thread.join(60)
    assert len(errors) == 2
    for error in errors:
        assert "'party-0' took step 1 for party-0, party-1, party-2; 'party-1' took step 1 for party-0, party-1" in str(
            error
        )


def test_copies_are_at_the_host_and_the_parties_that_follow_it() -> None:
    placed = place_experts(ExpertSettings(replicas=2), HOSTS, layers=2, experts=4)
    assert [placed.hosts_of(0, expert) for expert in range(4)] == [("a", "b"), ("b", "c"), ("c", "a"), ("a", "b")]
    assert placed.experts_of("a") == ((0, 2, 3), (1, 2))
    for layer in range(2):
        for expert in range(4):
            holders = [host for host in HOSTS if expert in placed.experts_of(host)[layer]]
            assert sorted(placed.hosts_of(layer, expert)) == holders


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: ExpertSettings(replicas=0), "replicas is 0"),
        (lambda: ExpertSettings(on_host_lost="replica"), "replicas is 1 and on_host_lost 'replica'"),
        (lambda: ExpertSettings(replicas=2, combine="host"), "a host's sum is over several experts"),
        (
            lambda: place_experts(ExpertSettings(replicas=4), HOSTS, layers=1, experts=8),
            "replicas is 4 and opted_out .* there are 3 parties",
        ),
    ],
)
def test_copies_that_cannot_be(settings: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        settings()


def test_copies_sum_in_one_order_whenever_they_hear_that_an_owner_has_gone(make_house: Callable[..., Any]) -> None:
    """Three batches in a step; one host hears after the first of them that the other owner has finished."""
    house = make_house("mixtral", experts=ExpertSettings(replicas=2))
    with house.open(2) as companies:
        owner = companies[0]
        for batch in range(3):
            owner.model(**batch_of(batch)).loss.backward()
            if batch == 0:
                owner.host.leave("party-1", lost=False)
        companies[1].host.leave("party-1", lost=False)
        owner.caller.step(step=0, total_steps=0)
        copies = [dict(company.host.module.named_parameters()) for company in companies]
        assert [name for name, p in copies[0].items() if not torch.equal(p, copies[1][name])] == []
