"""What the catalogue says of a data set: where it is, which of its parts are which splits, its columns and its prompt.

Values only; `catalogue.py` lists them and `loading.py` acts on them.

A *role* is what a column is for, whatever it is called: ``"text"``, ``"pair"``, ``"label"``, ``"question"`` and so on.
Invariant: an entry that exists has a test split, a role for all that its task needs, and a template of its roles.
"""

import string
from collections.abc import Mapping
from dataclasses import dataclass, field

from vflair_flower.errors import ConfigurationError
from vflair_flower.settings import TaskKind


@dataclass(frozen=True, slots=True)
class Part:
    """A split that the set itself has; `names` are what its files may be called, the hub's own name first."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A split that is cut from train: this share of its rows, by a seeded order of hashes."""

    share: float


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """One data set.

    Parameters
    ----------
    name, title : str
        What `load_task` takes, and what reports say.
    hub_id, hub_config : str
        On the Hugging Face hub; the configuration is empty if the set has one only.
    kind : TaskKind
        The task that is meant; a generation can be trained as ``causal-lm`` or ``seq2seq-lm``.
    splits : mapping of str to Part or HeldOut
        Where train, validation and test come from.
    columns : mapping of str to tuple of str
        For each role the names its column may have, the hub's own first.
    metrics : tuple of str
        Names in `vflair_flower.tasks.METRICS`, the main one first.
    citation : str
        Authors, year and where it was published.
    label_names : tuple of str
        Of a classification, in the order of the hub's labels.
    template, template_without_input : str
        The prompt, with roles in braces; the second where the role ``"input"`` is blank.
    response : str
        What follows the prompt, with roles in braces.
    group : tuple of str
        Roles or columns, the first that is there: rows that agree in it are never parted by a split.
    counted : bool
        Whether it is among the eighteen that a benchmark of split learning is expected to have.
    note : str
        What a reader of a figure has to know.
    real_rows : mapping of str to int
        How many real rows, per split, the tests load, encode and score; empty if they have made-up ones only.
    """

    name: str
    title: str
    hub_id: str
    hub_config: str = ""
    kind: TaskKind
    splits: Mapping[str, Part | HeldOut]
    columns: Mapping[str, tuple[str, ...]]
    metrics: tuple[str, ...]
    citation: str
    label_names: tuple[str, ...] = ()
    template: str = ""
    template_without_input: str = ""
    response: str = ""
    group: tuple[str, ...] = ()
    counted: bool = True
    note: str = ""
    real_rows: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "test" not in self.splits:
            raise ConfigurationError(f"{self.name}: there is no test split, so nothing could be reported. Name one.")
        needed = {
            TaskKind.SEQUENCE_CLASSIFICATION: {"text", "label"},
            TaskKind.SEQUENCE_REGRESSION: {"text", "label"},
            TaskKind.QUESTION_ANSWERING: {"question", "context", "answers"},
        }.get(self.kind, set())
        for template in (self.template, self.template_without_input, self.response):
            needed |= {name for _, name, _, _ in string.Formatter().parse(template) if name}
        missing = sorted(needed - set(self.columns) - {"answer"})
        if missing:
            raise ConfigurationError(f"{self.name}: no column has the role {missing[0]!r}. Add it to columns.")
        if self.kind.writes and not (self.template and self.response):
            raise ConfigurationError(f"{self.name}: a generation needs a template and a response. Add them.")

    @property
    def pair(self) -> bool:
        """Whether each row has two texts."""
        return "pair" in self.columns
