"""A party's policy: what may leave it, to whom, at what precision, and covered by what (`policy.toml`).

    [[may_leave]]
    tensor = "hidden"                      # as docs/wire.md names it; "*" is any
    to = "model-party"                     # any by default
    operation = "forward"                  # any by default
    precision = "float16"                  # at most; any by default
    covered_by = ["dp:epsilon=8"]          # all of these; a bare name is that defence with any settings

    [[may_leave]]
    tensor = ["attention_mask", "position_ids"]

    [[may_leave]]
    tensor = "adapters"                    # what a Flower message carries, to whoever aggregates
    to = "server"
    covered_by = ["dp-sgd"]

What no entry allows stays: the sender's own link refuses it (`Policy.check`).  A policy is the party's own; nobody else
need know it.  Invariant: a tensor without its covers is not sent, whatever code tries to send it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated
from torch import Tensor

from vflair_flower.errors import ConfigurationError, PolicyError
from vflair_flower.named import read_name
from vflair_flower.session import covers_of
from vflair_flower.session.frame import Frame
from vflair_flower.session.header import DTYPE_NAMES, DTYPES
from vflair_flower.settings import as_type, read_toml

ANY = "*"
ADAPTERS = "adapters"
SERVER = "server"
PUBLIC = "public"
"""Marks what was computed from texts that are nobody's secret."""
_FORBID = ConfigDict(extra="forbid")


@validated(frozen=True, kw_only=True, config=_FORBID)
class MayLeave:
    """One permission.

    Parameters
    ----------
    tensor : str or tuple of str
        Names on the wire; ``"*"`` for any.
    to, operation : str
        To whom and in which operation; ``"*"`` for any.
    precision : str
        The dtype with the most bits that may be sent, such as ``"float16"``; empty for any.
    covered_by : tuple of str
        All that the tensor must have gone through.
    """

    tensor: str | tuple[str, ...]
    to: str = ANY
    operation: str = ANY
    precision: str = ""
    covered_by: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.precision and self.precision not in DTYPES:
            raise ValueError(f"precision is {self.precision!r}; known are {', '.join(DTYPES)}")

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names, also if it is one."""
        return (self.tensor,) if isinstance(self.tensor, str) else self.tensor

    def is_about(self, tensor: str, to: str, operation: str) -> bool:
        """Whether it speaks of such a tensor."""
        wanted = ((self.tensors, tensor), ((self.to,), to), ((self.operation,), operation))
        return all(ANY in named or one in named for named, one in wanted)

    def missing(self, dtype: torch.dtype, covers: Sequence[str]) -> str:
        """Say what keeps a tensor that it speaks of from leaving; empty if nothing does."""
        if self.precision and dtype.itemsize > DTYPES[self.precision].itemsize:
            return f"it is {DTYPE_NAMES.get(dtype, dtype)}, and at most {self.precision} may leave"
        lacking = [one for one in self.covered_by if not _covered(one, covers)]
        return f"it is not covered by {' and '.join(lacking)}" if lacking else ""


class Policy:
    """What may leave a party.

    Parameters
    ----------
    rules : iterable of MayLeave
        Permissions; a tensor may leave if one of them lets it.
    name : str
        Of the file, for errors.
    """

    def __init__(self, rules: Iterable[MayLeave], *, name: str = "the policy") -> None:
        self.rules = tuple(rules)
        self.name = name

    @classmethod
    def read(cls, path: Path) -> "Policy":
        """Read a policy file; raise ConfigurationError for anything that is none."""
        loaded = read_toml(path, "policy")
        odd = sorted(set(loaded) - {"may_leave"})
        if odd or not isinstance(loaded.get("may_leave"), list):
            raise ConfigurationError(
                f"the policy {str(path)!r} has {', '.join(map(repr, odd)) or 'no entry'}; write one or more "
                "[[may_leave]] tables, each with a tensor's name."
            )
        return cls(as_type(tuple[MayLeave, ...], loaded["may_leave"], path, "policy"), name=str(path))

    def check_names(self, known: Iterable[str]) -> None:
        """Raise ConfigurationError for a rule about a tensor that no job sends: it would be a slip of the pen."""
        names = {*known, ANY, ADAPTERS}
        odd = sorted({one for rule in self.rules for one in rule.tensors} - names)
        if odd:
            raise ConfigurationError(
                f"{self.name} speaks of the tensor {odd[0]!r}, which this job never sends; it sends "
                f"{', '.join(sorted(names - {ANY}))}. Correct the name."
            )

    def check(self, frame: Frame) -> None:
        """Raise PolicyError unless all tensors of a frame may leave; put it into `connect` as the guard."""
        for name, tensor in frame.tensors.items():
            self.check_tensor(name, tensor, to=frame.target, operation=frame.operation)

    def check_tensor(
        self, name: str, tensor: Tensor, *, to: str, operation: str, covers: Sequence[str] | None = None
    ) -> None:
        """Raise PolicyError unless a tensor may leave; `covers` stand in for those that it is marked with."""
        found = covers_of(tensor) if covers is None else tuple(covers)
        about = [rule for rule in self.rules if rule.is_about(name, to, operation)]
        reasons = [rule.missing(tensor.dtype, found) for rule in about]
        if "" in reasons:
            return
        why = "; ".join(reasons) or "no entry speaks of it"
        had = f" (it went through {', '.join(found)})" if found else ""
        raise PolicyError(
            f"the tensor {name!r} was to be sent to '{to}' by '{operation}', and {self.name} does not let it: {why}"
            f"{had}. Nothing was sent. Apply the defence, or change the policy."
        )

    def check_state(self, state: Mapping[str, Tensor], covers: Sequence[str]) -> None:
        """Raise PolicyError unless trained parameters may leave in a Flower message."""
        for tensor in state.values():
            self.check_tensor(ADAPTERS, tensor, to=SERVER, operation="reply", covers=covers)


@dataclass(frozen=True, kw_only=True)
class CoverRule:
    """What a job's own defences ask of what leaves a data party: each named tensor goes through all of them.

    Parameters
    ----------
    required : mapping of str to tuple of str
        By tensor, the covers that it must have.
    """

    required: Mapping[str, tuple[str, ...]]

    def check(self, frame: Frame) -> None:
        """Raise PolicyError for a tensor that went round a defence."""
        for name, tensor in frame.tensors.items():
            covers: Any = covers_of(tensor)
            lacking = [one for one in self.required.get(name, ()) if one not in covers]
            if lacking and covers != (PUBLIC,):
                raise PolicyError(
                    f"the tensor {name!r} was to be sent to '{frame.target}' by '{frame.operation}' without going "
                    f"through {' and '.join(lacking)}, which this job applies. Nothing was sent. Send hidden states by "
                    "running the session's model, not by calls of your own."
                )


def _covered(wanted: str, covers: Sequence[str]) -> bool:
    return wanted in covers or (":" not in wanted and wanted in map(read_name, covers))
