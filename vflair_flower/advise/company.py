"""What a company has, and what it accepts: read from a TOML file."""

from pathlib import Path

from vflair_flower.errors import ConfigurationError
from vflair_flower.settings import TaskKind, as_type, one_of, read_toml, settings

_KINDS = (TaskKind.SEQUENCE_CLASSIFICATION, TaskKind.CAUSAL_LM)


@settings
class Company:
    """A data party's means and limits.

    Parameters
    ----------
    name : str
        For the advice's headline.
    model : str
        A local folder, a hub id, or ``"minilm-l6"``.
    kind : str
        ``"sequence-classification"`` or ``"causal-lm"``.
    classes : int
        Of a classifier.
    data : str
        A folder of rows or data set, as of the main job; needed for a job file that runs, and to measure.
    task : str
        A data set's name in the catalogue, if ``data`` is one of these.
    parties : int
        Data parties in the job.
    memory_gb : float
        Of the data party's device, for its part of the model and what training needs, in 10^9 bytes.
    model_party_memory_gb : float
        The same at the model party.
    link_mbit : float
        Of the slower direction, in 10^6 bits per second.
    delay_ms : float
        One way, in milliseconds.
    step_seconds : float
        The longest that a step may wait for the network.
    batch_size, max_tokens : int
        Rows per party and step, and tokens per row.
    max_text_read : float
        The largest share of its texts' tokens that the model party may read, by the best attack measured.
    max_labels_read : float
        The largest score of an attack on its labels.
    max_points_lost : float
        What a defence may cost of the task, in points of 100.
    """

    name: str
    model: str = "minilm-l6"
    kind: str = TaskKind.SEQUENCE_CLASSIFICATION.value
    classes: int = 2
    data: str = "messages"
    task: str = ""
    parties: int = 4
    memory_gb: float
    model_party_memory_gb: float = 80.0
    link_mbit: float
    delay_ms: float
    step_seconds: float = 10.0
    batch_size: int = 8
    max_tokens: int = 64
    max_text_read: float = 1.0
    max_labels_read: float = 1.0
    max_points_lost: float = 5.0

    def __post_init__(self) -> None:
        one_of("kind", self.kind, tuple(kind.value for kind in _KINDS))
        for name in ("classes", "parties", "batch_size", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; choose 1 or more.")
        for name in ("memory_gb", "model_party_memory_gb", "link_mbit", "step_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; choose a number above 0.")
        if self.delay_ms < 0 or self.max_points_lost < 0:
            raise ConfigurationError(
                f"delay_ms is {self.delay_ms} and max_points_lost {self.max_points_lost}; choose 0 or more."
            )
        for name in ("max_text_read", "max_labels_read"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it is a share, from 0 to 1.")

    @classmethod
    def read(cls, path: Path) -> "Company":
        """Read a company's file; raise ConfigurationError for anything that is none."""
        return as_type(cls, {"name": path.stem, **read_toml(path, "company")}, path, "company")
