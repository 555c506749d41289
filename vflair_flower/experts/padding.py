"""Calls to hosts of one size: filled up, so that who watches sizes learns how many tokens a batch has, and little more.

T tokens of a pass, K experts per token, H experts of a layer at one host, U tokens and R rows that go there.
Filling is zeros behind what is real: tokens that no row names, and rows of the expert -1.  A host sees it and leaves it
aside, so it computes what it would without, and nothing is hidden from it.  (Made-up vectors would be told from states
just so: by their gradients, which must be zero, and by standing for no text.)  All hosts of a layer are called, also
those that nothing goes to.
Invariant: with ``"whole"`` a call's size depends on T and the placement alone; with ``"bucket"`` on two more numbers,
the halvings that all hosts of the layer share.
Not hidden: T itself, how often and when calls are made, and how long a host takes, which works on real rows alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

_ROWS = ("row", "expert", "weight", "weight_grad")


@dataclass(frozen=True, kw_only=True)
class Room:
    """To how many tokens and rows a call is filled up."""

    tokens: int
    rows: int


def rooms(
    padding: str, sent: Mapping[str, Room], held: Mapping[str, int], *, tokens: int, per_token: int
) -> dict[str, Room]:
    """Return to what the calls of one layer are filled up.

    Parameters
    ----------
    padding : str
        ``"whole"`` or ``"bucket"``, as in `ExpertSettings`.
    sent : mapping of str to Room
        By host: U and R.
    held : mapping of str to int
        By host: H.
    tokens, per_token : int
        T and K.

    Examples
    --------
    >>> some = {"a": Room(tokens=3, rows=3), "b": Room(tokens=0, rows=0)}
    >>> rooms("whole", some, {"a": 2, "b": 1}, tokens=8, per_token=2)["a"]
    Room(tokens=8, rows=16)
    >>> rooms("bucket", some, {"a": 2, "b": 1}, tokens=8, per_token=2)["b"]
    Room(tokens=4, rows=2)
    """
    most = {host: Room(tokens=tokens, rows=tokens * min(per_token, held[host])) for host in sent}
    if padding == "whole":
        return most
    fewer_tokens = _halvings((most[host].tokens, sent[host].tokens) for host in sent)
    fewer_rows = _halvings((most[host].rows, sent[host].rows) for host in sent)
    return {
        host: Room(tokens=_part(room.tokens, fewer_tokens), rows=_part(room.rows, fewer_rows))
        for host, room in most.items()
    }


def filled(tensors: Mapping[str, Tensor], room: Room | None, *, by_row: bool = False) -> dict[str, Tensor]:
    """Return what crosses, filled up; as it is without a room.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        A request's or reply's.
    room : Room or None
        To how much.
    by_row : bool
        Whether vectors are of rows, and not of tokens.
    """
    if room is None:
        return dict(tensors)

    def fill(name: str, tensor: Tensor) -> Tensor:
        length = room.rows if by_row or name in _ROWS else room.tokens
        value = -1 if name == "expert" else 0
        return nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, length - len(tensor)), value=value)

    return {name: fill(name, tensor) for name, tensor in tensors.items()}


def emptied(tensors: Mapping[str, Tensor], sent: Room) -> dict[str, Tensor]:
    """Return what crosses without its filling, in memory of its own; `sent` says how much is real."""
    real = {name: sent.rows if name in _ROWS else sent.tokens for name in tensors}
    return {name: tensor[: real[name]].clone() for name, tensor in tensors.items()}


def opened(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Room]:
    """Return a forward request without its filling, and to what it was filled up."""
    return emptied(tensors, real_part(tensors)), Room(tokens=len(tensors["hidden"]), rows=len(tensors["expert"]))


def real_part(tensors: Mapping[str, Tensor]) -> Room:
    """Return how many of a forward request's tokens and rows are real."""
    real_R = tensors["expert"] >= 0
    rows = len(real_R) if bool(real_R.all()) else int(real_R.int().argmin())
    named_R = tensors["row"][:rows]
    return Room(tokens=int(named_R.max()) + 1 if len(named_R) else 0, rows=rows)


def _halvings(pairs: Iterable[tuple[int, int]]) -> int:
    """Return how often the most can be halved so that all that is sent still goes in."""
    found, pairs = 0, list(pairs)
    while any(_part(most, found) > 1 for most, _ in pairs):
        if any(_part(most, found + 1) < sent for most, sent in pairs):
            break
        found += 1
    return found


def _part(most: int, halvings: int) -> int:
    return -(-most // (1 << halvings))
