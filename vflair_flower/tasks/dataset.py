"""What a data set is here: examples in splits, names for its labels, and the secrets planted in it.

These are values, not loaders: `rows.py` and `loading.py` read them from folders and hubs, `messages.py` makes them up.

K labels; a row's `label` is an int in 0..K-1.
Invariant: a data set that exists has known splits, none of them empty, examples that fit its task, every label in
0..K-1, and ids unique per split.  A `TextDataset` has train and validation rows too.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Generic, Literal

from vflair_flower.errors import DataError
from vflair_flower.settings import TaskKind
from vflair_flower.tasks.examples import Example, ExampleT, NumberRow, PromptRow, Row, SpanRow

__all__ = ["SPLITS", "Row", "Secret", "SecretKind", "TaskDataset", "TextDataset"]

SPLITS = ("train", "validation", "test")

SecretKind = Literal["account", "order", "person", "sum"]

_EXAMPLES_OF: Mapping[TaskKind, tuple[type[Example], ...]] = {
    TaskKind.SEQUENCE_CLASSIFICATION: (Row,),
    TaskKind.SEQUENCE_REGRESSION: (NumberRow,),
    TaskKind.QUESTION_ANSWERING: (SpanRow,),
    TaskKind.CAUSAL_LM: (PromptRow,),
    TaskKind.MASKED_LM: (Row, NumberRow, SpanRow, PromptRow),
    TaskKind.SEQ2SEQ_LM: (PromptRow,),
    TaskKind.IMAGE_TEXT_TO_TEXT: (PromptRow,),
}


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
class TaskDataset(Generic[ExampleT]):
    """Examples per split, for any task.

    Parameters
    ----------
    name : str
        Short name for reports.
    source : str
        Where the examples come from, for instance a folder or a hub id.
    kind : TaskKind
        The task they are for.
    splits : mapping of str to tuple of examples
        Any of ``"train"``, ``"validation"`` and ``"test"``; none of them empty.
    label_names : tuple of str
        K different names, at least two, for a classification; empty for any other task.

    Raises
    ------
    DataError
        A split is missing, unknown or empty, an example is of another task, a label has no name, or an id comes twice.

    Examples
    --------
    >>> sums = (PromptRow("1 + 1 =", " 2", "a"),)
    >>> TaskDataset(name="sums", source="here", kind=TaskKind.CAUSAL_LM, splits={"test": sums}).train
    ()
    """

    name: str
    source: str
    kind: TaskKind
    splits: Mapping[str, tuple[ExampleT, ...]]
    label_names: tuple[str, ...] = ()

    needed_splits: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        unknown = sorted(set(self.splits) - set(SPLITS))
        if unknown:
            raise DataError(
                f"{self.source}: split {unknown[0]!r} is not one of {', '.join(SPLITS)}, so nobody would read it. "
                "Rename it."
            )
        self._check_label_names()
        for split in self.needed_splits:
            if split not in self.splits:
                raise DataError(f"{self.source}: there is no {split} split, and training needs one. Add it.")
        if not self.splits:
            raise DataError(f"{self.source}: there is no split at all, so nothing to do. Add one.")
        for split, rows in self.splits.items():
            self._check_rows(split, rows)

    def _check_label_names(self) -> None:
        if self.kind is not TaskKind.SEQUENCE_CLASSIFICATION:
            if self.label_names:
                raise DataError(
                    f"{self.source}: there are {len(self.label_names)} label names, but the task {self.kind.value!r} "
                    "has no classes. Leave them out."
                )
            return
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

    def _check_rows(self, split: str, rows: tuple[ExampleT, ...]) -> None:
        if not rows:
            raise DataError(f"{self.source}: the {split} split has no rows. Fill it, or leave a test split out.")
        seen: set[str] = set()
        for row in rows:
            if not isinstance(row, _EXAMPLES_OF[self.kind]):
                raise DataError(
                    f"{self.source}: row {row.id!r} of {split} is a {type(row).__name__}, which the task "
                    f"{self.kind.value!r} cannot use. It takes {_EXAMPLES_OF[self.kind][0].__name__}."
                )
            if isinstance(row, Row) and self.label_names and not 0 <= row.label < len(self.label_names):
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
        """K, the number of labels; 0 where the task has none."""
        return len(self.label_names)

    @property
    def train(self) -> tuple[ExampleT, ...]:
        """The rows to learn from; empty if the set is for testing only."""
        return self.splits.get("train", ())

    @property
    def validation(self) -> tuple[ExampleT, ...]:
        """The rows to choose settings by; never those that are reported on."""
        return self.splits.get("validation", ())

    @property
    def test(self) -> tuple[ExampleT, ...]:
        """The rows to report on; empty if there is no labelled test split."""
        return self.splits.get("test", ())


@dataclass(frozen=True, kw_only=True)
class TextDataset(TaskDataset[Row]):
    """Rows per split with the names of their labels: a classification that can be trained on.

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

    kind: TaskKind = TaskKind.SEQUENCE_CLASSIFICATION
    secrets: tuple[Secret, ...] = field(default=(), repr=False)

    needed_splits: ClassVar[tuple[str, ...]] = ("train", "validation")
