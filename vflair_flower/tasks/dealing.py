"""Deal rows to parties: who has which rows, as even or as skewed as real companies may be.

This is the data partition, not the partition of the model.  The dealing itself is Flower Datasets'
(`IidPartitioner`, `DirichletPartitioner`, `LinearPartitioner`); with flwr-datasets 0.6.1 all three work offline on a
data set in memory, under numpy 2 and pandas 3.  Only the places of rows are handed to it, never a text.

Invariant: every row goes to exactly one party, and the same rows, parties and settings give the same dealing.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.tasks.examples import ExampleT, Row

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

DealKind = Literal["iid", "label-skew", "quantity-skew"]


@dataclass(frozen=True, kw_only=True)
class DealSettings:
    """How rows are dealt.

    Parameters
    ----------
    kind : {"iid", "label-skew", "quantity-skew"}
        ``"iid"``: shuffled, in equal parts. ``"label-skew"``: each label is shared out by a draw from a Dirichlet
        distribution (Hsu et al. 2019, arXiv:1909.06335), so that parties differ in labels and in size.
        ``"quantity-skew"``: shuffled, and the n-th party gets n shares, so the last one has most.
    alpha : float
        Concentration of the Dirichlet distribution; small is skewed, large is even. Read for label-skew only.
    min_rows : int
        The fewest rows a party may get.
    seed : int
        Fixes the shuffle and the draw.

    Raises
    ------
    ConfigurationError
        A value is out of its range.
    """

    kind: DealKind = "iid"
    alpha: float = 0.3
    min_rows: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(DealKind):
            raise ConfigurationError(
                f"kind is {self.kind!r}, which is no way to deal rows. Choose one of {', '.join(get_args(DealKind))}."
            )
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigurationError(
                f"alpha is {self.alpha}, but a Dirichlet distribution needs alpha > 0. "
                "Choose 0.1 (skewed) to 10 (even)."
            )
        if self.min_rows < 1:
            raise ConfigurationError(
                f"min_rows is {self.min_rows}, but a party without rows cannot train. Choose >= 1."
            )
        if not 0 <= self.seed < 2**32:
            raise ConfigurationError(f"seed is {self.seed}. Choose 0 <= seed < 2**32.")


def deal(rows: Sequence[ExampleT], num_parties: int, settings: DealSettings) -> list[tuple[ExampleT, ...]]:
    """Deal `rows` to `num_parties` parties.

    Parameters
    ----------
    rows : sequence of examples
        All rows, for instance the train split; of any task, but only those of a classification have a label to skew.
    num_parties : int
        How many parties.
    settings : DealSettings
        How.

    Returns
    -------
    list of tuple of examples
        The rows of each party, in shuffled order.

    Raises
    ------
    DataError
        Some party would get fewer than ``settings.min_rows`` rows, or labels should be skewed and there are none.
    ConfigurationError
        `num_parties` is below 1, or flwr-datasets is not installed.
    """
    if num_parties < 1:
        raise ConfigurationError(f"num_parties is {num_parties}, but somebody must hold the rows. Choose at least 1.")
    if len(rows) < num_parties * settings.min_rows:
        raise DataError(
            f"{len(rows)} rows cannot give {num_parties} parties min_rows = {settings.min_rows} each. Take more rows, "
            "fewer parties or a smaller min_rows."
        )
    try:
        from datasets import Dataset
        from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, LinearPartitioner
    except ImportError as error:
        raise ConfigurationError(
            "Dealing rows to parties needs the library 'flwr-datasets', which is not installed. "
            "Run pip install 'vflair-flower[simulation]'."
        ) from error
    partitioner: Partitioner
    if settings.kind == "iid":
        partitioner = IidPartitioner(num_parties)
    elif settings.kind == "quantity-skew":
        partitioner = LinearPartitioner(num_parties)
    else:
        partitioner = DirichletPartitioner(
            num_parties,
            partition_by="label",
            alpha=float(settings.alpha),
            min_partition_size=settings.min_rows,
            seed=settings.seed,
        )
    # Of these, only the Dirichlet partitioner shuffles: the others cut what they get into contiguous parts.
    order = np.random.default_rng(settings.seed).permutation(len(rows)).tolist()
    labels = _labels(rows) if settings.kind == "label-skew" else [0] * len(rows)
    partitioner.dataset = Dataset.from_dict({"place": order, "label": [labels[place] for place in order]})
    places = _places(partitioner, num_parties, settings)
    smallest = min(range(num_parties), key=lambda party: len(places[party]))
    if len(places[smallest]) < settings.min_rows:
        raise DataError(
            f"With kind {settings.kind!r}, party {smallest} of {num_parties} would get {len(places[smallest])} of "
            f"{len(rows)} rows, fewer than min_rows = {settings.min_rows}. Take more rows, fewer parties, a smaller "
            "min_rows or kind 'iid'."
        )
    assert sorted(place for party in places for place in party) == list(range(len(rows)))
    return [tuple(rows[place] for place in party) for party in places]


def _labels(rows: Sequence[ExampleT]) -> list[int]:
    labels: list[int] = []
    for row in rows:
        if not isinstance(row, Row):
            raise DataError(
                f"kind is 'label-skew', but row {row.id!r} is a {type(row).__name__} and has no label to skew by. "
                "Choose 'iid' or 'quantity-skew'."
            )
        labels.append(row.label)
    return labels


def _places(partitioner: "Partitioner", num_parties: int, settings: DealSettings) -> list[list[int]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the Dirichlet partitioner warns at each of its eleven draws
            return [list(partitioner.load_partition(party)["place"][:]) for party in range(num_parties)]
    except ValueError as error:  # no draw gave each party its minimum; a linear share rounds to no row at all
        what = f"alpha = {settings.alpha}" if settings.kind == "label-skew" else f"kind {settings.kind!r}"
        raise DataError(
            f"With {what} and seed {settings.seed}, no dealing to {num_parties} parties was found in which each gets "
            f"min_rows = {settings.min_rows} rows. Choose a larger alpha, a smaller min_rows, fewer "
            "parties or kind 'iid'."
        ) from error
