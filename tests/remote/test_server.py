"""The model party's server: what it refuses, what it frees, what it repeats, and that timing never shows."""

import io
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vflair_flower.errors import PartyLostError, SessionError
from vflair_flower.partition import Mode
from vflair_flower.partition.footprint import footprint
from vflair_flower.remote import BodyMode, parameter_counts
from vflair_flower.session import Request

by_mode = pytest.mark.parametrize("mode", list(BodyMode))
by_cut = pytest.mark.parametrize("cut_mode", list(Mode))


def begin(server: Any, *parties: Any, number: int = 1, training: bool = True) -> None:
    server.begin([party.name for party in parties], server_round=number, training=training)
    for party in parties:
        party.join()


def weights(*modules: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for module in modules for p in module.parameters() if p.requires_grad]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@by_mode
@by_cut
@pytest.mark.parametrize("lora", [False, True], ids=["all-parameters", "lora"])
def test_one_party_equals_the_whole_model(
    mode: BodyMode, cut_mode: Mode, lora: bool, make_house: Callable[..., Any]
) -> None:
    house = make_house(mode=cut_mode, lora=lora)
    server = house.server(mode)
    party, whole = house.party("p1", server), house.whole()
    optimizer = house.spec.optimizer.build([p for p in whole.parameters() if p.requires_grad])
    begin(server, party)
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = house.spec.optimizer.rate(step, 8)
        for group in party.optimizer.param_groups:
            group["lr"] = house.spec.optimizer.rate(step, 8)
        optimizer.zero_grad()
        loss = whole(**party.batch(step)).loss
        loss.backward()
        optimizer.step()
        assert party.train(step, total_steps=8) == float(loss.detach())
    party.remote.finish()
    server.end()
    parts = {**dict(server.module.named_parameters()), **dict(party.model.named_parameters())}
    assert all(torch.equal(parts[name], p) for name, p in whole.named_parameters() if p.requires_grad)
    assert server.counts().steps == 4
    assert (
        server.counts().tokens
        == party.remote.tokens
        == sum(int(party.batch(s)["attention_mask"].sum()) for s in range(4))
    )


@by_mode
def test_frozen_head_still_trains_the_body(mode: BodyMode, make_house: Callable[..., Any]) -> None:
    house = make_house()
    server = house.server(mode)
    party = house.party("p1", server)
    party.model.requires_grad_(False)
    begin(server, party)
    before = weights(server.module)
    party.loss(0).backward()
    party.remote.step(step=0, total_steps=0)
    party.remote.finish()
    server.end()
    moved = [not torch.equal(a, b) for a, b in zip(before, weights(server.module), strict=True)]
    assert all(moved)


def test_backward_without_forward_or_twice_is_refused(make_house: Callable[..., Any]) -> None:
    house = make_house()
    server = house.server()
    party = house.party("p1", server)
    begin(server, party)
    grad = {"grad": torch.zeros(2, 5, 16)}
    with pytest.raises(SessionError, match=r"'p1' sent the gradient of call 7, which is not open"):
        server(Request("p1", "backward", grad, {"call": 7, "wants_grad": True}))
    loss = party.loss(0)
    with pytest.raises(SessionError, match="call 0, which is not open"):  # another party's call is none of its own
        server(Request("p2", "backward", grad, {"call": 0, "wants_grad": True}))
    loss.backward(retain_graph=True)
    with pytest.raises(SessionError, match="call 0, which is not open"):
        loss.backward()


def test_second_order_gradients_are_refused(make_house: Callable[..., Any]) -> None:
    """The other party's graph is gone after one backward pass; they would be silently wrong."""
    house = make_house()
    server = house.server()
    party = house.party("p1", server)
    begin(server, party)
    hidden_BTD = torch.randn(2, 5, 16, requires_grad=True)
    loss = party.remote(hidden_BTD, torch.ones(2, 5), None).pow(2).sum()
    (grad,) = torch.autograd.grad(loss, hidden_BTD, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@by_mode
def test_step_without_gradient_is_refused_and_loses_nothing(mode: BodyMode, make_house: Callable[..., Any]) -> None:
    house = make_house()
    server = house.server(mode)
    party = house.party("p1", server)
    begin(server, party)
    before = weights(server.module)
    with pytest.raises(SessionError, match="no rows went through the model"):
        party.remote.step(step=0, total_steps=0)
    with pytest.raises(SessionError, match="no gradient has come from it"):
        server(Request("p1", "step", {}, {"rows": 2, "step": 0, "total_steps": 0}))
    loss = party.loss(0)
    with pytest.raises(SessionError, match="no gradient has come from it"):
        party.remote.step(step=0, total_steps=0)
    loss.backward()  # the graph is still there
    with pytest.raises(SessionError, match="a step over 0 rows"):
        server(Request("p1", "step", {}, {"rows": 0, "step": 0, "total_steps": 0}))
    assert equal(weights(server.module), before)
    party.remote.step(step=0, total_steps=0)
    assert server.counts().steps == 1


def test_evaluation_session_refuses_training(make_house: Callable[..., Any]) -> None:
    house = make_house()
    server = house.server()
    party = house.party("p1", server)
    begin(server, party, training=False)
    with pytest.raises(SessionError, match=r"differentiable forward pass.*does not train.*no_grad"):
        party.loss(0)
    with pytest.raises(SessionError, match="a step in a session that does not train"):
        server(Request("p1", "step", {}, {"rows": 1, "step": 0, "total_steps": 0}))
    with torch.no_grad():
        loss = party.loss(0)
        assert torch.equal(loss, house.whole().eval()(**party.batch(0)).loss)
    party.remote.finish()
    server.end()
    assert server.memory().activations == 0


def test_unknown_operation_and_odd_shapes_are_refused(make_house: Callable[..., Any]) -> None:
    house = make_house()
    server = house.server()
    begin(server, house.party("p1", server))
    with pytest.raises(SessionError, match="'dance' is unknown"):
        server(Request("p1", "dance", {}))
    hidden, mask = torch.zeros(2, 3, 16), torch.ones(2, 3, dtype=torch.uint8)
    meta = {"call": 0, "keep": False}
    with pytest.raises(SessionError, match=r"\(2, 3, 16\) with a mask of shape \(2, 4\)"):
        server(Request("p1", "forward", {"hidden": hidden, "attention_mask": torch.ones(2, 4)}, meta))
    tensors = {"hidden": hidden, "attention_mask": mask, "position_ids": torch.zeros(1, 3, dtype=torch.int32)}
    with pytest.raises(SessionError, match="one value per token"):
        server(Request("p1", "forward", tensors, meta))


@by_mode
def test_graphs_are_freed(mode: BodyMode, make_house: Callable[..., Any]) -> None:
    house = make_house()
    server = house.server(mode)
    party = house.party("p1", server)
    begin(server, party)
    unused, used = party.loss(0), party.loss(1)
    assert set(server._graphs) == {("p1", 0), ("p1", 1)}
    used.backward()
    assert set(server._graphs) == {("p1", 0)}
    party.remote.step(step=0, total_steps=0)
    assert not server._graphs
    with pytest.raises(SessionError, match="its step has been taken"):
        unused.backward()
    party.loss(2)
    server.leave("p1", lost=True)
    assert not server._graphs
    assert not server._meter._live
    server.leave("p1", lost=True)  # once is enough


@by_mode
def test_who_has_left_may_not_train(mode: BodyMode, make_house: Callable[..., Any]) -> None:
    house = make_house()
    server = house.server(mode)
    party, other = house.party("p1", server), house.party("p2", server)
    begin(server, party, other)
    party.loss(0).backward()
    server.leave("p1", lost=True)
    with pytest.raises(PartyLostError, match="'p1'"):
        party.remote.step(step=0, total_steps=0)
    with pytest.raises(PartyLostError, match="'p1'"):
        party.loss(1)
    other.train(0)  # is not held up
    server.leave("p2", lost=False)
    server.end()
    assert not server._graphs
    assert not server._meter._live


@by_mode
def test_dropout_depends_on_party_round_and_call_alone(mode: BodyMode, make_house: Callable[..., Any]) -> None:
    house = make_house("dropout")
    hidden = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 5, dtype=torch.uint8)

    def forward(server: Any, party: str, call: int) -> torch.Tensor:
        tensors = {"hidden": hidden.clone(), "attention_mask": mask}
        return server(Request(party, "forward", tensors, {"call": call, "keep": True})).tensors["hidden"].clone()

    server, other = house.server(mode), house.server(mode)
    server.begin(["p1", "p2"], server_round=1, training=True)
    first = [forward(server, "p1", call) for call in range(2)]
    assert not torch.equal(*first)
    if mode is not BodyMode.SEQUENTIAL:  # there p2 would have to wait for its turn
        assert not torch.equal(forward(server, "p2", 0), first[0])
    other.begin(["p1", "p2"], server_round=1, training=True)
    torch.manual_seed(99)  # the process's own randomness has no say
    if mode is not BodyMode.SEQUENTIAL:
        forward(other, "p2", 5)
    state = torch.get_rng_state()
    assert torch.equal(forward(other, "p1", 0), first[0])
    assert torch.equal(forward(other, "p1", 1), first[1])
    assert torch.equal(torch.get_rng_state(), state)  # and is left as it was
    other.begin(["p1", "p2"], server_round=2, training=True)
    assert not torch.equal(forward(other, "p1", 0), first[0])


def test_evaluation_within_training_has_no_dropout(make_house: Callable[..., Any]) -> None:
    house = make_house("dropout")
    server = house.server()
    party = house.party("p1", server)
    begin(server, party)
    party.model.eval()
    with torch.no_grad():
        loss = party.loss(0)
    assert torch.equal(loss, house.whole().eval()(**party.batch(0)).loss)
    assert server.module.training
    party.model.train()
    assert not torch.equal(party.loss(0).detach(), loss)


@by_mode
def test_evaluation_within_training_does_not_depend_on_timing(
    mode: BodyMode, make_house: Callable[..., Any], at_once: Callable[..., list]
) -> None:
    """A party that evaluates between its steps sees the body of its place in the order, however quick others are."""
    results = []
    for slow in (0, 1):
        house = make_house()
        server = house.server(mode)
        parties = [house.party(f"p{i}", server) for i in range(2)]
        begin(server, *parties)

        def act(index: int, parties: list = parties, slow: int = slow) -> list[float]:
            losses = []
            for step in range(2):
                if index == slow:
                    time.sleep(0.05)
                with torch.no_grad():
                    losses.append(float(parties[index].loss(9)))
                parties[index].train(step)
            parties[index].remote.finish()
            return losses

        results.append(at_once(lambda: act(0), lambda: act(1)))
        server.end()
    assert results[0] == results[1]


@by_mode
@pytest.mark.parametrize("model", ["plain", "dropout"])
def test_four_parties_at_once_whatever_the_timing(
    mode: BodyMode, model: str, make_house: Callable[..., Any], at_once: Callable[..., list]
) -> None:
    """Bit for bit the same body, heads and losses, under random delays before and after every call.

    Dropout is the body's only: the parties of this test share one process, whose randomness they would share as well.
    """
    runs = []
    for seed in range(2):
        house = make_house(model)
        server = house.server(mode)
        parties = [house.party(f"p{i}", server) for i in range(4)]
        dice = random.Random(seed)
        losses: dict[str, list[float]] = {party.name: [] for party in parties}
        for party in parties:
            party.link.pause = lambda dice=dice: time.sleep(dice.choice([0.0, 0.0, 0.001, 0.004]))
            party.model.eval()

        def act(party: Any, number: int, losses: dict = losses) -> None:
            for step in range(3 if party.name != "p2" else 2):  # unequal lengths: p2 is done earlier
                losses[party.name].append(party.train(3 * number + step, total_steps=6))
            party.remote.finish()

        for number in range(2):
            begin(server, *parties, number=number + 1)
            at_once(*(lambda party=party, number=number: act(party, number) for party in reversed(parties)))
            server.end()
        runs.append((losses, weights(server.module, *(party.model for party in parties))))
        assert not server._graphs
        assert not server._meter._live
    assert runs[0][0] == runs[1][0]
    assert equal(runs[0][1], runs[1][1])


def test_parties_lost_in_the_middle_hold_nobody_up(
    make_house: Callable[..., Any], at_once: Callable[..., list]
) -> None:
    for mode in BodyMode:
        house = make_house()
        server = house.server(mode)
        parties = [house.party(f"p{i}", server) for i in range(4)]
        begin(server, *parties)

        def act(index: int, parties: list = parties, server: Any = server) -> None:
            for step in range(3):
                if (index, step) in {(1, 1), (3, 2)}:  # one before its forward pass, one with a gradient in hand
                    if index == 3:
                        parties[index].loss(step).backward()
                    server.leave(f"p{index}", lost=True)
                    return
                parties[index].train(step)
            parties[index].remote.finish()

        at_once(*(lambda index=index: act(index) for index in range(4)))
        server.end()
        assert not server._graphs
        assert server._update.gradient_bytes() == 0


def test_end_frees_who_still_waits(make_house: Callable[..., Any], at_once: Callable[..., list]) -> None:
    house = make_house()
    server = house.server()
    party, other = house.party("p1", server), house.party("p2", server)
    begin(server, party, other)
    started = time.monotonic()

    def end_when_waiting() -> None:
        while not server._update._barrier._arrived:
            time.sleep(0.005)
        server.end()

    with pytest.raises(PartyLostError, match="'p1'"):
        at_once(lambda: party.train(0), end_when_waiting)
    assert time.monotonic() - started < 10


@by_mode
def test_tied_head_is_trained_in_every_mode(mode: BodyMode, make_house: Callable[..., Any]) -> None:
    """In Head-Tail a tied language-model head is the model party's copy of the embedding; copies of it must count."""
    house = make_house("tied", mode=Mode.HT)
    results = []
    for chosen in (mode, BodyMode.SYNCHRONOUS):
        server = house.server(chosen)
        party = house.party("p1", server)
        begin(server, party)
        before = server.module.get_output_embeddings().weight.detach().clone()
        for step in range(3):
            party.train(step)
        party.remote.finish()
        server.end()
        after = server.module.get_output_embeddings().weight
        assert after is server.module.get_input_embeddings().weight
        assert not torch.equal(after, before)
        results.append(weights(server.module))
    assert equal(*results)


@by_mode
@pytest.mark.parametrize("lora", [False, True], ids=["all-parameters", "lora"])
def test_saved_job_goes_on_bit_identically(
    mode: BodyMode, lora: bool, make_house: Callable[..., Any], at_once: Callable[..., list]
) -> None:
    house = make_house(lora=lora)

    def play(server: Any, parties: list, number: int) -> None:
        begin(server, *parties, number=number)

        def act(party: Any) -> None:
            for step in range(2):
                party.train(2 * number + step, total_steps=8)
            party.remote.finish()

        at_once(*(lambda party=party: act(party) for party in parties))
        server.end()

    server = house.server(mode)
    parties = [house.party(f"p{i}", server) for i in range(2)]
    play(server, parties, 1)
    file = io.BytesIO()
    torch.save(server.state(), file)
    file.seek(0)
    resumed = house.server(mode)
    resumed.load_state(torch.load(file, weights_only=True))
    assert equal(weights(resumed.module), weights(server.module))
    again = [house.party(f"p{i}", resumed) for i in range(2)]
    for party, other in zip(parties, again, strict=True):
        other.model.load_state_dict(party.model.state_dict())
        other.optimizer.load_state_dict(party.optimizer.state_dict())
        for group in other.optimizer.state.values():
            group.update({name: value.clone() for name, value in group.items()})
    play(server, parties, 2)
    play(resumed, again, 2)
    assert equal(weights(resumed.module), weights(server.module))


@by_mode
def test_memory_is_what_formulas_say(
    mode: BodyMode, make_house: Callable[..., Any], at_once: Callable[..., list]
) -> None:
    house = make_house()
    server = house.server(mode)
    parties = [house.party(f"p{i}", server) for i in range(3)]
    begin(server, *parties)
    empty = server.memory()
    assert empty.activations == empty.gradients == empty.optimizer == 0

    def act(party: Any) -> None:
        party.train(0)
        party.remote.finish()

    at_once(*(lambda party=party: act(party) for party in parties))
    server.end()
    memory = server.memory()
    held, trained = parameter_counts(server.module)
    share = footprint(house.source, house.spec).model_party
    copies = len(parties) if mode is BodyMode.REPLICATED else 0
    tensors = len(list(server.module.parameters()))
    assert (held, trained) == (share.parameters, share.trained)
    assert memory.parameters == share.parameter_bytes + copies * 4 * trained
    assert memory.optimizer == max(1, copies) * (2 * 4 * trained + 4 * tensors)
    assert 4 * trained <= memory.gradients <= len(parties) * 4 * trained
    assert memory.total == memory.parameters + memory.gradients + memory.optimizer + memory.activations
    one_block_output = 4 * 3 * 5 * 16  # the largest batch: 3 rows, 5 tokens, width 16
    assert one_block_output < memory.activations < 100 * len(parties) * one_block_output


@by_mode
def test_activations_do_not_count_parameters(mode: BodyMode, make_house: Callable[..., Any]) -> None:
    """The same batch keeps the same bytes, whether it runs on the body itself or on a party's copy of it."""
    measured = []
    for chosen in (mode, BodyMode.SYNCHRONOUS):
        house = make_house()
        server = house.server(chosen)
        party = house.party("p1", server)
        begin(server, party)
        party.train(0)
        measured.append(server.memory().activations)
    assert measured[0] == measured[1] > 0


@by_cut
@pytest.mark.parametrize("lora", [False, True], ids=["all-parameters", "lora"])
def test_half_wire_halves_what_is_sent_and_nearly_trains_the_same(
    cut_mode: Mode, lora: bool, make_house: Callable[..., Any]
) -> None:
    losses = {}
    for wire_dtype in ("float32", "bfloat16"):
        house = make_house(mode=cut_mode, lora=lora, wire_dtype=wire_dtype)
        server = house.server()
        party = house.party("p1", server)
        begin(server, party)
        losses[wire_dtype] = [party.train(step) for step in range(4)]
        dtype = getattr(torch, wire_dtype)
        operations = [operation for operation, _ in party.link.sent]
        assert operations == ["forward", "backward", "step"] * 4
        assert party.link.sent[0][1] == {"hidden": dtype, "attention_mask": torch.uint8}
        assert party.link.sent[1][1] == {"grad": dtype}
        assert all(p.dtype is torch.float32 for p in party.model.parameters())
        assert all(p.grad is None or p.grad.dtype is torch.float32 for p in party.model.parameters())
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_frozen_head_needs_no_gradient_back(make_house: Callable[..., Any]) -> None:
    house = make_house()
    server = house.server()
    party = house.party("p1", server)
    begin(server, party)
    replies = []
    party.link.handler = lambda request: replies.append(server(request)) or replies[-1]
    party.loss(0).backward()
    assert set(replies[-1].tensors) == {"grad"}
    party.model.requires_grad_(False)
    party.loss(0).backward()
    assert set(replies[-1].tensors) == set()
