"""property: an agreement admits exactly what it says, and travels as JSON."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vflair_flower.errors import ConfigurationError, FrameError
from vflair_flower.session import Agreement, OperationSpec, TensorSpec
from vflair_flower.session.header import DTYPES, Header, Kind, TensorHeader

HIDDEN = TensorSpec("hidden_BTD", (torch.float32, torch.bfloat16), (4, 8, 16), fixed=(False, False, True))
MASK = TensorSpec("mask_BT", (torch.int64,), (4, 8))
AGREEMENT = Agreement({"forward": OperationSpec((HIDDEN, MASK), (HIDDEN,), optional=frozenset({"mask_BT"}))})
GOOD = Header(
    kind=Kind.CALL,
    call_id=1,
    source="a",
    target="body",
    operation="forward",
    tensors=(
        TensorHeader(name="hidden_BTD", dtype="bfloat16", shape=(2, 3, 16), num_bytes=192),
        TensorHeader(name="mask_BT", dtype="int64", shape=(2, 3), num_bytes=48),
    ),
    payload_bytes=240,
)


def with_hidden(**changes: object) -> Header:
    return replace(GOOD, tensors=(replace(GOOD.tensors[0], **changes), GOOD.tensors[1]))


def test_good_headers_pass() -> None:
    AGREEMENT.check(GOOD)
    AGREEMENT.check(replace(GOOD, tensors=GOOD.tensors[:1], payload_bytes=192))  # the mask is optional
    AGREEMENT.check(replace(GOOD, kind=Kind.REPLY, tensors=GOOD.tensors[:1], payload_bytes=192))
    AGREEMENT.check(Header(kind=Kind.BYE, call_id=0, source="a", target="hub", operation=""))


@pytest.mark.parametrize(
    "header",
    [
        replace(GOOD, operation="backward"),
        replace(GOOD, kind=Kind.REPLY),  # carries a mask, which replies do not
        replace(GOOD, tensors=GOOD.tensors[1:], payload_bytes=48),
        replace(GOOD, tensors=(*GOOD.tensors, GOOD.tensors[0]), payload_bytes=432),
        with_hidden(name="labels"),
        with_hidden(dtype="float16"),
        with_hidden(dtype="object"),
        with_hidden(shape=(2, 48)),
        with_hidden(shape=(5, 3, 16), num_bytes=480),
        with_hidden(shape=(2, 3, 15), num_bytes=180),
        with_hidden(num_bytes=191),
        replace(GOOD, payload_bytes=241),
        replace(GOOD, kind=Kind.NOTICE, operation=""),
        Header(kind=Kind.ERROR, call_id=0, source="a", target="b", operation="backward"),
        Header(kind=Kind.BYE, call_id=0, source="a", target="hub", operation="forward"),
    ],
)
def test_what_was_not_agreed_is_refused(header: Header) -> None:
    with pytest.raises(FrameError):
        AGREEMENT.check(header)


specs = st.builds(
    lambda name, dtypes, dimensions: TensorSpec(
        name, tuple(dtypes), tuple(size for size, _ in dimensions), tuple(flag for _, flag in dimensions)
    ),
    st.text("abc_", min_size=1, max_size=6),
    st.lists(st.sampled_from(sorted(DTYPES.values(), key=str)), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 100), st.booleans()), max_size=4),
)
sides = st.lists(specs, max_size=3, unique_by=lambda spec: spec.name).map(tuple)


@given(st.dictionaries(st.text("xyz", min_size=1, max_size=3), st.builds(OperationSpec, sides, sides), max_size=3))
def test_json_round_trip(operations: dict[str, OperationSpec]) -> None:
    agreement = Agreement(operations, max_header_bytes=8192, chunk_bytes=1000, max_calls_in_flight=3)
    again = Agreement.from_json(agreement.to_json())
    assert again == agreement
    assert again.digest == agreement.digest
    assert again.max_payload_bytes == agreement.max_payload_bytes


def test_max_payload_is_the_largest_side() -> None:
    assert AGREEMENT.max_payload_bytes == 4 * 8 * 16 * 4 + 4 * 8 * 8
    assert Agreement({}).max_payload_bytes == 0


def test_a_different_agreement_has_a_different_digest() -> None:
    assert replace(AGREEMENT, chunk_bytes=1 << 19).digest != AGREEMENT.digest


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"operations": 3}', "[" * 100_000, AGREEMENT.to_json().replace("4", "-4")]
)
def test_broken_json_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        Agreement.from_json(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TensorSpec("x", (torch.complex64,), (1,)),
        lambda: TensorSpec("x", (), (1,)),
        lambda: TensorSpec("", (torch.float32,), (1,)),
        lambda: TensorSpec("x", (torch.float32,), (-1,)),
        lambda: TensorSpec("x", (torch.float32,), (True,)),
        lambda: TensorSpec("x", (torch.float32,), (1, 2), fixed=(True,)),
        lambda: OperationSpec((HIDDEN, HIDDEN), ()),
        lambda: OperationSpec((HIDDEN,), (), optional=frozenset({"mask_BT"})),
        lambda: Agreement({}, chunk_bytes=4 << 20),
        lambda: Agreement({}, max_header_bytes=1),
        lambda: Agreement({}, max_calls_in_flight=0),
    ],
)
def test_settings_are_checked_at_birth(make: object) -> None:
    with pytest.raises(ConfigurationError):
        make()  # type: ignore[operator]
