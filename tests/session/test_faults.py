"""fault: an enum of faults x phase, on both data planes.  Whatever happens, nobody hangs and the right name is told."""

import enum
import threading

import pytest
import torch

from vflair_flower.errors import (
    ConfigurationError,
    DeadlineError,
    FrameError,
    PartyLostError,
    SessionClosedError,
    SessionError,
    TicketError,
)
from vflair_flower.session import Link, Reply, Request, connect
from vflair_flower.session.frame import Frame, FrameAssembler, encode
from vflair_flower.session.header import Kind

from .helpers import AGREEMENT, NOT_A_HANG_S, Background, Gate, House, double, wait_for

X = {"x": torch.ones(2, 2)}


# --- at the door -----------------------------------------------------------------------------------------------------


def test_a_wrong_ticket_is_refused_and_spoils_nothing(house: House) -> None:
    session = house.open("a")
    for wrong in ("", "x", session.tickets["a"][:-1], session.tickets["a"] + "x"):
        with pytest.raises(TicketError):
            house.link("a", ticket=wrong)
    assert session.joined == frozenset()
    assert house.link("a").call("body", "double", X).tensors["x"].eq(2).all()


def test_a_ticket_works_once(house: House) -> None:
    house.open("a")
    link = house.link("a")
    with pytest.raises(TicketError):
        house.link("a")
    assert link.call("body", "double", X).tensors["x"].eq(2).all()
    link.close()
    with pytest.raises(TicketError):
        house.link("a")


def test_the_ticket_of_another_party_or_session_is_refused(house: House) -> None:
    other = house.open("a")
    session = house.open("a", "b")
    for ticket in (session.tickets["b"], other.tickets["a"]):
        with pytest.raises(TicketError):
            house.link("a", ticket=ticket)
    for session_id, party in (("0" * 16, "a"), (session.id, "nobody")):
        with pytest.raises(TicketError):
            connect(
                house.hub.address,
                session=session_id,
                party=party,
                ticket=session.tickets["a"],
                agreement=AGREEMENT,
                deadline_s=1,
            )
    assert len({session.tickets["a"], session.tickets["b"], other.tickets["a"]}) == 3
    assert min(map(len, session.tickets.values())) >= 43  # 256 bits in base 64


def test_the_ticket_of_a_session_that_is_over_is_refused(house: House) -> None:
    house.open("a").close()
    with pytest.raises(TicketError):
        house.link("a")


def test_another_agreement_is_refused(house: House) -> None:
    session = house.open("a")
    house.agreement = type(AGREEMENT)({})
    with pytest.raises(FrameError, match="agreement"):
        house.link("a")
    assert session.lost == {"a": "it came with another agreement"}


def test_a_party_that_never_joins_is_lost(house: House) -> None:
    session = house.open("a", "b", join_deadline_s=0.3)
    a = house.link("a")
    told: list[tuple[str, str]] = []
    a.on_lost(lambda party, reason: told.append((party, reason)))
    with pytest.raises(PartyLostError) as caught:
        a.call("b", "wait", {})
    assert caught.value.party == "b"
    assert "did not join within 0.3 s" in caught.value.reason
    with pytest.raises(PartyLostError):
        session.call("b", "wait", {})
    with pytest.raises(TicketError):
        house.link("b")
    assert wait_for(lambda: len(told) == 1)
    assert house.losses == told == [("b", session.lost["b"])]


# --- a party or the hub dies -----------------------------------------------------------------------------------------


class Phase(enum.Enum):
    IDLE = "idle"
    CALLING = "its call is pending"
    CALLED = "it is being called"


def test_a_party_known_to_be_gone_is_expelled(house: House) -> None:
    """Flower may know before the hub that a party's handler has failed, even one that never dialled."""
    session = house.open("a", "b")
    link = house.link("a")
    session.expel("b", "its handler failed")
    assert session.lost == dict(house.losses) == {"b": "its handler failed"}
    with pytest.raises(PartyLostError, match="party 'b' is lost: its handler failed"):
        link.call("b", "double", X)
    with pytest.raises(TicketError):
        house.link("b")
    with pytest.raises(ConfigurationError, match="'c' is no party"):
        session.expel("c", "?")


class Death(enum.Enum):
    ABANDON = "leaves without a goodbye"
    EXCEPTION = "leaves its context with an exception"
    GARBAGE = "sends bytes that are no frame"
    FOREIGN_REPLY = "answers another operation than it was asked"


def die(link: Link, death: Death, asked_id: int) -> None:
    match death:
        case Death.ABANDON:
            link.abandon()
        case Death.EXCEPTION:
            with pytest.raises(ZeroDivisionError), link:
                raise ZeroDivisionError
        case Death.GARBAGE:
            link._wire.outbox.send([b"garbage" * 10])
        case Death.FOREIGN_REPLY:
            reply = Frame(kind=Kind.REPLY, call_id=asked_id, source="x", target="a", operation="double", tensors=X)
            link._wire.outbox.send(encode(reply, AGREEMENT))


# Who was not asked has nothing to answer.
DEATHS = [(d, p) for d in Death for p in Phase if d is not Death.FOREIGN_REPLY or p is Phase.CALLED]


@pytest.mark.parametrize(("death", "phase"), DEATHS)
def test_a_party_dies(house: House, death: Death, phase: Phase) -> None:
    gate, at_victim = Gate(), Gate()
    session = house.open("a", "victim", "c", hosts={"body": double, "gate": gate})
    a, victim, c = house.link("a"), house.link("victim"), house.link("c")
    told = threading.Event()
    a.on_lost(lambda party, reason: told.set())
    victim.serve(at_victim)
    jobs, own = [], None
    if phase is Phase.CALLING:
        own = Background(lambda: victim.call("gate", "wait", {}))
        assert gate.entered.wait(NOT_A_HANG_S)
    if phase is Phase.CALLED:
        jobs = [Background(lambda: a.call("victim", "wait", {}))]
        assert at_victim.entered.wait(NOT_A_HANG_S)
        jobs.append(Background(lambda: session.call("victim", "wait", {})))
    asked_id = next((call.hub_id for call in session._calls._by_hub_id.values() if call.caller == "a"), 0)
    dying = Background(lambda: die(victim, death, asked_id))

    assert told.wait(NOT_A_HANG_S)
    assert wait_for(lambda: len(house.losses) == 1)
    assert session.lost == {"victim": house.losses[0][1]}
    if death in (Death.GARBAGE, Death.FOREIGN_REPLY):
        assert "broke the agreement" in session.lost["victim"]
        with pytest.raises(FrameError, match="threw this party out"):
            victim.wait_closed(NOT_A_HANG_S)
    for job in jobs:
        error = job.join().error
        assert isinstance(error, PartyLostError), error
        assert error.party == "victim"
    gate.leave.set()
    at_victim.leave.set()
    if own is not None:
        assert isinstance(own.join().error, SessionError)
    dying.join()
    for call in (lambda: a.call("victim", "wait", {}), lambda: session.call("victim", "wait", {})):
        with pytest.raises(PartyLostError, match="victim"):
            call()
    with pytest.raises(SessionError):
        victim.call("body", "wait", {})
    # Nobody else is harmed, and a late answer of the hub to the dead party disturbs nothing.
    assert c.call("body", "double", X).tensors["x"].eq(2).all()
    assert a.call("body", "double", X).tensors["x"].eq(2).all()
    assert len(house.losses) == 1


@pytest.mark.parametrize("end", ["close", "abort", "break"])
@pytest.mark.parametrize("phase", Phase)
def test_the_hub_goes(house: House, end: str, phase: Phase) -> None:
    gate, at_a = Gate(), Gate()
    session = house.open("a", "b", hosts={"gate": gate})
    a = house.link("a")
    a.serve(at_a)
    jobs = []
    if phase is Phase.CALLING:
        jobs = [Background(lambda: a.call("gate", "wait", {})), Background(lambda: a.call("b", "wait", {}))]
        assert gate.entered.wait(NOT_A_HANG_S)
    if phase is Phase.CALLED:
        jobs = [Background(lambda: session.call("a", "wait", {}))]
        assert at_a.entered.wait(NOT_A_HANG_S)
    waiting = Background(lambda: a.wait_closed(NOT_A_HANG_S))
    gone = {
        "close": house.hub.close,
        "abort": lambda: session.abort("the loss is not finite"),
        "break": session._seats["a"].outbox.abandon,
    }[end]
    ending = Background(gone)
    for job in jobs:
        assert isinstance(job.join().error, SessionClosedError | PartyLostError), job.error
    waiting.join()
    gate.leave.set()
    at_a.leave.set()
    ending.join()
    with pytest.raises((SessionClosedError, PartyLostError)):
        a.call("gate", "wait", {})
    if end == "close":
        assert waiting.error is None
    elif end == "abort":
        assert isinstance(waiting.error, SessionClosedError)
        assert "the loss is not finite" in str(waiting.error)
    else:
        assert isinstance(waiting.error, PartyLostError)
        assert waiting.error.party == "hub"
        assert "hub" in a.lost


def test_a_barrier_among_parties_is_freed_by_on_lost(house: House) -> None:
    barrier = threading.Barrier(2)

    def meet(request: Request) -> Reply:
        barrier.wait(NOT_A_HANG_S)
        return double(request)

    session = house.hub.open_session(
        ["a", "b"],
        AGREEMENT,
        hosts={"body": meet},
        deadline_s=NOT_A_HANG_S,
        on_lost=lambda party, reason: barrier.abort(),
    )
    house.session, house.agreement = session, AGREEMENT
    a, b = house.link("a"), house.link("b")
    call = Background(lambda: a.call("body", "wait", {}))
    assert wait_for(lambda: barrier.n_waiting == 1)
    b.abandon()
    assert "BrokenBarrierError" in str(call.join().error)


def test_leaving_a_session_with_an_exception_aborts_it(house: House) -> None:
    session = house.open("a")
    a = house.link("a")
    with pytest.raises(ZeroDivisionError), session:
        raise ZeroDivisionError
    with pytest.raises(SessionClosedError, match="ZeroDivisionError"):
        a.wait_closed(NOT_A_HANG_S)


# --- too late --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["gate", "b"])
def test_a_deadline_is_kept_and_the_late_reply_dropped(house: House, target: str) -> None:
    gate = Gate()
    house.open("a", "b", hosts={"gate": gate, "body": double})
    a, b = house.link("a"), house.link("b")
    b.serve(gate)
    with pytest.raises(DeadlineError, match=rf"'wait' at '{target}' gave no answer within 0.2 s"):
        a.call(target, "wait", {}, timeout_s=0.2)
    gate.leave.set()
    assert a.call("body", "double", X).tensors["x"].eq(2).all()
    assert a.call(target, "double", X).tensors["x"].eq(2).all()
    assert house.losses == []


def test_the_hubs_own_call_has_a_deadline(house: House) -> None:
    session = house.open("a")
    gate = Gate()
    a = house.link("a")
    a.serve(gate)
    with pytest.raises(DeadlineError, match=r"0\.2 s"):
        session.call("a", "wait", {}, timeout_s=0.2)
    gate.leave.set()
    assert session.call("a", "double", X).tensors["x"].eq(2).all()


def test_a_call_that_was_given_up_is_not_begun(house: House) -> None:
    gate = Gate()
    begun: list[object] = []

    def handle(request: Request) -> Reply:
        begun.append(request.meta["n"])
        return Reply({}) if request.source == "c" else gate(request)

    house.open("a", "b", "c", hosts={"gate": handle})
    a, b, c = house.link("a"), house.link("b"), house.link("c")
    b.serve(handle)
    c.serve(double)
    for target in ("gate", "b"):
        gate.entered.clear()
        gate.leave.clear()
        first = Background(lambda t=target: a.call(t, "wait", {}, {"n": 0}))  # type: ignore[misc]
        assert gate.entered.wait(NOT_A_HANG_S)
        with pytest.raises(DeadlineError):
            a.call(target, "wait", {}, {"n": 1}, timeout_s=0.1)
        # Streams keep their order: these two come back only after the hub, then b, has read the cancellation.
        a.call("c", "wait", {})
        c.call("b", "wait", {}, {"n": 2})
        gate.leave.set()
        assert first.join().error is None
        a.call(target, "wait", {}, {"n": 3})
    assert sorted(begun) == [0, 0, 2, 2, 3, 3]


def test_a_default_deadline_holds_for_every_call(house: House) -> None:
    house.open("a", hosts={"gate": (gate := Gate())})
    with pytest.raises(DeadlineError, match=r"0\.2 s"):
        house.link("a", deadline_s=0.2).call("gate", "wait", {})
    gate.leave.set()


# --- a party that lies after a valid ticket -------------------------------------------------------------------------

NOTICE = b"".join(encode(Frame(kind=Kind.NOTICE, call_id=5, source="a", target="hub", meta={"event": "x"}), AGREEMENT))


def call(call_id: int, target: str = "gate") -> bytes:
    frame = Frame(kind=Kind.CALL, call_id=call_id, source="a", target=target, operation="wait")
    return b"".join(encode(frame, AGREEMENT))


LIES = {
    "noise": [b"\x00" * 100],
    "a chunk larger than agreed": [bytes(5000)],
    "half a frame, then another": [call(1)[:-5], call(2)],
    "two frames in a chunk": [call(1) + call(2)],
    "a payload larger than agreed": [b"VFLR\x01\x01\x00\x00" + (108).to_bytes(4, "little") + b"\xff" * 8],
    "a call number twice": [call(1), call(1)],
    "more calls at once than agreed": [call(n) for n in range(1, 70)],
    "names that do not exist": [call(n, f"n{n}") for n in range(1, 30)],
    "a reply to a stranger": [
        b"".join(encode(Frame(kind=Kind.REPLY, call_id=1, source="a", target="x", operation="wait"), AGREEMENT))
    ],
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_after_a_valid_ticket(house: House, lie: str) -> None:
    gate = Gate()
    session = house.open("a", "b", hosts={"gate": gate, "body": double})
    b = house.link("b")
    wire = house.wire("a")
    for chunk in LIES[lie]:
        wire.outbox.send([chunk])
    assembler = FrameAssembler(AGREEMENT)
    frames = [frame for chunk in wire.chunks() if (frame := assembler.feed(chunk)) is not None]
    assert frames[-1].meta["event"] == "refused"
    assert "broke the agreement" in session.lost["a"]
    assert wait_for(lambda: house.losses == [("a", session.lost["a"])])  # told after the farewell is on its way
    gate.leave.set()
    assert b.call("body", "double", X).tensors["x"].eq(2).all()


def test_meaningless_but_honest_frames_are_let_pass(house: House) -> None:
    """A cancellation and a reply may come too late; both are dropped."""
    session = house.open("a")
    link = house.link("a")
    reply = Frame(kind=Kind.REPLY, call_id=99, source="a", target="hub", operation="wait")
    link._wire.outbox.send([NOTICE])
    link._wire.outbox.send(encode(reply, AGREEMENT))
    assert link.call("body", "double", X).tensors["x"].eq(2).all()
    assert session.lost == {}


def test_a_party_cannot_answer_for_another(house: House) -> None:
    gate = Gate()
    session = house.open("a", "b", "c")
    a, b, c = house.link("a"), house.link("b"), house.link("c")
    b.serve(gate)
    asked = Background(lambda: a.call("b", "double", X))
    assert gate.entered.wait(NOT_A_HANG_S)
    (hub_id,) = session._calls._by_hub_id
    forged = Frame(kind=Kind.REPLY, call_id=hub_id, source="b", target="a", operation="double", tensors=X)
    c._wire.outbox.send(encode(forged, AGREEMENT))
    c.call("body", "wait", {})  # the hub has read the forgery
    gate.leave.set()
    reply = asked.join().value
    assert isinstance(reply, Reply)
    assert reply.tensors["x"].eq(2).all()


def test_a_party_that_takes_no_bytes_is_lost(house: House) -> None:
    """Its outbox fills; whoever relays to it must not wait for ever."""
    session = house.open("a", "b", deadline_s=0.3)
    a = house.link("a")
    house.wire("b")
    seat = session._seats["b"]
    seat.outbox._cap_bytes = 0  # as if full: the stream takes no more
    with pytest.raises(PartyLostError, match=r"took no bytes for 0\.3 s"):
        a.call("b", "wait", {})
    assert a.call("body", "double", X).tensors["x"].eq(2).all()


def test_a_hub_that_lies_is_left(house: House) -> None:
    session = house.open("a")
    link = house.link("a")
    session._seats["a"].outbox.send([b"noise" * 20])
    with pytest.raises(FrameError):
        link.wait_closed(NOT_A_HANG_S)
    with pytest.raises(FrameError):
        link.call("body", "wait", {})
    assert wait_for(lambda: "a" in session.lost)
