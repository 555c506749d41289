"""Slower links than there are: nothing comes early, order stays, and an end needs no patience."""

import threading
import time

import pytest
import torch

from tests.session.helpers import AGREEMENT, NOT_A_HANG_S, double
from vflair_flower.errors import ConfigurationError
from vflair_flower.session import Hub, LinkEmulation
from vflair_flower.session.outbox import Outbox


@pytest.mark.parametrize("bind", ["inproc", "127.0.0.1:0"])
def test_a_call_between_parties_takes_two_delays(bind: str) -> None:
    with Hub(bind=bind, emulate=LinkEmulation(delay_s=0.1)) as hub:
        session = hub.open_session(["a", "b"], AGREEMENT, deadline_s=NOT_A_HANG_S)
        links = [hub.connect(session, name) for name in ("a", "b")]
        links[1].serve(double)
        started = time.monotonic()
        reply = links[0].call("b", "double", {"x": torch.ones(2, 2)})
        assert time.monotonic() - started >= 0.2
        assert torch.equal(reply.tensors["x"], torch.full((2, 2), 2.0))
        for link in links:
            link.close()
        session.close()


def test_a_rate_spreads_chunks_and_keeps_their_order() -> None:
    outbox = Outbox(emulate=LinkEmulation(bytes_per_s=1000.0))
    outbox.send([bytes([i]) * 50 for i in range(4)])
    outbox.finish()
    started = time.monotonic()
    taken = list(outbox)
    assert time.monotonic() - started >= 0.19  # 200 bytes, less what passed before
    assert [chunk[0] for chunk in taken] == [0, 1, 2, 3]


def test_what_is_dropped_is_not_waited_for() -> None:
    outbox = Outbox(emulate=LinkEmulation(delay_s=60.0))
    outbox.send([b"late"])
    reader = threading.Thread(target=lambda: list(outbox))
    reader.start()
    outbox.abandon()
    reader.join(5)
    assert not reader.is_alive()


@pytest.mark.parametrize("values", [{"delay_s": -1.0}, {"bytes_per_s": 0.0}, {"delay_s": float("nan")}])
def test_links_that_cannot_be(values: dict) -> None:
    with pytest.raises(ConfigurationError, match="choose a delay of 0 or more"):
        LinkEmulation(**values)
