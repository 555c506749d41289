"""Calls between hub and parties, on both data planes; the ledger adds up to the bytes that went."""

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from vflair_flower.errors import (
    ConfigurationError,
    FrameError,
    PartyLostError,
    RemoteError,
    SessionClosedError,
)
from vflair_flower.session import Agreement, OperationSpec, Reply, Request, TensorSpec
from vflair_flower.session.outbox import Outbox

from .helpers import AGREEMENT, NOT_A_HANG_S, Background, Gate, House, double


def test_a_party_calls_the_hub(house: House) -> None:
    house.open("a")
    sent = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    reply = house.link("a").call("body", "double", {"x": sent}, {"step": 3})
    assert torch.equal(reply.tensors["x"], sent * 2)
    assert reply.meta == {"source": "a"}


def test_what_arrives_shares_nothing_with_what_was_sent(house: House) -> None:
    def spoil(request: Request) -> Reply:
        request.tensors["x"].zero_()
        return Reply(request.tensors)

    house.open("a", hosts={"body": spoil})
    sent = torch.ones(4, 4, requires_grad=True)
    reply = house.link("a").call("body", "double", {"x": sent})
    assert reply.tensors["x"].eq(0).all()
    assert not reply.tensors["x"].requires_grad
    assert sent.eq(1).all()


def test_the_hub_calls_a_party(house: House) -> None:
    session = house.open("a")
    house.link("a").serve(double)
    reply = session.call("a", "double", {"x": torch.ones(2, 2)}, {}, 10)
    assert reply.tensors["x"].eq(2).all()
    assert reply.meta == {"source": "hub"}
    with pytest.raises(ConfigurationError):
        session.call("nobody", "wait", {})


def test_parties_call_each_other(house: House) -> None:
    house.open("a", "b")
    a, b = house.link("a"), house.link("b")
    a.serve(double)
    b.serve(double)
    assert a.call("b", "double", {"x": torch.ones(2, 2)}).meta == {"source": "a"}
    assert b.call("a", "double", {"x": torch.ones(2, 2)}).meta == {"source": "b"}


def test_calls_wait_for_a_party_that_joins_and_serves_later(house: House) -> None:
    session = house.open("a", "b")
    early = Background(lambda: house.link("a").call("b", "double", {"x": torch.ones(1, 1)}))
    assert session.wait_joined(0.01) is False
    b = house.link("b")
    assert session.wait_joined(NOT_A_HANG_S)
    b.serve(double)
    early.join()
    assert early.error is None
    assert isinstance(early.value, Reply)


def test_nested_calls(house: House) -> None:
    """a asks the hub, whose handler asks b, whose handler asks a."""
    session = house.open("a", "b", hosts={"body": lambda request: session.call("b", "double", request.tensors)})
    a, b = house.link("a"), house.link("b")
    a.serve(double)
    b.serve(lambda request: b.call("a", "double", request.tensors))
    reply = a.call("body", "double", {"x": torch.ones(2, 2)})
    assert reply.tensors["x"].eq(2).all()


def test_handlers_of_different_parties_run_at_once(house: House) -> None:
    """A handler may wait for all parties; one thread for all of them would never get past the barrier."""
    barrier = threading.Barrier(4)

    def meet(request: Request) -> Reply:
        barrier.wait(NOT_A_HANG_S)
        return double(request)

    parties = ["a", "b", "c", "d"]
    house.open(*parties, hosts={"body": meet})
    links = [house.link(party) for party in parties]
    jobs = [Background(lambda link=link: [link.call("body", "wait", {}) for _ in range(3)]) for link in links]  # type: ignore[misc]
    assert [job.join().error for job in jobs] == [None] * 4


def test_calls_of_one_party_run_in_order_and_one_at_a_time(house: House) -> None:
    running, seen, most = [0], [], [0]

    def count(request: Request) -> Reply:
        running[0] += 1
        most[0] = max(most[0], running[0])
        seen.append(request.meta["n"])
        running[0] -= 1
        return Reply({})

    gate = Gate()

    def handle(request: Request) -> Reply:
        return gate(request) if request.meta["n"] == 0 else count(request)

    house.open("a", hosts={"body": handle})
    link = house.link("a")
    first = Background(lambda: link.call("body", "wait", {}, {"n": 0}))
    assert gate.entered.wait(NOT_A_HANG_S)
    others = [Background(lambda n=n: link.call("body", "wait", {}, {"n": n})) for n in range(1, 6)]  # type: ignore[misc]
    gate.leave.set()
    assert [job.join().error for job in (first, *others)] == [None] * 6
    assert sorted(seen) == [1, 2, 3, 4, 5]
    assert most == [1]


def test_more_calls_at_once_than_agreed_wait_their_turn(house: House) -> None:
    house.open("a", agreement=replace(AGREEMENT, max_calls_in_flight=2))
    link = house.link("a")
    jobs = [Background(lambda: link.call("body", "double", {"x": torch.ones(8, 8)})) for _ in range(12)]
    assert [job.join().error for job in jobs] == [None] * 12
    assert house.losses == []


def test_optional_and_empty_tensors(house: House) -> None:
    house.open("a", hosts={"body": lambda request: Reply({"x": request.tensors["x"]})})
    link = house.link("a")
    assert link.call("body", "add", {"x": torch.empty(0, 3)}).tensors["x"].shape == (0, 3)
    assert link.call("body", "add", {"x": torch.ones(1, 1), "y": torch.ones(1, 1)}).tensors["x"].item() == 1


@pytest.mark.parametrize(
    ("operation", "tensors"),
    [("double", {"x": torch.ones(65, 1)}), ("double", {}), ("double", {"x": torch.ones(3)}), ("triple", {})],
)
def test_a_wrong_call_is_refused_before_it_is_sent(
    house: House, operation: str, tensors: dict[str, torch.Tensor]
) -> None:
    session = house.open("a")
    link = house.link("a")
    with pytest.raises(FrameError):
        link.call("body", operation, tensors)
    assert link.ledger.total("up") == 0
    assert link.call("body", "double", {"x": torch.ones(1, 1)}).tensors["x"].item() == 2
    assert session.lost == {}


def test_a_handler_that_raises_reaches_the_caller_and_harms_nobody(house: House) -> None:
    def fail(request: Request) -> Reply:
        raise ValueError("rank 3 of 2")

    session = house.open("a", "b", hosts={"bad": fail, "body": double})
    a, b = house.link("a"), house.link("b")
    b.serve(fail)
    for target in ("bad", "b"):
        with pytest.raises(RemoteError, match=rf"'wait' at '{target}' raised ValueError: rank 3 of 2"):
            a.call(target, "wait", {})
    with pytest.raises(RemoteError, match="ValueError"):
        session.call("b", "wait", {})
    assert a.call("body", "double", {"x": torch.ones(1, 1)}).tensors["x"].item() == 2
    assert session.lost == {}


@pytest.mark.parametrize("reply", [Reply({}), Reply({"x": torch.ones(65, 65)}), None])
def test_a_reply_that_was_not_agreed_is_the_handlers_error(house: House, reply: Reply) -> None:
    house.open("a", hosts={"body": lambda request: reply})
    with pytest.raises(RemoteError):
        house.link("a").call("body", "double", {"x": torch.ones(1, 1)})
    assert house.losses == []


def test_session_errors_keep_their_type(house: House) -> None:
    def lose(request: Request) -> Reply:
        raise PartyLostError("expert-3", "its stream broke")

    house.open("a", hosts={"body": lose})
    with pytest.raises(PartyLostError) as caught:
        house.link("a").call("body", "wait", {})
    assert (caught.value.party, caught.value.reason) == ("expert-3", "its stream broke")


def test_a_name_that_does_not_exist_is_answered_at_once(house: House) -> None:
    house.open("a")
    with pytest.raises(RemoteError, match="nobody in this session is called 'bodi'"):
        house.link("a").call("bodi", "wait", {})
    assert house.losses == []


def test_the_source_is_set_by_the_hub(house: House) -> None:
    session = house.open("a", "b")
    house.link("b").serve(double)
    link = house.link("a")
    link.party = "b"  # a lie, which goes into the frame
    assert link.call("b", "double", {"x": torch.ones(1, 1)}).meta == {"source": "a"}
    assert link.call("body", "double", {"x": torch.ones(1, 1)}).meta == {"source": "a"}
    assert session.lost == {}


def test_goodbye_is_no_loss(house: House) -> None:
    session = house.open("a", "b")
    a, b = house.link("a"), house.link("b")
    b.close()
    b.close()
    assert session.finished == {"b"}
    with pytest.raises(SessionClosedError, match="'b' has said goodbye"):
        a.call("b", "wait", {})
    with pytest.raises(SessionClosedError):
        session.call("b", "wait", {})
    with pytest.raises(SessionClosedError):
        b.call("body", "wait", {})
    a.close()
    assert session.wait_gone(NOT_A_HANG_S)
    assert (session.lost, house.losses) == ({}, [])


def test_a_party_that_only_serves_ends_with_the_session(house: House) -> None:
    session = house.open("a")
    link = house.link("a")
    link.serve(double)
    waiting = Background(lambda: link.wait_closed(NOT_A_HANG_S))
    assert session.call("a", "wait", {}).tensors == {}
    session.close()
    assert waiting.join().error is None
    assert link.closed
    with pytest.raises(SessionClosedError):
        link.call("body", "wait", {})
    with pytest.raises(SessionClosedError):
        session.call("a", "wait", {})


def test_one_hub_has_many_sessions(house: House) -> None:
    first = house.open("a")
    one = house.link("a")
    second = house.open("a", hosts={"body": lambda request: Reply({"x": request.tensors["x"] * 3})})
    other = house.link("a")
    x = torch.ones(1, 1)
    assert (one.call("body", "double", {"x": x}).tensors["x"], other.call("body", "double", {"x": x}).tensors["x"]) == (
        2,
        3,
    )
    first.close()
    assert other.call("body", "double", {"x": x}).tensors["x"] == 3
    assert second.lost == {}


def test_large_tensors_cross_in_chunks(house: House) -> None:
    big = TensorSpec("x", (torch.float32,), (1 << 20,))
    agreement = Agreement({"double": OperationSpec((big,), (big,))}, chunk_bytes=1 << 18)
    house.open("a", "b", agreement=agreement)
    house.link("b").serve(double)
    link = house.link("a")
    x = torch.randn((1 << 20) - 3)
    for target in ("body", "b"):
        assert torch.equal(link.call(target, "double", {"x": x}).tensors["x"], x * 2)


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of every chunk that any stream of this process takes."""
    sizes: list[int] = []
    take = Outbox.__next__

    def counting(self: Outbox) -> bytes:
        chunk = take(self)
        sizes.append(len(chunk))
        return chunk

    monkeypatch.setattr(Outbox, "__next__", counting)
    return sizes


def test_the_ledgers_agree_with_each_other_and_with_the_streams(house: House, streamed: list[int]) -> None:
    session = house.open("a", "b")
    a, b = house.link("a"), house.link("b")
    b.serve(double)
    for rows in (1, 5, 3):
        a.call("body", "double", {"x": torch.ones(rows, 7)})
        a.call("b", "double", {"x": torch.ones(rows, 7, dtype=torch.int64)})
    session.call("b", "wait", {})
    with pytest.raises(RemoteError):
        a.call("nobody", "wait", {})
    a.close()
    b.close()
    session.close()
    links = a.ledger.snapshot()
    links.merge(b.ledger)
    assert session.ledger.entries() == links.entries()
    assert session.ledger.total() == sum(streamed)
    tensor = next(
        entry
        for entry in session.ledger.entries()
        if (entry.party, entry.peer, entry.direction, entry.tensor) == ("a", "b", "up", "x")
    )
    assert (tensor.messages, tensor.bytes, tensor.dtype, tensor.max_shape) == (3, 9 * 7 * 8, "int64", (5, 7))
    downs = {entry.operation for entry in session.ledger.entries() if entry.party == "b" and entry.direction == "down"}
    assert downs == {"double", "wait", "notice"}


def test_names_are_checked_when_a_session_is_opened(house: House) -> None:
    for parties, hosts in ((["a", "a"], {}), (["body"], {"body": double}), (["a b"], {}), (["hub"], {}), ([], {})):
        with pytest.raises(ConfigurationError):
            house.hub.open_session(parties, AGREEMENT, hosts=hosts, deadline_s=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="deadline_s"):
        house.hub.open_session(["a"], AGREEMENT, deadline_s=0)
    with pytest.raises(ConfigurationError, match="max_parties"):
        house.hub.open_session([f"p{i}" for i in range(2000)], AGREEMENT, deadline_s=1)


def test_a_frame_is_never_mixed_with_another() -> None:
    outbox = Outbox()
    others: list[Background] = []

    def frame() -> Iterator[bytes]:
        yield b"1"
        others.append(Background(lambda: outbox.send([b"other"], urgent=True)))
        others[0].done.wait(0.2)  # a chance that it must not take
        yield b"2"

    outbox.send(frame())
    assert others[0].join().value is True
    outbox.finish()
    assert list(outbox) == [b"1", b"2", b"other"]


def test_a_frame_that_fails_half_way_ends_the_stream() -> None:
    outbox = Outbox()

    def frame() -> Iterator[bytes]:
        yield b"1"
        raise MemoryError

    with pytest.raises(MemoryError):
        outbox.send(frame())
    assert list(outbox) == []
    assert outbox.send([b"2"]) is False


def test_a_full_outbox_makes_writers_wait_and_tells_them() -> None:
    outbox = Outbox(cap_bytes=4)
    assert outbox.send([b"12345"])
    with pytest.raises(TimeoutError):
        outbox.send([b"6"], timeout_s=0.01)
    assert outbox.send([b"7"], urgent=True)
    outbox.finish()
    assert outbox.send([b"8"]) is False
    assert list(outbox) == [b"12345", b"7"]
