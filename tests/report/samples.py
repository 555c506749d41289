"""Results that never ran: a realistic one, the smallest that is allowed, and one that is too much."""

from vflair_flower.report import (
    AuditRow,
    ControlTraffic,
    DataSummary,
    Interval,
    MetricSummary,
    ModelSummary,
    PartySummary,
    PeakMemory,
    Result,
    RoundSummary,
    Sentence,
    TrafficEntry,
    TrafficSummary,
    observer_table,
)

HBT_FLOWS = [
    ("up", "forward", "hidden", "float32", (16, 64, 384), 3600, 312_000_000),
    ("up", "forward", "attention_mask", "int64", (16, 64), 3600, 1_625_000),
    ("up", "forward", "position_ids", "int64", (16, 64), 3600, 1_625_000),
    ("down", "forward", "hidden", "float32", (16, 64, 384), 3600, 312_000_000),
    ("up", "backward", "grad", "float32", (16, 64, 384), 1800, 205_000_000),
    ("down", "backward", "grad", "float32", (16, 64, 384), 1800, 205_000_000),
    ("up", "forward", "header", "", (), 3600, 900_000),
    ("down", "forward", "header", "", (), 3600, 700_000),
    ("up", "step", "header", "", (), 480, 90_000),
    ("down", "step", "header", "", (), 480, 60_000),
]
HT_FLOWS = [
    ("up", "forward", "hidden", "float32", (16, 64, 384), 900, 88_000_000),
    ("up", "forward", "attention_mask", "int64", (16, 64), 900, 460_000),
    ("down", "forward", "logits", "float32", (16, 8), 900, 403_200),
    ("up", "backward", "grad", "float32", (16, 8), 900, 403_200),
    ("down", "backward", "grad", "float32", (16, 64, 384), 900, 88_000_000),
]


def entries(flows=HBT_FLOWS, parties=("alpha",)):
    """Deal the flows out evenly over parties."""
    return tuple(
        TrafficEntry(
            party=party,
            peer="model-party",
            direction=direction,
            operation=operation,
            tensor=tensor,
            dtype=dtype,
            max_shape=shape,
            messages=messages // len(parties),
            bytes=size // len(parties),
        )
        for party in parties
        for direction, operation, tensor, dtype, shape, messages, size in flows
    )


def audit_rows(name="vmi"):
    """One attack that read much, with secrets and two sentences."""
    return (
        AuditRow(
            attack=name,
            adversary="model-party",
            cut="HBT 1|4|1",
            knowledge="public",
            metric="position_accuracy",
            value=0.93,
            interval=_interval(0.9, 0.95, "bootstrap over rows"),
            chance=0.02,
            n=24,
            seconds=12.5,
            planted_secrets=9,
            found_secrets=7,
            sentences=(
                Sentence(true="my card <b>4711</b> is gone", found="my card <b>4711</b> is late"),
                Sentence(true="call me", found=""),
            ),
        ),
    )


def _interval(low, high, method="Wilson"):
    return Interval(low=low, high=high, confidence=0.95, method=method)


def _party(name, *, rows, owns, held, trained, memory, metric=None, role="data party", process=None):
    peak = PeakMemory(**dict(zip(("parameters", "gradients", "optimizer", "activations"), memory, strict=True)))
    return PartySummary(
        name=name,
        role=role,
        rows=rows,
        owns=owns,
        parameters_held=held,
        parameters_trained=trained,
        peak_memory_bytes=peak.total,
        peak_memory=peak,
        process_peak_bytes=process,
        metric=metric,
    )


def _round(number, loss, metric, *, unsplit=True, lost=(), seconds=None):
    seconds = (
        seconds
        if seconds is not None
        else {"train": 24.5 + number % 2, "evaluate": 4.1, "aggregate": 1.2, "checkpoint": 0.6}
    )
    return RoundSummary(
        round=number,
        steps=150,
        loss=loss,
        unsplit_loss=loss + 0.0004 * number if unsplit else None,
        metric=metric,
        unsplit_metric=metric + 0.003 if unsplit else None,
        seconds=seconds,
        tokens=62_400,
        tokens_per_s=2_450.0,
        sent_bytes=206_000_000,
        lost_parties=tuple(lost),
    )


def full_result(**changes):
    """Four companies and a model party, five rounds, with the unsplit model beside it."""
    names = ("Alder Bank", "Birch Insurance", "Cedar Telecom", "Dogwood Energy")
    ledger = entries(parties=names)
    control = ControlTraffic(bytes=14_200_000, messages=40)
    model = ModelSummary(
        name="MiniLM",
        family="bert",
        num_blocks=6,
        parameters=22_861_959,
        partition="HBT",
        head_blocks=1,
        body_blocks=4,
        tail_blocks=1,
        tuning="LoRA r=8",
        trainable_parameters=150_151,
    )
    owns = "embedding, blocks 0-0, 5-5, task head"
    memory = (61_600_000, 610_000, 1_220_000, 48_300_000)
    fields = {
        "run_id": "2025-01-31_1200_hbt",
        "created": "2025-01-31T12:00:00+00:00",
        "duration_s": 163.4,
        "status": "completed",
        "settings": {
            "job": "fine-tune",
            "partition": "HBT",
            "head_blocks": 1,
            "tail_blocks": 1,
            "rounds": 5,
            "batch_size": 16,
            "learning_rate": 0.001,
            "lora_rank": 8,
            "body": "synchronous",
            "defence": None,
            "resume": False,
            "data": "banking-messages",
        },
        "seed": 1,
        "versions": {
            "vflair_flower": "0.1.0",
            "flwr": "1.41.0",
            "torch": "2.8.0",
            "transformers": "5.20.0",
            "peft": "0.19.0",
        },
        "model": model,
        "data": DataSummary(
            name="messages to customer service",
            partition="iid",
            classes=8,
            rows={"train": 2400, "validation": 300, "test": 600},
            evaluated_on="test",
        ),
        "metric": MetricSummary(
            name="accuracy",
            split=0.961,
            unsplit=0.963,
            majority=0.14,
            chance=1 / 8,
            n=600,
            split_interval=_interval(0.943, 0.974),
            unsplit_interval=_interval(0.945, 0.975),
            difference=0.961 - 0.963,
            difference_interval=_interval(-0.011, 0.007, "paired bootstrap"),
        ),
        "rounds": tuple(
            _round(number, loss, metric)
            for number, loss, metric in zip(
                range(1, 6), (1.71, 0.82, 0.41, 0.27, 0.21), (0.62, 0.86, 0.93, 0.953, 0.957), strict=True
            )
        ),
        "traffic": TrafficSummary(total_bytes=1_039_150_000, messages=8_160, entries=ledger, control=control),
        "parties": (
            *(
                _party(
                    name,
                    rows=rows,
                    owns=owns,
                    held=15_400_000,
                    trained=52_300,
                    memory=memory,
                    metric=metric,
                    process=912_000_000,
                )
                for name, rows, metric in zip(names, (600, 610, 590, 600), (0.967, 0.953, 0.96, 0.964), strict=True)
            ),
            _party(
                "model-party",
                rows=None,
                owns="blocks 1-4",
                held=7_150_000,
                trained=97_800,
                memory=(28_600_000, 391_000, 782_000, 71_000_000),
                role="model party",
                process=1_204_000_000,
            ),
        ),
        "observers": observer_table(
            ledger,
            partition="HBT",
            num_blocks=6,
            head_blocks=1,
            tail_blocks=1,
            tls=False,
            loopback=True,
            adapters=names,
            control=control,
        ),
        "audit": audit_rows(),
    }
    return Result(**{**fields, **changes})


def minimal_result(**changes):
    """One company, one round, no unsplit model, Head-Tail, nothing else known."""
    fields = {
        "run_id": "small",
        "created": "2025-01-31T12:00:00Z",
        "duration_s": 4.2,
        "settings": {},
        "versions": {},
        "model": ModelSummary(
            name="tiny",
            family="gpt2",
            num_blocks=2,
            parameters=1000,
            partition="HT",
            head_blocks=0,
            body_blocks=2,
            tail_blocks=0,
            tuning="none",
            trainable_parameters=0,
        ),
        "data": DataSummary(name="toy", partition="iid", classes=2, rows={"train": 1, "test": 1}, evaluated_on="test"),
        "metric": MetricSummary(
            name="accuracy",
            split=1.0,
            unsplit=None,
            majority=1.0,
            chance=0.5,
            n=1,
            split_interval=_interval(0.2, 1.0),
            unsplit_interval=None,
            difference=None,
            difference_interval=None,
        ),
        "rounds": (_round(1, float("nan"), None, unsplit=False, seconds={}),),
        "traffic": TrafficSummary(total_bytes=0, messages=0, entries=(), control=ControlTraffic(bytes=0, messages=0)),
        "parties": (_party("solo", rows=1, owns="embedding", held=1, trained=0, memory=(0, 0, 0, 0)),),
        "observers": (),
        "audit": (),
    }
    return full_result(**{**fields, **changes})


def extreme_result(**changes):
    """Twenty companies, eighty blocks, sixty rounds, parties lost, terabytes."""
    names = tuple(f"Company number {index:02d} with a rather long name" for index in range(20))
    flows = [(*flow[:5], flow[5] * 100_000, flow[6] * 5_000) for flow in HBT_FLOWS]
    ledger = entries(flows, parties=names)
    control = ControlTraffic(bytes=9_000_000_000, messages=2400)
    fields = {
        "run_id": "extreme",
        "duration_s": 400_000.0,
        "model": ModelSummary(
            name="Large-70B",
            family="llama",
            num_blocks=80,
            parameters=70_553_706_496,
            partition="HBT",
            head_blocks=2,
            body_blocks=76,
            tail_blocks=2,
            tuning="LoRA r=16",
            trainable_parameters=200_000_000,
        ),
        "rounds": tuple(
            _round(number, 2.0 / number, min(0.95, 0.2 + number / 50), lost=names[:3] if number in (7, 31) else ())
            for number in range(1, 61)
        ),
        "traffic": TrafficSummary(
            total_bytes=sum(entry.bytes for entry in ledger), messages=2_000_000_000, entries=ledger, control=control
        ),
        "parties": (
            *(
                _party(
                    name,
                    rows=10_000_000,
                    owns="embedding, blocks 0-1, 78-79, final norm, task head",
                    held=5_524_000_000,
                    trained=9_000_000,
                    memory=(11_048_000_000, 18_000_000, 72_000_000, 6_000_000_000),
                    metric=0.9,
                )
                for name in names
            ),
            _party(
                "model-party",
                rows=None,
                owns="blocks 2-77",
                held=65_000_000_000,
                trained=182_000_000,
                memory=(130_000_000_000, 364_000_000, 1_456_000_000, 160_000_000_000),
                role="model party",
            ),
        ),
        "observers": observer_table(
            ledger,
            partition="HBT",
            num_blocks=80,
            head_blocks=2,
            tail_blocks=2,
            body_host="node",
            tls=True,
            adapters=names,
            control=control,
        ),
    }
    return full_result(**{**fields, **changes})
