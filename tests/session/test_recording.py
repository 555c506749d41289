"""Recordings of sessions: each adversary's holds what it saw and nothing else, and the session never hears of it."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vflair_flower.attacks import NetworkView, network_view
from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.experts.balance import BALANCER
from vflair_flower.remote.protocol import AVERAGER, MODEL_PARTY
from vflair_flower.session import (
    Agreement,
    Hub,
    Link,
    OperationSpec,
    Recorded,
    Recorder,
    RecordingSettings,
    Reply,
    Request,
    Sighting,
    TensorSpec,
    read_recording,
)
from vflair_flower.session import recording as module
from vflair_flower.session.header import Kind
from vflair_flower.session.recording import joint_tap, recorders_at_hub, recorders_at_party
from vflair_flower.session.sampling import Sampler

from .helpers import NOT_A_HANG_S, Background

WIDE = (1 << 14, 64)
HIDDEN, GRAD, GRADIENT = (TensorSpec(name, (torch.float32,), WIDE) for name in ("hidden", "grad", "gradient"))
AGREEMENT = Agreement(
    {
        "forward": OperationSpec((HIDDEN,), (HIDDEN,)),
        "backward": OperationSpec((GRAD,), (GRAD,)),
        "average": OperationSpec((GRADIENT,), (GRADIENT,)),
        "step": OperationSpec((), ()),
    }
)
SECRET = "a-word-in-meta"
JOB = "job"


def marked(seed: int, rows: int = 3) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))


CROSSED = {
    name: marked(seed)
    for seed, name in enumerate(
        ("hidden", "answer", "grad", "hidden_grad", "gradient", "mean", "to_host", "of_host", "grad_to_host", "back")
    )
}
OF_BODY = {"hidden", "answer", "grad", "hidden_grad"}
OF_AVERAGER = {"gradient", "mean"}
OF_HOST = {"to_host", "of_host", "grad_to_host", "back"}


def body(request: Request) -> Reply:
    if request.operation == "step":
        return Reply({})
    name, what = ("hidden", "answer") if request.operation == "forward" else ("grad", "hidden_grad")
    return Reply({name: CROSSED[what]}, {"note": SECRET})


def averager(request: Request) -> Reply:
    return Reply({"gradient": CROSSED["mean"]})


def host(request: Request) -> Reply:
    name, what = ("hidden", "of_host") if request.operation == "forward" else ("grad", "back")
    return Reply({name: CROSSED[what]})


def run_job(link: Link) -> None:
    """What a party does in a step: the body, a host of experts, the averager, and the body's step."""
    link.call(MODEL_PARTY, "forward", {"hidden": CROSSED["hidden"]}, {"call": 0, "keep": True, "word": SECRET})
    link.call("b", "forward", {"hidden": CROSSED["to_host"]}, {"call": 1, "layer": 0})
    link.call("b", "backward", {"grad": CROSSED["grad_to_host"]}, {"call": 1})
    link.call(MODEL_PARTY, "backward", {"grad": CROSSED["grad"]}, {"call": 0})
    link.call(AVERAGER, "average", {"gradient": CROSSED["gradient"]}, {"rows": 3})
    link.call(MODEL_PARTY, "step", {}, {"step": 0})


class Session:
    """A recorded session of parties a and b, and, where it is a node, of the model party."""

    def __init__(self, settings: RecordingSettings | None, *, node: bool = False, bind: str = "inproc") -> None:
        self.parties = ["a", "b", *([MODEL_PARTY] if node else [])]
        self.settings, self.node, self.bind = settings, node, bind
        self.links: dict[str, Link] = {}

    def __enter__(self) -> "Session":
        about = {"job": JOB, "server_round": 2, "training": True}
        self.recorders = recorders_at_hub(self.settings, parties=self.parties, **about)  # type: ignore[arg-type]
        self.hub = Hub(bind=self.bind)
        self.hub.start()
        hosts = {AVERAGER: averager} if self.node else {AVERAGER: averager, MODEL_PARTY: body}
        self.session = self.hub.open_session(
            self.parties, AGREEMENT, hosts=hosts, deadline_s=NOT_A_HANG_S, tap=joint_tap(self.recorders)
        )
        self.own = {}
        for party in self.parties:
            own = None
            if self.settings is not None:
                self.own[party] = recorders_at_party(self.settings, party=party, **about)  # type: ignore[arg-type]
                own = joint_tap(self.own[party])
            self.links[party] = self.hub.connect(self.session, party, tap=own)
        self.links["b"].serve(host)
        if self.node:
            self.links[MODEL_PARTY].serve(body)
        return self

    def __exit__(self, *_: object) -> None:
        for link in self.links.values():
            link.close()
        self.session.close()
        self.hub.close()
        for recorder in (*self.recorders, *(one for own in self.own.values() for one in own)):
            recorder.close()


def crossed_bytes(session: Session, party: str, direction: str) -> int:
    """What the hub counted, but for its notices: some are for parties that have gone already."""
    entries = session.session.ledger.entries()
    return sum(e.bytes for e in entries if (e.party, e.direction) == (party, direction) and e.operation != "notice")


def settings(folder: Path, *adversaries: str, **more: int) -> RecordingSettings:
    return RecordingSettings(folder=folder, adversaries=adversaries, **more)  # type: ignore[arg-type]


def content(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def found_in(text: bytes) -> dict[str, int]:
    counts = {name: text.count(tensor.numpy().tobytes()) for name, tensor in CROSSED.items()}
    return {name: count for name, count in counts.items() if count}


ALL = ("model-party", "aggregator", "host:b", "host:a", "hub", "network")
SEEN = {
    "model-party": OF_BODY,
    "aggregator": OF_AVERAGER,
    "host:b": OF_HOST,
    "host:a": set(),
    "hub": OF_BODY | OF_AVERAGER | OF_HOST,
    "network": set(),
}


@pytest.mark.parametrize("node", [False, True], ids=["body at the hub", "body at a node"])
def test_each_adversary_has_what_it_saw_once_and_nothing_else(tmp_path: Path, node: bool) -> None:
    given = settings(tmp_path, *ALL)
    with Session(given, node=node) as session:
        run_job(session.links["a"])
    for name in ALL:
        text = content(given.folder_of(JOB, name))
        assert found_in(text) == dict.fromkeys(SEEN[name], 1), name
        assert (SECRET.encode() in text) == (name in ("model-party", "hub")), name
        kept = list(read_recording(given.folder_of(JOB, name)))
        assert all(seen.server_round == 2 and seen.training for seen in kept)
        assert {seen.session for seen in kept} <= {session.session.id}
        assert bool(kept) == (name != "host:a")
    assert b"gradient" not in content(given.folder_of(JOB, "model-party"))


def test_the_names_are_those_of_the_endpoints() -> None:
    assert module.MODEL_PARTY == MODEL_PARTY
    assert {AVERAGER, BALANCER} == set(module.AGGREGATING)


def test_the_network_has_sizes_and_times_of_all_frames_and_no_content(tmp_path: Path) -> None:
    given = settings(tmp_path, "network")
    with Session(given, bind="127.0.0.1:0") as session:
        run_job(session.links["a"])
    folder = given.folder_of(JOB, "network")
    kept = list(read_recording(folder))
    assert [path.name for path in folder.iterdir()] == ["index.jsonl"]
    text = content(folder).decode()
    assert not any(word in text for word in ("forward", "backward", "average", "hidden", "model-party", '"b"}'))
    assert all((s.source, s.target, s.operation, s.call_id, s.meta, s.tensors) == ("", "", "", 0, {}, {}) for s in kept)
    for party in "ab":
        for way in ("up", "down"):
            sizes = [s.num_bytes for s in kept if (s.party, s.direction) == (party, way) and s.kind is not Kind.NOTICE]
            assert sum(sizes) == crossed_bytes(session, party, way)
    view = network_view(kept)
    assert isinstance(view, NetworkView)
    assert [f.num_bytes for f in view.frames] == [s.num_bytes for s in sorted(kept, key=lambda s: s.time_s)]
    assert vars(view.frames[0]).keys() == {"time_s", "direction", "party", "num_bytes"}
    with pytest.raises(DataError, match="no frame"):
        network_view([])


@pytest.mark.parametrize("bind", ["inproc", "127.0.0.1:0"])
def test_a_party_records_itself_what_the_hub_records_of_it(tmp_path: Path, bind: str) -> None:
    given = settings(tmp_path, "model-party", "host:b")
    with Session(given, node=True, bind=bind) as session:
        run_job(session.links["a"])
    for name in given.adversaries:
        party = name.removeprefix("host:")
        at_hub, at_home = (list(read_recording(given.folder_of(JOB, name, party=own))) for own in (None, party))
        assert len(at_hub) == len(at_home) > 0
        for one, other in zip(at_hub, at_home, strict=True):
            assert_same(one, other)
    assert [r.adversary for r in session.own["a"]] == []


def test_what_the_hub_of_a_body_asks_hosts_is_the_model_partys_as_well(tmp_path: Path) -> None:
    given = settings(tmp_path, "model-party", "host:b")
    with Session(given) as session:
        asked = {"hidden": CROSSED["to_host"]}
        session.session.call("b", "forward", asked, {"call": -1, "owner": "a", "layer": 0}, NOT_A_HANG_S)
    for name in given.adversaries:
        assert set(found_in(content(given.folder_of(JOB, name)))) == {"to_host", "of_host"}


def assert_same(one: Sighting, other: Sighting) -> None:
    for name in ("session", "party", "direction", "kind", "call_id", "source", "target", "operation", "meta"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.num_bytes == other.num_bytes
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_what_is_read_is_what_crossed(tmp_path: Path) -> None:
    given, crossed = settings(tmp_path, "hub"), []
    (recorder,) = recorders_at_hub(given, job=JOB, parties=["a"], server_round=1, training=False)
    kinds = (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
    for number, dtype in enumerate(kinds):
        tensors = {"x": marked(number).to(dtype), "none": torch.empty(0, 5, dtype=dtype)}
        crossed.append(sighting("forward", {"call": number, "f": 0.5, "t": True, "s": "é"}, tensors))
        recorder(crossed[-1])
        tensors["x"].zero_()  # whoever is called may change it
        crossed[-1] = replace(crossed[-1], tensors={**tensors, "x": marked(number).to(dtype)})
    recorder.close()
    kept = list(read_recording(recorder.folder))
    for one, other in zip(kept, crossed, strict=True):
        assert_same(one, other)
        assert (one.time_s, one.server_round, one.training) == (other.time_s, 1, False)
        assert {name: tensor.dtype for name, tensor in one.tensors.items()} == dict.fromkeys(
            ("x", "none"), other.tensors["x"].dtype
        )


def sighting(
    operation: str,
    meta: dict[str, object],
    tensors: dict[str, Tensor] | None = None,
    *,
    kind: Kind = Kind.CALL,
    call_id: int = 0,
    source: str = "a",
    target: str = MODEL_PARTY,
) -> Sighting:
    answered = kind is not Kind.CALL
    return Sighting(
        session="s",
        party="a",
        direction="down" if answered else "up",
        kind=kind,
        call_id=call_id,
        source=target if answered else source,
        target=source if answered else target,
        operation=operation,
        meta=meta,  # type: ignore[arg-type]
        tensors=tensors or {},
        num_bytes=100,
    )


def chosen(sampler: Sampler, *frames: Sighting) -> list[bool]:
    return [sampler.keeps(frame) for frame in frames]


class TestSampling:
    def test_keeps_a_call_with_its_reply_its_backward_call_and_that_ones_reply(self, tmp_path: Path) -> None:
        given = settings(tmp_path, "model-party", every=2)
        with Session(given) as session:
            link = session.links["a"]
            for call in range(5):
                link.call(MODEL_PARTY, "forward", {"hidden": marked(100 + call)}, {"call": call})
            for call in range(5):
                link.call(MODEL_PARTY, "backward", {"grad": marked(200 + call)}, {"call": call})
            link.call(MODEL_PARTY, "step", {})
        kept = list(read_recording(given.folder_of(JOB, "model-party")))
        calls = [s for s in kept if s.kind is Kind.CALL]
        assert [(s.operation, s.meta.get("call")) for s in calls] == [
            *(("forward", call) for call in (0, 2, 4)),
            *(("backward", call) for call in (0, 2, 4)),
            ("step", None),
        ]
        assert sorted(s.call_id for s in kept if s.kind is Kind.REPLY) == sorted(s.call_id for s in calls)
        assert torch.equal(calls[1].tensors["hidden"], marked(102))

    def test_keeps_all_frames_of_a_cache(self) -> None:
        sampler = Sampler(2)
        hidden = {"hidden": marked(1)}
        for cache, want in ((7, True), (8, False), (9, True)):
            for step in range(3):
                asked = sighting("forward", {"cache": cache, "cached": step}, hidden, call_id=10 * cache + step)
                answer = sighting("forward", {}, hidden, kind=Kind.REPLY, call_id=10 * cache + step)
                assert chosen(sampler, asked, answer) == [want, want]

    def test_keeps_all_layers_and_both_parts_of_a_pass(self) -> None:
        sampler = Sampler(2)
        layers = [
            sighting("forward", {"call": number, "layer": layer}, target="b")
            for number, layer in enumerate((0, 1, 2, 1, 2, 0, 2))  # the second pass asks this host from layer 1 on
        ]
        assert chosen(sampler, *layers) == [True, True, True, False, False, True, True]
        parts = [sighting("forward", {"call": n, "part": part}) for n, part in enumerate(["encoder", "decoder"] * 3)]
        assert chosen(sampler, *parts) == [True, True, False, False, True, True]
        back = [sighting("backward", {"call": n}) for n in range(6)]
        assert chosen(sampler, *back) == [True, True, False, False, True, True]

    def test_counts_every_caller_and_what_belongs_to_no_pass_by_itself(self) -> None:
        sampler = Sampler(3)
        for source in "ab":
            asked = [sighting("average", {"rows": 1}, {"gradient": marked(1)}, source=source) for _ in range(4)]
            assert chosen(sampler, *asked) == [True, False, False, True]
            assert chosen(sampler, *[sighting("step", {}, source=source)] * 3) == [True] * 3

    def test_does_not_mix_up_a_partys_own_calls_with_those_made_to_it(self) -> None:
        sampler = Sampler(2)
        own = sighting("forward", {"call": 0}, {"hidden": marked(1)}, call_id=5)
        others = replace(own, direction="down", source="b", target="a", meta={"call": 0})
        second = replace(others, meta={"call": 1})
        assert chosen(sampler, own, others, second) == [True, True, False]
        assert not sampler.keeps(replace(second, direction="up", kind=Kind.REPLY))  # answers the second
        assert sampler.keeps(replace(own, direction="down", kind=Kind.REPLY))


class TestCap:
    CAP = 1 << 17

    def test_is_kept_said_and_outlives_the_session(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        given = settings(tmp_path, "model-party", "hub", max_bytes=self.CAP)
        for _ in range(2):
            with Session(given) as session:
                link = session.links["a"]
                for call in range(60):
                    sent = {"hidden": marked(call, rows=16)}
                    assert link.call(MODEL_PARTY, "forward", sent, {"call": call}).tensors.keys() == {"hidden"}
                    link.call(MODEL_PARTY, "backward", {"grad": marked(call, rows=16)}, {"call": call})
        for name in given.adversaries:
            folder = given.folder_of(JOB, name)
            assert 0.7 * self.CAP < len(content(folder)) <= self.CAP
            lines = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
            notes = [line for line in lines if "note" in line]
            assert len(notes) == 1
            assert f"its cap of {self.CAP} bytes" in notes[0]["note"]
        assert "has reached its cap" in caplog.text
        assert "nothing more is recorded" in caplog.text

    def test_ends_between_exchanges_and_not_within_one(self, tmp_path: Path) -> None:
        given = settings(tmp_path, "model-party", max_bytes=self.CAP)
        with Session(given) as session:
            for call in range(60):
                session.links["a"].call(MODEL_PARTY, "forward", {"hidden": marked(call, rows=8)}, {"call": call})
                session.links["a"].call(MODEL_PARTY, "backward", {"grad": marked(call, rows=8)}, {"call": call})
        kept = [s for s in read_recording(given.folder_of(JOB, "model-party")) if s.tensors]
        assert len(kept) % 4 == 0
        assert 4 * 60 > len(kept) > 0

    def test_a_frame_that_is_larger_than_all_is_left_out(self, tmp_path: Path) -> None:
        given = settings(tmp_path, "model-party", max_bytes=1 << 16)
        with Session(given) as session:
            session.links["a"].call(MODEL_PARTY, "forward", {"hidden": marked(1, rows=400)}, {"call": 0})
        folder = given.folder_of(JOB, "model-party")
        assert list(read_recording(folder)) == []
        assert len(content(folder)) < 1 << 16


def test_many_parties_at_once_lose_no_frame(tmp_path: Path) -> None:
    given = settings(tmp_path, "hub", "network")
    with Session(given) as session:
        start = threading.Barrier(2)

        def work(party: str) -> None:
            start.wait(NOT_A_HANG_S)
            for call in range(40):
                sent = {"hidden": torch.full((2, 64), float(call))}
                session.links[party].call(MODEL_PARTY, "forward", sent, {"call": call})

        jobs = [Background(lambda p=party: work(p)) for party in "ab"]  # type: ignore[misc]
        assert [job.join().error for job in jobs] == [None] * 2
    for name in given.adversaries:
        kept = list(read_recording(given.folder_of(JOB, name)))
        sizes = [s.num_bytes for s in kept if s.kind is not Kind.NOTICE]
        assert sum(sizes) == sum(crossed_bytes(session, party, way) for party in "ab" for way in ("up", "down"))
    kept = [s for s in read_recording(given.folder_of(JOB, "hub")) if s.kind is Kind.CALL]
    for party in "ab":
        numbers = [(s.meta["call"], float(s.tensors["hidden"][0, 0])) for s in kept if s.source == party]
        assert numbers == [(call, float(call)) for call in range(40)]


def test_nothing_that_befalls_a_recording_reaches_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    given = settings(tmp_path, "model-party", "network")
    monkeypatch.setattr("vflair_flower.session.tensor_log.save_file", fail)
    monkeypatch.setattr("vflair_flower.session.tensor_log._BUFFER_BYTES", 1000)
    with Session(given) as session:
        run_job(session.links["a"])
        assert session.session.lost == {}
    assert "no space left on device" in caplog.text
    assert len(list(read_recording(given.folder_of(JOB, "network")))) > 10  # the other recorder goes on


def test_a_session_without_recording_looks_at_no_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> Sighting:
        raise AssertionError("a frame was looked at")

    for name in ("link", "hub_session"):
        for maker in ("of_frame", "of_parcel"):
            monkeypatch.setattr(f"vflair_flower.session.{name}.{maker}", never)
    assert joint_tap(recorders_at_hub(None, job=JOB, parties=["a"], server_round=1, training=True)) is None
    with Session(None) as session:
        run_job(session.links["a"])
        assert session.session.lost == {}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"adversaries": ("mallory",)}, "'mallory'"),
        ({"adversaries": ("host:",)}, "'host:'"),
        ({"adversaries": ("hub", "hub")}, "each once"),
        ({"adversaries": "hub"}, "give a tuple"),
        ({"every": 0}, "every is 0"),
        ({"max_bytes": 3}, "max_bytes is 3"),
        ({"every": True}, "every is True"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, more: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        RecordingSettings(folder=tmp_path, **more)  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_used_is_refused_before_the_session(tmp_path: Path) -> None:
    given = settings(tmp_path, "hub")
    folder = given.folder_of(JOB, "hub")
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="holds other files"):
        recorders_at_hub(given, job=JOB, parties=["a"], server_round=1, training=True)
    with pytest.raises(ConfigurationError, match="cannot name a folder"):
        recorders_at_hub(given, job="../job", parties=["a"], server_round=1, training=True)
    (folder / "thesis.txt").unlink()
    (folder / "index.jsonl").write_text('{"format": "vflair-truth", "version": 1}\n')
    with pytest.raises(ConfigurationError, match=r"no vflair-recording.*Choose another folder"):
        recorders_at_hub(given, job=JOB, parties=["a"], server_round=1, training=True)


class TestDamaged:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        given = settings(tmp_path, "hub")
        (recorder,) = recorders_at_hub(given, job=JOB, parties=["a"], server_round=1, training=False)
        for number in range(4):
            recorder(sighting("forward", {"call": number}, {"hidden": marked(number)}))
        recorder.close()
        assert len(list(read_recording(recorder.folder))) == 4
        return recorder.folder

    @staticmethod
    def file(folder: Path) -> Path:
        (found,) = folder.glob("*.safetensors")
        return found

    @staticmethod
    def change(folder: Path, one: str, other: str) -> None:
        index = folder / "index.jsonl"
        assert one in index.read_text()
        index.write_text(index.read_text().replace(one, other))

    @pytest.mark.parametrize(
        ("harm", "message"),
        [
            (lambda f: TestDamaged.file(f).unlink(), "which is not there"),
            (lambda f: TestDamaged.file(f).write_bytes(TestDamaged.file(f).read_bytes()[:-40]), "cannot be read"),
            (lambda f: TestDamaged.file(f).write_bytes(b"no tensors here"), "cannot be read"),
            (lambda f: TestDamaged.change(f, "2.hidden", "9.hidden"), "line 4 of .* does not hold"),
            (lambda f: TestDamaged.change(f, '"kind":"call"', '"kind":"scream"'), "is no frame"),
            (lambda f: TestDamaged.change(f, '"party":"a",', ""), "is no frame"),
            (lambda f: TestDamaged.change(f, '"time_s"', "time"), "line 2 of .* is not JSON"),
            (lambda f: TestDamaged.change(f, TestDamaged.file(f).name, "../../../../etc/passwd"), "which is not there"),
            (lambda f: TestDamaged.change(f, "vflair-recording", "another"), "no vflair-recording: it says 'another'"),
            (lambda f: TestDamaged.change(f, '"version":1', '"version":9'), "of version 9"),
            (lambda f: (f / "index.jsonl").write_text("[]\n"), "no JSON object"),
            (lambda f: (f / "index.jsonl").write_bytes(b"\xff\xfe\x00"), "is not JSON"),
            (lambda f: (f / "index.jsonl").write_text(""), "it says None"),
            (lambda f: (f / "index.jsonl").unlink(), "has no index"),
        ],
    )
    def test_is_said_clearly(self, folder: Path, harm: Callable[[Path], object], message: str) -> None:
        harm(folder)
        with pytest.raises(DataError, match=message):
            list(read_recording(folder))

    def test_a_folder_that_is_none_is_said_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="has no index"):
            read_recording(tmp_path / "nowhere")


def test_a_recorder_is_a_tap_and_later_frames_are_dropped(tmp_path: Path) -> None:
    recorder = Recorder(settings(tmp_path), "hub", job=JOB, streams=["a"], server_round=1, training=True)
    recorder(sighting("step", {}))
    recorder.close()
    recorder(sighting("step", {}))
    recorder.close()
    (kept,) = read_recording(recorder.folder)
    assert isinstance(kept, Recorded)
