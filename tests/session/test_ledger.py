"""The ledger adds up, survives JSON, and is safe among threads."""

import threading

import pytest

from vflair_flower.errors import ConfigurationError
from vflair_flower.session import Ledger


def record(
    ledger: Ledger, *, party: str = "a", direction: str = "up", shape: tuple[int, ...] = (2, 3), bytes: int = 24
) -> None:
    ledger.record(
        party=party,
        peer="body",
        direction=direction,  # type: ignore[arg-type]
        operation="forward",
        tensor="hidden",
        dtype="float32",
        shape=shape,
        bytes=bytes,
        messages=1,
    )


def test_entries_are_summed() -> None:
    ledger = Ledger()
    record(ledger)
    record(ledger, shape=(1, 5), bytes=20)
    record(ledger, direction="down")
    record(ledger, party="b")
    entry = next(entry for entry in ledger.entries() if entry.party == "a" and entry.direction == "up")
    assert (entry.messages, entry.bytes, entry.max_shape) == (2, 44, (2, 5))
    assert ledger.total() == 92
    assert ledger.total("up") == 68
    assert ledger.total(party="b") == 24
    assert ledger.total("down", "b") == 0


def test_merge_snapshot_and_json() -> None:
    ledger, other = Ledger(), Ledger()
    record(ledger)
    record(other)
    record(other, party="b")
    before = ledger.snapshot()
    ledger.merge(other)
    assert before.total() == 24
    assert ledger.total() == 72
    assert Ledger.from_json(ledger.to_json()).entries() == ledger.entries()


@pytest.mark.parametrize("text", ["", "3", '[{"party": "a"}]', '[["a"]]'])
def test_broken_json_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        Ledger.from_json(text)


def test_a_direction_is_up_or_down() -> None:
    with pytest.raises(ConfigurationError):
        record(Ledger(), direction="sideways")


def test_threads_lose_nothing() -> None:
    ledger = Ledger()
    threads = [threading.Thread(target=lambda: [record(ledger) for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.total() == 4 * 200 * 24
