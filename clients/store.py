"""What a party keeps between rounds, on its own disk: one file per round with optimiser state and step.

Not here: the adapters, which travel with every Flower message.  A node's process may be new in every round, and another
one than before; files outlive it.  The last two rounds are kept, so that a job whose round broke off goes on from the
round before.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch

from vflair_flower.errors import CheckpointError

_KEPT_ROUNDS = 2


class PartyStore:
    """The files of one party in one job.

    Parameters
    ----------
    root : pathlib.Path
        The party's own folder for all jobs.
    job, party : str
        Whose files these are.
    """

    def __init__(self, root: Path, *, job: str, party: str) -> None:
        for name in (job, party):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise CheckpointError(f"{name!r} cannot name a folder; use letters, digits, '.', '_' and '-'.")
        self.folder = root / job / party

    def save(self, server_round: int, state: dict[str, Any]) -> None:
        """Write a round's state, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(server_round)
        draft = path.with_suffix(".part")
        torch.save(state, draft)
        os.replace(draft, path)
        for old in self._rounds():
            if old <= server_round - _KEPT_ROUNDS or old > server_round:
                self._path(old).unlink(missing_ok=True)

    def load(self, server_round: int, *, mapped: bool = False) -> dict[str, Any] | None:
        """Return the state after round `server_round`, or after the last one before it; None if there is none.

        A party that sat rounds out, or is new, has no file of the last round.  A mapped file's tensors are read from
        disk when they are looked at.
        """
        earlier = [r for r in self._rounds() if r <= server_round]
        if not earlier:
            return None
        path = self._path(max(earlier))
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:
            raise CheckpointError(
                f"the party's own state {path} cannot be read ({error}). Put the file back, or remove it to let this "
                "party's optimiser start anew."
            ) from error
        return state

    def has(self, server_round: int) -> bool:
        """Whether the party has ended this very round and kept its state."""
        return self._path(server_round).exists()

    def _path(self, server_round: int) -> Path:
        return self.folder / f"round-{server_round:05d}.pt"

    def _rounds(self) -> list[int]:
        return sorted(int(p.stem.removeprefix("round-")) for p in self.folder.glob("round-*.pt"))
