"""Who has which rows in the simulated job: one data set, dealt to the parties; in a deployment each has its own."""

from functools import lru_cache

from simulations.settings import JobSettings
from vflair_flower.clients import PartyRows
from vflair_flower.settings import TaskSettings
from vflair_flower.tasks import DealSettings, Example, TaskDataset, TextDataset, deal, load_rows

JobData = TextDataset | TaskDataset[Example]


def load_dataset(settings: JobSettings) -> JobData:
    """Load the job's data set whole: texts with labels, or one of the catalogue's if the job names a task."""
    return load_rows(
        settings.data,
        task=settings.task,
        text_column=settings.text_column,
        label_column=settings.label_column,
        max_rows=settings.max_rows,
        seed=settings.seed,
        base_dir=settings.base,
    )


def task_of(data: JobData) -> TaskSettings:
    """Return the task that a data set is for."""
    return TaskSettings(kind=data.kind, label_names=data.label_names)


def rows_of_party(settings: JobSettings, index: int) -> PartyRows:
    """Return the rows dealt to party `index` (from 0)."""
    return _dealt(settings)[index]


@lru_cache(maxsize=2)
def _dealt(settings: JobSettings) -> tuple[PartyRows, ...]:
    data = load_dataset(settings)
    iid = DealSettings(kind="iid", seed=settings.seed)
    train = deal(data.splits["train"], settings.parties, settings.deal_settings())
    # Held-out rows are dealt evenly, whatever the training rows are: every party asks the same of the model.
    validation = deal(data.splits["validation"], settings.parties, iid)
    test = deal(data.splits["test"], settings.parties, iid) if data.splits.get("test") else [()] * settings.parties
    return tuple(
        PartyRows(train=train[i], validation=validation[i], test=test[i], label_names=data.label_names)
        for i in range(settings.parties)
    )
