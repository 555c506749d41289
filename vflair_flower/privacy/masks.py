"""Numbers that add up and masks that cancel: the arithmetic of secure aggregation, for parties and strategy alike.

V length of a party's vector: a 1, the weight, then weight x array values and weight x metrics.  Vectors are uint64
``[V]`` in the ring modulo 2^64.  Invariant: everything here is exact but one rounding to fixed point per number.

Flower's own SecAgg+ draws masks from numpy's RandomState with a seed of 32 bits, which whoever has the masked vector
can try out.  Here a mask is a ChaCha20 stream under a key of 256 bits, which HKDF makes of the shared secret, the job,
the round and the two parties.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from vflair_flower.errors import ConfigurationError, SessionError
from vflair_flower.secagg_settings import SecAggSettings

Vector = NDArray[np.uint64]
Arrays = dict[str, NDArray[np.floating]]
_KEY_BYTES = 32
_HEAD = 2  # the 1 and the weight


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What stands where in a vector; the same at all parties.

    Parameters
    ----------
    arrays : tuple of (name, shape, dtype)
        In the order in which they are flattened.
    metrics : tuple of str
        Names of the metrics, sorted.
    """

    arrays: tuple[tuple[str, tuple[int, ...], str], ...]
    metrics: tuple[str, ...] = ()

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[np.floating]], metrics: Mapping[str, float]) -> "Layout":
        """Return the layout of a party's arrays and metrics."""
        return cls(
            arrays=tuple((name, array.shape, str(array.dtype)) for name, array in sorted(arrays.items())),
            metrics=tuple(sorted(metrics)),
        )

    @property
    def size(self) -> int:
        """Length of the vector."""
        return _HEAD + sum(int(np.prod(shape)) for _, shape, _ in self.arrays) + len(self.metrics)

    def to_json(self) -> str:
        """Return it as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Layout":
        """Return what `to_json` wrote."""
        read = json.loads(text)
        arrays = tuple((str(name), tuple(map(int, shape)), str(dtype)) for name, shape, dtype in read["arrays"])
        return cls(arrays=arrays, metrics=tuple(map(str, read["metrics"])))


def encode(
    arrays: Mapping[str, NDArray[np.floating]],
    metrics: Mapping[str, float],
    *,
    weight: int,
    settings: SecAggSettings,
    parties: int,
) -> Vector:
    """Return a party's vector ``[V]``, not yet masked.

    Parameters
    ----------
    arrays, metrics
        What is to be averaged.
    weight : int
        The party's number of examples.
    settings : SecAggSettings
        The job's.
    parties : int
        How many vectors may be summed.

    Raises
    ------
    ConfigurationError
        For a number that the sum has no room for, or that is none.  It names the array and not the number: the error
        goes to the strategy.
    """
    if not 0 <= weight <= settings.max_weight:
        raise ConfigurationError(
            f"this party's num_examples is not between 0 and max_weight ({settings.max_weight}) of secure aggregation; "
            "raise max_weight."
        )
    bits = settings.fraction_bits(parties)
    values: list[tuple[str, NDArray[np.floating]]] = sorted(arrays.items())
    values += [(f"metric {name!r}", np.asarray([metrics[name]], dtype=np.float64)) for name in sorted(metrics)]
    parts = [np.asarray([1, weight], dtype=np.int64)]
    for name, array in values:
        if array.dtype.kind != "f":
            raise ConfigurationError(f"{name!r} is {array.dtype}, and only floating-point numbers are averaged.")
        flat = array.astype(np.float64).reshape(-1)
        if not np.all(np.abs(flat) <= settings.clip):  # also false for NaN
            raise ConfigurationError(
                f"{name} has a number beyond +-{settings.clip:g}, or one that is none, and the securely computed sum "
                "could wrap around. Nothing of it was sent. Raise secure_aggregation's clip, or train with a lower "
                "learning rate if training diverges."
            )
        # A power of two scales exactly; the one error is that of rint, at most half of the last bit.
        parts.append(np.rint(np.ldexp(flat, bits)).astype(np.int64) * weight)
    return np.concatenate(parts).view(np.uint64)


def decode(
    total: Vector, layout: Layout, *, summed: int, settings: SecAggSettings, parties: int
) -> tuple[Arrays, dict[str, float], int]:
    """Return the weighted means of arrays and metrics, and the sum of weights, from the sum of vectors.

    Parameters
    ----------
    total : Vector
        The sum, without masks.
    layout : Layout
        Of the vectors.
    summed : int
        How many vectors are in it.
    settings, parties
        As they were encoded with.

    Raises
    ------
    SessionError
        If the sum still has a mask, or nobody had an example.
    """
    signed = total.view(np.int64)
    if int(signed[0]) != summed:
        raise SessionError(
            f"the sum over {summed} parties does not come out of their masks: one of them masked with other keys than "
            "it gave in shares, or a vector was changed on the way. Nothing of it is used; run the round again."
        )
    weight = int(signed[1])
    if weight < 1:
        raise SessionError(f"the parties of the round have {weight} examples together; an average needs at least one.")
    means = np.ldexp(signed[_HEAD:].astype(np.float64) / weight, -settings.fraction_bits(parties))
    arrays: Arrays = {}
    start = 0
    for name, shape, dtype in layout.arrays:
        end = start + int(np.prod(shape))
        arrays[name] = means[start:end].reshape(shape).astype(dtype)
        start = end
    metrics = {name: float(mean) for name, mean in zip(layout.metrics, means[start:], strict=True)}
    return arrays, metrics, weight


def derive(secret: bytes, *words: str | int) -> bytes:
    """Return a key of 256 bits for one purpose: HKDF-SHA256 of the secret, bound to `words`."""
    info = json.dumps(["vflair-flower secure aggregation", *words]).encode()
    return HKDF(algorithm=hashes.SHA256(), length=_KEY_BYTES, salt=None, info=info).derive(secret)


def mask_of(key: bytes, size: int) -> Vector:
    """Return the mask ``[size]`` of a key: its ChaCha20 stream, read as little-endian numbers.

    The nonce is fixed because a key makes one mask and no other.
    """
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(8 * size)), dtype="<u8").astype(np.uint64)
