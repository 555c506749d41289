"""A model with an encoder and a decoder, cut: two holes, one certificate, and every way of getting it wrong noticed."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, EncoderDecoderCache, PreTrainedModel, T5Config

from vflair_flower.certificate import TINY, certify
from vflair_flower.certificate.compare import make_inputs
from vflair_flower.certificate.parties import PARTY, Parties, checkpoint, open_parties, plan_of, trained
from vflair_flower.errors import PartitionError, RemoteError
from vflair_flower.partition import (
    Mode,
    ModelSource,
    PartitionPlan,
    Segment,
    SegmentRunner,
    SplitCache,
    load_segment,
    make_trainable,
    refuse_trained_copies,
    save_merged_adapter,
    trained_state,
)
from vflair_flower.partition.caching import cache_layers, split_cache
from vflair_flower.partition.holes import EncoderStates
from vflair_flower.partition.structure import Part
from vflair_flower.remote import BodyMode, RemoteSegment, SegmentServer, protocol
from vflair_flower.session import Reply, Request
from vflair_flower.settings import LoraSettings, TaskKind, TaskSettings
from vflair_flower.spec import SplitSpec

SUMMARISE = TaskKind.SEQ2SEQ_LM
TASK = TaskSettings(kind=SUMMARISE)
HBT = plan_of(Mode.HBT)
BLOCKS, WHOLE = 5, Segment.whole(5)  # the encoder's; the decoder has 4
TABLES = {f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for part in ("encoder", "decoder")}
LORA = LoraSettings(rank=2, alpha=4)


@pytest.fixture(scope="module", params=["t5", "t5-gated"])
def source(request: pytest.FixtureRequest) -> Iterator[ModelSource]:
    with checkpoint(TINY[request.param](), SUMMARISE) as written:
        yield written


@pytest.fixture
def parties(source: ModelSource) -> Iterator[Parties]:
    with open_parties(source, SUMMARISE, HBT, frozen=TABLES) as opened:
        yield opened


def backward(parties: Parties, inputs: Mapping[str, Any] | None = None) -> tuple[Tensor, Tensor]:
    """Run both models forth and back; return their logits."""
    inputs = inputs or make_inputs(parties.whole.config, SUMMARISE)
    whole, own = parties.whole(**inputs), parties.data_party(**inputs)
    whole.loss.backward()
    own.loss.backward()
    return whole.logits, own.logits


def differing(parties: Parties) -> list[str]:
    own, body = trained(parties.data_party), parties.server.pending_gradients(PARTY)
    gradients = {name: body[name] if name in body else own[name].grad for name in own.keys() | body.keys()}
    return [n for n, p in trained(parties.whole).items() if p.grad is None or not torch.equal(p.grad, gradients[n])]


def test_frozen_tables_leave_every_gradient_equal(parties: Parties) -> None:
    logits, own = backward(parties)
    assert torch.equal(logits, own)
    assert differing(parties) == []


def test_a_decoder_mask_crosses(parties: Parties) -> None:
    inputs = make_inputs(parties.whole.config, SUMMARISE)
    decoder_mask = torch.ones_like(inputs["labels"])
    decoder_mask[1, 5:] = 0
    logits, own = backward(parties, {**inputs, "decoder_attention_mask": decoder_mask})
    assert torch.equal(logits, own)
    assert differing(parties) == []


def test_eager_attention_and_left_padding_are_exact(parties: Parties) -> None:
    for model in (parties.whole, parties.data_party, parties.server._model):
        model.set_attn_implementation("eager")
    logits, own = backward(parties, make_inputs(parties.whole.config, SUMMARISE, left=True))
    assert torch.equal(logits, own)
    assert differing(parties) == []


def test_states_without_a_gradient_bring_none_back(parties: Parties, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(parties.whole.config, SUMMARISE)
    with torch.no_grad():
        encoder: Any = parties.whole.get_encoder()
        states = encoder(input_ids=inputs.pop("input_ids"), attention_mask=inputs["attention_mask"])
    calls = recorded(parties, monkeypatch)
    logits, own = backward(parties, {**inputs, "encoder_outputs": (states.last_hidden_state,)})
    assert torch.equal(logits, own)
    assert [(operation, sorted(tensors)) for operation, tensors in calls][1:] == [("backward", ["grad"])]
    body = parties.server.pending_gradients(PARTY)
    whole = trained(parties.whole)
    assert body.keys() == {name for name in trained(parties.server.module) if name.startswith("decoder.")}
    assert all(torch.equal(gradient, whole[name].grad) for name, gradient in body.items())  # type: ignore[arg-type]


def test_summing_the_parties_shares_would_round_otherwise(parties: Parties, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the gradient of the blocks behind the hole travels: added here instead, it is summed in another order."""
    call = RemoteSegment.__call__

    def added_here(self: RemoteSegment, *args: Any, encoder: EncoderStates | None = None, **kwargs: Any) -> Tensor:
        copy = None if encoder is None else EncoderStates(hidden_BSD=encoder.hidden_BSD, mask_BS=encoder.mask_BS)
        return call(self, *args, encoder=copy, **kwargs)

    monkeypatch.setattr(RemoteSegment, "__call__", added_here)
    backward(parties)
    assert any(name.startswith("encoder.") for name in differing(parties))


def recorded(parties: Parties, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, tuple[int, ...]]]]:
    """Write down what the data party sends: operation and shapes."""
    calls: list[tuple[str, dict[str, tuple[int, ...]]]] = []
    link = parties.remote._link
    send = link.call

    def call(target: str, operation: str, tensors: Mapping[str, Tensor], meta: Any = None) -> Reply:
        calls.append((operation, {name: tuple(tensor.shape) for name, tensor in tensors.items()}))
        return send(target, operation, tensors, meta)

    monkeypatch.setattr(link, "call", call)
    return calls


def test_two_round_trips_each_way(parties: Parties, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(parties, monkeypatch)
    backward(parties)
    read, written, D = (3, 9), (3, 7), 64
    assert calls == [
        ("forward", {"hidden": (*read, D), "attention_mask": read}),
        (
            "forward",
            {
                "hidden": (*written, D),
                "attention_mask": written,
                "encoder_hidden": (*read, D),
                "encoder_mask": read,
            },
        ),
        ("backward", {"grad": (*written, D), "encoder_grad": (*read, D)}),
        ("backward", {"grad": (*read, D)}),
    ]
    assert parties.remote.rows_since_step == 3


@torch.no_grad()
def test_a_new_token_costs_one_hidden_vector(parties: Parties, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(parties, monkeypatch)
    inputs = make_inputs(parties.whole.config, SUMMARISE, left=True)
    model: Any = parties.data_party.eval()
    model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=4)
    encoded, first, *later = [tensors for _, tensors in calls]
    assert encoded == {"hidden": (3, 9, 64), "attention_mask": (3, 9)}
    assert first == {"hidden": (3, 1, 64), "encoder_hidden": (3, 9, 64), "encoder_mask": (3, 9)}
    assert later == [{"hidden": (3, 1, 64)}] * 3


@torch.no_grad()
def test_a_cache_of_ones_own_is_followed(parties: Parties) -> None:
    inputs = make_inputs(parties.whole.config, SUMMARISE)
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    settings: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None, "num_beams": 3, "do_sample": False}
    own_blocks = HBT.data_party(4).blocks
    cache = split_cache(parties.whole.config, own_blocks)
    assert isinstance(cache, EncoderDecoderCache)
    assert isinstance(cache.self_attention_cache, SplitCache)
    assert len(cache_layers(cache)) == 8
    whole: Any = parties.whole.eval()
    own: Any = parties.data_party.eval()
    expected = whole.generate(**given, **settings)
    assert torch.equal(own.generate(**given, **settings, past_key_values=cache), expected)
    assert parties.server._caches.state_bytes() > 0
    foreign = EncoderDecoderCache(*(type(cache.cross_attention_cache)(config=own.config) for _ in range(2)))
    with pytest.raises(PartitionError, match="DynamicCache, which the other parties' caches cannot follow"):
        own.generate(**given, **settings, past_key_values=foreign)


def _change_a_weight(part: str) -> Callable[[Parties], None]:
    def change(parties: Parties) -> None:
        body = dict(parties.server.module.named_parameters())
        name = next(n for n, p in body.items() if n.startswith(part) and p.dim() == 2)
        with torch.no_grad():
            body[name][0, 0] += 1e-2

    return change


def _see_padding(parties: Parties) -> None:
    run = parties.server._run

    def without_mask(*args: Any, encoder: EncoderStates | None = None, **kwargs: Any) -> Tensor:
        if encoder is not None and encoder.mask_BS is not None:
            encoder = EncoderStates(hidden_BSD=encoder.hidden_BSD, mask_BS=torch.ones_like(encoder.mask_BS))
        return run(*args, encoder=encoder, **kwargs)

    parties.server._run = without_mask  # type: ignore[assignment]


def _forget_the_tail(parties: Parties) -> None:
    answer = parties.server._backward

    def without(request: Request) -> Reply:
        kept = {name: tensor for name, tensor in request.tensors.items() if name != "encoder_grad"}
        return answer(Request(request.source, request.operation, kept, request.meta))

    parties.server._backward = without  # type: ignore[method-assign]


def _forget_the_table(parties: Parties) -> None:
    body = dict(parties.server.module.named_parameters())
    with torch.no_grad():
        for name in TABLES:
            body[name].zero_()


@pytest.mark.parametrize(
    ("tamper", "wrong"),
    [
        (_change_a_weight("encoder."), "logits_equal"),
        (_change_a_weight("decoder."), "logits_equal"),
        (_see_padding, "logits_equal"),
        (_see_padding, "generation_equal"),
        (_forget_the_table, "logits_equal"),
        (_forget_the_tail, "steps_equal"),
    ],
)
def test_a_spoilt_party_is_caught(tamper: Callable[[Parties], None], wrong: str) -> None:
    row = certify("t5", TINY["t5"](), SUMMARISE, Mode.HBT, tamper=tamper)
    assert not row.ok
    assert getattr(row, wrong) is False


def test_a_beam_search_that_nobody_follows_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SplitCache, "take_changes", lambda self: (None, None))
    row = certify("t5", TINY["t5"](), SUMMARISE, Mode.HBT)
    assert row.generation_equal is False
    assert "beam" in row.remark
    assert "greedy" not in row.remark


def test_a_forgotten_encoder_mask_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache, the mask of what the encoder has read comes once and is needed with every token."""
    monkeypatch.setattr(
        "vflair_flower.remote.caches.PartyCache.encoder_states",
        lambda self, width: (
            None
            if self.encoder_mask_BS is None
            else EncoderStates(
                hidden_BSD=torch.zeros(1, 1, 1).expand(*self.encoder_mask_BS.shape, width),
                mask_BS=torch.ones_like(self.encoder_mask_BS),
            )
        ),
    )
    assert certify("t5", TINY["t5"](), SUMMARISE, Mode.HBT).generation_equal is False


@pytest.mark.parametrize(
    "plan", [HBT, PartitionPlan(head_blocks=0, tail_blocks=1), PartitionPlan(head_blocks=0, tail_blocks=0)]
)
def test_segments_keep_global_names_and_read_no_more(source: ModelSource, plan: PartitionPlan, tmp_path: Path) -> None:
    segments = plan.data_party(BLOCKS), plan.model_party(BLOCKS)
    own, body = (load_segment(source, segment, TASK).model for segment in segments)
    tensors = load_file(Path(source.location) / "model.safetensors")
    names = [set(dict(model.named_parameters())) for model in (own, body)]
    assert names[0] | names[1] == tensors.keys()
    assert names[0] & names[1] == (TABLES if plan.head_blocks + plan.tail_blocks else set())
    saved: dict[str, Tensor] = {}
    for number, (model, held) in enumerate(zip((own, body), names, strict=True)):
        model.save_pretrained(tmp_path / str(number))
        files = load_file(tmp_path / str(number) / "model.safetensors")
        assert files.keys() == held
        saved |= files
        poisoned = tmp_path / f"poisoned-{number}"
        model.config.save_pretrained(poisoned)
        rest = {n: t if n in held else torch.full_like(t, torch.nan) for n, t in tensors.items()}
        save_file(rest, poisoned / "model.safetensors", metadata={"format": "pt"})
        again = load_segment(ModelSource(name="poisoned", location=str(poisoned)), segments[number], TASK).model
        assert all(parameter.isfinite().all() for parameter in again.parameters())
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())


def test_an_untied_head_stays_untied(tmp_path: Path) -> None:
    """T5 1.1 has a language-model head of its own; transformers ties it by default, and unties it as it reads it."""
    with checkpoint(TINY["t5-gated"](), SUMMARISE) as tied:
        tensors = load_file(Path(tied.location) / "model.safetensors")
        tensors["lm_head.weight"] = tensors["shared.weight"].flip(0).contiguous()
        T5Config.from_pretrained(tied.location).save_pretrained(tmp_path)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = ModelSource(name="untied", location=str(tmp_path))
    with open_parties(source, SUMMARISE, HBT, frozen=TABLES) as parties:
        assert torch.equal(parties.data_party.lm_head.weight, tensors["lm_head.weight"])
        logits, own = backward(parties)
        assert torch.equal(logits, own)
        assert differing(parties) == []


def test_lora_trains_as_on_the_whole_model(source: ModelSource, tmp_path: Path) -> None:
    """LoRA leaves the tables frozen: three steps are the whole model's, and PEFT loads the adapters together."""
    from peft import PeftModel

    spec = SplitSpec(plan=HBT, task=TASK, tuning=LORA, seed=3)
    loaded = [load_segment(source, s, TASK, seed=3) for s in (WHOLE, HBT.data_party(BLOCKS), HBT.model_party(BLOCKS))]
    server = SegmentServer(loaded[2], spec, body_mode=BodyMode.SYNCHRONOUS, deadline_s=20)
    whole, own = (make_trainable(segment, LORA, TASK, seed=3) for segment in loaded[:2])
    loaded[1].channel.call = RemoteSegment(_Direct(server), spec)  # type: ignore[arg-type]
    server.begin([PARTY], server_round=1, training=True)
    optimizers = [torch.optim.AdamW(list(trained(m).values()), lr=0.01, weight_decay=0.0) for m in (whole, own)]
    for step in range(3):
        inputs = make_inputs(loaded[0].model.config, SUMMARISE, seed=step)
        for model, optimizer in zip((whole, own), optimizers, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = spec.optimizer.rate(step, 3)
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
        loaded[1].channel.call.step(step=step, total_steps=3)  # type: ignore[attr-defined]
    states = [trained_state(own), server.trained_state()]
    expected = trained_state(whole)
    assert expected.keys() == states[0].keys() | states[1].keys()
    assert not any("relative_attention_bias" in name for name in expected)
    assert all(torch.equal({**states[0], **states[1]}[name], tensor) for name, tensor in expected.items())
    save_merged_adapter(tmp_path, list(states), loaded[0].model.config, LORA, TASK)
    plain: PreTrainedModel = AutoModelForSeq2SeqLM.from_pretrained(source.location)
    tuned: nn.Module = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    inputs = make_inputs(loaded[0].model.config, SUMMARISE)
    assert torch.equal(tuned(**inputs).logits, whole.eval()(**inputs).logits)


class _Direct:
    """Stands for an open link: hands each call to the server."""

    def __init__(self, server: SegmentServer) -> None:
        self._server = server

    def call(self, _target: str, operation: str, tensors: Mapping[str, Tensor], meta: Any = None) -> Reply:
        own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        return self._server(Request(PARTY, operation, own, dict(meta or {})))


@pytest.mark.parametrize("mode", BodyMode)
def test_every_body_mode_trains_on_the_table_under_its_own_name(source: ModelSource, mode: BodyMode) -> None:
    """Also where each party trains a copy of the body: the table is read through the block that borrows it."""
    spec = SplitSpec(plan=HBT, task=TASK, tuning=None, seed=3)
    own, body = (load_segment(source, s, TASK) for s in (HBT.data_party(BLOCKS), HBT.model_party(BLOCKS)))
    server = SegmentServer(body, spec, body_mode=mode, deadline_s=20)
    server.begin([PARTY], server_round=1, training=True)
    own.channel.call = RemoteSegment(_Direct(server), spec)  # type: ignore[arg-type]
    inputs = make_inputs(own.model.config, SUMMARISE)
    loss = own.model(**inputs).loss
    loss.backward()
    assert server.pending_gradients(PARTY).keys() >= TABLES
    own.channel.call.step(step=0, total_steps=0)
    assert not torch.equal(own.model(**inputs).loss, loss)


def test_runner_joins_the_parts_without_a_network(source: ModelSource) -> None:
    whole = load_segment(source, WHOLE, TASK).model
    own = load_segment(source, HBT.data_party(BLOCKS), TASK)
    body = load_segment(source, HBT.model_party(BLOCKS), TASK)
    run = SegmentRunner(body.model, body.segment)
    own.channel.call = run
    inputs = make_inputs(whole.config, SUMMARISE)
    assert torch.equal(own.model(**inputs).logits, whole(**inputs).logits)
    hidden = torch.zeros(1, 3, 64)
    with pytest.raises(PartitionError, match="'decoder' was to be run without an encoder's states"):
        run(hidden, None, part=Part.DECODER)
    with pytest.raises(PartitionError, match=r"'only' was to be run without .* parts are encoder, decoder"):
        run(hidden, None)


@torch.no_grad()
def test_a_decoder_call_without_its_encoder_is_refused(parties: Parties) -> None:
    hidden = torch.zeros(1, 3, 64)
    with pytest.raises(RemoteError, match="without an encoder's states"):
        parties.remote(hidden, None, None, part=Part.DECODER)
    states = EncoderStates(hidden_BSD=torch.zeros(2, 3, 64), mask_BS=torch.ones(2, 3))
    with pytest.raises(RemoteError, match=r"encoder states of shape .* for 1 rows"):
        parties.remote(hidden, None, None, part=Part.DECODER, encoder=states)


def test_other_families_agreements_know_no_encoder() -> None:
    spec = SplitSpec(plan=HBT, task=TaskSettings(kind=TaskKind.CAUSAL_LM))
    llama, t5 = (protocol.agreement_for(spec, TINY[name]()) for name in ("llama", "t5"))
    for operation, sent in (("forward", {"encoder_hidden", "encoder_mask"}), ("backward", {"encoder_grad"})):
        names = [{tensor.name for tensor in agreed.operations[operation].request} for agreed in (llama, t5)]
        assert names[1] - names[0] == sent


def test_head_tail_is_refused(source: ModelSource) -> None:
    plan = PartitionPlan(mode=Mode.HT, head_blocks=1, tail_blocks=0)
    for segment in (plan.data_party(BLOCKS), plan.model_party(BLOCKS)):
        with pytest.raises(PartitionError, match=r"Head-Tail and the model \(t5\) is an encoder-decoder.*HBT"):
            load_segment(source, segment, TASK)


def test_a_cut_too_deep_for_the_decoder_is_refused(source: ModelSource) -> None:
    plan = PartitionPlan(head_blocks=2, tail_blocks=2)
    with pytest.raises(PartitionError, match="model has 4 blocks; the model party would hold none"):
        load_segment(source, plan.data_party(BLOCKS), TASK)


def test_training_the_tables_is_refused() -> None:
    config = TINY["t5"]()
    with pytest.raises(PartitionError, match=r"relative position bias.*Use LoRA"):
        refuse_trained_copies(config, HBT, TASK, None)
    refuse_trained_copies(config, HBT, TASK, LORA)
    refuse_trained_copies(config, PartitionPlan(head_blocks=0, tail_blocks=0), TASK, None)
