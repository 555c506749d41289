"""Which rows are in which step: a pure function of (seed, party, step).

It holds no iterator state, so a resumed run sees the same batches as one that was never stopped.

Invariant: every epoch visits every row exactly once.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vflair_flower.errors import ConfigurationError

_GROUPED_BATCHES = 16


@dataclass(frozen=True, kw_only=True)
class BatchOrder:
    """Which rows are in which step, without end: each epoch is a new permutation, its last batch may be smaller.

    Parameters
    ----------
    num_rows : int
        How many rows the party has.
    batch_size : int
        Rows per step.
    seed : int
        The run's seed.
    party : str
        Name of the party, so that parties do not walk in step.
    lengths : tuple of int
        Tokens of each row, to group rows of like length; empty does not.  Batches of like length need little padding,
        and on short texts of mixed length half of the arithmetic is padding.  Grouping is within `_GROUPED_BATCHES`
        batches of the epoch's permutation, and whole batches are shuffled again.

    Raises
    ------
    ConfigurationError
        A value is out of its range.

    Examples
    --------
    >>> order = BatchOrder(num_rows=5, batch_size=2, seed=1, party="north")
    >>> order.steps_per_epoch, sorted(order.indices(0) + order.indices(1) + order.indices(2))
    (3, [0, 1, 2, 3, 4])
    """

    num_rows: int
    batch_size: int
    seed: int
    party: str
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for setting, value, least in (
            ("num_rows", self.num_rows, 1),
            ("batch_size", self.batch_size, 1),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise ConfigurationError(
                    f"{setting} is {value} for party {self.party!r}, so there would be no batches. "
                    f"Choose at least {least}."
                )

        if self.lengths and len(self.lengths) != self.num_rows:
            raise ConfigurationError(
                f"there are {len(self.lengths)} lengths for {self.num_rows} rows of party {self.party!r}. "
                "Give one length per row, or none."
            )

    @property
    def steps_per_epoch(self) -> int:
        """How many steps visit every row once."""
        return -(-self.num_rows // self.batch_size)

    def epoch(self, step: int) -> int:
        """Return the epoch that global step `step` belongs to; both count from 0."""
        if step < 0:
            raise ConfigurationError(f"step is {step}, but steps count from 0. Pass the global step.")
        return step // self.steps_per_epoch

    def indices(self, step: int) -> list[int]:
        """Return the rows of global step `step`, a pure function of (seed, party, step) and the sizes.

        Parameters
        ----------
        step : int
            Counted from 0 over the whole run, not per round or epoch.

        Returns
        -------
        list of int
            Between 1 and `batch_size` places of rows.

        Raises
        ------
        ConfigurationError
            `step` is negative.
        """
        epoch = self.epoch(step)
        # Python's own hash() of a string differs from process to process.
        party = int.from_bytes(hashlib.sha256(self.party.encode()).digest()[:16], "big")
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch, party]))
        permutation = generator.permutation(self.num_rows)
        if self.lengths:
            permutation = self._grouped(permutation, generator)
        start = (step % self.steps_per_epoch) * self.batch_size
        return [int(place) for place in permutation[start : start + self.batch_size]]

    def _grouped(self, permutation: npt.NDArray[np.int64], generator: np.random.Generator) -> npt.NDArray[np.int64]:
        """Sort stretches of the permutation by length, then shuffle whole batches; a smaller one stays last."""
        lengths = np.asarray(self.lengths)
        stretch = _GROUPED_BATCHES * self.batch_size
        parts = [permutation[i : i + stretch] for i in range(0, self.num_rows, stretch)]
        grouped = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
        full = self.num_rows // self.batch_size
        batches = grouped[: full * self.batch_size].reshape(full, self.batch_size)
        return np.concatenate([batches[generator.permutation(full)].reshape(-1), grouped[full * self.batch_size :]])
