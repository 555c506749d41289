"""A Flower grid that runs a ClientApp in this process: the same ServerApp and ClientApp objects, no Ray, no SuperLink.

As a SuperNode, a node handles one message at a time; nodes run at once, one thread each.
"""

import itertools
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity  # Message() reads run and node id from it


class InProcessGrid(Grid):
    """Nodes are given as their node configurations; node ids count from 1001."""

    def __init__(self, app: ClientApp, nodes: list[dict], run_config: Mapping | None = None) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self._run = Run.create_empty(run_id=1)
        self.app = app
        self.contexts = {
            1001 + i: Context(1, 1001 + i, dict(node), RecordDict(), dict(run_config or {}))
            for i, node in enumerate(nodes)
        }
        self._locks = {node: threading.Lock() for node in self.contexts}
        self._pool = ThreadPoolExecutor(len(nodes))
        self._ids = itertools.count(1)
        self._futures: dict[str, Future[Message]] = {}

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def get_nodes(self):
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            name = str(next(self._ids))
            message.metadata.__dict__["_message_id"] = name
            self._futures[name] = self._pool.submit(self._execute, message)
            ids.append(name)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        done = [i for i in set(message_ids) if i in self._futures and self._futures[i].done()]
        return [self._futures.pop(i).result() for i in done]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        waiting = set(self.push_messages(messages))
        limit = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and (limit is None or time.monotonic() < limit):
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
            time.sleep(0.002)
        return replies

    def _execute(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        with self._locks[node]:
            try:
                reply = self.app(message=message, context=self.contexts[node])
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        reply.metadata.__dict__["_message_id"] = str(next(self._ids))
        reply.metadata.__dict__["_src_node_id"] = node
        return reply
