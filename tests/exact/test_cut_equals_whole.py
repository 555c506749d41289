"""Split equals whole: logits, loss, every gradient and every weight after AdamW steps, bit for bit in float32."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from vflair_flower.errors import PartitionError
from vflair_flower.partition import Mode, PartitionPlan
from vflair_flower.settings import TaskKind

CLASSIFY, WRITE = TaskKind.SEQUENCE_CLASSIFICATION, TaskKind.CAUSAL_LM
DECODERS = ("gpt2", "llama", "llama-tied", "mistral-window", "qwen2", "qwen3")
TASKS = [(family, CLASSIFY) for family in ("bert", "roberta", *DECODERS)] + [(family, WRITE) for family in DECODERS]
PLANS = {
    "HBT-1-2-1": PartitionPlan(mode=Mode.HBT, head_blocks=1, tail_blocks=1),
    "HBT-0-3-1": PartitionPlan(mode=Mode.HBT, head_blocks=0, tail_blocks=1),
    "HBT-1-3-0": PartitionPlan(mode=Mode.HBT, head_blocks=1, tail_blocks=0),
    "HT-1-3": PartitionPlan(mode=Mode.HT, head_blocks=1, tail_blocks=0),
    "HT-2-2": PartitionPlan(mode=Mode.HT, head_blocks=2, tail_blocks=0),
}
by_task = pytest.mark.parametrize(("family", "kind"), TASKS, ids=[f"{f}-{k.value}" for f, k in TASKS])
by_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
by_tuning = pytest.mark.parametrize("lora", [False, True], ids=["all-parameters", "lora"])
STEPS = 3


@by_task
@by_plan
@by_tuning
def test_split_equals_whole(
    family: str,
    kind: TaskKind,
    plan: PartitionPlan,
    lora: bool,
    cut_model: Callable[..., Any],
    make_batch: Callable[..., Any],
    trained_parameters: Callable[..., dict[str, torch.nn.Parameter]],
) -> None:
    cut = cut_model(family, kind, plan, lora=lora)
    whole = trained_parameters(cut.whole)
    own, body = trained_parameters(cut.data_party), trained_parameters(cut.server.module)
    assert own.keys() | body.keys() == whole.keys()

    batch = make_batch(family, kind)
    logits, loss = batch(cut.whole)
    split_logits, split_loss = batch(cut.data_party)
    assert torch.equal(split_logits, logits)
    assert torch.equal(split_loss, loss)
    loss.backward()
    split_loss.backward()
    shared = cut.shared()
    reached = set()
    for name, parameter in whole.items():
        parts = [part[name].grad for part in (body, own) if name in part and part[name].grad is not None]
        if parameter.grad is None:
            assert not parts, name
            continue
        reached.add(name)
        # A tied embedding in Head-Tail is the one parameter of which both parties own a copy: as the embedding at the
        # data party, as the language-model head at the model party.  The whole model's gradient is the sum of both.
        assert len(parts) == (2 if name in shared else 1), name
        assert torch.equal(sum(parts[1:], parts[0]), parameter.grad), name
    assert len(reached) >= len(whole) - 1, set(whole) - reached  # a BERT pooler's or GPT-2's unused tensors at most

    if shared:
        # Each party's optimiser sees only its part of the sum, so with all parameters trained, Head-Tail of a tied
        # model is not the whole model's training.  LoRA freezes the embedding and is exact.
        assert plan.mode is Mode.HT
        assert kind is WRITE
        assert not lora
        return
    remote = cut.open_session()
    optimizers = [torch.optim.AdamW(p, lr=0.0, weight_decay=0.01) for p in (list(whole.values()), list(own.values()))]
    for step in range(STEPS):
        batch = make_batch(family, kind, seed=step)
        for optimizer, model in zip(optimizers, (cut.whole, cut.data_party), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = cut.spec.optimizer.rate(step, STEPS)
            optimizer.zero_grad()
            batch(model)[1].backward()
            optimizer.step()
        remote.step(step=step, total_steps=STEPS)
    remote.finish()
    cut.server.end()
    for name, parameter in whole.items():
        assert torch.equal(own.get(name, body.get(name)), parameter), name


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("kind", [CLASSIFY, WRITE], ids=lambda kind: kind.value)
@pytest.mark.parametrize("plan", [PLANS["HBT-1-2-1"], PLANS["HT-1-3"]], ids=["HBT", "HT"])
def test_left_padding_with_position_ids(
    family: str, kind: TaskKind, plan: PartitionPlan, cut_model: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    cut = cut_model(family, kind, plan)
    batch = make_batch(family, kind, left=True)
    (logits, loss), (split_logits, split_loss) = batch(cut.whole), batch(cut.data_party)
    assert torch.equal(split_logits, logits)
    assert torch.equal(split_loss, loss)
    cut.open_session()
    assert torch.equal(batch(cut.data_party)[0], logits)  # masks as uint8 and positions as int32 lose nothing


@by_task
def test_whole_segment_is_the_plain_model(
    family: str, kind: TaskKind, cut_model: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    cut = cut_model(family, kind, PLANS["HBT-1-2-1"])
    auto = AutoModelForSequenceClassification if kind is CLASSIFY else AutoModelForCausalLM
    plain = auto.from_pretrained(cut.source.location).eval()
    batch = make_batch(family, kind)
    assert torch.equal(batch(plain)[0], batch(cut.whole.eval())[0])


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("plan", [PLANS["HBT-1-2-1"], PLANS["HT-1-3"]], ids=["HBT", "HT"])
def test_the_comparison_notices_a_difference(
    family: str, plan: PartitionPlan, cut_model: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    cut = cut_model(family, CLASSIFY, plan)
    batch = make_batch(family, CLASSIFY)
    logits, _ = batch(cut.whole)

    def wrong_mask(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor, positions_BT: torch.Tensor | None) -> torch.Tensor:
        return cut.runner(hidden_BTD, torch.ones_like(mask_BT), positions_BT)

    cut.channel.call = wrong_mask
    if family == "bert":  # a decoder's right padding lies behind all tokens, where a causal mask hides it anyway
        assert not torch.equal(batch(cut.data_party)[0], logits)
    cut.channel.call = cut.runner
    assert torch.equal(batch(cut.data_party)[0], logits)
    body_weight = next(p for name, p in cut.server.module.named_parameters() if p.dim() == 2 and "embed" not in name)
    with torch.no_grad():
        body_weight[0] += 1e-3
    assert not torch.equal(batch(cut.data_party)[0], logits)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_left_padding_notices_wrong_mask_or_positions(
    family: str, cut_model: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    cut = cut_model(family, WRITE, PLANS["HBT-1-2-1"])
    batch = make_batch(family, WRITE, left=True)
    logits, _ = batch(cut.whole)
    cut.channel.call = lambda hidden, mask, positions: cut.runner(hidden, torch.ones_like(mask), positions)
    assert not torch.equal(batch(cut.data_party)[0], logits)
    if family == "llama":  # GPT-2's positions enter before the cut
        cut.channel.call = lambda hidden, mask, positions: cut.runner(hidden, mask, positions * 2)
        assert not torch.equal(batch(cut.data_party)[0], logits)


@pytest.mark.parametrize(
    "plan", [PartitionPlan(mode=Mode.HT, head_blocks=0, tail_blocks=0), PartitionPlan(head_blocks=0, tail_blocks=0)]
)
def test_lora_without_a_block_is_refused(plan: PartitionPlan, cut_model: Callable[..., Any]) -> None:
    with pytest.raises(PartitionError, match=r"no module of this segment .* gets LoRA.*at least one block"):
        cut_model("llama", CLASSIFY, plan, lora=True)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("plan", [PLANS["HBT-1-2-1"], PLANS["HT-1-3"]], ids=["HBT", "HT"])
def test_frozen_head_still_trains_the_body(
    family: str,
    plan: PartitionPlan,
    cut_model: Callable[..., Any],
    make_batch: Callable[..., Any],
    trained_parameters: Callable[..., dict[str, torch.nn.Parameter]],
) -> None:
    cut = cut_model(family, CLASSIFY, plan)
    body = trained_parameters(cut.server.module)
    for name, parameter in (*cut.whole.named_parameters(), *cut.data_party.named_parameters()):
        parameter.requires_grad_(name in body)
    before = {name: p.detach().clone() for name, p in body.items()}
    remote = cut.open_session()
    optimizer = torch.optim.AdamW([p for p in cut.whole.parameters() if p.requires_grad], lr=0.01, weight_decay=0.01)
    batch = make_batch(family, CLASSIFY)
    batch(cut.whole)[1].backward()
    optimizer.step()
    batch(cut.data_party)[1].backward()
    remote.step(step=0, total_steps=0)
    whole = trained_parameters(cut.whole)
    assert all(torch.equal(body[name], whole[name]) for name in body)
    assert not all(torch.equal(body[name], before[name]) for name in body)
