"""One cell of the comparison: a method on one dealing with one seed; a message to a node, and a line of a file."""

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simulations.moe.choices import load_questions, measure_choices, perplexity, row_likelihoods
from simulations.moe.methods import Job, train
from simulations.moe.settings import MoeSettings
from simulations.moe.texts import load_texts
from vflair_flower.partition import load_tokenizer, resolve_model
from vflair_flower.settings import OptimizerSettings, TrainingSettings

_CURVE_SHARE = 4
"""Of the held-out rows, every so-manieth is measured after each round."""


@dataclass(frozen=True, kw_only=True, order=True)
class Cell:
    """What is trained."""

    seed: int
    partition: str
    parties: int
    method: str

    @property
    def name(self) -> str:
        """A name that is unique in a job."""
        return f"{self.method}/{self.parties}/{self.partition}/{self.seed}"


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """What a cell gave; `docs/experts.md` explains the fields."""

    method: str
    parties: int
    partition: str
    seed: int
    perplexity: float
    perplexity_by_party: list[float]
    own_perplexity: float
    choices: dict[str, dict[str, float]]
    curve: list[tuple[int, float]]
    memory: dict[str, int]
    tokens: int
    steps: int
    bytes_per_token: float
    bytes_per_token_and_layer: float
    seconds: float

    @property
    def cell(self) -> Cell:
        """What was trained."""
        return Cell(seed=self.seed, partition=self.partition, parties=self.parties, method=self.method)

    def to_json(self) -> str:
        """Return one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "CellResult":
        """Return what `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        return cls(**{**values, "curve": [(int(tokens), float(ppl)) for tokens, ppl in values["curve"]]})


def cells_of(settings: MoeSettings) -> list[Cell]:
    """Return all cells: centralised training once per seed, and nothing twice that one party makes the same."""
    cells = set()
    for seed in settings.seeds:
        for method in settings.methods:
            if method == "centralised":
                cells.add(Cell(seed=seed, partition="iid", parties=1, method=method))
                continue
            for partition in settings.partitions:
                for parties in settings.parties:
                    if parties > 1 or (method == "pc-moe" and partition == "iid"):
                        cells.add(Cell(seed=seed, partition=partition, parties=parties, method=method))
    return sorted(cells)


def run_cell(cell: Cell, settings: MoeSettings, model: str) -> CellResult:
    """Train and measure one cell."""
    texts = load_texts(settings.data_dir, settings.moe_rows, settings.moe_held_out_rows)
    source = resolve_model(model)
    tokenizer = load_tokenizer(source)
    largest = max(settings.parties)
    held_out = texts.all_held_out
    parts = largest if cell.method == "centralised" else cell.parties
    work_dir = Path(tempfile.mkdtemp(prefix="vflair-cell-"))
    try:
        job = Job(
            model=model,
            rows=tuple(texts.dealt(parts, cell.partition, cell.seed)),
            curve_rows=held_out[::_CURVE_SHARE],
            training=TrainingSettings(
                rounds=settings.moe_rounds,
                local_steps=settings.moe_steps // settings.moe_rounds,
                batch_size=settings.moe_batch_size // parts,
                evaluation_batch_size=32,
                max_tokens=settings.moe_max_tokens,
            ),
            optimizer=OptimizerSettings(learning_rate=settings.moe_learning_rate, warmup_fraction=0.05),
            seed=cell.seed,
            work_dir=work_dir,
            deadline_s=settings.deadline_s,
            wire_dtype=settings.moe_wire_dtype,
            local_tolerance=settings.moe_local_tolerance,
        )
        outcome = train(cell.method, job, tokenizer)
        own_rows = texts.dealt(cell.parties, cell.partition, cell.seed, held_out=True)
        found, own, choices = [], [], []
        for party, model_of in enumerate(outcome.models()):
            by_row = dict(
                zip(
                    [row.id for row in held_out],
                    row_likelihoods(model_of, tokenizer, held_out, settings.moe_max_tokens),
                    strict=True,
                )
            )
            found.append(perplexity(list(by_row.values())))
            own.append(perplexity([by_row[row.id] for row in own_rows[party]]))
            if settings.data_dir is not None and settings.moe_choice_rows:
                questions = load_questions(settings.data_dir, settings.moe_choice_rows)
                choices.append(measure_choices(model_of, tokenizer, questions, settings.moe_max_tokens))
        layers = int(model_of.config.get_text_config().num_hidden_layers)
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)
    per_token = outcome.sent_bytes / max(1, outcome.tokens)
    return CellResult(
        method=cell.method,
        parties=cell.parties,
        partition=cell.partition,
        seed=cell.seed,
        perplexity=_geometric(found),
        perplexity_by_party=found,
        own_perplexity=_geometric(own),
        choices=_mean(choices),
        curve=outcome.curve,
        memory={**outcome.memory.to_json(), "total": outcome.memory.total},
        tokens=outcome.tokens,
        steps=outcome.steps,
        bytes_per_token=per_token,
        bytes_per_token_and_layer=per_token / layers,
        seconds=outcome.seconds,
    )


def _geometric(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _mean(figures: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the mean over parties, set by set."""
    if not figures:
        return {}
    return {
        name: {key: sum(one[name][key] for one in figures) / len(figures) for key in first}
        for name, first in figures[0].items()
    }
