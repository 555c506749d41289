"""All certificates at once, and the admission of families that have none yet.

Invariant: a family is in `FAMILIES` because its certificate is green, by this version's tests or just now.
"""

import threading
from collections.abc import Callable, Iterable

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from vflair_flower.certificate.compare import Certificate, certify
from vflair_flower.certificate.tiny import TINY, shrink
from vflair_flower.errors import ConfigurationError, ModelError
from vflair_flower.partition import Mode, ModelSource
from vflair_flower.partition.loading import tasks_of, without_reports
from vflair_flower.partition.sources import read_config, set_task
from vflair_flower.partition.structure import FAMILIES, Family, family_name, modes_of
from vflair_flower.settings import TaskSettings

_SHORT = {
    "sequence-classification": "classes",
    "sequence-regression": "number",
    "question-answering": "span",
    "masked-lm": "masked LM",
    "causal-lm": "causal LM",
    "seq2seq-lm": "seq2seq LM",
    "image-text-to-text": "image + text",
}
_one_at_a_time = threading.RLock()


def certify_all(
    names: Iterable[str] | None = None, *, progress: Callable[[Certificate], None] = lambda row: None
) -> list[Certificate]:
    """Certify every task and mode of the families of the table.

    Parameters
    ----------
    names : iterable of str, optional
        Rows of `TINY`; all by default.
    progress : callable
        Called with each row as it is done.

    Raises
    ------
    ConfigurationError
        If a name is unknown.
    """
    rows = []
    for name in TINY if names is None else names:
        if name not in TINY:
            raise ConfigurationError(f"the family is {name!r}; the table has {', '.join(TINY)}.")
        for row in _certify_tasks(name, TINY[name]()):
            progress(row)
            rows.append(row)
    return rows


def certify_model(
    config: PreTrainedConfig, *, progress: Callable[[Certificate], None] = lambda row: None
) -> list[Certificate]:
    """Certify a model's own architecture, shrunk; an unknown family whose rows are all green is known from then on.

    Raises
    ------
    ModelError
        If the configuration cannot be made small, or transformers has no task for it.
    """
    with _one_at_a_time:
        name = family_name(config)
        known = name in FAMILIES
        if name != config.model_type:
            raise ModelError(
                f"the model is a {config.model_type!r} around a {name!r}; models with more than a text model are cut "
                "only where the table has them (`vflair verify --all`). Choose one of those."
            )
        if not known:
            FAMILIES[name] = _likely_family(config)
        rows: list[Certificate] = []
        try:
            for row in _certify_tasks(name, shrink(config)):
                progress(row)
                rows.append(row)
        finally:
            if not known and not (rows and all(row.ok for row in rows)):
                del FAMILIES[name]
        if not rows:
            raise ModelError(f"transformers has no task class for the model family {name!r}. Choose another model.")
        return rows


def admit(config: PreTrainedConfig) -> None:
    """Let a model's family in: one that is known at once, one that is not if its certificate is green.

    Raises
    ------
    ModelError
        If the family fails; says where.
    """
    with _one_at_a_time:
        if family_name(config) in FAMILIES:
            return
        failed = [row for row in certify_model(config) if not row.ok]
    if failed:
        first = failed[0]
        raise ModelError(
            f"the model family {config.model_type!r} has no certificate: cut, it is not the model itself "
            f"({len(failed)} comparisons failed, the first for {first.task} in {first.mode}: "
            f"{first.remark or 'numbers differ'}). Training it would go wrong without a word. Choose a family of "
            "`vflair verify --all`."
        )


def load_admitted_config(source: ModelSource, task: TaskSettings) -> PreTrainedConfig:
    """Read a model's configuration for a task, as `load_config` does, and certify its family at first use."""
    config = read_config(source)
    admit(config)
    set_task(config, task, source.location)
    return config


def cells(rows: list[Certificate]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the matrix for people: the tasks, and per family one cell for each of them, Head-Tail first."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    lines = []
    for family in dict.fromkeys(row.family for row in rows):
        own = [row for row in rows if row.family == family]
        lines.append((family, [_cell([row for row in own if row.task == task]) for task in tasks]))
    return [_SHORT.get(task, task) for task in tasks], lines


def markdown(rows: list[Certificate]) -> str:
    """Return the matrix as a Markdown table."""
    tasks, lines = cells(rows)
    head = [f"| family | {' | '.join(tasks)} |", f"|---|{'---|' * len(tasks)}"]
    return "\n".join(head + [f"| {family} | {' | '.join(marks)} |" for family, marks in lines])


def _cell(rows: list[Certificate]) -> str:
    marks = {row.mode: _mark(row) for row in rows}
    return " / ".join(marks.get(mode, "–") for mode in Mode) if marks else "–"


def _mark(row: Certificate) -> str:
    if not row.ok:
        return "fails"
    return ("=" if row.max_gradient_error == 0 else "≈") + ("✎" if row.generation_equal else "")


def _certify_tasks(name: str, config: PreTrainedConfig) -> Iterable[Certificate]:
    with without_reports():
        for kind in tasks_of(config):
            for mode in modes_of(config):
                yield certify(name, config, kind, mode)


def _likely_family(config: PreTrainedConfig) -> Family:
    """Guess the row of an unknown family; the certificate decides whether the guess was right."""
    causal = any("CausalLM" in name or "LMHead" in name for name in config.architectures or ())
    return Family(encoder=type(config) in MODEL_FOR_MASKED_LM_MAPPING and not causal)
