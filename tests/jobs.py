"""Jobs of a tiny classifier that parties train together: what they agree on, who they are, what they end with."""

from pathlib import Path
from typing import Any

import torch
from flwr.serverapp.strategy import FedAvg

from tests.tiny import LABELS
from vflair_flower.partition import PartitionPlan
from vflair_flower.settings import LoraSettings, OptimizerSettings, TaskSettings
from vflair_flower.spec import SplitSpec
from vflair_flower.strategies import SplitLearning


def job_spec(model: str, **changes: Any) -> SplitSpec:
    """Return a job in Head-Body-Tail, with LoRA of rank 2 on every segment; `changes` are other fields of the spec."""
    usual: dict[str, Any] = {
        "plan": PartitionPlan(head_blocks=1, tail_blocks=1),
        "task": TaskSettings(label_names=LABELS),
        "tuning": LoraSettings(rank=2),
        "optimizer": OptimizerSettings(learning_rate=5e-3),
    }
    return SplitSpec(model=model, **{**usual, **changes})


def job_nodes(folder: Path, count: int, **config: Any) -> list[dict[str, Any]]:
    """Return the configurations of a job's data parties, which keep their state below `folder`."""
    common = {"num-partitions": count, "state-dir": str(folder / "state"), **config}
    return [{"partition-id": i, **common} for i in range(count)]


def fedavg(**settings: Any) -> FedAvg:
    """Return an aggregator that goes on with any one party."""
    return FedAvg(**{"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1, **settings})


def state_of(strategy: SplitLearning) -> dict[str, torch.Tensor]:
    """Return all that was trained: heads and tails averaged, and the body where the strategy has it."""
    return {**strategy.arrays.to_torch_state_dict(), **(strategy.body_state() or {})}
