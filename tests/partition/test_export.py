"""Exported segments: a party's tensors and no others, loaded bit-equal; another cut is refused, so is overwriting."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, BertConfig
from typer.testing import CliRunner

import vflair_flower.partition.export as exporting
from vflair_flower.certificate import TINY
from vflair_flower.certificate.parties import checkpoint, task_settings
from vflair_flower.cli import app
from vflair_flower.errors import ModelError, PartitionError
from vflair_flower.partition import (
    LoadedSegment,
    Mode,
    ModelSource,
    PartitionPlan,
    Segment,
    load_segment,
    load_tokenizer,
    resolve_model,
)
from vflair_flower.partition.export import Side, export_segment
from vflair_flower.partition.files import read_manifest
from vflair_flower.partition.loading import tasks_of
from vflair_flower.settings import TaskKind, TaskSettings

CLASSIFY = TaskSettings(label_names=("a", "b", "c"))
WRITE = TaskSettings(kind=TaskKind.CAUSAL_LM)
HBT, HT = PartitionPlan(), PartitionPlan(mode=Mode.HT, head_blocks=1, tail_blocks=0)
CASES = [
    ("bert", "base", CLASSIFY),
    ("bert", "classifier", CLASSIFY),
    ("gpt2", "writer", WRITE),
    ("llama", "writer", WRITE),
    ("llama", "writer", CLASSIFY),
    ("llama-tied", "writer", WRITE),
]
by_plan = pytest.mark.parametrize("plan", [HBT, HT], ids=["HBT", "HT"])
by_side = pytest.mark.parametrize("side", list(Side))


def segment_of(plan: PartitionPlan, side: Side, blocks: int = 4) -> Segment:
    return (plan.data_party if side is Side.DATA_PARTY else plan.model_party)(blocks)


def tensors_in(folder: Path | str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in Path(folder).glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_equal(one: LoadedSegment, other: LoadedSegment) -> None:
    ours, theirs = dict(one.model.named_parameters()), dict(other.model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert one.new_parameters == other.new_parameters


@pytest.mark.parametrize(("family", "kind", "task"), CASES)
@by_plan
@by_side
def test_exported_segment_loads_as_from_the_whole(
    family: str,
    kind: str,
    task: TaskSettings,
    plan: PartitionPlan,
    side: Side,
    save_checkpoint: Callable[..., ModelSource],
    tmp_path: Path,
) -> None:
    source, segment = save_checkpoint(family, kind), segment_of(plan, side)
    written = export_segment(source, plan, side, tmp_path / "own")
    whole, held = tensors_in(source.location), tensors_in(tmp_path / "own")
    assert len(held) == written.tensors < len(whole)
    assert sum(t.nbytes for t in held.values()) == written.tensor_bytes
    assert all(torch.equal(held[name], whole[name]) and held[name].dtype is whole[name].dtype for name in held)
    own = load_segment(resolve_model(str(tmp_path / "own")), segment, task, seed=4)
    assert_equal(own, load_segment(source, segment, task, seed=4))
    foreign = set(range(4)) - set(segment.blocks)
    assert not [name for name in held for i in foreign if f".{i}." in name]


@by_plan
def test_both_parties_hold_the_whole_model_together(
    plan: PartitionPlan, save_checkpoint: Callable[..., ModelSource], tmp_path: Path
) -> None:
    source = save_checkpoint("llama", "writer")
    for side in Side:
        export_segment(source, plan, side, tmp_path / side)
    data, model = (tensors_in(tmp_path / side).keys() for side in Side)
    assert data | model == tensors_in(source.location).keys()
    assert not data & model


def test_folder_says_which_cut_it_is(save_checkpoint: Callable[..., ModelSource], tmp_path: Path) -> None:
    source = save_checkpoint("llama", "writer")
    written = export_segment(source, HBT, Side.MODEL_PARTY, tmp_path / "body")
    row = json.loads((tmp_path / "body" / "segment.json").read_text())
    assert (row["party"], row["mode"], row["head_blocks"], row["tail_blocks"]) == ("model-party", "HBT", 1, 1)
    assert row["owns"] == "blocks 1-2"
    assert row["model"] == source.name
    assert read_manifest(tmp_path / "body") == written.manifest
    assert read_manifest(source.location) is None
    assert (tmp_path / "body" / "config.json").read_bytes() == Path(source.location, "config.json").read_bytes()
    assert written.files == tuple(sorted(file.name for file in (tmp_path / "body").iterdir()))


@pytest.mark.parametrize(
    ("plan", "asked", "first"),
    [
        (HBT, HBT.model_party(4), "model.layers.1.input_layernorm.weight"),
        (HBT, PartitionPlan(head_blocks=2).data_party(4), "model.layers.1.input_layernorm.weight"),
        (HT, HBT.data_party(4), "lm_head.weight"),
        (HT, Segment.whole(4), "lm_head.weight"),
    ],
)
def test_another_cut_is_refused(
    plan: PartitionPlan, asked: Segment, first: str, save_checkpoint: Callable[..., ModelSource], tmp_path: Path
) -> None:
    export_segment(save_checkpoint("llama", "writer"), plan, Side.DATA_PARTY, tmp_path / "own")
    cut = r"HBT 1\|2\|1" if plan is HBT else r"HT 1\|3"
    said = rf"the first is '{first}'.*data party's segment of 'llama-writer' for the cut {cut} .*export-segment"
    with pytest.raises(ModelError, match=said):
        load_segment(resolve_model(str(tmp_path / "own")), asked, WRITE)


def test_smaller_part_of_the_same_side_loads(save_checkpoint: Callable[..., ModelSource], tmp_path: Path) -> None:
    source = save_checkpoint("llama", "writer")
    export_segment(source, PartitionPlan(head_blocks=2), Side.DATA_PARTY, tmp_path / "own")
    segment = HBT.data_party(4)
    own = load_segment(resolve_model(str(tmp_path / "own")), segment, WRITE)
    assert_equal(own, load_segment(source, segment, WRITE))


def test_missing_classifier_of_another_cut_is_never_drawn_anew(
    save_checkpoint: Callable[..., ModelSource], tmp_path: Path
) -> None:
    """A classifier may be new, but not where the whole model has one that the folder was written without."""
    source = save_checkpoint("bert", "classifier")
    no_tail = PartitionPlan(head_blocks=1, tail_blocks=0)
    export_segment(source, no_tail, Side.MODEL_PARTY, tmp_path / "body")
    folder = resolve_model(str(tmp_path / "body"))
    load_segment(folder, no_tail.model_party(4), CLASSIFY)
    with pytest.raises(ModelError, match=r"lacks 4 tensors of this segment, the first is 'bert\.pooler\.dense\.bias'"):
        load_segment(folder, HT.model_party(4), CLASSIFY)


def test_segment_for_one_task_holds_no_more_and_serves_no_other(tmp_path: Path) -> None:
    torch.manual_seed(5)
    config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "whole")
    words = AutoModelForMaskedLM.from_config(config).state_dict()
    tensors = tensors_in(tmp_path / "whole") | {n: t.clone() for n, t in words.items() if n.startswith("cls.")}
    tensors.pop("cls.predictions.decoder.weight", None)  # tied
    save_file(tensors, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    source = resolve_model(str(tmp_path / "whole"))
    masked = TaskSettings(kind=TaskKind.MASKED_LM)
    classify = TaskSettings(label_names=("a", "b"))

    export_segment(source, HBT, Side.DATA_PARTY, tmp_path / "any")
    for task in (classify, masked):
        any_task = load_segment(resolve_model(str(tmp_path / "any")), HBT.data_party(4), task)
        assert_equal(any_task, load_segment(source, HBT.data_party(4), task))

    export_segment(source, HBT, Side.DATA_PARTY, tmp_path / "words", tasks=[TaskKind.MASKED_LM])
    assert not [name for name in tensors_in(tmp_path / "words") if "pooler" in name or "classifier" in name]
    words_only = resolve_model(str(tmp_path / "words"))
    load_segment(words_only, HBT.data_party(4), masked)
    with pytest.raises(ModelError, match=r"'bert\.pooler\.dense\.bias'.*for masked-lm; .*sequence-classification"):
        load_segment(words_only, HBT.data_party(4), classify)
    with pytest.raises(ModelError, match="no image-text-to-text class"):
        export_segment(source, HBT, Side.DATA_PARTY, tmp_path / "no", tasks=[TaskKind.IMAGE_TEXT_TO_TEXT])


def test_stored_dtype_is_kept(save_checkpoint: Callable[..., ModelSource], tmp_path: Path) -> None:
    shutil.copytree(save_checkpoint("llama", "writer").location, tmp_path / "whole")
    for file in (tmp_path / "whole").glob("*.safetensors"):
        halves = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
        save_file(halves, file, metadata={"format": "pt"})
    source = resolve_model(str(tmp_path / "whole"))
    export_segment(source, HBT, Side.DATA_PARTY, tmp_path / "own")
    assert {tensor.dtype for tensor in tensors_in(tmp_path / "own").values()} == {torch.bfloat16}
    own = load_segment(resolve_model(str(tmp_path / "own")), HBT.data_party(4), WRITE)
    assert_equal(own, load_segment(source, HBT.data_party(4), WRITE))


def test_shards_are_of_the_size_asked_for(save_checkpoint: Callable[..., ModelSource], tmp_path: Path) -> None:
    source, limit = save_checkpoint("llama", "writer"), 20_000
    export_segment(source, HBT, Side.DATA_PARTY, tmp_path / "own", shard_bytes=limit)
    index = json.loads((tmp_path / "own" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "own").glob("*.safetensors"))
    assert len(files) > 2
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            assert sum(opened.get_tensor(name).nbytes for name in names) <= limit or len(names) == 1
        assert all(index["weight_map"][name] == file.name for name in names)
    own = load_segment(resolve_model(str(tmp_path / "own")), HBT.data_party(4), WRITE)
    assert_equal(own, load_segment(source, HBT.data_party(4), WRITE))


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_checkpoint_is_exported_as_safetensors(
    sharded: bool, save_checkpoint: Callable[..., ModelSource], tmp_path: Path
) -> None:
    source, old = save_checkpoint("llama", "writer"), tmp_path / "old"
    old.mkdir()
    shutil.copy(Path(source.location) / "config.json", old)
    tensors = tensors_in(source.location)
    if sharded:
        parts = {"a.bin": list(tensors)[::2], "b.bin": list(tensors)[1::2]}
        for file, names in parts.items():
            torch.save({name: tensors[name] for name in names}, old / file)
        places = {name: file for file, names in parts.items() for name in names}
        (old / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    else:
        torch.save(tensors, old / "pytorch_model.bin")
    export_segment(resolve_model(str(old)), HBT, Side.MODEL_PARTY, tmp_path / "body")
    own = load_segment(resolve_model(str(tmp_path / "body")), HBT.model_party(4), WRITE)
    assert_equal(own, load_segment(source, HBT.model_party(4), WRITE))


def test_tokenizer_goes_to_the_data_party_alone(
    save_checkpoint: Callable[..., ModelSource], tmp_path: Path, tokenizer_folder: Path
) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(save_checkpoint("llama", "writer").location, whole)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, whole)
    (whole / "modeling_own.py").write_text("raise SystemExit")
    for side in Side:
        export_segment(resolve_model(str(whole)), HBT, side, tmp_path / side)
        assert not list((tmp_path / side).glob("*.py"))
    assert load_tokenizer(resolve_model(str(tmp_path / Side.DATA_PARTY))).pad_token == "<pad>"
    assert not list((tmp_path / Side.MODEL_PARTY).glob("tokenizer*"))


def test_nothing_is_overwritten(save_checkpoint: Callable[..., ModelSource], tmp_path: Path) -> None:
    source = save_checkpoint("llama", "writer")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ModelError, match="something in it already; nothing is overwritten"):
        export_segment(source, HBT, Side.DATA_PARTY, tmp_path / "full")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    with pytest.raises(ModelError, match="nothing is overwritten"):
        export_segment(source, HBT, Side.DATA_PARTY, tmp_path / "full" / "thesis.txt")
    (tmp_path / "empty").mkdir()
    export_segment(source, HBT, Side.DATA_PARTY, tmp_path / "empty")
    assert (tmp_path / "empty" / "segment.json").is_file()


def test_failed_export_leaves_nothing(
    save_checkpoint: Callable[..., ModelSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(exporting, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        export_segment(save_checkpoint("llama", "writer"), HBT, Side.DATA_PARTY, tmp_path / "own")
    assert list(tmp_path.iterdir()) == []


def test_segment_of_a_segment_is_refused(save_checkpoint: Callable[..., ModelSource], tmp_path: Path) -> None:
    export_segment(save_checkpoint("llama", "writer"), HBT, Side.DATA_PARTY, tmp_path / "own")
    with pytest.raises(ModelError, match=r"no whole checkpoint but the data party's segment .* HBT 1\|2\|1"):
        export_segment(resolve_model(str(tmp_path / "own")), HBT, Side.MODEL_PARTY, tmp_path / "again")


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": "other", "version": 1}', '{"format": "vflair-segment"}'])
def test_spoilt_segment_json_is_refused(
    damage: str, save_checkpoint: Callable[..., ModelSource], tmp_path: Path
) -> None:
    export_segment(save_checkpoint("llama", "writer"), HBT, Side.DATA_PARTY, tmp_path / "own")
    (tmp_path / "own" / "segment.json").write_text(damage)
    with pytest.raises(ModelError, match=r"segment\.json"):
        load_segment(resolve_model(str(tmp_path / "own")), HBT.data_party(4), WRITE)


def test_cut_that_misses_the_model_is_refused(save_checkpoint: Callable[..., ModelSource], tmp_path: Path) -> None:
    with pytest.raises(PartitionError, match="the model has 4 blocks"):
        export_segment(
            save_checkpoint("llama", "writer"), PartitionPlan(head_blocks=4), Side.DATA_PARTY, tmp_path / "own"
        )
    with pytest.raises(ModelError, match="shard_bytes is 0"):
        export_segment(save_checkpoint("llama", "writer"), HBT, Side.DATA_PARTY, tmp_path / "own", shard_bytes=0)
    assert not (tmp_path / "own").exists()


def test_of_a_hub_only_needed_shards_are_fetched(
    save_checkpoint: Callable[..., ModelSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is a folder here; what is copied from it stands for what would be downloaded."""
    remote, cache = Path(save_checkpoint("llama", "writer").location), tmp_path / "cache"
    cache.mkdir()

    def snapshot_download(repository: str, *, allow_patterns: list[str]) -> str:
        assert repository == "org/name"
        for name in allow_patterns:
            if (remote / name).is_file():
                shutil.copy(remote / name, cache)
        return str(cache)

    monkeypatch.setattr(exporting, "snapshot_download", snapshot_download)
    monkeypatch.setattr(exporting, "read_config", lambda _: sources_read_config(str(remote)))
    export_segment(ModelSource(name="org/name", location="org/name"), HBT, Side.MODEL_PARTY, tmp_path / "body")
    fetched = {file.name for file in cache.glob("*.safetensors")}
    index = json.loads((remote / "model.safetensors.index.json").read_text())["weight_map"]
    assert fetched == {file for name, file in index.items() if ".layers.1." in name or ".layers.2." in name}
    assert fetched < set(index.values())
    own = load_segment(resolve_model(str(tmp_path / "body")), HBT.model_party(4), WRITE)
    assert_equal(own, load_segment(ModelSource(name="r", location=str(remote)), HBT.model_party(4), WRITE))


def sources_read_config(location: str) -> object:
    from vflair_flower.partition.sources import read_config

    return read_config(ModelSource(name="remote", location=location))


def test_command_line(save_checkpoint: Callable[..., ModelSource], tmp_path: Path) -> None:
    source, run = save_checkpoint("llama", "writer"), CliRunner().invoke
    ask = ["export-segment", "--model", source.location]
    cut = ["--mode", "HBT", "--head", "1", "--tail", "1"]
    done = run(app, [*ask, *cut, "--for", "data-party", "--out", str(tmp_path / "own")])
    assert done.exit_code == 0, done.output
    assert "the data party's segment of 'llama-writer' for the cut HBT 1|2|1" in done.output
    own = load_segment(resolve_model(str(tmp_path / "own")), HBT.data_party(4), WRITE)
    assert_equal(own, load_segment(source, HBT.data_party(4), WRITE))
    again = run(app, [*ask, *cut, "--for", "data-party", "--out", str(tmp_path / "own")])
    assert again.exit_code == 1
    assert "nothing is overwritten" in again.output
    unknown = run(app, [*ask, "--for", "everybody", "--out", str(tmp_path / "no")])
    assert unknown.exit_code == 1
    assert "'data-party', 'model-party'" in unknown.output
    tail = run(app, [*ask, "--mode", "HT", "--for", "model-party", "--out", str(tmp_path / "rest")])
    assert tail.exit_code == 0, tail.output
    assert read_manifest(tmp_path / "rest").segment == HT.model_party(4)


@pytest.mark.parametrize(
    "family", ["albert", "deepseek-v3", "falcon-alibi", "gpt-oss", "llava", "mamba", "mixtral", "t5", "xlnet"]
)
@by_side
def test_odd_families_are_exported_exactly(family: str, side: Side, tmp_path: Path) -> None:
    """Shared blocks, fused experts, two stacks, a vision tower: for one task, the folder holds what is loaded."""
    config = TINY[family]()
    kind = tasks_of(config)[-1]
    segment = segment_of(HBT, side)
    with checkpoint(config, kind) as source:
        written = export_segment(source, HBT, side, tmp_path / "own", tasks=[kind])
        own = load_segment(resolve_model(str(tmp_path / "own")), segment, task_settings(kind))
        assert_equal(own, load_segment(source, segment, task_settings(kind)))
    held = {id(tensor): tensor.nbytes for tensor in own.model.state_dict(keep_vars=True).values()}
    assert written.tensor_bytes == sum(held.values())
