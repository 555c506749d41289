"""Baichuan-7B and ChatGLM files, written here in their original layout, read as Llama and GLM; relatives are refused.

The layouts and the arithmetic are written out once more in this file, apart from the library's, to compare with.
B rows, T tokens, H heads, G groups of keys, E width of a head.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, GlmConfig, GlmForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedModel as Model

from vflair_flower.certificate import certify_model
from vflair_flower.errors import ModelError
from vflair_flower.partition import (
    Mode,
    ModelSource,
    PartitionPlan,
    Segment,
    SegmentRunner,
    load_segment,
    load_tokenizer,
    make_trainable,
    resolve_model,
    trained_state,
)
from vflair_flower.partition.export import Side, export_segment
from vflair_flower.partition.sources import read_config
from vflair_flower.settings import LoraSettings, TaskKind, TaskSettings

WRITE = TaskSettings(kind=TaskKind.CAUSAL_LM)
CLASSIFY = TaskSettings(label_names=("a", "b", "c"))
WHOLE = Segment.whole(4)
HBT, HT = PartitionPlan(), PartitionPlan(mode=Mode.HT, head_blocks=1, tail_blocks=0)

# As in the repositories' config.json, with smaller sizes.
BAICHUAN: dict[str, Any] = {
    "architectures": ["BaiChuanForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_baichuan.BaiChuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaiChuanForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 4096,
    "model_type": "baichuan",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.29.1",
    "use_cache": True,
    "vocab_size": 64,
}
CHATGLM: dict[str, Any] = {
    "_name_or_path": "THUDM/chatglm3-6b",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 48,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 32,
    "kv_channels": 16,
    "layernorm_epsilon": 1e-05,
    "model_type": "chatglm",
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 4,
    "original_rope": True,
    "padded_vocab_size": 64,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.27.1",
    "use_cache": True,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GLM4 = {
    **{name: value for name, value in CHATGLM.items() if name != "_name_or_path"},
    "architectures": ["ChatGLMForConditionalGeneration"],
    "layernorm_epsilon": 1.5625e-07,
    "rope_ratio": 500,
    "seq_length": 131072,
    "eos_token_id": [60, 61, 62],
    "pad_token_id": 60,
    "kv_channels": 8,
}
ORIGINALS = {"baichuan-7b": BAICHUAN, "chatglm3": CHATGLM, "glm4": GLM4}
by_original = pytest.mark.parametrize("original", list(ORIGINALS))
by_plan = pytest.mark.parametrize("plan", [HBT, HT], ids=["HBT", "HT"])


def equivalent(original: str) -> Model:
    """The Llama or GLM that a checkpoint must amount to, built directly."""
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 4}
    if original == "baichuan-7b":
        return LlamaForCausalLM(LlamaConfig(**sizes, rms_norm_eps=1e-5, max_position_embeddings=4096, pad_token_id=0))
    glm4 = original == "glm4"
    rope = {"rope_type": "default", "rope_theta": 5e6 if glm4 else 1e4, "partial_rotary_factor": 0.5}
    config = GlmConfig(
        **sizes,
        num_key_value_heads=2,
        head_dim=8 if glm4 else 16,
        rms_norm_eps=1.5625e-07 if glm4 else 1e-5,
        attention_bias=True,
        rope_parameters=rope,
        max_position_embeddings=131072 if glm4 else 8192,
        pad_token_id=60 if glm4 else 0,
    )
    return GlmForCausalLM(config)


def to_original(original: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write a Llama's or GLM's tensors as the repositories do."""
    written: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        theirs, value = name, tensor
        if "q_proj" in name:
            value = torch.cat([tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
            theirs = name.replace("q_proj", "W_pack")
        if original != "baichuan-7b":
            outside = {
                "model.embed_tokens.weight": "transformer.embedding.word_embeddings.weight",
                "model.norm.weight": "transformer.encoder.final_layernorm.weight",
                "lm_head.weight": "transformer.output_layer.weight",
            }
            theirs = outside.get(name, "transformer.encoder." + theirs.removeprefix("model."))
            theirs = theirs.replace("self_attn.W_pack", "self_attention.query_key_value")
            theirs = theirs.replace("self_attn.o_proj", "self_attention.dense")
            theirs = theirs.replace("gate_up_proj", "dense_h_to_4h").replace("down_proj", "dense_4h_to_h")
        written[theirs] = value.clone().contiguous()
    for block in range(4 if original == "baichuan-7b" else 0):
        written[f"model.layers.{block}.self_attn.rotary_emb.inv_freq"] = torch.rand(4)  # of old files; read by nobody
    if original != "baichuan-7b":
        written["transformer.rotary_pos_emb.inv_freq"] = torch.rand(4)
    return written


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[ModelSource, Model]]:
    done: dict[str, tuple[ModelSource, Model]] = {}

    def write(original: str) -> tuple[ModelSource, Model]:
        if original not in done:
            torch.manual_seed(7)
            model = equivalent(original).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.randn_like(parameter) * 0.2)
            folder = tmp_path_factory.mktemp("originals") / original
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(ORIGINALS[original]))
            theirs, places = to_original(original, model.state_dict()), {}
            for number, name in enumerate(sorted(theirs)):
                file = f"model-{number % 5 + 1:05d}-of-00005.safetensors"
                places[name] = file
            for file in set(places.values()):
                shard = {name: tensor for name, tensor in theirs.items() if places[name] == file}
                save_file(shard, folder / file, metadata={"format": "pt"})
            index = {"metadata": {}, "weight_map": places}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            (folder / "modeling_baichuan.py").write_text("raise SystemExit('code from a hub was run')")
            (folder / "configuration_baichuan.py").write_text("raise SystemExit('code from a hub was run')")
            done[original] = resolve_model(str(folder)), model
        return done[original]

    return write


def parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


@by_original
def test_whole_model_is_the_equivalent_one(original: str, written: Callable[..., tuple[ModelSource, Model]]) -> None:
    source, reference = written(original)
    loaded = load_segment(source, WHOLE, WRITE)
    assert type(loaded.model).__name__ == type(reference).__name__
    ours, theirs = parameters(loaded.model), parameters(reference)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert loaded.new_parameters == ()
    ids_BT = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, 6:] = 0
    for inputs in ({"input_ids": ids_BT}, {"input_ids": ids_BT, "attention_mask": mask_BT}):
        assert torch.equal(loaded.model.eval()(**inputs).logits, reference(**inputs).logits)


@by_original
@by_plan
def test_segments_hold_their_own_converted_tensors(
    original: str, plan: PartitionPlan, written: Callable[..., tuple[ModelSource, Model]]
) -> None:
    source, reference = written(original)
    theirs = parameters(reference)
    data, body = (load_segment(source, s, WRITE) for s in (plan.data_party(4), plan.model_party(4)))
    own = [parameters(loaded.model) for loaded in (data, body)]
    assert own[0].keys() | own[1].keys() == theirs.keys()
    assert not own[0].keys() & own[1].keys()
    assert all(torch.equal(tensor, theirs[name]) for each in own for name, tensor in each.items())
    data.channel.call = SegmentRunner(body.model.eval(), body.segment)
    ids_BT = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    assert torch.equal(data.model.eval()(**inputs).logits, reference(**inputs).logits)


@by_original
@by_plan
def test_other_parties_tensors_are_not_read(
    original: str, plan: PartitionPlan, written: Callable[..., tuple[ModelSource, Model]], tmp_path: Path
) -> None:
    """Of every tensor of the other party only NaN is left, and loading does not notice."""
    source, _ = written(original)
    for side, segment in zip(Side, (plan.data_party(4), plan.model_party(4)), strict=True):
        export_segment(source, plan, side, tmp_path / side / "own")
        own = {name for file in (tmp_path / side / "own").glob("*.safetensors") for name in load_file(file)}
        poisoned = tmp_path / side / "poisoned"
        shutil.copytree(source.location, poisoned)
        for file in poisoned.glob("*.safetensors"):
            tensors = load_file(file)
            left = {n: t.clone() if n in own else torch.full_like(t, torch.nan) for n, t in tensors.items()}
            save_file(left, file, metadata={"format": "pt"})
        loaded = load_segment(resolve_model(str(poisoned)), segment, WRITE)
        assert all(parameter.isfinite().all() for parameter in loaded.model.parameters())


@by_original
@by_plan
def test_exported_segment_keeps_the_original_layout(
    original: str, plan: PartitionPlan, written: Callable[..., tuple[ModelSource, Model]], tmp_path: Path
) -> None:
    source, reference = written(original)
    theirs = parameters(reference)
    for side, segment in zip(Side, (plan.data_party(4), plan.model_party(4)), strict=True):
        export_segment(source, plan, side, tmp_path / side)
        names = {name for file in (tmp_path / side).glob("*.safetensors") for name in load_file(file)}
        assert any("W_pack" in name or "query_key_value" in name for name in names)
        assert not any("inv_freq" in name for name in names)
        own = parameters(load_segment(resolve_model(str(tmp_path / side)), segment, WRITE).model)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in own.items())
        assert not list((tmp_path / side).glob("*.py"))


@by_original
def test_pickled_files_are_read_as_well(
    original: str, written: Callable[..., tuple[ModelSource, Model]], tmp_path: Path
) -> None:
    """Baichuan-7B and ChatGLM2 were published as pytorch_model.bin."""
    source, reference = written(original)
    shutil.copy(Path(source.location) / "config.json", tmp_path)
    torch.save(to_original(original, reference.state_dict()), tmp_path / "pytorch_model.bin")
    own = parameters(load_segment(resolve_model(str(tmp_path)), HBT.model_party(4), WRITE).model)
    assert all(torch.equal(tensor, parameters(reference)[name]) for name, tensor in own.items())


@by_original
def test_classifier_and_lora_are_those_of_the_equivalent_model(
    original: str, written: Callable[..., tuple[ModelSource, Model]], tmp_path: Path
) -> None:
    source, reference = written(original)
    reference.save_pretrained(tmp_path / "plain")
    states = []
    for place in (source, resolve_model(str(tmp_path / "plain"))):
        loaded = load_segment(place, HBT.data_party(4), CLASSIFY, seed=3)
        tuned = make_trainable(loaded, LoraSettings(rank=2, target_modules=("q_proj", "v_proj")), CLASSIFY, seed=3)
        states.append(trained_state(tuned))
        assert loaded.new_parameters == ("score.weight",)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@by_original
def test_saved_model_is_a_plain_one(
    original: str, written: Callable[..., tuple[ModelSource, Model]], tmp_path: Path
) -> None:
    source, reference = written(original)
    load_segment(source, WHOLE, WRITE).model.save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(plain) is type(reference)
    assert all(torch.equal(tensor, parameters(reference)[name]) for name, tensor in parameters(plain).items())
    again = load_segment(resolve_model(str(tmp_path / "plain")), HBT.data_party(4), WRITE)
    assert all(torch.equal(t, parameters(reference)[name]) for name, t in parameters(again.model).items())


def test_translated_model_has_a_certificate(written: Callable[..., tuple[ModelSource, Model]]) -> None:
    rows = certify_model(read_config(written("chatglm3")[0]))
    assert rows
    assert all(row.ok for row in rows)


@torch.no_grad()
def chatglm_logits(raw: dict[str, Any], tensors: dict[str, Tensor], ids_BT: Tensor) -> Tensor:
    """ChatGLM's arithmetic on its own tensors: what its papers and config say, in plain steps."""
    heads, groups, width = raw["num_attention_heads"], raw["multi_query_group_num"], raw["kv_channels"]
    turned = width // 2
    base = 10000.0 * raw.get("rope_ratio", 1)
    speeds = base ** (-torch.arange(0, turned, 2, dtype=torch.float64) / turned)
    angles = torch.arange(ids_BT.shape[1], dtype=torch.float64)[:, None] * speeds
    turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)[None, :, None]

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + raw["layernorm_epsilon"]).rsqrt() * tensors[name]

    def rotate(x_BTHE: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x_BTHE[..., :turned].unflatten(-1, (-1, 2)).contiguous())
        return torch.cat([torch.view_as_real(pairs * turns).flatten(-2), x_BTHE[..., turned:]], -1)

    hidden = tensors["transformer.embedding.word_embeddings.weight"][ids_BT]
    causal = torch.full((ids_BT.shape[1],) * 2, -torch.inf).triu(1)
    for block in range(raw["num_layers"]):
        at = f"transformer.encoder.layers.{block}."
        fused = norm(hidden, at + "input_layernorm.weight") @ tensors[at + "self_attention.query_key_value.weight"].T
        fused = fused + tensors[at + "self_attention.query_key_value.bias"]
        q, k, v = fused.split([heads * width, groups * width, groups * width], -1)
        q, k, v = (x.unflatten(-1, (-1, width)) for x in (q, k, v))
        q, k = rotate(q), rotate(k)
        k, v = (x.repeat_interleave(heads // groups, 2) for x in (k, v))
        weights = (torch.einsum("bthe,bshe->bhts", q, k) / width**0.5 + causal).softmax(-1)
        mixed = torch.einsum("bhts,bshe->bthe", weights, v).flatten(2)
        hidden = hidden + mixed @ tensors[at + "self_attention.dense.weight"].T
        wide = norm(hidden, at + "post_attention_layernorm.weight") @ tensors[at + "mlp.dense_h_to_4h.weight"].T
        gate, up = wide.chunk(2, -1)
        hidden = hidden + (silu(gate) * up) @ tensors[at + "mlp.dense_4h_to_h.weight"].T
    final = norm(hidden, "transformer.encoder.final_layernorm.weight")
    return final @ tensors["transformer.output_layer.weight"].T


@pytest.mark.parametrize("original", ["chatglm3", "glm4"])
def test_translated_chatglm_computes_its_published_arithmetic(
    original: str, written: Callable[..., tuple[ModelSource, Model]]
) -> None:
    source, reference = written(original)
    tensors = to_original(original, reference.state_dict())
    ids_BT = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(4))
    expected = chatglm_logits(ORIGINALS[original], tensors, ids_BT)
    model = load_segment(source, WHOLE, WRITE).model.eval()
    answered = model(ids_BT).logits
    assert answered.std() > 0.1
    torch.testing.assert_close(answered, expected, rtol=1e-5, atol=1e-5)
    wrong = chatglm_logits({**ORIGINALS[original], "rope_ratio": 3}, tensors, ids_BT)
    assert not torch.allclose(answered, wrong, rtol=1e-5, atol=1e-5)


def test_published_settings_are_translated(tmp_path: Path) -> None:
    """glm-4-9b-chat, chatglm2-6b and Baichuan-7B at their real sizes."""
    glm4 = {
        **GLM4,
        **{"hidden_size": 4096, "ffn_hidden_size": 13696, "num_layers": 40, "num_attention_heads": 32},
        **{"kv_channels": 128, "padded_vocab_size": 151552, "eos_token_id": [151329, 151336, 151338]},
        "pad_token_id": 151329,
    }
    config = translate(tmp_path, glm4)
    assert (config.model_type, config.vocab_size, config.intermediate_size) == ("glm", 151552, 13696)
    assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (40, 2, 128)
    assert config.rms_norm_eps == 1.5625e-07
    assert config.rope_parameters["rope_theta"] == 5_000_000
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    assert (config.max_position_embeddings, config.attention_bias) == (131072, True)
    assert (config.pad_token_id, config.eos_token_id) == (151329, [151329, 151336, 151338])
    assert config.name_or_path == str(tmp_path)

    second = {**CHATGLM, "_name_or_path": "THUDM/chatglm2-6b", "padded_vocab_size": 65024, "seq_length": 32768}
    config = translate(tmp_path, {name: value for name, value in second.items() if name != "eos_token_id"})
    assert config.rope_parameters["rope_theta"] == 10_000
    assert (config.rms_norm_eps, config.eos_token_id, config.pad_token_id) == (1e-5, None, 0)

    seven = {**BAICHUAN, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 64000}
    config = translate(tmp_path, {**seven, "num_attention_heads": 32, "rms_norm_eps": 1e-6})
    assert (config.model_type, config.vocab_size, config.head_dim) == ("llama", 64000, 128)
    assert (config.num_key_value_heads, config.rms_norm_eps, config.pad_token_id) == (32, 1e-6, 0)
    assert config.rope_parameters["rope_theta"] == 10_000


def translate(folder: Path, raw: dict[str, Any]) -> Any:
    (folder / "config.json").write_text(json.dumps(raw))
    return read_config(resolve_model(str(folder)))


BAICHUAN_13B = {name: value for name, value in BAICHUAN.items() if name != "max_position_embeddings"}
BAICHUAN_13B |= {"architectures": ["BaichuanForCausalLM"], "model_max_length": 4096}
BAICHUAN2_7B = {**BAICHUAN, "architectures": ["BaichuanForCausalLM"], "z_loss_weight": 0, "vocab_size": 125696}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (BAICHUAN_13B, "Baichuan-13B, which has ALiBi positions"),
        (BAICHUAN2_7B, "Baichuan2, whose language-model head normalises"),
        ({**BAICHUAN_13B, "z_loss_weight": 0}, "Baichuan2"),
        ({**BAICHUAN, "architectures": ["BaichuanForCausalLM"]}, r"architectures \['BaichuanForCausalLM'\]"),
        ({**BAICHUAN, "architectures": None}, r"architectures \[\]"),
        ({**BAICHUAN, "quantization_config": {"bits": 4}}, "is quantised"),
        ({**CHATGLM, "quantization_bit": 4}, "is quantised"),
        ({**CHATGLM, "inner_hidden_size": 128, "position_encoding_2d": True}, "ChatGLM-6B of the first generation"),
        ({**CHATGLM, "vision_config": {"hidden_size": 8}}, "vision tower"),
        ({**CHATGLM, "architectures": ["ChatGLMForSequenceClassification"]}, "classifier of its own"),
        ({**CHATGLM, "rmsnorm": False}, "has rmsnorm = False"),
        ({**CHATGLM, "post_layer_norm": False}, "has post_layer_norm = False"),
        ({**CHATGLM, "multi_query_attention": False}, "has multi_query_attention = False"),
        ({**CHATGLM, "add_bias_linear": True}, "has add_bias_linear = True"),
        ({**CHATGLM, "apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        ({**CHATGLM, "hidden_dropout": 0.1}, "has hidden_dropout = 0.1"),
        ({**CHATGLM, "pre_seq_len": 128}, "has pre_seq_len = 128"),
        (
            {**CHATGLM, "_name_or_path": "x", "padded_vocab_size": 65024, "rope_ratio": 4},
            "ChatGLM2-32K divides positions by",
        ),
    ],
)
def test_relatives_that_compute_something_else_are_refused(tmp_path: Path, raw: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=rf"{said}.*Read without that code are Baichuan-7B"):
        translate(tmp_path, raw)


def test_chatglm3_may_stretch_its_rotary_base(tmp_path: Path) -> None:
    long = {**CHATGLM, "_name_or_path": "THUDM/chatglm3-6b-32k", "padded_vocab_size": 65024, "rope_ratio": 50}
    assert translate(tmp_path, long).rope_parameters["rope_theta"] == 500_000


@pytest.mark.parametrize("lost", ["multi_query_group_num", "layernorm_epsilon", "padded_vocab_size", "seq_length"])
def test_incomplete_config_is_a_model_error(tmp_path: Path, lost: str) -> None:
    with pytest.raises(ModelError, match=rf"says 'chatglm', but it cannot be read as one \(KeyError: '{lost}'\)"):
        translate(tmp_path, {name: value for name, value in CHATGLM.items() if name != lost})


@by_original
def test_fused_matrix_of_another_shape_is_a_model_error(
    original: str, written: Callable[..., tuple[ModelSource, Model]], tmp_path: Path
) -> None:
    source, _ = written(original)
    folder = tmp_path / "odd"
    shutil.copytree(source.location, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        fused = [name for name in tensors if name.endswith(("W_pack.weight", "query_key_value.weight"))]
        cut = {name: tensors[name][:-8].contiguous() for name in fused}
        save_file({**tensors, **cut}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError):
        load_segment(resolve_model(str(folder)), HBT.data_party(4), WRITE)


@by_original
def test_tokenizer_without_code_is_read_beside_an_original(
    original: str, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tokenizer_folder / "config.json").write_text(json.dumps(ORIGINALS[original]))
    assert load_tokenizer(resolve_model(str(tokenizer_folder))).pad_token == "<pad>"
    assert not caplog.records
