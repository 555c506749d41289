"""What a failing node's reply says, in the words that a person is shown."""

import pytest
from flwr.app import Error, Message, RecordDict

from vflair_flower.strategies.grid import reason_of


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("label 'x'\n  is unknown", "label 'x' is unknown"),
        (
            "<class 'RayTaskError'>:<'ray::Actor.run() (pid=1)\n File \"a.py\", line 3\nClientAppException:"
            "\n\nException ClientAppException occurred. Message: the disk is full'>",
            "the disk is full",
        ),
        ("word " * 400, ("word " * 160)[:800] + " ..."),
        (None, "its handler failed with Flower's error code 7"),
    ],
)
def test_reason(reason, shown):
    asked = Message(RecordDict(), dst_node_id=3, message_type="query")
    assert reason_of(Message(Error(7, reason), reply_to=asked)) == shown
