"""A Flower grid whose nodes are processes of their own, which a test can kill.

Each process imports `module:app` and answers messages that come through a pipe, as a SuperNode's ClientApp would.
A killed process never answers, as a party that a network has lost.
"""

import importlib
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Mapping
from multiprocessing.connection import Connection

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity


def _serve(pipe: Connection, module: str, context: Context) -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, context.node_id, 1
    app = importlib.import_module(module).app
    while (message := pipe.recv()) is not None:
        try:
            reply = app(message=message, context=context)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        pipe.send(reply)


class ProcessGrid(Grid):
    """Nodes are given as their node configurations; node ids count from 1001."""

    def __init__(self, module: str, nodes: list[dict], run_config: Mapping | None = None) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self._run = Run.create_empty(run_id=1)
        self._ids = itertools.count(1)
        self._waiting: dict[str, int] = {}
        self.processes, self._pipes = {}, {}
        spawn = multiprocessing.get_context("spawn")
        for i, node in enumerate(nodes):
            ours, theirs = spawn.Pipe()
            context = Context(1, 1001 + i, dict(node), RecordDict(), dict(run_config or {}))
            process = spawn.Process(target=_serve, args=(theirs, module, context), daemon=True)
            process.start()
            theirs.close()
            self.processes[1001 + i], self._pipes[1001 + i] = process, ours

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()

    def kill(self, node: int) -> None:
        """Kill a node's process with SIGKILL."""
        os.kill(self.processes[node].pid, signal.SIGKILL)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.processes)

    def get_nodes(self):
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            name = str(next(self._ids))
            message.metadata.__dict__["_message_id"] = name
            node = message.metadata.dst_node_id
            if self.processes[node].is_alive():
                self._pipes[node].send(message)
            self._waiting[name] = node
            ids.append(name)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for name in list(message_ids):
            node = self._waiting.get(name)
            pipe = self._pipes.get(node)
            try:
                if pipe is None or not pipe.poll():
                    continue
                reply = pipe.recv()
            except (EOFError, OSError):
                continue
            reply.metadata.__dict__["_message_id"] = str(next(self._ids))
            reply.metadata.__dict__["_src_node_id"] = node
            del self._waiting[name]
            replies.append(reply)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        waiting = set(self.push_messages(messages))
        limit = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and (limit is None or time.monotonic() < limit):
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
            time.sleep(0.005)
        return replies
