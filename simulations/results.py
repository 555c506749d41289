"""Put a finished job's figures together: `result.json`, the merged adapter, the report."""

import importlib.metadata
import json
import os
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from simulations.baseline import Unsplit
from simulations.rows import JobData
from simulations.settings import JobSettings
from vflair_flower import __version__
from vflair_flower.control import RoundReport
from vflair_flower.memory import MemoryParts
from vflair_flower.partition import load_tokenizer, resolve_model
from vflair_flower.partition.footprint import Footprint
from vflair_flower.partition.structure import num_blocks
from vflair_flower.report import (
    ControlTraffic,
    DataSummary,
    Interval,
    MetricSummary,
    ModelSummary,
    PartySummary,
    PeakMemory,
    Result,
    RoundSummary,
    TrafficEntry,
    TrafficSummary,
    observer_table,
)
from vflair_flower.settings import TaskKind
from vflair_flower.spec import SplitSpec
from vflair_flower.strategies import SplitLearning
from vflair_flower.tasks import Interval as Estimate
from vflair_flower.tasks import (
    Row,
    TextDataset,
    encode_task,
    majority_accuracy,
    mean_interval,
    paired_bootstrap_difference,
)
from vflair_flower.training import commonest_token, metric_of

_METHODS = {"lora": "LoRA", "dora": "DoRA", "adalora": "AdaLoRA"}
_PACKAGES = ("flwr", "torch", "transformers", "peft", "safetensors", "numpy", "grpcio", "ray", "flwr-datasets")


def make_result(
    *,
    settings: JobSettings,
    spec: SplitSpec,
    data: JobData,
    strategy: SplitLearning,
    final_reports: list[RoundReport],
    unsplit: Unsplit | None,
    final_split: str,
    model_name: str,
    footprint: Footprint,
    run_id: str,
    duration_s: float,
) -> Result:
    """Return the job's result; see docs/result.md for the meaning of each field."""
    entries = tuple(
        TrafficEntry.from_json({**asdict(e), "max_shape": list(e.max_shape)}) for e in strategy.ledger.entries()
    )
    control = ControlTraffic(bytes=strategy.control_bytes, messages=strategy.control_messages)
    plan = spec.plan
    blocks = num_blocks(strategy.config)
    parties = sorted({report.party for report in strategy.reports.values() if report.role == "data party"})
    return Result(
        run_id=run_id,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        duration_s=duration_s,
        status="completed",
        settings=settings.to_flat(),
        seed=settings.seed,
        versions=versions(),
        model=ModelSummary(
            name=model_name,
            family=strategy.config.model_type,
            num_blocks=blocks,
            parameters=footprint.whole_parameters,
            partition=plan.mode.value,
            head_blocks=plan.head_blocks,
            body_blocks=blocks - plan.head_blocks - plan.tail_blocks,
            tail_blocks=plan.tail_blocks,
            tuning=_tuning(spec),
            trainable_parameters=footprint.whole_trained,
        ),
        data=DataSummary(
            name=data.name,
            partition=settings.data_partition,
            classes=len(data.label_names),
            rows={name: len(rows) for name, rows in data.splits.items()},
            evaluated_on=final_split,
        ),
        metric=_metric(settings, spec, data, final_reports, unsplit, final_split),
        rounds=_rounds(strategy, unsplit, metric_of(spec.task.kind)),
        traffic=TrafficSummary(
            total_bytes=strategy.ledger.total(),
            messages=sum(e.messages for e in entries if e.tensor == "header"),
            entries=entries,
            control=control,
        ),
        parties=_parties(strategy, spec, final_reports),
        observers=observer_table(
            entries,
            partition=plan.mode.value,
            num_blocks=blocks,
            head_blocks=plan.head_blocks,
            tail_blocks=plan.tail_blocks,
            body_host=settings.model_party,
            tls=False,
            loopback=True,
            adapters=parties,
            adapters_cover=_adapters_cover(spec, strategy),
            adapters_summed=spec.secure_aggregation is not None,
            control=control,
        ),
        audit=(),
    )


def _adapters_cover(spec: SplitSpec, strategy: SplitLearning) -> str | None:
    """Return what covers the adapters in Flower messages: DP-SGD of every data party, if no one can foresee it."""
    spent = [one.privacy for one in strategy.reports.values() if one.role == "data party"]
    if spec.privacy is None or spec.defence_seed or not all(one.get("epsilon") for one in spent):
        return None
    worst = max(one["epsilon"] for one in spent)
    return f"dp-sgd (epsilon {worst:.2f}, delta {spec.privacy.delta:g}, of a row)"


def point_latest(run_dir: Path) -> None:
    """Let runs/latest point to a run."""
    draft = run_dir.parent / f".latest-{run_dir.name}"
    draft.unlink(missing_ok=True)
    draft.symlink_to(run_dir.name, target_is_directory=True)
    os.replace(draft, run_dir.parent / "latest")


def write_secrets(path: Path, data: JobData) -> None:
    """Write down which secrets were planted, so that an audit can look for them; nothing where there are none."""
    if isinstance(data, TextDataset) and data.secrets:
        path.write_text(json.dumps([asdict(secret) for secret in data.secrets], indent=1))


def _metric(
    settings: JobSettings,
    spec: SplitSpec,
    data: JobData,
    reports: list[RoundReport],
    unsplit: Unsplit | None,
    final_split: str,
) -> MetricSummary:
    scores = {i: score for report in reports for i, score in zip(report.row_ids, report.scores, strict=True)}
    ids, seed = sorted(scores), settings.seed
    split_scores = [scores[i] for i in ids]
    split = mean_interval(split_scores, seed=seed)
    whole = difference = None
    if unsplit is not None:
        own = dict(zip(unsplit.final.row_ids, unsplit.final.scores, strict=True))
        unsplit_scores = [own[i] for i in ids]
        whole = mean_interval(unsplit_scores, seed=seed)
        difference = paired_bootstrap_difference(split_scores, unsplit_scores, seed=seed)
    majority, chance = _levels(settings, spec, data, final_split)
    return MetricSummary(
        name=metric_of(spec.task.kind),
        split=split.estimate,
        unsplit=None if whole is None else whole.estimate,
        majority=majority,
        chance=chance,
        n=len(ids),
        split_interval=_interval(split),
        unsplit_interval=None if whole is None else _interval(whole),
        difference=None if whole is None else split.estimate - whole.estimate,
        difference_interval=None if difference is None else _interval(difference),
    )


def _levels(
    settings: JobSettings, spec: SplitSpec, data: JobData, final_split: str
) -> tuple[float | None, float | None]:
    """Return what the commonest answer and a blind guess would reach, where such levels exist."""
    if spec.task.kind is TaskKind.SEQUENCE_CLASSIFICATION:
        known, asked = (
            [row.label for row in data.splits[split] if isinstance(row, Row)] for split in ("train", final_split)
        )
        return majority_accuracy(known, asked), 1 / len(data.label_names)
    if spec.task.kind is TaskKind.QUESTION_ANSWERING:
        return None, None
    tokenizer = load_tokenizer(resolve_model(spec.model, settings.base))
    train, held_out = (
        encode_task(spec.task.kind, data.splits[split], tokenizer, max_tokens=spec.training.max_tokens)
        for split in ("train", final_split)
    )
    return commonest_token(train, held_out), 1 / len(tokenizer)


def _interval(estimate: Estimate) -> Interval:
    return Interval(low=estimate.low, high=estimate.high, confidence=estimate.confidence, method=estimate.method)


def _rounds(strategy: SplitLearning, unsplit: Unsplit | None, metric: str) -> tuple[RoundSummary, ...]:
    rounds = []
    for index, record in enumerate(strategy.history):
        own = unsplit.rounds[index] if unsplit is not None and index < len(unsplit.rounds) else None
        rounds.append(
            RoundSummary(
                round=record.server_round,
                steps=record.steps,
                loss=record.train_metrics.get("loss"),
                unsplit_loss=own.loss if own else None,
                metric=record.evaluate_metrics.get(metric),
                unsplit_metric=own.score if own else None,
                seconds=record.seconds,
                tokens=record.tokens,
                tokens_per_s=record.tokens / max(record.seconds.get("train", 0.0), 1e-9),
                sent_bytes=record.sent_bytes,
                lost_parties=tuple(sorted(record.lost)),
            )
        )
    return tuple(rounds)


def _parties(strategy: SplitLearning, spec: SplitSpec, final_reports: list[RoundReport]) -> tuple[PartySummary, ...]:
    blocks = num_blocks(strategy.config)
    own_metric = {r.party: sum(r.scores) / len(r.scores) for r in final_reports if r.scores}
    rows = {card.party: card.rows.get("train") for card in strategy.cards.values()}
    summaries = []
    for report in sorted(strategy.reports.values(), key=lambda r: (r.role, r.party)):
        is_data = report.role == "data party"
        segment = spec.plan.data_party(blocks) if is_data else spec.plan.model_party(blocks)
        memory = MemoryParts(**report.memory)
        summaries.append(
            PartySummary(
                name=report.party,
                role="data party" if is_data else "model party",
                rows=rows.get(report.party) if is_data else None,
                owns=segment.describe(),
                parameters_held=report.parameters_held,
                parameters_trained=report.parameters_trained,
                peak_memory_bytes=memory.total,
                peak_memory=PeakMemory(**report.memory),
                process_peak_bytes=report.process_peak_bytes,
                metric=own_metric.get(report.party),
                privacy=report.privacy,
            )
        )
    return tuple(summaries)


def _tuning(spec: SplitSpec) -> str:
    lora = spec.tuning
    what = "all parameters" if lora is None else f"{_METHODS[lora.method]} r={lora.rank}"
    where = " at the data parties" if spec.scope == "local" else ""
    weights = [spec.weights.quantization] if spec.weights.quantization != "none" else []
    weights += [spec.weights.dtype] if spec.weights.dtype != "float32" else []
    return f"{what}{where}{' on ' + ' '.join(weights) if weights else ''}"


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    found = {"python": platform.python_version(), "vflair-flower": __version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
