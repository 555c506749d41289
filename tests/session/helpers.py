"""What the session tests share: agreements, a hub with its session, and ways to wait for events."""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import torch

from vflair_flower.session import (
    Agreement,
    Handler,
    Hub,
    HubSession,
    Link,
    OperationSpec,
    Reply,
    Request,
    TensorSpec,
    connect,
)
from vflair_flower.session.transport import Hello, InprocPlane, Wire

PLANES = {"inproc": "inproc", "grpc": "127.0.0.1:0"}
NOT_A_HANG_S = 20.0
ALL = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
)

X = TensorSpec("x", ALL, (64, 64))
AGREEMENT = Agreement(
    {
        "double": OperationSpec((X,), (X,)),
        "wait": OperationSpec((), ()),
        "add": OperationSpec((X, TensorSpec("y", ALL, (64, 64))), (X,), optional=frozenset({"y"})),
    },
    chunk_bytes=4096,
)


def double(request: Request) -> Reply:
    """Answer `double` and `wait`."""
    if request.operation == "wait":
        return Reply({})
    return Reply({"x": request.tensors["x"] * 2}, {"source": request.source})


class Gate:
    """A handler that says when it was called, and waits until it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.leave = threading.Event()

    def __call__(self, request: Request) -> Reply:
        self.entered.set()
        self.leave.wait(NOT_A_HANG_S)
        return double(request)


class Background:
    """Run something on a thread and keep its result or error."""

    def __init__(self, job: Callable[[], object]) -> None:
        self.value: object = None
        self.error: BaseException | None = None
        self.done = threading.Event()
        self._job = job
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.value = self._job()
        except BaseException as error:
            self.error = error
        self.done.set()

    def join(self) -> "Background":
        self._thread.join(NOT_A_HANG_S)
        assert not self._thread.is_alive(), "it hangs"
        return self


class House:
    """A hub with one session, and a record of who was reported lost."""

    def __init__(self, bind: str) -> None:
        self.stack = ExitStack()
        self.hub = self.stack.enter_context(Hub(bind=bind))
        self.losses: list[tuple[str, str]] = []

    def open(
        self,
        *parties: str,
        hosts: dict[str, Handler] | None = None,
        agreement: Agreement = AGREEMENT,
        deadline_s: float = NOT_A_HANG_S,
        join_deadline_s: float = 60.0,
    ) -> HubSession:
        self.agreement = agreement
        self.session = self.hub.open_session(
            parties,
            agreement,
            hosts={"body": double} if hosts is None else hosts,
            deadline_s=deadline_s,
            join_deadline_s=join_deadline_s,
            on_lost=lambda party, reason: self.losses.append((party, reason)),
        )
        return self.session

    def link(self, party: str, *, ticket: str | None = None, deadline_s: float = NOT_A_HANG_S) -> Link:
        link = connect(
            self.hub.address,
            session=self.session.id,
            party=party,
            ticket=self.session.tickets[party] if ticket is None else ticket,
            agreement=self.agreement,
            deadline_s=deadline_s,
        )
        self.stack.callback(link.close)
        return link

    def wire(self, party: str) -> Wire:
        """Join as a client that may send whatever bytes it likes."""
        hello = Hello(
            session=self.session.id,
            party=party,
            ticket=self.session.tickets[party],
            agreement=self.agreement.digest,
        )
        if self.hub.address.startswith("inproc"):
            wire: Wire = InprocPlane.dial(self.hub.address, hello)
        else:
            from vflair_flower.session.grpc_plane import GrpcWire

            wire = GrpcWire.dial(self.hub.address, hello, timeout_s=NOT_A_HANG_S, root_certificates=None)
        self.stack.callback(wire.close)
        self.stack.callback(wire.cancel)
        return wire

    def close(self) -> None:
        self.stack.close()


def our_threads() -> list[str]:
    """Names of the threads that belong to hubs and links."""
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("vflair-"))


def wait_for(ready: Callable[[], bool]) -> bool:
    """Wait for something that has no event; the bound only shows that it does not hang."""
    end = time.monotonic() + NOT_A_HANG_S
    while not ready():
        if time.monotonic() > end:
            return False
        threading.Event().wait(0.005)
    return True
