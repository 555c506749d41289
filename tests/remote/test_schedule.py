"""Barrier and turns: nobody waits beyond the deadline, nobody who left holds others up, names alone make the order."""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from vflair_flower.errors import DeadlineError, PartyLostError, SessionError
from vflair_flower.remote.schedule import Barrier, Turns

NOT_A_HANG_S = 20.0
SHORT_S = 0.05


def start(work: Callable[[], object]) -> "Future[object]":
    """Run something on a thread of its own."""
    done: Future[object] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done


def wait_until_waiting(condition: threading.Condition, number: int) -> None:
    """Return when `number` threads wait for the condition; no clock decides."""
    finish = threading.Event()
    for _ in range(2000):
        with condition:
            if len(condition._waiters) >= number:
                return
        finish.wait(0.005)
    raise AssertionError("nobody waits")


def arrive(barrier: Barrier, member: str, acts: list[list[str]]) -> "Future[object]":
    return start(lambda: barrier.arrive(member, acts.append))


def test_last_to_arrive_acts_once_for_all() -> None:
    barrier, acts = Barrier("cab", NOT_A_HANG_S), []
    waiting = [arrive(barrier, "b", acts), arrive(barrier, "c", acts)]
    wait_until_waiting(barrier._changed, 2)
    assert acts == []
    barrier.arrive("a", acts.append)
    assert acts == [["a", "b", "c"]]
    for future in waiting:
        assert future.result(NOT_A_HANG_S) is None


def test_barrier_can_be_used_again() -> None:
    barrier, acts = Barrier("ab", NOT_A_HANG_S), []
    for cycle in range(1, 4):
        other = arrive(barrier, "b", acts)
        barrier.arrive("a", acts.append)
        other.result(NOT_A_HANG_S)
        assert len(acts) == cycle


def test_leaving_lets_the_others_go_on_without_the_one_who_left() -> None:
    barrier, acts = Barrier("abc", NOT_A_HANG_S), []
    waiting = [arrive(barrier, "a", acts), arrive(barrier, "b", acts)]
    wait_until_waiting(barrier._changed, 2)
    barrier.leave("c")
    for future in waiting:
        future.result(NOT_A_HANG_S)
    assert acts == [["a", "b"]]
    with pytest.raises(PartyLostError, match=r"'c'.*may not step any more"):
        barrier.arrive("c", acts.append)


def test_leaving_while_waiting_ends_the_wait_and_the_contribution() -> None:
    barrier, acts = Barrier("abc", NOT_A_HANG_S), []
    leaver, other = arrive(barrier, "a", acts), arrive(barrier, "b", acts)
    wait_until_waiting(barrier._changed, 2)
    barrier.leave("a")
    with pytest.raises(PartyLostError, match=r"'a'.*while its step was waiting"):
        leaver.result(NOT_A_HANG_S)
    assert not other.done()
    barrier.arrive("c", acts.append)
    other.result(NOT_A_HANG_S)
    assert acts == [["b", "c"]]


def test_when_all_leave_nobody_keeps_waiting() -> None:
    barrier, acts = Barrier("ab", NOT_A_HANG_S), []
    waiting = arrive(barrier, "a", acts)
    wait_until_waiting(barrier._changed, 1)
    barrier.leave("a")
    barrier.leave("b")
    with pytest.raises(PartyLostError):
        waiting.result(NOT_A_HANG_S)
    assert acts == []


def test_barrier_deadline_names_the_late_and_can_be_tried_again() -> None:
    barrier, acts = Barrier("abc", SHORT_S), []
    with pytest.raises(DeadlineError, match=r"waited 0\.05 s for the step of b, c"):
        barrier.arrive("a", acts.append)
    barrier.leave("c")
    with pytest.raises(DeadlineError, match="for the step of a;"):  # who gave up waiting counts as not arrived
        barrier.arrive("b", acts.append)
    assert acts == []
    barrier.leave("b")
    barrier.arrive("a", acts.append)
    assert acts == [["a"]]


def test_failure_of_the_act_reaches_everyone_and_is_forgotten_afterwards() -> None:
    barrier, acts = Barrier("ab", NOT_A_HANG_S), []

    def fail(_: list[str]) -> None:
        raise ValueError("no such number")

    other = start(lambda: barrier.arrive("b", fail))
    wait_until_waiting(barrier._changed, 1)
    with pytest.raises(SessionError, match="optimiser step failed: no such number") as caught:
        barrier.arrive("a", fail)
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(SessionError, match="no such number"):
        other.result(NOT_A_HANG_S)
    other = arrive(barrier, "b", acts)
    barrier.arrive("a", acts.append)
    other.result(NOT_A_HANG_S)
    assert acts == [["a", "b"]]


@pytest.mark.parametrize("arrival", list(itertools.permutations("abc")))
def test_turns_go_by_name_whoever_asks_first(arrival: tuple[str, ...]) -> None:
    turns, order = Turns(arrival, NOT_A_HANG_S), []

    def act(member: str) -> None:
        for _ in range(3):
            turns.take(member)
            order.append(member)
            turns.give(member)
        turns.leave(member)

    waiting = [start(lambda m=member: act(m)) for member in arrival]
    for future in waiting:
        future.result(NOT_A_HANG_S)
    assert "".join(order) == "abcabcabc"


def test_turn_is_taken_once_and_only_its_holder_gives_it() -> None:
    turns = Turns("ab", SHORT_S)
    turns.take("a")
    turns.take("a")
    turns.give("b")
    with pytest.raises(DeadlineError, match=r"'b' waited 0\.05 s for its turn; 'a' has it"):
        turns.take("b")
    turns.give("a")
    turns.give("a")  # has none to give
    turns.take("b")


def test_leaving_of_the_holder_hands_the_turn_on() -> None:
    turns = Turns("abc", NOT_A_HANG_S)
    turns.take("a")
    waiting = start(lambda: turns.take("b"))
    wait_until_waiting(turns._changed, 1)
    turns.leave("a")
    waiting.result(NOT_A_HANG_S)
    turns.give("b")
    turns.take("c")
    turns.give("c")
    turns.take("b")  # a is gone for good
    with pytest.raises(PartyLostError, match="'a'"):
        turns.take("a")


def test_leaving_while_waiting_for_a_turn_ends_the_wait() -> None:
    turns = Turns("abc", NOT_A_HANG_S)
    turns.take("a")
    leaver, other = start(lambda: turns.take("b")), start(lambda: turns.take("c"))
    wait_until_waiting(turns._changed, 2)
    turns.leave("b")
    with pytest.raises(PartyLostError, match="'b'"):
        leaver.result(NOT_A_HANG_S)
    assert not other.done()
    turns.give("a")
    other.result(NOT_A_HANG_S)


def test_strangers_get_nothing() -> None:
    with pytest.raises(PartyLostError, match="'x'"):
        Turns("ab", SHORT_S).take("x")
    with pytest.raises(PartyLostError, match="'x'"):
        Barrier("ab", SHORT_S).arrive("x", lambda _: None)
    Turns("ab", SHORT_S).leave("x")
    Barrier("ab", SHORT_S).leave("x")
