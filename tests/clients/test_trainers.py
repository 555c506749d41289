"""Hugging Face's `Trainer` on a data party's language model: as on the unsplit one."""

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerState,
    TrainingArguments,
)

from tests.own_trainers import PLANS, RATE, TEXTS, assert_equal, common, history, largest_deviation, run, spec_of, whole
from tests.tiny import WORDS
from tests.writers import save_writer
from vflair_flower.clients import PartySession
from vflair_flower.clients.trainer import refuse_halves
from vflair_flower.errors import ConfigurationError
from vflair_flower.settings import OptimizerSettings


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_writer(tmp_path_factory.mktemp("writer")))


def trainer_for(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str], callbacks: Any = (), **settings: Any
) -> Trainer:
    rows = [dict(tokenizer(text), extra="not for the model") for text in texts]
    data = Dataset.from_list([{k: row[k] for k in ("input_ids", "attention_mask", "extra")} for row in rows])
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    arguments = TrainingArguments(**settings)
    return Trainer(
        model, arguments, data_collator=collate, train_dataset=data, eval_dataset=data, callbacks=list(callbacks)
    )


@pytest.mark.parametrize("mode", PLANS)
def test_trainer_with_accumulation_equals_the_trainer_on_the_unsplit_model(
    writer: str, tmp_path: Path, mode: str
) -> None:
    """Texts of unlike length: with accumulation a step's loss is the mean over the tokens of all its batches."""
    spec, seen = spec_of(writer, PLANS[mode]), {}
    settings = common(tmp_path / "trainer", eval_strategy="epoch", warmup_steps=0)

    def train(session: PartySession) -> None:
        callbacks = [session.trainer_callback()]
        seen["split"] = trainer_for(session.model, session.tokenizer, TEXTS, callbacks, **settings)
        seen["split"].train()
        seen["steps"] = (session.next_step, session.total_steps)

    strategy = run(spec, train, tmp_path)
    model, tokenizer = whole(spec)
    unsplit = trainer_for(model, tokenizer, TEXTS, **settings)
    unsplit.train()
    assert history(seen["split"]) == history(unsplit)
    assert len({entry["learning_rate"] for entry in history(unsplit) if "learning_rate" in entry}) == 6
    assert seen["steps"] == (6, 6)
    assert strategy.reports["model-party"].steps == unsplit.state.global_step == 6
    assert_equal(strategy, model)


@pytest.mark.parametrize("weighed", [True, False])
def test_two_parties_trainers_equal_one_on_the_joined_batch(writer: str, tmp_path: Path, weighed: bool) -> None:
    """The callback weighs a step by its tokens; weighed by rows (`attach` alone), short texts count for too much."""
    spec = spec_of(writer, averaging="step", schedule="constant")
    spec = dataclasses.replace(spec, optimizer=OptimizerSettings(name="sgd", learning_rate=RATE, schedule="constant"))
    shares = {"party-0": ["lost my card"] * 2, "party-1": [" ".join(WORDS[3:17]), " ".join(WORDS[9:25])]}
    settings = common(tmp_path / "trainer", lr_scheduler_type="constant", optim="sgd", gradient_accumulation_steps=1)
    building, built = threading.Lock(), threading.Barrier(2)

    def train(session: PartySession) -> None:
        with building:  # accelerate's state is the process's, and every Trainer sets it up anew
            trainer = trainer_for(session.model, session.tokenizer, shares[session.party], **settings)
        if weighed:
            trainer.add_callback(session.trainer_callback())
        else:
            trainer.optimizer = session.attach(torch.optim.SGD(session.trainable_parameters(), lr=RATE))
        built.wait(60)
        trainer.train()

    strategy = run(spec, train, tmp_path, parties=2, on_party_lost="stop")
    model, tokenizer = whole(spec)
    trainer_for(
        model,
        tokenizer,
        [text for own in shares.values() for text in own],
        **{**settings, "per_device_train_batch_size": 4},
    ).train()
    deviation = largest_deviation(strategy, model)
    assert deviation < 1e-5 if weighed else deviation > 1e-2


@pytest.mark.parametrize("clipped", [True, False])
def test_the_jobs_clipping_equals_the_trainers_on_the_unsplit_model(writer: str, tmp_path: Path, clipped: bool) -> None:
    """By the norm over the whole model, here far below what it is."""
    norm = 0.05
    spec = spec_of(writer, max_grad_norm=norm if clipped else 0.0)
    spec = dataclasses.replace(spec, optimizer=dataclasses.replace(spec.optimizer, name="sgd"))

    def train(session: PartySession) -> None:
        settings = common(tmp_path / "trainer", optim="sgd")
        trainer_for(session.model, session.tokenizer, TEXTS, [session.trainer_callback()], **settings).train()

    strategy = run(spec, train, tmp_path)
    model, tokenizer = whole(spec)
    trainer_for(model, tokenizer, TEXTS, **common(tmp_path / "whole", optim="sgd", max_grad_norm=norm)).train()
    deviation = largest_deviation(strategy, model)
    assert deviation < 1e-5 if clipped else deviation > 1


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm is 1, .*Set max_grad_norm=0.0"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
            "load_best_model_at_end",
        ),
        ({"auto_find_batch_size": True}, "auto_find_batch_size is on"),
        ({"learning_rate": 1e-4}, r"learning rate at step 0 is 0.0001, and the model party steps with 0.005"),
        ({"lr_scheduler_type": "constant"}, r"at step 1 is 0.005, and the model party steps with 0.004\d+"),
        ({"warmup_steps": 2}, "at step 0 is 0, and the model party steps with 0.005: the job's schedule is 'linear'"),
    ],
)
def test_what_would_change_one_partys_part_alone_is_refused(
    writer: str, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    def train(session: PartySession) -> None:
        settings = common(tmp_path / "trainer", **changed)
        trainer = trainer_for(session.model, session.tokenizer, TEXTS, [session.trainer_callback()], **settings)
        with pytest.raises(ConfigurationError, match=said):
            trainer.train()
        seen.append(session.next_step)

    seen: list[int] = []
    run(spec_of(writer), train, tmp_path)
    assert seen == [1 if "step 1" in said else 0]


def test_scaled_losses_several_devices_and_checkpoints_are_refused() -> None:
    arguments = TrainingArguments(**common(Path("unused")))
    refuse_halves(arguments, TrainerState())
    with pytest.raises(ConfigurationError, match="goes on from a checkpoint at step 7"):
        refuse_halves(arguments, TrainerState(global_step=7))
    arguments._n_gpu = 2
    with pytest.raises(ConfigurationError, match="train on 2 devices"):
        refuse_halves(arguments, TrainerState())
    arguments._n_gpu, arguments.fp16 = 0, True
    with pytest.raises(ConfigurationError, match="nobody scales back"):
        refuse_halves(arguments, TrainerState())


def test_a_rate_of_ones_own_is_possible(writer: str, tmp_path: Path) -> None:
    def train(session: PartySession) -> None:
        callbacks = [session.trainer_callback(own_rate=True)]
        settings = common(tmp_path / "trainer", learning_rate=1e-4)
        trainer_for(session.model, session.tokenizer, TEXTS, callbacks, **settings).train()

    strategy = run(spec_of(writer), train, tmp_path)
    assert strategy.reports["model-party"].steps == 6
