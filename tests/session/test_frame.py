"""property and fault: frames survive the round trip, and hostile bytes do nothing but raise FrameError."""

import contextlib
import json
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vflair_flower.errors import FrameError
from vflair_flower.session import Agreement, OperationSpec, TensorSpec
from vflair_flower.session import frame as frame_module
from vflair_flower.session.frame import PREFIX, Frame, FrameAssembler, encode, pack
from vflair_flower.session.header import DTYPES, Kind

from .helpers import ALL

RANKS = [TensorSpec(f"r{rank}", ALL, (5,) * rank) for rank in range(4)]
AGREEMENT = Agreement(
    {"op": OperationSpec(tuple(RANKS), tuple(RANKS), optional=frozenset(spec.name for spec in RANKS))}, chunk_bytes=256
)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    made = {}
    for rank in draw(st.lists(st.integers(0, 3), unique=True, max_size=4)):
        shape = tuple(draw(st.integers(0, 5)) for _ in range(rank))
        dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        numel = int(torch.tensor(shape).prod()) if shape else 1
        values = torch.tensor(draw(st.lists(st.integers(0, 1), min_size=numel, max_size=numel)))
        tensor = (values * draw(st.integers(1, 100))).to(dtype).reshape(shape)
        made[f"r{rank}"] = tensor.transpose(0, -1).contiguous().transpose(0, -1) if rank > 1 else tensor
    return made


metas = st.dictionaries(
    st.text(max_size=5).filter(lambda text: text.isprintable()),
    st.one_of(
        st.booleans(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False, allow_infinity=False), st.just("é\n")
    ),
    max_size=3,
)


@pytest.mark.parametrize("step", [2, 5, 9])
def test_strided_tensors_travel(step: int) -> None:
    """Of eight numbers every so-manieth: with 9, one number that keeps its stride."""
    sent = torch.arange(8.0)[::step]
    frame = Frame(kind=Kind.CALL, call_id=7, source="a", target="b", operation="op", tensors={"r1": sent}, meta={})
    assembler = FrameAssembler(AGREEMENT)
    results = [assembler.feed(chunk) for chunk in encode(frame, AGREEMENT)]
    assert torch.equal(results[-1].tensors["r1"], sent)


def recut(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    position = 0
    while position < len(data):
        size = sizes.pop() if sizes else AGREEMENT.chunk_bytes
        yield data[position : position + size]
        position += size


@given(tensors(), metas, st.sampled_from([Kind.CALL, Kind.REPLY]), st.lists(st.integers(1, 256), max_size=30))
def test_round_trip(
    made: dict[str, torch.Tensor], meta: dict[str, str | int | float | bool], kind: Kind, sizes: list[int]
) -> None:
    frame = Frame(kind=kind, call_id=7, source="a", target="b", operation="op", tensors=made, meta=meta)
    chunks = list(encode(frame, AGREEMENT))
    assert all(len(chunk) == AGREEMENT.chunk_bytes for chunk in chunks[:-1])
    assembler = FrameAssembler(AGREEMENT)
    for _ in range(2):  # an assembler reads one frame after the other
        results = [assembler.feed(chunk) for chunk in recut(b"".join(chunks), list(sizes))]
        assert all(result is None for result in results[:-1])
        back = results[-1]
        assert back is not None
        assert (back.kind, back.call_id, back.source, back.target, back.operation) == (kind, 7, "a", "b", "op")
        assert back.meta == meta
        assert {key: type(value) for key, value in back.meta.items()} == {
            key: type(value) for key, value in meta.items()
        }
        assert list(back.tensors) == list(made)
        for name, tensor in made.items():
            assert back.tensors[name].dtype == tensor.dtype
            assert back.tensors[name].shape == tensor.shape
            assert torch.equal(back.tensors[name], tensor)
    payload = sum(tensor.numel() * tensor.element_size() for tensor in made.values())
    assert assembler.overhead_bytes + payload == len(b"".join(chunks))
    assert assembler.overhead_bytes % 64 == 0


def test_received_tensors_are_writable_and_lie_in_memory_of_their_own() -> None:
    sent = torch.ones(5, 5, dtype=torch.bfloat16)
    frame = Frame(
        kind=Kind.CALL, call_id=1, source="a", target="b", operation="op", tensors={"r2": sent, "r1": sent[0]}
    )
    assembler = FrameAssembler(AGREEMENT)
    (*_, back) = [assembler.feed(chunk) for chunk in encode(frame, AGREEMENT)]
    assert back is not None
    back.tensors["r2"].zero_()
    assert back.tensors["r1"].eq(1).all()
    assert sent.eq(1).all()
    assert all(tensor.data_ptr() % 64 == 0 for tensor in back.tensors.values())


def test_nan_and_infinity_in_tensors_travel() -> None:
    sent = torch.tensor([float("nan"), float("inf"), -0.0])
    frame = Frame(kind=Kind.CALL, call_id=1, source="a", target="b", operation="op", tensors={"r1": sent})
    assembler = FrameAssembler(AGREEMENT)
    (*_, back) = [assembler.feed(chunk) for chunk in encode(frame, AGREEMENT)]
    assert back is not None
    assert torch.equal(back.tensors["r1"].view(torch.int32), sent.view(torch.int32))


@pytest.mark.parametrize(
    "changes",
    [
        {"operation": "other"},
        {"tensors": {"r1": torch.ones(6)}},
        {"tensors": {"r1": torch.ones(2, 2)}},
        {"tensors": {"r1": torch.ones(2, dtype=torch.complex64)}},
        {"tensors": {"r9": torch.ones(2)}},
        {"tensors": {"r1": torch.ones(2).to_sparse()}},
        {"tensors": {"r1": torch.ones(2, device="meta")}},
        {"tensors": {"r1": [1.0]}},
        {"meta": {"loss": float("nan")}},
        {"meta": {"n": 2**70}},
        {"meta": {"x": None}},
        {"meta": {"x" * 300: 1}},
        {"meta": {str(i): "y" * 1000 for i in range(100)}},
        {"meta": {"x": "\ud800"}},
        {"target": "x" * 300},
    ],
)
def test_a_wrong_frame_is_refused_before_it_is_sent(changes: dict[str, object]) -> None:
    good: dict[str, object] = {"kind": Kind.CALL, "call_id": 1, "source": "a", "target": "b", "operation": "op"}
    encode(Frame(**good), AGREEMENT)  # type: ignore[arg-type]
    with pytest.raises(FrameError):
        encode(Frame(**(good | changes)), AGREEMENT)  # type: ignore[arg-type]


# --- hostile bytes ---------------------------------------------------------------------------------------------------

GOOD_HEADER = {
    "call": 1,
    "source": "a",
    "target": "b",
    "operation": "op",
    "tensors": [["r1", "float32", [3], 12]],
    "meta": {"n": 1},
}


def raw(header: object = GOOD_HEADER, payload: bytes = bytes(12), *, prefix: dict[str, int] | None = None) -> bytes:
    """Build a frame by hand, with whatever lies are asked for."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-(PREFIX.size + len(text)) % 64)
    said = {"version": 1, "kind": 1, "zero": 0, "header": len(text), "payload": len(payload)} | (prefix or {})
    start = PREFIX.pack(b"VFLR", said["version"], said["kind"], said["zero"], said["header"], said["payload"])
    return start + text + payload


def feed(*frames: bytes) -> Frame | None:
    assembler = FrameAssembler(AGREEMENT)
    result = None
    for data in frames:
        for start in range(0, len(data), 256):
            result = assembler.feed(data[start : start + 256])
    return result


def test_the_hand_made_frame_is_good() -> None:
    frame = feed(raw())
    assert frame is not None
    assert frame.tensors["r1"].tolist() == [0, 0, 0]


LIES = {
    "magic": b"VFLX" + raw()[4:],
    "version": raw(prefix={"version": 2}),
    "kind 0": raw(prefix={"kind": 0}),
    "kind 99": raw(prefix={"kind": 99}),
    "reserved": raw(prefix={"zero": 1}),
    "header 0": raw(prefix={"header": 0}),
    "header huge": raw(prefix={"header": 2**32 - 1}),
    "header unpadded": raw(prefix={"header": len(raw()) - 12 - PREFIX.size - 1}),
    "payload huge": raw(prefix={"payload": 2**64 - 1}),
    "payload longer": raw(prefix={"payload": 13}),
    "payload shorter": raw(prefix={"payload": 11}),
    "surplus": raw() + b"x",
    "not json": raw(b"{"),
    "utf-16": raw(json.dumps(GOOD_HEADER).encode("utf-16")),
    "list": raw([]),
    "null": raw(None),
    "deep": raw(b"[" * 50_000),
    "deep object": raw(b'{"a":' * 10_000),
    "extra key": raw(GOOD_HEADER | {"z": 1}),
    "missing key": raw({key: GOOD_HEADER[key] for key in list(GOOD_HEADER)[1:]}),
    "key twice": raw(b'{"call":1,"call":2,"source":"a","target":"b","operation":"op","tensors":[],"meta":{}}', b""),
    "call negative": raw(GOOD_HEADER | {"call": -1}),
    "call bool": raw(GOOD_HEADER | {"call": True}),
    "call huge": raw(GOOD_HEADER | {"call": 2**63}),
    "call float": raw(GOOD_HEADER | {"call": 1.0}),
    "source type": raw(GOOD_HEADER | {"source": 1}),
    "target long": raw(GOOD_HEADER | {"target": "t" * 300}),
    "target surrogate": raw(GOOD_HEADER | {"target": "\ud800"}),
    "operation": raw(GOOD_HEADER | {"operation": "eval"}),
    "tensors type": raw(GOOD_HEADER | {"tensors": {}}),
    "tensor type": raw(GOOD_HEADER | {"tensors": ["r1"]}),
    "tensor short": raw(GOOD_HEADER | {"tensors": [["r1", "float32", [3]]]}),
    "tensor missing payload": raw(GOOD_HEADER | {"tensors": []}),
    "dtype": raw(GOOD_HEADER | {"tensors": [["r1", "object", [3], 12]]}),
    "shape negative": raw(GOOD_HEADER | {"tensors": [["r1", "float32", [-3], 12]]}),
    "shape bool": raw(GOOD_HEADER | {"tensors": [["r1", "float32", [True], 4]]}, bytes(4)),
    "shape float": raw(GOOD_HEADER | {"tensors": [["r1", "float32", [3.0], 12]]}),
    "shape huge": raw(GOOD_HEADER | {"tensors": [["r1", "float32", [2**61], 12]]}),
    "shape long": raw(GOOD_HEADER | {"tensors": [["r1", "float32", [1] * 1000, 4]]}, bytes(4)),
    "shape rank": raw(GOOD_HEADER | {"tensors": [["r1", "float32", [1, 3], 12]]}),
    "bytes": raw(GOOD_HEADER | {"tensors": [["r1", "float32", [3], 11]]}, bytes(11)),
    "meta nan": raw(GOOD_HEADER | {"meta": {"n": float("nan")}}),
    "meta infinity": raw(GOOD_HEADER | {"meta": {"n": float("-inf")}}),
    "meta 1e999": raw(json.dumps(GOOD_HEADER).replace('"n": 1', '"n": 1e999').encode()),
    "meta long integer": raw(json.dumps(GOOD_HEADER).replace('"n": 1', '"n": ' + "9" * 5000).encode()),
    "meta big integer": raw(GOOD_HEADER | {"meta": {"n": 2**64}}),
    "meta nested": raw(GOOD_HEADER | {"meta": {"n": {}}}),
    "meta null": raw(GOOD_HEADER | {"meta": {"n": None}}),
    "meta list": raw(GOOD_HEADER | {"meta": []}),
    "bool of 2": raw(GOOD_HEADER | {"tensors": [["r1", "bool", [1], 1]]}, b"\x02"),
    "notice with payload": raw(prefix={"kind": int(Kind.NOTICE)}),
}


@pytest.mark.parametrize("lie", sorted(LIES))
def test_lies_are_refused(lie: str) -> None:
    # A second, honest frame follows: a lie that hides in what is still missing comes out there.
    with pytest.raises(FrameError):
        feed(LIES[lie], raw())


def test_chunks_of_no_or_too_many_bytes_are_refused() -> None:
    with pytest.raises(FrameError, match="a chunk has 0 bytes"):
        FrameAssembler(AGREEMENT).feed(b"")
    with pytest.raises(FrameError, match="a chunk has 257 bytes"):
        FrameAssembler(AGREEMENT).feed(bytes(257))


def test_a_broken_stream_stays_broken() -> None:
    assembler = FrameAssembler(AGREEMENT)
    with pytest.raises(FrameError):
        assembler.feed(b"x" * 64)
    with pytest.raises(FrameError, match="before"):
        assembler.feed(raw()[:256])


@pytest.mark.parametrize("end", range(1, len(raw()), 7))
def test_a_truncated_frame_is_no_frame(end: int) -> None:
    assert feed(raw()[:end]) is None


@pytest.fixture(scope="module")
def allocated() -> Iterator[list[int]]:
    sizes: list[int] = []
    allocate = frame_module._allocate

    def counting(num_bytes: int) -> torch.Tensor:
        sizes.append(num_bytes)
        return allocate(num_bytes)

    patch = pytest.MonkeyPatch()
    patch.setattr(frame_module, "_allocate", counting)
    yield sizes
    patch.undo()


def only_frame_errors(data: bytes, allocated: list[int]) -> None:
    allocated.clear()
    with contextlib.suppress(FrameError):
        feed(data)
    assert sum(allocated) <= AGREEMENT.max_payload_bytes


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(raw()) - 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bits_raise_nothing_but_frame_errors(allocated: list[int], flips: list[tuple[int, int]]) -> None:
    data = bytearray(raw())
    for position, mask in flips:
        data[position] ^= mask
    only_frame_errors(bytes(data), allocated)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["r1", "op", "float32"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(sorted(GOOD_HEADER)), inner, max_size=6)
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(
    st.dictionaries(st.sampled_from(sorted(GOOD_HEADER)), json_values, max_size=2),
    st.integers(0, 6),
    st.binary(max_size=40),
)
def test_fuzzed_headers_raise_nothing_but_frame_errors(
    allocated: list[int], changes: dict[str, object], kind: int, payload: bytes
) -> None:
    only_frame_errors(raw(GOOD_HEADER | changes, payload, prefix={"kind": kind}), allocated)


@given(st.binary(max_size=300))
def test_fuzzed_bytes_raise_nothing_but_frame_errors(allocated: list[int], data: bytes) -> None:
    only_frame_errors(data, allocated)


@pytest.mark.parametrize("lie", ["payload huge", "shape huge", "bytes", "payload longer", "dtype", "operation"])
def test_a_lying_header_allocates_nothing(allocated: list[int], lie: str) -> None:
    allocated.clear()
    with pytest.raises(FrameError):
        feed(LIES[lie])
    assert allocated == []


def test_packing_copies_no_payload() -> None:
    tensor = torch.arange(5, dtype=torch.float32)
    parcel = pack(
        Frame(kind=Kind.CALL, call_id=1, source="a", target="b", operation="op", tensors={"r1": tensor}), AGREEMENT
    )
    tensor[0] = 9
    assert b"".join(parcel.chunks())[-20:] == tensor.numpy().tobytes()
