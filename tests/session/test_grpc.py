"""fault, e2e: what only sockets can show; TLS, plain text refused, real processes killed."""

import datetime
import ipaddress
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import grpc
import psutil
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from vflair_flower.errors import ConfigurationError, DeadlineError, PartyLostError, SessionError
from vflair_flower.session import Hub, TlsServerFiles, connect
from vflair_flower.session.grpc_plane import is_loopback

from .helpers import AGREEMENT, NOT_A_HANG_S, Background, Gate, House, double, wait_for

X = {"x": torch.ones(2, 2)}


# --- TLS -------------------------------------------------------------------------------------------------------------


def certify(folder: Path, name: str) -> TlsServerFiles:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    chain, private = folder / f"{name}.pem", folder / f"{name}.key"
    chain.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return TlsServerFiles(certificate_chain=chain, private_key=private)


def test_tls(tmp_path: Path) -> None:
    ours, wrong = certify(tmp_path, "ours"), certify(tmp_path, "wrong")
    with Hub(tls=ours) as hub, hub.open_session(["a"], AGREEMENT, hosts={"body": double}, deadline_s=20) as session:

        def join(root: bytes | None, timeout_s: float) -> object:
            with connect(
                hub.address,
                session=session.id,
                party="a",
                ticket=session.tickets["a"],
                agreement=AGREEMENT,
                deadline_s=NOT_A_HANG_S,
                connect_timeout_s=timeout_s,
                root_certificates=root,
            ) as link:
                return link.call("body", "double", X).tensors["x"].tolist()

        with pytest.raises(SessionError, match="could not prove who it is"):
            join(wrong.certificate_chain.read_bytes(), NOT_A_HANG_S)
        with pytest.raises(DeadlineError, match="both sides use TLS"):
            join(None, 0.5)
        assert session.joined == frozenset()
        assert join(ours.certificate_chain.read_bytes(), NOT_A_HANG_S) == [[2, 2], [2, 2]]


def test_a_certificate_that_does_not_exist_or_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no file"):
        TlsServerFiles(certificate_chain=tmp_path / "none.pem", private_key=tmp_path / "none.key")
    broken = tmp_path / "broken.pem"
    broken.write_text("no certificate")
    with pytest.raises(ConfigurationError):
        Hub(tls=TlsServerFiles(certificate_chain=broken, private_key=broken)).start()


# --- where plain text may go ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.8.9.1:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("0.0.0.0:1", False),
        ("10.0.0.1:1", False),
        ("127.evil.example.com:1", False),
        ("localhost.example.com:1", False),
    ],
)
def test_plain_text_stays_on_loopback(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback
    if loopback:
        return
    with pytest.raises(ConfigurationError, match="plain text"):
        Hub(bind=address, advertise="hub.example.com")
    with pytest.raises(ConfigurationError, match="plain text"):
        connect(address, session="s", party="a", ticket="t", agreement=AGREEMENT, deadline_s=1)


def test_a_hub_says_where_it_can_be_dialled() -> None:
    with pytest.raises(ConfigurationError, match="advertise"):
        Hub(bind="0.0.0.0:0", allow_plaintext=True)
    with Hub(bind="0.0.0.0:0", advertise="localhost", allow_plaintext=True) as hub:
        assert hub.address.startswith("localhost:")
        assert int(hub.address.rpartition(":")[2]) > 0
    with Hub(advertise="hub.example.com:9443") as hub:
        assert hub.address == "hub.example.com:9443"
    with pytest.raises(ConfigurationError, match="start"):
        _ = hub.address


@pytest.mark.parametrize("bind", ["", "localhost", ":1", "localhost:x", "localhost:99999"])
def test_addresses_are_checked(bind: str) -> None:
    with pytest.raises(ConfigurationError, match="host:port"):
        Hub(bind=bind)


def test_a_taken_port_is_refused() -> None:
    with Hub() as hub, pytest.raises(ConfigurationError, match="cannot listen"):
        Hub(bind=hub.address).start()


def test_nobody_at_home() -> None:
    with Hub() as hub:
        address = hub.address
    with pytest.raises(DeadlineError, match="no hub answered"):
        connect(address, session="s", party="a", ticket="t", agreement=AGREEMENT, deadline_s=1, connect_timeout_s=0.5)


def test_a_closed_link_leaves_no_connection() -> None:
    with Hub() as hub, hub.open_session(["a", "b"], AGREEMENT, deadline_s=20) as session:
        port = int(hub.address.rpartition(":")[2])

        def connections() -> int:
            return sum(bool(c.raddr) and c.raddr.port == port for c in psutil.Process().net_connections("tcp"))

        links = [
            connect(
                hub.address, session=session.id, party=p, ticket=session.tickets[p], agreement=AGREEMENT, deadline_s=1
            )
            for p in ("a", "b")
        ]
        assert connections() == 2
        links[0].close()
        links[1].abandon()
        assert wait_for(lambda: connections() == 0)


# --- messages that no link would send ---------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
@pytest.mark.parametrize("ticket", [True, False])
def test_huge_or_compressed_messages_are_not_taken(
    grpc_house: House, compression: grpc.Compression, ticket: bool
) -> None:
    session = grpc_house.open("a", "b")
    said = {
        "session": session.id,
        "party": "a",
        "ticket": session.tickets["a"] if ticket else "guess",
        "agreement": AGREEMENT.digest,
    }
    with grpc.insecure_channel(grpc_house.hub.address, [("grpc.max_send_message_length", -1)]) as channel:
        stream = channel.stream_stream("/vflair.DataPlane/Stream")
        answers = stream(
            iter([bytes(64 << 20)]), metadata=tuple(said.items()), compression=compression, timeout=NOT_A_HANG_S
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(answers)
    if compression is grpc.Compression.Gzip:
        # 64 MiB of zeros pack into a message of legal size: it must not be unpacked.
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    else:
        assert caught.value.code() is getattr(grpc.StatusCode, "RESOURCE_EXHAUSTED" if ticket else "UNAUTHENTICATED")
    if ticket and session.joined:
        assert wait_for(lambda: session.lost.keys() == {"a"})
    if not ticket:
        assert session.joined == frozenset()
    assert grpc_house.link("b").call("body", "double", X).tensors["x"].eq(2).all()


# --- real processes, killed ------------------------------------------------------------------------------------------

CHILD = """
import json, os, sys, threading
from tests_session_helpers import AGREEMENT, Gate
from vflair_flower.session import Hub, connect
said = json.loads(sys.argv[1])
"""


def child(body: str, said: dict[str, object]) -> "subprocess.Popen[str]":
    code = CHILD.replace("tests_session_helpers", f"{__package__}.helpers") + textwrap.dedent(body)
    root = Path(__file__).parents[len((__package__ or "").split("."))]
    environment = os.environ | {"PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(said)], stdout=subprocess.PIPE, text=True, env=environment
    )


def test_a_killed_process_is_noticed_at_once(grpc_house: House) -> None:
    """Three parties of one process die in three phases: idle, with a call pending, and while being called."""
    gate = Gate()
    session = grpc_house.open("a", "idle", "calling", "called", hosts={"gate": gate, "body": double})
    a = grpc_house.link("a")
    process = child(
        """
        links = {p: connect(said["address"], session=said["session"], party=p, ticket=said["tickets"][p],
                            agreement=AGREEMENT, deadline_s=60) for p in ("idle", "calling", "called")}
        def serve(request):
            os.write(1, b"called\\n")  # at once: two handlers say it
            threading.Event().wait()
        links["called"].serve(serve)
        links["calling"].call("gate", "wait", {})
        """,
        {"address": grpc_house.hub.address, "session": session.id, "tickets": session.tickets},
    )
    try:
        assert gate.entered.wait(60)
        calls = [
            Background(lambda: a.call("called", "wait", {})),
            Background(lambda: session.call("called", "wait", {})),
        ]
        assert process.stdout is not None
        assert process.stdout.readline() == "called\n"
        process.send_signal(signal.SIGKILL)
        for call in calls:
            error = call.join().error
            assert isinstance(error, PartyLostError)
            assert error.party == "called"
        assert wait_for(lambda: len(grpc_house.losses) == 3)
        assert session.lost.keys() == {"idle", "calling", "called"}
        gate.leave.set()
        assert a.call("body", "double", X).tensors["x"].eq(2).all()
    finally:
        process.kill()
        process.wait()


def test_a_killed_hub_is_noticed_at_once() -> None:
    process = child(
        """
        hub = Hub()
        hub.start()
        gate = Gate()
        session = hub.open_session(["a", "b"], AGREEMENT, hosts={"gate": gate}, deadline_s=60)
        print(json.dumps([hub.address, session.id, session.tickets]), flush=True)
        gate.entered.wait()
        print("entered", flush=True)
        threading.Event().wait()
        """,
        {},
    )
    try:
        assert process.stdout is not None
        address, session, tickets = json.loads(process.stdout.readline())
        a, b = (
            connect(address, session=session, party=p, ticket=tickets[p], agreement=AGREEMENT, deadline_s=60)
            for p in ("a", "b")
        )
        with a, b:
            pending = Background(lambda: a.call("gate", "wait", {}))
            relayed = Background(lambda: a.call("b", "wait", {}))
            idle = Background(lambda: b.wait_closed(60))
            assert process.stdout.readline() == "entered\n"
            process.send_signal(signal.SIGKILL)
            for job in (pending, relayed, idle):
                error = job.join().error
                assert isinstance(error, PartyLostError), error
                assert error.party == "hub"
            with pytest.raises(PartyLostError):
                a.call("gate", "wait", {})
    finally:
        process.kill()
        process.wait()


def test_a_hub_that_nobody_closed_does_not_keep_its_process_alive() -> None:
    process = child(
        """
        hub = Hub()
        hub.start()
        session = hub.open_session(["a"], AGREEMENT, deadline_s=60)
        link = connect(hub.address, session=session.id, party="a", ticket=session.tickets["a"], agreement=AGREEMENT,
                       deadline_s=60)
        """,
        {},
    )
    try:
        assert process.wait(60) == 0
    finally:
        process.kill()
