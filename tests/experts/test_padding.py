"""Calls that are filled up: the same bits for the owner, and one size for whoever watches the network."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.experts.conftest import batch_of
from tests.experts.test_exact import steps
from tests.experts.test_split import SPLIT, open_split
from tests.experts.test_split import joined as split_joined
from vflair_flower.errors import ConfigurationError, SessionError
from vflair_flower.experts.padding import Room, emptied, filled, real_part, rooms
from vflair_flower.partition import PartitionPlan
from vflair_flower.remote.protocol import BACKWARD, FORWARD
from vflair_flower.session import Request
from vflair_flower.settings import ExpertSettings


@pytest.mark.parametrize(
    ("family", "padding", "count"), [("mixtral", "whole", 3), ("gpt-oss", "bucket", 2), ("deepseek-v3", "bucket", 4)]
)
def test_the_owner_gets_the_same_bits(family: str, padding: str, count: int, make_house: Callable[..., Any]) -> None:
    """Losses, every gradient and three AdamW steps."""
    expected, whole, found, end = steps(make_house(family, experts=ExpertSettings(padding=padding)), count)
    assert found == expected
    assert [name for name, p in whole.items() if not torch.equal(end[name], p)] == []


@pytest.mark.parametrize(
    "more",
    [
        {"combine": "host"},
        {"codec": "int8"},
        {"replicas": 2},
        pytest.param({"schedule": "round-robin", "combine": "host"}, marks=pytest.mark.slow),
        {"local_layers": 1, "on_host_lost": "skip"},
    ],
    ids=str,
)
def test_as_without_it_whatever_else_is_set(more: dict[str, Any], make_house: Callable[..., Any]) -> None:
    found = []
    for padding in ("none", "whole", "bucket"):
        with make_house("mixtral", experts=ExpertSettings(padding=padding, **more)).open(3) as companies:
            owner, *others = companies
            for other in others:
                other.caller.finish()
            losses = [owner.train(batch_of(step, rows=1, tokens=5), step) for step in range(2)]
            with torch.no_grad():  # one token: most hosts get nothing but filling
                logits = owner.model.eval()(input_ids=torch.tensor([[7]])).logits
            found.append((losses, logits, [c.host.trained_state() for c in companies]))
    for losses, logits, states in found[1:]:
        assert losses == found[0][0]
        assert torch.equal(logits, found[0][1])
        for state, before in zip(states, found[0][2], strict=True):
            assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


def test_a_split_backbones_body_fills_its_calls_up_too(make_house: Callable[..., Any]) -> None:
    found = []
    for padding in ("none", "whole"):
        house = make_house("mixtral", experts=replace(SPLIT, padding=padding), plan=PartitionPlan(tail_blocks=1))
        with open_split(house, 3) as (companies, body):
            owner, *others = companies
            for other in others:
                other.caller.finish()
            losses = [owner.train(batch_of(step, rows=1, tokens=5), step) for step in range(2)]
            found.append((losses, split_joined(companies, body, house)))
    assert found[0][0] == found[1][0]
    assert [name for name, tensor in found[0][1].items() if not torch.equal(tensor, found[1][1][name])] == []


def test_every_host_is_called_in_every_layer_and_keeps_nothing(make_house: Callable[..., Any]) -> None:
    with make_house("mixtral", experts=ExpertSettings(padding="whole")).open(4) as companies:
        owner, *others = companies
        for other in others:
            other.caller.finish()
        heard: list[tuple[int, str, int]] = []
        owner.caller.watch = lambda _call, one: heard.append((one.layer, one.host, len(one.rows_N)))
        owner.train(batch_of(0, rows=1, tokens=4) | {"input_ids": torch.tensor([[9, 9, 9, 9]])})
        assert not any(company.host._kept for company in companies)
    assert [(layer, host) for layer, host, _ in heard] == [
        (layer, f"party-{i}") for layer in range(4) for i in range(4)
    ]
    assert any(rows == 0 for *_, rows in heard)


@given(
    tokens=st.integers(1, 40),
    per_token=st.integers(1, 5),
    held=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    padding=st.sampled_from(("whole", "bucket")),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_rooms_hold_what_is_sent_and_no_more_than_the_most(tokens, per_token, held, padding, data):
    counts = {str(index): count for index, count in enumerate(held)}
    most = {host: Room(tokens=tokens, rows=tokens * min(per_token, count)) for host, count in counts.items()}
    sent = {}
    for host in counts:
        rows = data.draw(st.integers(0, most[host].rows))
        sent[host] = Room(tokens=data.draw(st.integers(min(1, rows), min(tokens, rows))), rows=rows)
    found = rooms(padding, sent, counts, tokens=tokens, per_token=per_token)
    assert all(sent[host].tokens <= found[host].tokens <= most[host].tokens for host in counts)
    assert all(sent[host].rows <= found[host].rows <= most[host].rows for host in counts)
    assert all(room.tokens >= 1 and room.rows >= 1 for room in found.values())
    if padding == "whole":
        assert found == most
    elif len(found) == 1:  # filled up to less than twice what is sent
        (room,), (real,) = found.values(), sent.values()
        assert room.rows <= max(1, 2 * real.rows)


def test_what_is_filled_up_is_emptied_again():
    request = {
        "hidden": torch.rand(2, 3),
        "row": torch.tensor([0, 1, 0], dtype=torch.int32),
        "expert": torch.tensor([1, 1, 4], dtype=torch.int32),
        "weight": torch.rand(3),
    }
    full = filled(request, Room(tokens=5, rows=7))
    assert {name: len(tensor) for name, tensor in full.items()} == {"hidden": 5, "row": 7, "expert": 7, "weight": 7}
    assert real_part(full) == real_part(request) == Room(tokens=2, rows=3)
    found = emptied(full, real_part(full))
    assert all(torch.equal(found[name], tensor) for name, tensor in request.items())
    nothing = filled({name: tensor[:0] for name, tensor in request.items()}, Room(tokens=2, rows=2))
    assert real_part(nothing) == Room(tokens=0, rows=0)


def test_filling_is_refused_where_the_job_has_none_and_in_between(make_house: Callable[..., Any]) -> None:
    def ask(host: Any, experts: list[int], row: list[int]) -> Any:
        tensors = {
            "hidden": torch.zeros(2, 64),
            "row": torch.tensor(row, dtype=torch.int32),
            "expert": torch.tensor(experts, dtype=torch.int32),
        }
        return host(Request("party-1", FORWARD, tensors, {"layer": 0, "call": 1, "keep": True}))

    with make_house("mixtral").open(2) as companies:
        own = make_house("mixtral").placement(["party-0", "party-1"]).experts_of("party-0")[0]
        with pytest.raises(SessionError, match=r"for the experts \[-1\]"):
            ask(companies[0].host, [own[0], -1], [0, 0])
    with make_house("mixtral", experts=ExpertSettings(padding="whole")).open(2) as companies:
        host = companies[0].host
        for experts, row in (([-1, own[0]], [0, 0]), ([own[0], -1], [5, 0]), ([own[0], -1], [-3, 0])):
            if experts[0] == -1:  # all behind the first filling is filling
                assert not ask(host, experts, row).tensors["output"].any()
                continue
            with pytest.raises(SessionError, match="each row needs an expert and one of the tokens"):
                ask(host, experts, row)
        ask(host, [own[0], -1], [0, 0])
        short = {"grad": torch.zeros(0, 64), "weight": torch.zeros(0)}
        with pytest.raises(SessionError, match="sent the gradient of 0 tokens"):
            host(Request("party-1", BACKWARD, short, {"call": 1}))


def test_what_it_does_not_go_with_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="padding is 'much'"):
        ExpertSettings(padding="much")
    with pytest.raises(ConfigurationError, match="says by its size where tokens go"):
        ExpertSettings(padding="whole", semantics="hand-off-token", schedule="round-robin")
