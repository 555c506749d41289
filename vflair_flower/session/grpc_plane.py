"""The gRPC data plane: one bidirectional stream per party, dialled by the party, over TLS outside loopback.

What it is: bytes in, bytes out; gRPC gives framing, TLS, keepalive and flow control, nothing else.  What it is not: a
protobuf service; there is no generated code.  Invariant: nothing that a peer sends is read before its ticket was
accepted, and no message is larger than one chunk.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import grpc

from vflair_flower.errors import (
    ConfigurationError,
    DeadlineError,
    FrameError,
    PartyLostError,
    SessionError,
    TicketError,
)
from vflair_flower.session.agreement import MAX_CHUNK_BYTES
from vflair_flower.session.outbox import Outbox
from vflair_flower.session.transport import Admit, Hello

P = ParamSpec("P")
T = TypeVar("T")

_SERVICE = "vflair.DataPlane"
_METHOD = "Stream"
_RETRY_S = 0.2
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Without these two a server that is pinged every 20 s answers "too many pings" and hangs up.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]
_LIMITS = [
    ("grpc.max_receive_message_length", MAX_CHUNK_BYTES),
    ("grpc.max_send_message_length", MAX_CHUNK_BYTES),
]
_SERVER_OPTIONS = [
    *_KEEPALIVE,
    *_LIMITS,
    ("grpc.so_reuseport", 0),  # else a second hub on a taken port silently shares its connections
    ("grpc.compression_enabled_algorithms_bitset", 1),  # identity only: a small message cannot unpack to a large one
]


@dataclass(frozen=True, kw_only=True)
class TlsServerFiles:
    """Name the files with which the hub proves who it is.

    Parameters
    ----------
    certificate_chain : Path
        PEM file with the hub's certificate and those between it and the authority.
    private_key : Path
        PEM file with its key.
    """

    certificate_chain: Path
    private_key: Path

    def __post_init__(self) -> None:
        for what, path in (("certificate_chain", self.certificate_chain), ("private_key", self.private_key)):
            object.__setattr__(self, what, Path(path))
            if not Path(path).is_file():
                raise ConfigurationError(f"{what} is {path}, which is no file; name the PEM file of the hub.")


class GrpcPlane:
    """The hub's side.

    Parameters
    ----------
    bind : str
        host:port to listen on; port 0 takes a free one.
    tls : TlsServerFiles | None
        None listens in plain text.
    max_streams : int
        How many streams may be open at once; one more is refused.
    """

    def __init__(self, *, bind: str, tls: TlsServerFiles | None, max_streams: int) -> None:
        self._bind = bind
        self._tls = tls
        self._max_streams = max_streams
        self._admit: Admit | None = None
        self._server: Any = None

    def start(self, admit: Admit) -> str:
        """Open the door; return host:port as bound."""
        self._admit = admit
        handler = grpc.method_handlers_generic_handler(
            _SERVICE, {_METHOD: grpc.stream_stream_rpc_method_handler(self._stream)}
        )
        server = grpc.server(
            _ThreadPerStream(), handlers=(handler,), options=_SERVER_OPTIONS, maximum_concurrent_rpcs=self._max_streams
        )
        try:
            if self._tls is None:
                port = server.add_insecure_port(self._bind)
            else:
                pair = (self._tls.private_key.read_bytes(), self._tls.certificate_chain.read_bytes())
                port = server.add_secure_port(self._bind, grpc.ssl_server_credentials([pair]))
        except (RuntimeError, ValueError) as error:
            port, reason = 0, str(error)
        else:
            reason = "the port is taken, or the certificate and key do not fit each other"
        if not port:
            server.stop(None)
            raise ConfigurationError(
                f"the hub cannot listen on {self._bind}: {reason}. Choose a free port; port 0 takes any."
            )
        server.start()
        self._server = server
        return f"{self._bind.rpartition(':')[0]}:{port}"

    def stop(self) -> None:
        """Close the door and end all streams."""
        if self._server is not None:
            self._server.stop(1.0).wait()
            self._server = None

    def _stream(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        assert self._admit is not None
        said = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        hello = Hello(
            session=said.get("session", ""),
            party=said.get("party", ""),
            ticket=said.get("ticket", ""),
            agreement=said.get("agreement", ""),
        )
        try:
            seat = self._admit(hello)
        except TicketError as error:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        except FrameError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        threading.Thread(
            target=seat.receive, args=(_until_broken(requests),), name=f"vflair-hub-{hello.party}", daemon=True
        ).start()
        return iter(seat.outbox)


class GrpcWire:
    """The link's side."""

    def __init__(self, channel: Any, call: Any, outbox: Outbox, first: bytes) -> None:
        self._channel = channel
        self._call = call
        self._outbox = outbox
        self._first = first

    @property
    def outbox(self) -> Outbox:
        """What the stream carries to the hub."""
        return self._outbox

    @classmethod
    def dial(cls, address: str, hello: Hello, *, timeout_s: float, root_certificates: bytes | None) -> "GrpcWire":
        """Dial a hub; try again until it answers or the time is over.

        Raises
        ------
        TicketError, FrameError
            When the hub does not let this party in.
        DeadlineError
            When no hub answers in time.
        SessionError
            When the hub cannot prove who it is.
        """
        end = time.monotonic() + timeout_s
        pause = threading.Event()
        while True:
            try:
                return cls._dial_once(address, hello, end - time.monotonic(), root_certificates)
            except grpc.RpcError as error:
                _raise_unless_worth_another_try(error, address)
                seen = error.details()
            if time.monotonic() + _RETRY_S >= end:
                raise DeadlineError(
                    f"no hub answered at {address} within {timeout_s:g} s (last seen: {seen}); check that the address "
                    "can be reached from here, and that both sides use TLS or neither does."
                )
            pause.wait(_RETRY_S)

    @classmethod
    def _dial_once(cls, address: str, hello: Hello, left_s: float, root_certificates: bytes | None) -> "GrpcWire":
        options = [*_KEEPALIVE, *_LIMITS, ("grpc.use_local_subchannel_pool", 1)]
        if is_loopback(address):
            options.append(("grpc.enable_http_proxy", 0))
        if root_certificates is None:
            channel = grpc.insecure_channel(address, options=options)
        else:
            credentials = grpc.ssl_channel_credentials(root_certificates=root_certificates)
            channel = grpc.secure_channel(address, credentials, options=options)
        outbox = Outbox()
        said = (
            ("session", hello.session),
            ("party", hello.party),
            ("ticket", hello.ticket),
            ("agreement", hello.agreement),
        )
        call = channel.stream_stream(f"/{_SERVICE}/{_METHOD}")(iter(outbox), metadata=said)
        # The wait for the first chunk, which the hub sends when it lets a party in, knows no timeout of its own.
        timer = threading.Timer(max(0.0, left_s), call.cancel)
        timer.daemon = True
        timer.start()
        try:
            return cls(channel, call, outbox, next(call))
        except BaseException as error:
            outbox.abandon()
            channel.close()
            if isinstance(error, StopIteration):
                raise PartyLostError("hub", "it ended the stream before it had begun") from None
            raise
        finally:
            timer.cancel()

    def chunks(self) -> Iterator[bytes]:
        """Yield what the hub sends until it ends the stream; raise PartyLostError when the stream breaks."""
        try:
            yield self._first
            self._first = b""
            yield from self._call
        except grpc.RpcError as error:
            code = error.code().name if isinstance(error, grpc.Call) else type(error).__name__
            raise PartyLostError("hub", f"its stream broke ({code})") from None
        finally:
            self._outbox.abandon()

    def cancel(self) -> None:
        """Break the stream at once."""
        self._call.cancel()
        self._outbox.abandon()

    def close(self) -> None:
        """Free what the stream holds, after it has ended."""
        self._outbox.abandon()
        self._channel.close()


def host_of(address: str) -> str:
    """Return the host in host:port, without brackets."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigurationError(f"the address is {address!r}; write host:port, for instance 127.0.0.1:9443.")
    return host.strip("[]")


def is_loopback(address: str) -> bool:
    """Say whether host:port stays on this machine."""
    host = host_of(address)
    parts = host.split(".")
    # A name such as 127.example.com is no loopback address.
    return host in ("localhost", "::1") or (len(parts) == 4 and parts[0] == "127" and all(p.isdigit() for p in parts))


def _raise_unless_worth_another_try(error: Any, address: str) -> None:
    code, details = error.code(), error.details()
    if code is grpc.StatusCode.UNAUTHENTICATED:
        raise TicketError(details) from None
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        raise FrameError(details) from None
    if any(sign in str(details) for sign in ("SSL_ERROR_SSL", "CERTIFICATE_VERIFY", "certificate")):
        raise SessionError(
            f"the hub at {address} could not prove who it is ({details}); pass as root_certificates the authority that "
            "signed its certificate, and dial the name that the certificate bears."
        ) from None
    if code not in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    ):
        raise SessionError(f"{address} does not answer as a hub does ({code.name}: {details}); is it one?") from None


def _until_broken(requests: Iterator[bytes]) -> Iterator[bytes]:
    """End where the stream ends, however it ends: without a goodbye both are a loss."""
    try:
        yield from requests
    except Exception:
        # gRPC raises a bare Exception when the peer has gone.
        return


class _ThreadPerStream(futures.ThreadPoolExecutor):
    """Run each stream on a daemon thread of its own.

    A stream lives for a round, so a pool has nothing to reuse, and the threads of a pool would keep a process alive
    whose hub nobody closed.
    """

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> "futures.Future[T]":
        future: futures.Future[T] = futures.Future()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="vflair-hub-stream", daemon=True).start()
        return future
