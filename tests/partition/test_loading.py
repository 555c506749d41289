"""Loading a segment: a party's own tensors and no others, all tensors together, and equal new parameters everywhere."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vflair_flower.errors import ModelError
from vflair_flower.partition import (
    LoadedSegment,
    Mode,
    ModelSource,
    PartitionPlan,
    Segment,
    SegmentRunner,
    load_segment,
    resolve_model,
)
from vflair_flower.settings import TaskKind, TaskSettings

CLASSIFY = TaskSettings(label_names=("a", "b", "c"))
WRITE = TaskSettings(kind=TaskKind.CAUSAL_LM)
WHOLE = Segment(blocks=(0, 1, 2, 3), num_blocks=4, embedding=True, task_head=True)
HBT, HT = PartitionPlan(), PartitionPlan(mode=Mode.HT, head_blocks=1, tail_blocks=0)
CASES = [
    ("bert", "classifier", CLASSIFY),
    ("gpt2", "classifier", CLASSIFY),
    ("llama", "classifier", CLASSIFY),
    ("gpt2", "writer", WRITE),
    ("llama", "writer", WRITE),
    ("llama-tied", "writer", WRITE),
]
by_case = pytest.mark.parametrize(("family", "kind", "task"), CASES, ids=[f"{f}-{k}" for f, k, _ in CASES])
by_plan = pytest.mark.parametrize("plan", [HBT, HT], ids=["HBT", "HT"])
REAL_LLAMA = Path(__file__).resolve().parents[2].parent / "shared" / "models" / "stories260K"


def names_on_disk(folder: str) -> dict[str, tuple[int, ...]]:
    found = {}
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return found


def index_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def own_names(loaded: LoadedSegment) -> set[str]:
    return {name for name, _ in loaded.model.named_parameters()}


@by_case
@by_plan
def test_segments_together_are_the_checkpoint(
    family: str, kind: str, task: TaskSettings, plan: PartitionPlan, save_checkpoint: Callable[..., ModelSource]
) -> None:
    source = save_checkpoint(family, kind)
    data, model = (load_segment(source, s, task) for s in (plan.data_party(4), plan.model_party(4)))
    tensors = {}
    for file in Path(source.location).glob("*.safetensors"):
        tensors |= load_file(file)
    assert own_names(data) | own_names(model) == tensors.keys()
    both = own_names(data) & own_names(model)
    tied = task is WRITE and family in ("gpt2", "llama-tied") and plan is HT
    # A tied language-model head is the embedding's matrix: in Head-Tail the model party cannot do without a copy.
    assert both == ({n for n in tensors if n.endswith(("wte.weight", "embed_tokens.weight"))} if tied else set())
    for loaded in (data, model):
        assert loaded.new_parameters == ()
        for name, parameter in loaded.model.named_parameters():
            assert torch.equal(parameter, tensors[name]), name
            assert parameter.dtype is torch.float32


@by_case
@by_plan
def test_other_parties_tensors_are_never_read(
    family: str,
    kind: str,
    task: TaskSettings,
    plan: PartitionPlan,
    save_checkpoint: Callable[..., ModelSource],
    tmp_path: Path,
) -> None:
    """Fill every tensor of other parties with NaN and cut the file's bytes of them off: loading does not notice."""
    source = save_checkpoint(family, kind)
    for number, segment in enumerate((plan.data_party(4), plan.model_party(4))):
        folder = tmp_path / str(number)
        shutil.copytree(source.location, folder)
        own = own_names(load_segment(source, segment, task))
        foreign_files = set(index_of(folder).values()) - {
            file for name, file in index_of(folder).items() if name in own
        }
        assert foreign_files
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            poisoned = {n: t.clone() if n in own else torch.full_like(t, torch.nan) for n, t in tensors.items()}
            save_file(poisoned, file, metadata={"format": "pt"})
        again = load_segment(ModelSource(name="poisoned", location=str(folder)), segment, task)
        assert all(parameter.isfinite().all() for parameter in again.model.parameters())
        assert not any(buffer.isnan().any() for buffer in again.model.buffers())


@by_plan
def test_only_own_tensors_are_asked_for(
    plan: PartitionPlan, save_checkpoint: Callable[..., ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Record what is materialised from the files, not only what ends up in the model."""
    source = save_checkpoint("llama", "writer")
    for segment in (plan.data_party(4), plan.model_party(4)):
        with recorded_reads(monkeypatch) as read:
            loaded = load_segment(source, segment, WRITE)
        assert read == own_names(loaded)
        assert read < names_on_disk(source.location).keys()


@contextmanager
def recorded_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    import transformers.modeling_utils as loader

    read: set[str] = set()

    class Slice:
        def __init__(self, name: str, inner: object) -> None:
            self._name, self._inner = name, inner

        def __getitem__(self, key: object) -> torch.Tensor:
            read.add(self._name)
            return self._inner[key]

        def __getattr__(self, name: str) -> object:
            return getattr(self._inner, name)

    class File:
        def __init__(self, *args: object, **kwargs: object) -> None:
            self._inner = safe_open(*args, **kwargs)

        def __enter__(self) -> "File":
            self._inner.__enter__()
            return self

        def __exit__(self, *details: object) -> None:
            self._inner.__exit__(*details)

        def get_tensor(self, name: str) -> torch.Tensor:
            read.add(name)
            return self._inner.get_tensor(name)

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self._inner.get_slice(name))

        def __getattr__(self, name: str) -> object:
            return getattr(self._inner, name)

    with monkeypatch.context() as patch:
        patch.setattr(loader, "safe_open", File)
        yield read


def test_files_of_other_parties_may_be_missing_with_a_filtered_index(
    save_checkpoint: Callable[..., ModelSource], tmp_path: Path
) -> None:
    source = save_checkpoint("llama", "writer")
    folder = tmp_path / "own"
    shutil.copytree(source.location, folder)
    segment = HBT.data_party(4)
    own = own_names(load_segment(source, segment, WRITE))
    index = {name: file for name, file in index_of(folder).items() if name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    gone = [file for file in folder.glob("*.safetensors") if file.name not in set(index.values())]
    for file in gone:
        file.unlink()
    assert gone
    kept = ModelSource(name="own", location=str(folder))
    assert own_names(load_segment(kept, segment, WRITE)) == own
    with pytest.raises(ModelError, match=r"lacks \d+ tensors of this segment, the first is 'model.layers.1"):
        load_segment(kept, HBT.model_party(4), WRITE)


@by_plan
@pytest.mark.parametrize("side", ["data_party", "model_party"])
def test_missing_tensor_is_refused(
    plan: PartitionPlan, side: str, save_checkpoint: Callable[..., ModelSource], tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(save_checkpoint("bert", "classifier").location, folder)
    segment = getattr(plan, side)(4)
    lost = f"bert.encoder.layer.{segment.blocks[0]}.attention.self.query.weight"
    index = {name: file for name, file in index_of(folder).items() if name != lost}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for file in folder.glob("*.safetensors"):
        left = {name: tensor for name, tensor in load_file(file).items() if name != lost}
        save_file(left, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks 1 tensors of this segment, the first is '{lost}'"):
        load_segment(ModelSource(name="broken", location=str(folder)), segment, CLASSIFY)


def test_language_model_head_is_never_made_up(save_checkpoint: Callable[..., ModelSource]) -> None:
    source = save_checkpoint("llama", "base")  # has no lm_head, and ties nothing
    with pytest.raises(ModelError, match=r"lacks 1 tensors of this segment, the first is 'lm_head\.weight'"):
        load_segment(source, HBT.data_party(4), WRITE)
    load_segment(source, HBT.model_party(4), WRITE)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("bytes", r"the file '{name}' \(26 bytes\) is damaged .*Copy that file again"),
        ("short", r"the file '{name}' .* is damaged or was not copied to its end"),
        ("absent", r"lists \d+ shards, of which 1 are missing, the first is '{name}'.*Copy the missing shards"),
        ("empty", r"the file '{name}' \(0 bytes\) is damaged"),
    ],
)
def test_damaged_files_are_named(
    damage: str, said: str, save_checkpoint: Callable[..., ModelSource], tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(save_checkpoint("llama", "writer").location, folder)
    file = folder / index_of(folder)["model.layers.0.self_attn.q_proj.weight"]
    left = {"bytes": b"no safetensors file at all", "short": file.read_bytes()[:-1], "empty": b""}
    file.unlink()
    if damage in left:
        file.write_bytes(left[damage])
    with pytest.raises(ModelError, match=f"could not be read: .*{said.format(name=file.name)}"):
        load_segment(ModelSource(name="damaged", location=str(folder)), HBT.data_party(4), WRITE)


@pytest.mark.parametrize("index", ["{", "[]", '{"metadata": {}}', '{"weight_map": {}}'])
def test_spoilt_index_is_a_model_error(index: str, save_checkpoint: Callable[..., ModelSource], tmp_path: Path) -> None:
    folder = tmp_path / "spoilt"
    shutil.copytree(save_checkpoint("llama", "writer").location, folder)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        load_segment(ModelSource(name="spoilt", location=str(folder)), HBT.data_party(4), WRITE)


def test_folder_without_weights_is_a_model_error(save_checkpoint: Callable[..., ModelSource], tmp_path: Path) -> None:
    shutil.copy(Path(save_checkpoint("llama", "writer").location) / "config.json", tmp_path)
    with pytest.raises(ModelError, match=r"has none of model\.safetensors, .*`save_pretrained`"):
        load_segment(ModelSource(name="none", location=str(tmp_path)), HBT.data_party(4), WRITE)


def test_broken_pickled_file_is_a_model_error(save_checkpoint: Callable[..., ModelSource], tmp_path: Path) -> None:
    shutil.copy(Path(save_checkpoint("llama", "writer").location) / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ModelError, match=r"the file 'pytorch_model\.bin' .* is damaged"):
        load_segment(ModelSource(name="old", location=str(tmp_path)), HBT.data_party(4), WRITE)


def test_classifier_of_another_size_is_a_model_error(save_checkpoint: Callable[..., ModelSource]) -> None:
    with pytest.raises(ModelError, match="task head of 3 classes"):
        load_segment(save_checkpoint("bert", "classifier"), WHOLE, TaskSettings(label_names=("a", "b")))


@pytest.mark.parametrize(
    ("family", "new"), [("bert", {"classifier.weight", "classifier.bias"}), ("llama", {"score.weight"})]
)
@by_plan
def test_new_classifier_is_drawn_by_name_and_seed(
    family: str, new: set[str], plan: PartitionPlan, save_checkpoint: Callable[..., ModelSource]
) -> None:
    source = save_checkpoint(family, "base")
    side = plan.data_party(4) if plan.mode is Mode.HBT else plan.model_party(4)
    torch.manual_seed(1)
    whole = load_segment(source, WHOLE, CLASSIFY, seed=7)
    torch.manual_seed(2)  # the process's own randomness has no say
    part = load_segment(source, side, CLASSIFY, seed=7)
    other = load_segment(source, side, CLASSIFY, seed=8)
    assert set(whole.new_parameters) == set(part.new_parameters) == new
    for name in new:
        drawn = part.model.get_parameter(name)
        assert torch.equal(drawn, whole.model.get_parameter(name))
        if drawn.dim() > 1:
            assert 0.005 < drawn.std() < 0.05
            assert not torch.equal(drawn, other.model.get_parameter(name))
    without_head = plan.model_party(4) if plan.mode is Mode.HBT else plan.data_party(4)
    assert load_segment(source, without_head, CLASSIFY, seed=7).new_parameters == ()


def test_decoder_without_pad_token_classifies_batches(save_checkpoint: Callable[..., ModelSource]) -> None:
    """GPT-2 and many others name no pad token; transformers then refuses to classify more than one text at once."""
    loaded = load_segment(save_checkpoint("gpt2", "base"), WHOLE, CLASSIFY)
    assert loaded.model.config.pad_token_id == 2
    ids_BT = torch.tensor([[5, 6, 7, 2], [5, 6, 2, 2]])
    logits = loaded.model.eval()(input_ids=ids_BT, attention_mask=(ids_BT != 2).long()).logits
    alone = loaded.model(input_ids=ids_BT[1:, :2]).logits
    assert torch.allclose(logits[1:], alone, atol=1e-6)
    assert loaded.model.get_input_embeddings().padding_idx is None


@pytest.mark.skipif(not REAL_LLAMA.is_dir(), reason="the real tiny Llama stories260K is not there")
def test_segments_of_a_real_llama_write_what_it_writes() -> None:
    source = resolve_model(str(REAL_LLAMA))
    whole_segment = Segment(blocks=tuple(range(5)), num_blocks=5, embedding=True, task_head=True)
    whole, data, body = (load_segment(source, s, WRITE) for s in (whole_segment, HBT.data_party(5), HBT.model_party(5)))
    assert own_names(data) | own_names(body) == own_names(whole)
    data.channel.call = SegmentRunner(body.model, body.segment)
    start = torch.tensor([[1, 403, 407]])
    settings = {"max_new_tokens": 20, "do_sample": False, "use_cache": False}
    written = whole.model.eval().generate(start, **settings)
    assert torch.equal(data.model.eval().generate(start, **settings), written)
    assert len(set(written[0].tolist())) > 5
