"""What DP-SGD hides: `python -m simulations.dp_privacy path/to/sst2 --epsilons "0 8 3"`.

The main job is run once per epsilon (0: without DP), on the same rows with the same canaries among them: texts of
random tokens with random labels, each put in or left out by a coin of its own.  Afterwards members among the real rows
are told from others, and the canaries are guessed (Steinke et al., NeurIPS 2023, arXiv 2305.08846), which gives a lower
bound on epsilon that must stay below the account.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from simulations.in_process import run_main_job
from simulations.launch import read_defaults
from vflair_flower.attacks import HeadKnowledge, Knowledge, Surrogate, find_attack, run_attack
from vflair_flower.attacks.membership.audit import Canaries, audit_in_one_run, canary_scores, random_canaries
from vflair_flower.attacks.membership.victim import member_rehearsal
from vflair_flower.attacks.scoring import score
from vflair_flower.audit import Subject
from vflair_flower.errors import ConfigurationError
from vflair_flower.partition import load_tokenizer, resolve_model
from vflair_flower.report import Result
from vflair_flower.settings import TaskSettings
from vflair_flower.tasks import Row, TextDataset, load_text_dataset, padding_token_id

_ATTACKS = ("loss-threshold", "reference-loss")


@dataclass(frozen=True, kw_only=True)
class Line:
    """What one run came to.

    Parameters
    ----------
    asked : float
        Epsilon that the job was given; 0 for none.
    spent : float or None
        By the account; None without DP.
    metric : str
        Of the main job.
    score, low, high : float
        Its value on the validation rows, with its 95 % interval.
    members : mapping of str to sequence of float
        By attack, the area under the curve with its 95 % interval.
    right, guesses, canaries : int
        How many guesses about canaries were right, of how many.
    bound : float
        Epsilon is above it with 95 % confidence.
    best_bound : float
        What it would be, were all guesses right.
    """

    asked: float
    spent: float | None
    metric: str
    score: float
    low: float
    high: float
    members: dict[str, tuple[float, float, float]]
    right: int
    guesses: int
    canaries: int
    bound: float
    best_bound: float


def main(
    data: Annotated[Path, typer.Argument(help="Folder of train.jsonl and validation.jsonl, texts with labels.")],
    epsilons: Annotated[str, typer.Option(help="With blanks between; 0: without DP.")] = "0 8 3",
    model: Annotated[str, typer.Option(help="A model's name or folder.")] = "minilm-l6",
    rows: Annotated[int, typer.Option(help="Real rows to train on.")] = 2500,
    canaries: Annotated[int, typer.Option(help="Of which about half are trained on.")] = 400,
    compared: Annotated[int, typer.Option(help="Members, and as many others, that are to be told apart.")] = 600,
    passes: Annotated[float, typer.Option(help="Over all rows.")] = 16.0,
    batch_size: Annotated[int, typer.Option(help="Rows per step; under DP, expected.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 0.005,
    rank: Annotated[int, typer.Option(help="Of LoRA; 0 trains all parameters.")] = 8,
    max_tokens: Annotated[int, typer.Option(help="Per row.")] = 48,
    delta: Annotated[float, typer.Option(help="Of the account and of the bound.")] = 1e-5,
    seed: Annotated[int, typer.Option(help="Of rows, canaries and training.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves it to torch.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the figures.")] = None,
) -> None:
    """Train with and without DP-SGD, and measure what can be told of single rows."""
    if threads:
        torch.set_num_threads(threads)
    dataset = load_text_dataset(str(data.resolve()), base_dir=None)
    with tempfile.TemporaryDirectory(prefix="vflair-dp-") as folder:
        work = Path(folder)
        task = TaskSettings(kind=dataset.kind, label_names=dataset.label_names)
        train, others = _chosen(dataset, rows, compared, seed)
        config: dict[str, Any] = {
            **read_defaults(),
            "data": str(work / "data"),
            "model": model,
            "parties": 1,
            "rounds": 1,
            "passes": passes,
            "batch-size": batch_size,
            "learning-rate": learning_rate,
            "lora-rank": rank,
            "max-tokens": max_tokens,
            "seed": seed,
            "dp-delta": delta,
            "unsplit": False,
            "audit": "",
            "hub-bind": "inproc",
            "threads": 0,
            "base-dir": str(Path.cwd()),
            "runs": str(work / "runs"),
        }
        planted = _plant(work / "data", dataset, train, canaries, model, task, seed)
        lines = []
        for epsilon in (float(one) for one in epsilons.split()):
            lines.append(_line({**config, "dp-epsilon": epsilon}, epsilon, planted, train[:compared], others))
            Console().print(_table(lines))
    if out is not None:
        out.write_text(json.dumps({"settings": config, "lines": [asdict(line) for line in lines]}, indent=1))


def _chosen(dataset: TextDataset, rows: int, compared: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Return rows to train on, and as many others as are compared, of the same split."""
    pool = dataset.splits["train"]
    if not 1 <= compared <= rows or rows + compared > len(pool):
        raise ConfigurationError(
            f"{rows} rows are to be trained on, {compared} of them compared with as many others, and the data set has "
            f"{len(pool)} in train. Lower rows or compared."
        )
    order = np.random.default_rng([seed, 3]).permutation(len(pool)).tolist()
    chosen = [pool[place] for place in order[: rows + compared]]
    own = {row.text for row in chosen[:rows]}
    return chosen[:rows], [row for row in chosen[rows:] if row.text not in own]


def _plant(
    folder: Path, dataset: TextDataset, train: Sequence[Row], count: int, model: str, task: TaskSettings, seed: int
) -> Canaries:
    """Write the data set with canaries among its rows."""
    planted = random_canaries(count, load_tokenizer(resolve_model(model, Path.cwd())), task, num_tokens=12, seed=seed)
    splits = {"train": [*train, *planted.trained], "validation": dataset.splits["validation"]}
    folder.mkdir(parents=True)
    for name, own in splits.items():
        said = ({"id": row.id, "text": row.text, "label": task.label_names[row.label]} for row in own)  # type: ignore[union-attr]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in said))
    return planted


def _line(
    config: dict[str, Any], epsilon: float, planted: Canaries, members: Sequence[Row], others: Sequence[Row]
) -> Line:
    """Run the job once and measure it."""
    name = f"epsilon-{epsilon:g}"
    run_main_job({**config, "run-id": name})
    subject = Subject(run=str(Path(config["runs"]) / name))
    result = Result.read(subject.folder / "result.json")
    spec, tokenizer, trained = subject.spec, subject.tokenizer, subject.trained()
    before, after = (Surrogate(source, spec.plan, spec.task, seed=spec.seed) for source in (subject.public, trained))
    mixed = member_rehearsal(trained, spec, members, others, tokenizer, seed=spec.seed)
    knows = Knowledge(head=HeadKnowledge.PUBLIC, surrogate=before, pad_id=padding_token_id(tokenizer))
    told = {}
    for attack in _ATTACKS:
        attempt = run_attack(find_attack(attack), mixed.view, knows, seed=spec.seed)
        figure = next(iter(score(attempt.guess, mixed.truth, seed=spec.seed).values()))
        told[attack] = (figure.value, figure.low, figure.high)
    scores = canary_scores(
        planted, before.whole, after.whole, tokenizer, spec.task, max_tokens=spec.training.max_tokens
    )
    audit = audit_in_one_run(scores, planted, delta=float(config["dp-delta"]))
    spent = [party.privacy["epsilon"] for party in result.parties if party.privacy.get("epsilon")]
    return Line(
        asked=epsilon,
        spent=max(spent) if spent else None,
        metric=result.metric.name,
        score=result.metric.split,
        low=result.metric.split_interval.low,
        high=result.metric.split_interval.high,
        members=told,
        right=audit.correct,
        guesses=audit.guesses,
        canaries=audit.canaries,
        bound=audit.epsilon,
        best_bound=audit.epsilon_at_best,
    )


def _table(lines: Sequence[Line]) -> Table:
    heads = ("epsilon asked", "spent", lines[0].metric, *_ATTACKS, "canaries guessed right", "epsilon is above")
    table = Table(*heads)
    for line in lines:
        table.add_row(
            f"{line.asked:g}" if line.asked else "no DP",
            "-" if line.spent is None else f"{line.spent:.2f}",
            f"{line.score:.1%} ({line.low:.1%} to {line.high:.1%})",
            *(f"{value:.2f} ({low:.2f} to {high:.2f})" for value, low, high in line.members.values()),
            f"{line.right} of {line.guesses}",
            f"{line.bound:.2f} (at most {line.best_bound:.2f})",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
