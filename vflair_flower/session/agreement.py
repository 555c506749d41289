"""What may travel in a session: every operation, every tensor, its dtypes and its largest shape.

What it is: a value, made by the strategy, sent to each party in its Flower message, and held by both ends of every
stream.  What it is not: a description of models; it knows sizes, not meanings.  Invariant: a header that passes
`Agreement.check` announces exactly the bytes of the tensors that it lists, and never more than `max_payload_bytes`.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from vflair_flower.errors import ConfigurationError, FrameError
from vflair_flower.session.header import DTYPE_NAMES, DTYPES, MAX_NAME_CHARS, MAX_RANK, Header, Kind, TensorHeader

MIN_HEADER_BYTES = 4096
MIN_CHUNK_BYTES = 256
MAX_CHUNK_BYTES = 4_000_000
"""A chunk is one gRPC message, and gRPC refuses messages above 4 MiB unless told otherwise."""


@dataclass(frozen=True)
class TensorSpec:
    """Say what one tensor may look like.

    Parameters
    ----------
    name : str
        Name of the tensor in its request or reply.
    dtypes : tuple[torch.dtype, ...]
        The dtypes that are accepted.
    max_shape : tuple[int, ...]
        Largest size of each dimension; its length is the rank that is required.
    fixed : tuple[bool, ...] | None
        Where true, the dimension must equal `max_shape`; None leaves all of them free.

    Examples
    --------
    >>> TensorSpec("hidden_BTD", (torch.bfloat16,), (8, 512, 1024), fixed=(False, False, True)).max_bytes
    8388608
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    max_shape: tuple[int, ...]
    fixed: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtypes", tuple(self.dtypes))
        object.__setattr__(self, "max_shape", tuple(self.max_shape))
        object.__setattr__(
            self, "fixed", tuple(self.fixed) if self.fixed is not None else (False,) * len(self.max_shape)
        )
        _check_name(self.name, "a tensor")
        unknown = [str(dtype) for dtype in self.dtypes if dtype not in DTYPE_NAMES]
        if unknown or not self.dtypes:
            raise ConfigurationError(
                f"tensor '{self.name}' lists the dtypes {unknown or '()'}, which cannot travel; "
                f"choose one or more of {', '.join(DTYPES)}."
            )
        if len(self.max_shape) > MAX_RANK or any(
            isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in self.max_shape
        ):
            raise ConfigurationError(
                f"tensor '{self.name}' has max_shape {self.max_shape}; give at most {MAX_RANK} integers of 0 or more."
            )
        if len(self.fixed_dimensions) != len(self.max_shape):
            raise ConfigurationError(
                f"tensor '{self.name}' has {len(self.max_shape)} dimensions in max_shape but "
                f"{len(self.fixed_dimensions)} in fixed; give one flag for each dimension."
            )

    @property
    def fixed_dimensions(self) -> tuple[bool, ...]:
        """One flag for each dimension: must it equal `max_shape`?"""
        return tuple(self.fixed) if self.fixed is not None else (False,) * len(self.max_shape)

    @property
    def max_bytes(self) -> int:
        """The bytes of the largest tensor that fits."""
        return math.prod(self.max_shape) * max(dtype.itemsize for dtype in self.dtypes)

    def check(self, tensor: TensorHeader, where: str) -> None:
        """Raise `FrameError` unless the announced tensor fits this specification."""
        dtype = DTYPES.get(tensor.dtype)
        if dtype is None or dtype not in self.dtypes:
            agreed = ", ".join(DTYPE_NAMES[dtype] for dtype in self.dtypes)
            raise FrameError(
                f"tensor '{tensor.name}' of {where} has dtype {tensor.dtype[:40]}, but {agreed} was agreed; cast it."
            )
        fits = len(tensor.shape) == len(self.max_shape) and all(
            size == bound if fixed else 0 <= size <= bound
            for size, bound, fixed in zip(tensor.shape, self.max_shape, self.fixed_dimensions, strict=True)
        )
        if not fits:
            bounds = ", ".join(
                f"{'=' if fixed else '<='}{bound}"
                for bound, fixed in zip(self.max_shape, self.fixed_dimensions, strict=True)
            )
            raise FrameError(
                f"tensor '{tensor.name}' of {where} has shape {tensor.shape}, but ({bounds}) was agreed; "
                "send less at once, or agree larger bounds when the session is opened."
            )
        expected = math.prod(tensor.shape) * dtype.itemsize
        if tensor.num_bytes != expected:
            raise FrameError(
                f"tensor '{tensor.name}' of {where} announces {tensor.num_bytes} bytes, but {tensor.dtype} of shape "
                f"{tensor.shape} takes {expected}; the sender lies or is broken."
            )


@dataclass(frozen=True)
class OperationSpec:
    """Say which tensors a call carries, and which its reply.

    Parameters
    ----------
    request, reply : tuple[TensorSpec, ...]
        Tensors of the call and of the answer to it.
    optional : frozenset[str]
        Names of tensors, in either, that may be absent.
    """

    request: tuple[TensorSpec, ...]
    reply: tuple[TensorSpec, ...]
    optional: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "request", tuple(self.request))
        object.__setattr__(self, "reply", tuple(self.reply))
        object.__setattr__(self, "optional", frozenset(self.optional))
        for side, specs in (("request", self.request), ("reply", self.reply)):
            names = [spec.name for spec in specs]
            if len(set(names)) != len(names):
                raise ConfigurationError(f"a {side} names the tensors {names}; give each tensor a name of its own.")
        strangers = self.optional - {spec.name for spec in (*self.request, *self.reply)}
        if strangers:
            raise ConfigurationError(f"optional names {sorted(strangers)}, which no tensor bears; correct the names.")


@dataclass(frozen=True)
class Agreement:
    """Hold all that may travel in a session; checked at both ends of every stream.

    Parameters
    ----------
    operations : Mapping[str, OperationSpec]
        The operations by name.
    max_header_bytes : int
        Longest header that is read, in bytes.
    chunk_bytes : int
        Longest gRPC message that a frame is cut into, in bytes; below gRPC's default limit of 4 MiB.
    max_calls_in_flight : int
        How many calls of one party may await their replies at once.

    Examples
    --------
    >>> hidden = TensorSpec("hidden_BTD", (torch.float32,), (8, 512, 1024))
    >>> agreement = Agreement({"forward": OperationSpec((hidden,), (hidden,))})
    >>> Agreement.from_json(agreement.to_json()) == agreement
    True
    """

    operations: Mapping[str, OperationSpec]
    max_header_bytes: int = field(default=65536, kw_only=True)
    chunk_bytes: int = field(default=1 << 20, kw_only=True)
    max_calls_in_flight: int = field(default=64, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "operations", dict(self.operations))
        for name in self.operations:
            _check_name(name, "an operation")
        _check_range("max_header_bytes", self.max_header_bytes, MIN_HEADER_BYTES, 1 << 24)
        _check_range("chunk_bytes", self.chunk_bytes, MIN_CHUNK_BYTES, MAX_CHUNK_BYTES)
        _check_range("max_calls_in_flight", self.max_calls_in_flight, 1, 1 << 16)

    @property
    def max_payload_bytes(self) -> int:
        """The tensor bytes of the largest frame that this agreement admits."""
        sides = [side for spec in self.operations.values() for side in (spec.request, spec.reply)]
        return max((sum(tensor.max_bytes for tensor in side) for side in sides), default=0)

    @property
    def digest(self) -> str:
        """SHA-256 of this agreement: two parties whose digests differ agreed on different things."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def check(self, header: Header) -> None:
        """Raise `FrameError` unless a frame with this header may travel; nothing is allocated for it.

        Raises
        ------
        FrameError
            Unknown operation; missing, unknown or repeated tensor; dtype, rank, dimension or byte count that was not
            agreed.
        """
        if header.kind not in (Kind.CALL, Kind.REPLY):
            if header.tensors or header.payload_bytes:
                raise FrameError(
                    f"a frame of kind {header.kind.name} carries {len(header.tensors)} tensors and "
                    f"{header.payload_bytes} payload bytes; only calls and replies may carry any."
                )
            if header.operation not in (self.operations if header.kind is Kind.ERROR else ("",)):
                raise FrameError(
                    f"a frame of kind {header.kind.name} names the operation {header.operation[:80]!r}; an error names "
                    "one that was agreed, a notice and a goodbye none."
                )
            return
        where = f"{header.kind.name.lower()} '{header.operation}'"
        operation = self.operations.get(header.operation)
        if operation is None:
            raise FrameError(
                f"{where} was not agreed in this session; agreed are {sorted(self.operations)}. Name one of them."
            )
        specs = {spec.name: spec for spec in (operation.request if header.kind is Kind.CALL else operation.reply)}
        names = [tensor.name for tensor in header.tensors]
        missing = sorted(set(specs) - set(names) - operation.optional)
        unknown = sorted(set(names) - set(specs))
        if missing or unknown or len(set(names)) != len(names):
            raise FrameError(
                f"{where} carries the tensors {names[:16]}: missing {missing}, not agreed {unknown[:16]}; "
                f"carry each of {sorted(specs)} at most once (optional: {sorted(operation.optional)})."
            )
        for tensor in header.tensors:
            specs[tensor.name].check(tensor, where)
        announced = sum(tensor.num_bytes for tensor in header.tensors)
        if header.payload_bytes != announced:
            raise FrameError(
                f"{where} announces a payload of {header.payload_bytes} bytes, but its tensors take {announced}; "
                "the sender lies or is broken."
            )

    def to_json(self) -> str:
        """Return the agreement as canonical JSON text, fit for a Flower ConfigRecord."""
        operations = {
            name: {
                "request": [_spec_to_dict(spec) for spec in operation.request],
                "reply": [_spec_to_dict(spec) for spec in operation.reply],
                "optional": sorted(operation.optional),
            }
            for name, operation in self.operations.items()
        }
        return json.dumps(
            {
                "operations": operations,
                "max_header_bytes": self.max_header_bytes,
                "chunk_bytes": self.chunk_bytes,
                "max_calls_in_flight": self.max_calls_in_flight,
            },
            sort_keys=True,
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> "Agreement":
        """Read back what `to_json` wrote.

        Raises
        ------
        ConfigurationError
            When the text is not an agreement.
        """
        try:
            loaded = json.loads(text)
            operations = {
                name: OperationSpec(
                    request=tuple(_spec_from_dict(spec) for spec in operation["request"]),
                    reply=tuple(_spec_from_dict(spec) for spec in operation["reply"]),
                    optional=frozenset(operation["optional"]),
                )
                for name, operation in loaded["operations"].items()
            }
            return cls(
                operations,
                max_header_bytes=loaded["max_header_bytes"],
                chunk_bytes=loaded["chunk_bytes"],
                max_calls_in_flight=loaded["max_calls_in_flight"],
            )
        except ConfigurationError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigurationError(
                f"the text {text[:80]!r} is no agreement ({type(error).__name__}: {error}); "
                "pass on unchanged what Agreement.to_json() returned."
            ) from None


def _spec_to_dict(spec: TensorSpec) -> dict[str, object]:
    return {
        "name": spec.name,
        "dtypes": [DTYPE_NAMES[dtype] for dtype in spec.dtypes],
        "max_shape": list(spec.max_shape),
        "fixed": list(spec.fixed_dimensions),
    }


def _spec_from_dict(loaded: Mapping[str, Sequence[int]]) -> TensorSpec:
    return TensorSpec(
        name=str(loaded["name"]),
        dtypes=tuple(DTYPES[str(name)] for name in loaded["dtypes"]),
        max_shape=tuple(loaded["max_shape"]),
        fixed=tuple(bool(flag) for flag in loaded["fixed"]),
    )


def _check_name(name: str, what: str) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise ConfigurationError(f"{what} is called {name!r}; choose 1 to {MAX_NAME_CHARS} printable characters.")


def _check_range(what: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigurationError(f"{what} is {value!r}; choose an integer from {low} to {high}.")
