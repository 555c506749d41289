"""What is trained: LoRA and task head, or everything; its state, its merging, and its size by formula."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from vflair_flower.errors import CheckpointError, PartitionError
from vflair_flower.memory import optimizer_bytes, tensor_bytes
from vflair_flower.partition import (
    LoadedSegment,
    Mode,
    ModelSource,
    PartitionPlan,
    Segment,
    SegmentRunner,
    load_config,
    load_segment,
    load_trained_state,
    make_trainable,
    refuse_trained_copies,
    save_merged_adapter,
    trained_state,
)
from vflair_flower.partition.footprint import footprint
from vflair_flower.settings import LoraSettings, OptimizerSettings, TaskKind, TaskSettings, TrainingSettings
from vflair_flower.spec import SplitSpec

CLASSIFY = TaskSettings(label_names=("a", "b", "c"))
WRITE = TaskSettings(kind=TaskKind.CAUSAL_LM)
WHOLE = Segment(blocks=(0, 1, 2, 3), num_blocks=4, embedding=True, task_head=True)
LORA = LoraSettings(rank=3, alpha=6)
HBT, HT = PartitionPlan(), PartitionPlan(mode=Mode.HT, head_blocks=1, tail_blocks=0)
by_plan = pytest.mark.parametrize("plan", [HBT, HT], ids=["HBT", "HT"])
IDS_BT = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 0, 0]])
INPUTS = {"input_ids": IDS_BT, "attention_mask": (IDS_BT != 0).long()}


def load(
    source: ModelSource, segment: Segment, task: TaskSettings, lora: LoraSettings | None = LORA, seed: int = 3
) -> tuple[LoadedSegment, nn.Module]:
    loaded = load_segment(source, segment, task, seed=seed)
    return loaded, make_trainable(loaded, lora, task, seed=seed)


def shake(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


@by_plan
@pytest.mark.parametrize("side", ["data_party", "model_party"])
@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "all-parameters"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_trained_state_round_trip(
    family: str, plan: PartitionPlan, side: str, lora: LoraSettings | None, save_checkpoint: Callable[..., ModelSource]
) -> None:
    source = save_checkpoint(family, "base")
    _, model = load(source, getattr(plan, side)(4), CLASSIFY, lora)
    shake(model)
    state = trained_state(model)
    assert sum(t.numel() for t in state.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    _, again = load(source, getattr(plan, side)(4), CLASSIFY, lora, seed=4)
    load_trained_state(again, state)
    kept = dict(again.named_parameters())
    assert all(torch.equal(kept[name], p) for name, p in model.named_parameters() if p.requires_grad)
    shake(model)
    assert all(torch.equal(tensor, trained_state(again)[name]) for name, tensor in state.items())  # a copy, not a view


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "all-parameters"])
def test_state_of_another_segment_is_refused(
    lora: LoraSettings | None, save_checkpoint: Callable[..., ModelSource]
) -> None:
    source = save_checkpoint("llama", "base")
    _, own = load(source, HBT.data_party(4), CLASSIFY, lora)
    _, body = load(source, HBT.model_party(4), CLASSIFY, lora)
    with pytest.raises(CheckpointError, match=r"does not fit this segment.*another cut, model or tuning"):
        load_trained_state(own, trained_state(body))
    narrow = {name: tensor[..., :1] for name, tensor in trained_state(own).items()}
    with pytest.raises(CheckpointError, match="names or shapes differ"):
        load_trained_state(own, narrow)


def test_lora_is_drawn_by_name_and_seed(save_checkpoint: Callable[..., ModelSource]) -> None:
    source = save_checkpoint("llama", "base")
    settings = LoraSettings(rank=3, target_modules=("q_proj", "embed_tokens"))
    torch.manual_seed(1)
    _, whole = load(source, WHOLE, CLASSIFY, settings)
    torch.manual_seed(2)
    _, own = load(source, HBT.data_party(4), CLASSIFY, settings)
    _, other = load(source, HBT.data_party(4), CLASSIFY, settings, seed=4)
    drawn = trained_state(whole)
    assert any("lora_embedding_B" in name for name in drawn)
    assert not any(name.endswith("embed_tokens.weight") for name in drawn)  # adapters travel, the embedding never
    for name, tensor in trained_state(own).items():
        assert torch.equal(tensor, drawn[name]), name
        if tensor.any():
            assert not torch.equal(tensor, trained_state(other)[name]), name


def test_trained_state_asks_no_hub(
    save_checkpoint: Callable[..., ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, own = load(save_checkpoint("llama", "base"), HBT.data_party(4), CLASSIFY)
    own.peft_config["default"].base_model_name_or_path = "some-org/some-model"

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", refuse)
    load_trained_state(own, trained_state(own))


@by_plan
@pytest.mark.parametrize(
    ("family", "kind", "task"),
    [
        ("bert", "base", CLASSIFY),
        ("llama", "base", CLASSIFY),
        ("gpt2", "base", CLASSIFY),
        ("llama-tied", "writer", WRITE),
    ],
    ids=["bert", "llama", "gpt2", "llama-tied-writes"],
)
def test_merged_adapter_loads_with_plain_peft(
    family: str,
    kind: str,
    task: TaskSettings,
    plan: PartitionPlan,
    save_checkpoint: Callable[..., ModelSource],
    tmp_path: Path,
) -> None:
    source = save_checkpoint(family, kind)
    own, data_model = load(source, plan.data_party(4), task)
    body, body_model = load(source, plan.model_party(4), task)
    own.channel.call = SegmentRunner(body.model, body.segment)
    parameters = [p for m in (data_model, body_model) for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    labels = torch.tensor([0, 2]) if task is CLASSIFY else IDS_BT
    data_model.eval()
    body_model.eval()
    for _ in range(3):
        optimizer.zero_grad()
        data_model(**INPUTS, labels=labels).loss.backward()
        optimizer.step()
    logits = data_model(**INPUTS).logits

    states = [trained_state(data_model), trained_state(body_model)]
    save_merged_adapter(tmp_path / "merged", states, load_config(source, task), LORA, task)
    auto = AutoModelForSequenceClassification if task is CLASSIFY else AutoModelForCausalLM
    settings = {"num_labels": 3, "pad_token_id": 0} if task is CLASSIFY else {}
    plain = auto.from_pretrained(source.location, **settings).eval()
    plain.config.pad_token_id = own.model.config.pad_token_id
    before = plain(**INPUTS).logits
    merged = PeftModel.from_pretrained(plain, str(tmp_path / "merged")).eval()
    assert torch.equal(merged(**INPUTS).logits, logits)
    assert not torch.allclose(before, logits, atol=1e-3)

    states[1] = {name: tensor * 1.01 for name, tensor in states[1].items()}
    save_merged_adapter(tmp_path / "wrong", states, load_config(source, task), LORA, task)
    fresh = auto.from_pretrained(source.location, **settings).eval()
    fresh.config.pad_token_id = own.model.config.pad_token_id
    assert not torch.equal(PeftModel.from_pretrained(fresh, str(tmp_path / "wrong"))(**INPUTS).logits, logits)


@by_plan
@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "all-parameters"])
@pytest.mark.parametrize(
    ("family", "kind", "task"),
    [
        ("bert", "base", CLASSIFY),
        ("llama", "base", CLASSIFY),
        ("gpt2", "writer", WRITE),
        ("llama-tied", "writer", WRITE),
    ],
    ids=["bert", "llama", "gpt2-writes", "llama-tied-writes"],
)
def test_footprint_is_what_loading_gives(
    family: str,
    kind: str,
    task: TaskSettings,
    plan: PartitionPlan,
    lora: LoraSettings | None,
    save_checkpoint: Callable[..., ModelSource],
) -> None:
    source = save_checkpoint(family, kind)
    spec = SplitSpec(plan=plan, task=task, tuning=lora, optimizer=OptimizerSettings(name="adamw"))
    if task is WRITE and plan is HT and lora is None:  # both models tie their embeddings
        with pytest.raises(
            PartitionError, match=r"Head-Tail and the model \(\w+\) ties its embedding.*Use LoRA.*or Head-Body"
        ):
            footprint(source, spec)
        return
    planned = footprint(source, spec)
    assert (planned.num_blocks, planned.family) == (4, family.removesuffix("-tied"))
    _, whole = load(source, WHOLE, task, lora)
    assert planned.whole_parameters == sum(p.numel() for p in whole.parameters())
    assert planned.whole_trained == sum(p.numel() for p in whole.parameters() if p.requires_grad)
    for share, segment in ((planned.data_party, plan.data_party(4)), (planned.model_party, plan.model_party(4))):
        _, model = load(source, segment, task, lora)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert share.owns == segment.describe()
        assert share.parameters == sum(p.numel() for p in model.parameters())
        assert share.trained == sum(p.numel() for p in trained)
        assert share.parameter_bytes == tensor_bytes(model.parameters())
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = spec.optimizer.build(trained)
        optimizer.step()
        counters = 4 * len(trained)  # AdamW counts each parameter's steps in a float
        measured = tensor_bytes(p.grad for p in trained) + optimizer_bytes(optimizer) - counters
        assert share.training_bytes == measured


@pytest.mark.parametrize(("family", "wire_dtype"), [("bert", "bfloat16"), ("llama", "float32")])
@by_plan
def test_footprint_bounds_the_bytes_of_a_step(
    family: str, wire_dtype: str, plan: PartitionPlan, save_checkpoint: Callable[..., ModelSource]
) -> None:
    """A full batch takes exactly the planned bytes, whatever the family's task head returns."""
    spec = SplitSpec(
        plan=plan, task=CLASSIFY, wire_dtype=wire_dtype, training=TrainingSettings(batch_size=2, max_tokens=5)
    )
    source = save_checkpoint(family, "base")
    planned = footprint(source, spec)
    own, data_model = load(source, plan.data_party(4), CLASSIFY)
    body, _ = load(source, plan.model_party(4), CLASSIFY)
    run = SegmentRunner(body.model, body.segment)
    item = 4 if wire_dtype == "float32" else 2
    sent: dict[str, int] = {}

    def call(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor, positions_BT: torch.Tensor | None) -> torch.Tensor:
        answer = run(hidden_BTD, mask_BT, positions_BT)
        sent["up"] = (hidden_BTD.numel() + answer.numel()) * item + mask_BT.numel()
        sent["down"] = (hidden_BTD.numel() + answer.numel()) * item
        return answer

    own.channel.call = call
    data_model(**INPUTS, labels=torch.tensor([0, 1]))
    assert (planned.up_bytes_per_step, planned.down_bytes_per_step) == (sent["up"], sent["down"])
    smaller = replace(spec, training=TrainingSettings(batch_size=1, max_tokens=5))
    assert footprint(source, smaller).up_bytes_per_step < planned.up_bytes_per_step


def test_training_of_albert_is_refused() -> None:
    config = AutoConfig.for_model("albert", num_hidden_layers=4)
    with pytest.raises(PartitionError, match=r"one block's weights serve all 4 layers.*Choose a model"):
        refuse_trained_copies(config, HBT, CLASSIFY, LORA)
