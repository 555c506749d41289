"""Flower grids on one machine, without Ray and SuperLink: a ClientApp's nodes as threads or as processes.

Flower's simulation runs at most its machine's cores + 4 handlers at once, at most 32, and a session needs all its
parties at once.  `LocalGrid` has no such limit, and its parties share one process and one GPU.  In `ProcessGrid` each
has a process of its own, whose memory can be measured and which can be killed.
As a SuperNode, a node handles one message at a time.  Node ids count from 1001.
Invariant: a handler that fails is a reply with its error, never an exception here.
"""

import importlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity  # Message() reads run and node id from it

_FIRST_NODE = 1001


class _OneMachine(Grid):
    """What both kinds have in common."""

    def __init__(self, nodes: Sequence[Mapping[str, Any]], run_config: Mapping[str, Any] | None) -> None:
        if TaskIdentity._run_id is None:
            TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self._run = Run.create_empty(run_id=1)
        self._ids = itertools.count(1)
        self.contexts = {
            _FIRST_NODE + i: Context(1, _FIRST_NODE + i, dict(node), RecordDict(), dict(run_config or {}))
            for i, node in enumerate(nodes)
        }

    @abstractmethod
    def _start(self, message: Message, name: str) -> None:
        """Let a message be handled."""

    @abstractmethod
    def _take(self, name: str) -> Message | None:
        """Return the reply to a message, once, when it is there."""

    def set_run(self, run: Run) -> None:
        """Set what `run` returns."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message for a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes."""
        return list(self.contexts)

    def get_nodes(self) -> Any:
        """Refuse: there are no nodes beyond their ids."""
        raise NotImplementedError("a grid on one machine knows its nodes by their ids alone; call get_node_ids.")

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Start handling messages; returns their ids."""
        ids = []
        for message in messages:
            name = str(next(self._ids))
            message.metadata.__dict__["_message_id"] = name
            self._start(message, name)
            ids.append(name)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there, each once."""
        return [reply for name in set(message_ids) if (reply := self._take(name)) is not None]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Return the replies that came within the timeout, in seconds."""
        waiting = set(self.push_messages(messages))
        limit = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and (limit is None or time.monotonic() < limit):
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
            time.sleep(0.002)
        return replies

    def _addressed(self, reply: Message, node: int) -> Message:
        reply.metadata.__dict__["_message_id"] = str(next(self._ids))
        reply.metadata.__dict__["_src_node_id"] = node
        return reply


class LocalGrid(_OneMachine):
    """Nodes as threads of this process.

    Parameters
    ----------
    app : flwr.clientapp.ClientApp
        What every node runs.
    nodes : sequence of mapping
        Each node's ``Context.node_config``.
    run_config : mapping, optional
        ``Context.run_config`` of all.
    """

    def __init__(
        self, app: ClientApp, nodes: Sequence[Mapping[str, Any]], run_config: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(nodes, run_config)
        self.app = app
        self._locks = {node: threading.Lock() for node in self.contexts}
        self._pool = ThreadPoolExecutor(len(nodes), thread_name_prefix="vflair-node")
        self._futures: dict[str, Future[Message]] = {}

    def close(self) -> None:
        """Free the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, message: Message, name: str) -> None:
        self._futures[name] = self._pool.submit(self._execute, message)

    def _take(self, name: str) -> Message | None:
        if name not in self._futures or not self._futures[name].done():
            return None
        return self._futures.pop(name).result()

    def _execute(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        with self._locks[node]:
            return self._addressed(_answer(self.app, message, self.contexts[node]), node)


class ProcessGrid(_OneMachine):
    """Nodes as processes of their own.

    Parameters
    ----------
    module : str
        Module with the ClientApp, as ``app``; each process imports it.
    nodes, run_config
        As of `LocalGrid`.
    """

    def __init__(
        self, module: str, nodes: Sequence[Mapping[str, Any]], run_config: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(nodes, run_config)
        self._waiting: dict[str, int] = {}
        self.processes: dict[int, SpawnProcess] = {}
        self._pipes: dict[int, Connection] = {}
        spawn = multiprocessing.get_context("spawn")
        for node, context in self.contexts.items():
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(theirs, module, context), daemon=True)
            process.start()
            theirs.close()
            self.processes[node], self._pipes[node] = process, ours

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes, those whose processes have ended too."""
        return list(self.processes)

    def close(self) -> None:
        """End the processes."""
        for process in self.processes.values():
            process.kill()
            process.join()

    def kill(self, node: int) -> None:
        """Kill a node's process with SIGKILL; it never answers, as a party that a network has lost."""
        pid = self.processes[node].pid
        if pid is not None:
            os.kill(pid, signal.SIGKILL)

    def _start(self, message: Message, name: str) -> None:
        node = message.metadata.dst_node_id
        if self.processes[node].is_alive():
            self._pipes[node].send(message)
        self._waiting[name] = node

    def _take(self, name: str) -> Message | None:
        node = self._waiting.get(name)
        if node is None:
            return None
        try:
            if not self._pipes[node].poll():
                return None
            reply: Message = self._pipes[node].recv()
        except (EOFError, OSError):
            return None
        del self._waiting[name]
        return self._addressed(reply, node)


def _serve(pipe: Connection, module: str, context: Context) -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, context.node_id, 1
    app: ClientApp = importlib.import_module(module).app
    while (message := pipe.recv()) is not None:
        pipe.send(_answer(app, message, context))


def _answer(app: ClientApp, message: Message, context: Context) -> Message:
    try:
        return app(message=message, context=context)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
