"""Candidates after what has been found so far: the step that every search from left to right takes.

B rows, R of them, T tokens, K candidates, D hidden.  Rows have no padding on the left, so no mask is needed: behind its
end a row is run on with any token, and nobody looks at what comes of it.
Invariant: a candidate's state is that of the whole prefix and the candidate, run at once (tests/attacks).
"""

import copy

import torch
from torch import Tensor

from vflair_flower.attacks.surrogate import Surrogate
from vflair_flower.errors import ConfigurationError
from vflair_flower.partition.caching import SplitCache
from vflair_flower.partition.structure import Part, family_name, family_of, stack_lengths

_RECURRENT = ("mamba",)
"""Families whose blocks keep no keys and values; their prefixes are run again."""


def is_causal(surrogate: Surrogate) -> bool:
    """Whether a token's state depends on nothing behind it."""
    config = surrogate.config
    return not family_of(config).encoder and Part.DECODER not in stack_lengths(config)


def refuse_encoders(surrogate: Surrogate, attack: str) -> None:
    """Raise ConfigurationError for a model in which every token sees every other one."""
    if not is_causal(surrogate):
        raise ConfigurationError(
            f"attack {attack!r} reads token after token, and the model ({family_name(surrogate.config)}) is "
            "bidirectional: a token's state depends on those behind it. Choose 'pia' or 'vmi', or a causal model."
        )


class Prefixes:
    """Rows of tokens found so far, all of the same length.

    Parameters
    ----------
    surrogate : Surrogate
        Whose head is run.
    positions_BT : Tensor
        Int64, the positions of each row's tokens, found or not.
    """

    def __init__(self, surrogate: Surrogate, positions_BT: Tensor) -> None:
        self._surrogate = surrogate
        self._positions_BT = positions_BT
        self._cache: SplitCache | None = None
        if surrogate.task.kind.writes and family_name(surrogate.config) not in _RECURRENT:
            self._cache = surrogate.head_cache()
        self.ids_BT = torch.zeros(positions_BT.shape[0], 0, dtype=torch.int64, device=positions_BT.device)
        """Int64, what has been found."""

    @property
    def length(self) -> int:
        """How many tokens each row has."""
        return self.ids_BT.shape[1]

    @torch.no_grad()
    def append(self, ids_BT: Tensor) -> Tensor:
        """Lengthen every row by some tokens; returns their states, [B, T, D]."""
        before = self.length
        self.ids_BT = torch.cat([self.ids_BT, ids_BT], dim=1)
        if self._cache is None:
            positions_BT = self._positions_BT[:, : self.length]
            return self._surrogate.head_of_ids(self.ids_BT, None, positions_BT)[:, before:]
        positions_BT = self._positions_BT[:, before : self.length]
        return self._surrogate.head_of_ids(ids_BT, None, positions_BT, cache=self._cache)

    @torch.no_grad()
    def states(self, rows_R: Tensor, candidates_RK: Tensor) -> Tensor:
        """Return the states that candidates have as next tokens of some rows, [R, K, D]."""
        count = candidates_RK.shape[1]
        chosen = rows_R.repeat_interleave(count)
        ids = candidates_RK.reshape(-1, 1)
        if self._cache is None:
            ids = torch.cat([self.ids_BT[chosen], ids], dim=1)
            hidden = self._surrogate.head_of_ids(ids, None, self._positions_BT[chosen, : self.length + 1])
        else:
            at = self._positions_BT[chosen, self.length : self.length + 1]
            hidden = self._surrogate.head_of_ids(ids, None, at, cache=_of_rows(self._cache, chosen))
        return hidden[:, -1].reshape(len(rows_R), count, -1)


def _of_rows(cache: SplitCache, rows: Tensor) -> SplitCache:
    """Return a cache of some rows, each as often as it is named; the one that is given stays as it is."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]  # layers put new tensors in place of theirs
    if cache.tokens:
        chosen.batch_select_indices(rows)
    return chosen
