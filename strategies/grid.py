"""A Flower grid seen through a session: data parties only, and no waiting for a party that the hub has seen go.

Flower notices a dead party after a minute, the hub at once.  `Strategy.start` waits for all replies of a round; through
this grid it waits for those that can still come.
"""

import time
from collections.abc import Callable, Iterable

from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

_POLL_S = 0.1
_REASON_CHARS = 800
_WRAPPED = "Exception ClientAppException occurred. Message: "


def reason_of(reply: Message) -> str:
    """Return why a node failed, in its own last words; of a traceback that Ray has wrapped, the error's message."""
    words = " ".join((reply.error.reason or "").split())
    words = words.rpartition(_WRAPPED)[2].rstrip("'>")
    if len(words) > _REASON_CHARS:
        words = words[:_REASON_CHARS] + " ..."
    return words or f"its handler failed with Flower's error code {reply.error.code}"


class SessionGrid(Grid):
    """Wraps the grid that Flower gave.

    Parameters
    ----------
    inner : flwr.serverapp.Grid
        The real one.
    data_nodes : callable
        Returns the node ids of the data parties; None before they are known.
    may_still_come : callable
        Told the nodes whose replies are missing; says whether they are worth waiting for.
    on_reply : callable
        Told each reply as it comes.
    """

    def __init__(
        self,
        inner: Grid,
        *,
        data_nodes: Callable[[], list[int] | None],
        may_still_come: Callable[[set[int]], bool],
        on_reply: Callable[[Message], None],
    ) -> None:
        self.inner = inner
        self._data_nodes = data_nodes
        self._may_still_come = may_still_come
        self._on_reply = on_reply

    def set_run(self, run: Run) -> None:
        """Pass on."""
        self.inner.set_run(run)

    @property
    def run(self) -> Run:
        """Flower's run."""
        return self.inner.run

    def create_message(self, *args: object, **kwargs: object) -> Message:
        """Pass on."""
        return self.inner.create_message(*args, **kwargs)  # type: ignore[arg-type]

    def get_node_ids(self) -> Iterable[int]:
        """Return the data parties' nodes, so that an aggregator samples no model party."""
        known = self._data_nodes()
        return [n for n in self.inner.get_node_ids() if known is None or n in known]

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return what Flower knows of the data parties' nodes."""
        known = set(self.get_node_ids())
        return [node for node in self.inner.get_nodes() if node.node_id in known]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass on."""
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass on."""
        return self.inner.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send, and wait for all replies that can still come, at most `timeout` seconds."""
        messages = list(messages)
        if not messages:
            return []
        ids = list(self.inner.push_messages(messages))
        nodes = {i: m.metadata.dst_node_id for i, m in zip(ids, messages, strict=True)}
        limit = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while nodes:
            for reply in self.inner.pull_messages(list(nodes)):
                nodes.pop(reply.metadata.reply_to_message_id, None)
                self._on_reply(reply)
                replies.append(reply)
            if not nodes or not self._may_still_come(set(nodes.values())):
                break
            if limit is not None and time.monotonic() > limit:
                break
            time.sleep(_POLL_S)
        return replies
