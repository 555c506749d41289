"""What a classification data set is here: rows in splits, names for its labels, and the secrets planted in it.

These are values, not loaders: `rows.py` reads them from folders and hubs, `messages.py` makes them up.

K labels; a row's `label` is an int in 0..K-1.
Invariant: a `TextDataset` that exists has train and validation rows, every label in 0..K-1, and ids unique per split.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from vflair_flower.errors import DataError

SPLITS = ("train", "validation", "test")

SecretKind = Literal["account", "order", "person", "sum"]


@dataclass(frozen=True, slots=True)
class Row:
    """One text and its label.

    Parameters
    ----------
    text : str
        The text as it was written.
    label : int
        Index into `TextDataset.label_names`.
    id : str
        Name of the row, unique in its split.
    """

    text: str
    label: int
    id: str


@dataclass(frozen=True, slots=True)
class Secret:
    """A planted value which stands word for word in one row, so that an audit can look for it elsewhere.

    Parameters
    ----------
    kind : SecretKind
        ``"account"`` and ``"order"`` values are unique in a data set, ``"person"`` and ``"sum"`` may come twice.
    value : str
        The exact characters in the text.
    row_id : str
        The row that holds it.
    """

    kind: SecretKind
    value: str
    row_id: str


@dataclass(frozen=True, kw_only=True)
class TextDataset:
    """Rows per split with the names of their labels.

    Parameters
    ----------
    name : str
        Short name for reports.
    source : str
        Where the rows come from, for instance a folder or a hub id.
    label_names : tuple of str
        K different names; at least two.
    splits : mapping of str to tuple of Row
        ``"train"``, ``"validation"`` and perhaps ``"test"``; none of them empty.
    secrets : tuple of Secret
        Planted values; empty unless the data set was generated.

    Raises
    ------
    DataError
        A split is missing, unknown or empty, a label has no name, or an id comes twice in a split.

    Examples
    --------
    >>> rows = (Row("Where is it?", 0, "a"), Row("It broke.", 1, "b"))
    >>> data = TextDataset(
    ...     name="two", source="here", label_names=("late", "broken"), splits={"train": rows, "validation": rows}
    ... )
    >>> data.num_labels, len(data.train), data.test
    (2, 2, ())
    """

    name: str
    source: str
    label_names: tuple[str, ...]
    splits: Mapping[str, tuple[Row, ...]]
    secrets: tuple[Secret, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.splits) - set(SPLITS))
        if unknown:
            raise DataError(
                f"{self.source}: split {unknown[0]!r} is not one of {', '.join(SPLITS)}, so nobody would read it. "
                "Rename it."
            )
        if len(self.label_names) < 2:
            raise DataError(
                f"{self.source}: the label names are {list(self.label_names)}; with fewer than two labels there is "
                "nothing to learn. Check the label column."
            )
        twice = [name for name, count in Counter(self.label_names).items() if count > 1]
        if twice:
            raise DataError(
                f"{self.source}: the label name {twice[0]!r} is given to two labels, so reports would mix them up. "
                "Give each label a name of its own."
            )
        for split in ("train", "validation"):
            if split not in self.splits:
                raise DataError(f"{self.source}: there is no {split} split, and training needs one. Add it.")
        for split, rows in self.splits.items():
            self._check_rows(split, rows)

    def _check_rows(self, split: str, rows: tuple[Row, ...]) -> None:
        if not rows:
            raise DataError(f"{self.source}: the {split} split has no rows. Fill it, or leave a test split out.")
        seen: set[str] = set()
        for row in rows:
            if not 0 <= row.label < len(self.label_names):
                raise DataError(
                    f"{self.source}: row {row.id!r} of {split} has label {row.label}, but there are names for "
                    f"0..{len(self.label_names) - 1} only. Correct the label or add the name."
                )
            if row.id in seen:
                raise DataError(
                    f"{self.source}: the id {row.id!r} comes twice in {split}, so results could not be traced to a "
                    "row. Make ids unique."
                )
            seen.add(row.id)

    @property
    def num_labels(self) -> int:
        """K, the number of labels."""
        return len(self.label_names)

    @property
    def train(self) -> tuple[Row, ...]:
        """The rows to learn from."""
        return self.splits["train"]

    @property
    def validation(self) -> tuple[Row, ...]:
        """The rows to choose settings by."""
        return self.splits["validation"]

    @property
    def test(self) -> tuple[Row, ...]:
        """The rows to report on; empty if there is no labelled test split."""
        return self.splits.get("test", ())
