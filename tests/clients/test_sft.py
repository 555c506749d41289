"""TRL's `SFTTrainer` on a data party's language model: as on the unsplit one."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from tests.own_trainers import HT, PLANS, TEXTS, assert_equal, common, history, run, spec_of, whole
from tests.stories import save_stories
from tests.writers import save_writer
from vflair_flower.clients import PartySession
from vflair_flower.clients import sft as sft_module
from vflair_flower.clients.sft import LogitsSFTTrainer
from vflair_flower.errors import ConfigurationError
from vflair_flower.generation.harness import SplitLM


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_writer(tmp_path_factory.mktemp("writer")))


@pytest.fixture(scope="module")
def stories(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_stories(shared / "models" / "stories260K", tmp_path_factory.mktemp("stories")))


def sft(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    kind: type[SFTTrainer] = SFTTrainer,
    callbacks: Any = (),
    **settings: Any,
) -> SFTTrainer:
    trainer = kind(
        model,
        SFTConfig(**common(folder, **{"max_length": 32, "bf16": False, "seed": 3, **settings})),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        eval_dataset=Dataset.from_dict({"text": TEXTS[:5]}),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(("mode", "kind"), [("HBT", SFTTrainer), ("HBT", LogitsSFTTrainer), ("HT", LogitsSFTTrainer)])
def test_sft_equals_sft_on_the_unsplit_model(stories: str, tmp_path: Path, mode: str, kind: type[SFTTrainer]) -> None:
    """Bit for bit: every logged loss, evaluations on the way, and all parties' adapters; TRL checkpoints blocks."""
    spec, seen = spec_of(stories, PLANS[mode]), {}
    asked = {"kind": kind, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3}

    def train(session: PartySession) -> None:
        callbacks = [session.trainer_callback()]
        seen["split"] = sft(session.model, session.tokenizer, tmp_path / "split", callbacks=callbacks, **asked)
        seen["memory"] = session.memory().optimizer

    strategy = run(spec, train, tmp_path)
    model, tokenizer = whole(spec)
    unsplit = sft(model, tokenizer, tmp_path / "whole", **asked)
    assert history(seen["split"]) == history(unsplit)
    losses = [entry["loss"] for entry in history(unsplit) if "loss" in entry]
    assert len(losses) == strategy.reports["party-0"].steps == strategy.reports["model-party"].steps == 6
    assert losses[-1] < losses[0]
    assert len([entry for entry in history(unsplit) if "eval_loss" in entry]) == 3
    assert_equal(strategy, model)
    assert (tmp_path / "split" / "checkpoint-6" / "adapter_model.safetensors").is_file()
    assert seen["memory"] > 0


def test_sft_of_trl_and_of_logits_differ_by_rounding_alone(stories: str, tmp_path: Path) -> None:
    spec, losses = spec_of(stories), []
    for kind in (SFTTrainer, LogitsSFTTrainer):
        model, tokenizer = whole(spec)
        trainer = sft(model, tokenizer, tmp_path / kind.__name__, kind=kind)
        losses.append([entry["loss"] for entry in history(trainer) if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_sft_on_a_head_tail_model_says_what_to_take_instead(writer: str, tmp_path: Path) -> None:
    def train(session: PartySession) -> None:
        with pytest.raises(AttributeError, match=r"the task head is at the model party .*LogitsSFTTrainer"):
            sft(session.model, session.tokenizer, tmp_path / "sft", callbacks=[session.trainer_callback()])
        seen.append(session.party)

    seen: list[str] = []
    run(spec_of(writer, HT), train, tmp_path)
    assert seen == ["party-0"]


@pytest.mark.parametrize(
    "packed", [{"packing": True}, {"padding_free": True, "max_length": None}], ids=["packing", "padding_free"]
)
def test_rows_of_several_texts_are_refused(writer: str, tmp_path: Path, packed: dict[str, Any]) -> None:
    def train(session: PartySession) -> None:
        with pytest.raises(ValueError, match="packing=False and padding_free=False"):
            sft(session.model, session.tokenizer, tmp_path / "sft", callbacks=[session.trainer_callback()], **packed)
        seen.append(session.party)

    seen: list[str] = []
    run(spec_of(writer), train, tmp_path)
    assert seen == ["party-0"]


def test_a_row_of_several_texts_without_a_mask_is_refused(writer: str, tmp_path: Path) -> None:
    """With one, all parties read it as one text."""
    spec, seen = spec_of(writer), {}
    ids_BT = torch.tensor([[5, 6, 7, 8, 9]])
    positions_BT = torch.tensor([[0, 1, 2, 0, 1]])

    def train(session: PartySession) -> None:
        with torch.no_grad():
            with pytest.raises(ValueError, match=r"position ids begin anew within a row.*packing=False"):
                session.model(input_ids=ids_BT, position_ids=positions_BT)
            asked = {"input_ids": ids_BT, "position_ids": positions_BT, "use_cache": False}
            seen["split"] = session.model(**asked, attention_mask=torch.ones_like(ids_BT)).logits

    run(spec, train, tmp_path)
    model, _ = whole(spec)
    with torch.no_grad():
        asked = {"input_ids": ids_BT, "position_ids": positions_BT, "use_cache": False}
        masked = model(**asked, attention_mask=torch.ones_like(ids_BT)).logits
        kept_apart = model(**asked).logits
    torch.testing.assert_close(seen["split"], masked)  # bits of so small products depend on where they lie in memory
    assert not torch.allclose(masked, kept_apart, atol=1e-3)


def test_the_harness_scores_the_model_between_steps(stories: str, tmp_path: Path) -> None:
    spec, seen = spec_of(stories), {}
    asked = [Instance("loglikelihood", {}, (text, " happy"), i) for i, text in enumerate(TEXTS[:5])]

    def train(session: PartySession) -> None:
        sft(session.model, session.tokenizer, tmp_path / "split", callbacks=[session.trainer_callback()])
        lm = SplitLM(session.model, session.tokenizer, session.spec.generation, batch_size=2)
        seen["split"] = lm.loglikelihood(asked)

    run(spec, train, tmp_path)
    model, tokenizer = whole(spec)
    before = HFLM(model, tokenizer=tokenizer, batch_size=2).loglikelihood(asked)
    sft(model.train(), tokenizer, tmp_path / "whole")
    assert seen["split"] == HFLM(model, tokenizer=tokenizer, batch_size=2).loglikelihood(asked) != before


def test_without_trl_the_way_to_install_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, sft_module.__name__)
    with pytest.raises(ConfigurationError, match=r"pip install 'vflair-flower\[trl\]'"):
        importlib.import_module(sft_module.__name__)
