"""A data party that trains a language model with a Trainer of its own, and the same Trainer's unsplit model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer

from simulations.local_grid import LocalGrid
from tests.jobs import fedavg, state_of
from tests.tiny import WORDS
from vflair_flower.clients import DataParty, PartyRows, PartySession, split_session
from vflair_flower.partition import (
    Mode,
    PartitionPlan,
    Segment,
    load_segment,
    load_tokenizer,
    make_trainable,
    resolve_model,
    trained_state,
)
from vflair_flower.partition.sources import load_config
from vflair_flower.partition.structure import num_blocks
from vflair_flower.settings import LoraSettings, OptimizerSettings, TaskKind, TaskSettings, TrainingSettings
from vflair_flower.spec import SplitSpec
from vflair_flower.strategies import HubSettings, SplitLearning
from vflair_flower.tasks import PromptRow

RATE = 5e-3
TASK = TaskSettings(kind=TaskKind.CAUSAL_LM)
HBT, HT = PartitionPlan(), PartitionPlan(mode=Mode.HT, head_blocks=1, tail_blocks=0)
PLANS = {"HBT": HBT, "HT": HT}
TEXTS = [" ".join(WORDS[(7 * i + j) % len(WORDS)] for j in range(3 + i % 6)) for i in range(18)]
MINE = {"grad_norm", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
MINE |= {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "total_flos"}
"""What a log says of one party's own part or of its speed."""


def spec_of(
    model: str, plan: PartitionPlan = HBT, *, schedule: str = "linear", max_grad_norm: float = 0.0, **settings: Any
) -> SplitSpec:
    return SplitSpec(
        model=model,
        plan=plan,
        task=TASK,
        tuning=LoraSettings(rank=4),
        optimizer=OptimizerSettings(learning_rate=RATE, schedule=schedule, max_grad_norm=max_grad_norm),
        training=TrainingSettings(rounds=1, batch_size=4, max_tokens=64),
        **settings,
    )


def rows_of(texts: list[str]) -> PartyRows:
    rows = tuple(PromptRow(text, " now", str(i)) for i, text in enumerate(texts))
    return PartyRows(train=rows, validation=rows[:2])


def run(
    spec: SplitSpec, train: Callable[[PartySession], Any], tmp_path: Path, parties: int = 1, **settings: Any
) -> SplitLearning:
    """Run one round in which every party trains with its own code."""
    app = ClientApp()
    DataParty(lambda _context: rows_of(TEXTS), state_dir=tmp_path / "state").register(app, train=False)

    @app.train()
    def trained(message: Message, context: Context) -> Message:
        with split_session(message, context) as session:
            train(session)
            return session.reply(num_examples=4)

    aggregator = fedavg(fraction_evaluate=0.0)
    with SplitLearning(spec=spec, aggregator=aggregator, hub=HubSettings(bind="inproc"), **settings) as strategy:
        strategy.start(LocalGrid(app, [{"party": f"party-{i}"} for i in range(parties)]))
    return strategy


def whole(spec: SplitSpec) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    source = resolve_model(spec.model)
    blocks = num_blocks(load_config(source, TASK))
    loaded = load_segment(source, Segment.whole(blocks), TASK, seed=spec.seed)
    return make_trainable(loaded, spec.tuning, TASK, seed=spec.seed).train(), load_tokenizer(source)


def assert_equal(strategy: SplitLearning, model: nn.Module) -> None:
    split, expected = state_of(strategy), trained_state(model)
    assert split.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(expected[name], split[name])] == []
    assert any(float(value.abs().max()) > 0 for name, value in expected.items() if "lora_B" in name)


def largest_deviation(strategy: SplitLearning, model: nn.Module) -> float:
    """Return the largest deviation in a trained matrix that began at zero, as a share of its largest entry."""
    split, expected = state_of(strategy), {n: p for n, p in trained_state(model).items() if "lora_B" in n}
    assert len(expected) == 8
    return max(float((p - split[n]).abs().max() / p.abs().max()) for n, p in expected.items())


def history(trainer: Trainer) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if k not in MINE} for entry in trainer.state.log_history]


def common(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,  # of nine batches: the last step of an epoch has one
        "num_train_epochs": 2,
        "learning_rate": RATE,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.0,
        "optim": "adamw_torch",  # the one that the body runs: the fused one rounds differently
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
