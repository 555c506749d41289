"""Read checkpoints of architectures that transformers has no code for, as the family whose arithmetic is theirs.

Baichuan-7B is a Llama whose three projections lie in one matrix; ChatGLM2, ChatGLM3 and the original GLM-4 files are
what transformers calls GLM, under other names and with the projections in one matrix.  Their own code is never run:
config.json is translated, names and layout go through transformers' own weight conversion, tensor by tensor, so that
a segment still reads its own tensors alone.

Verified (tests/partition/test_conversions.py), on random weights in the original layout:
the names and shapes of all tensors; every converted tensor, whole and per segment, against a conversion written apart
from this one, bit for bit; that converted models answer as a Llama or GLM built directly, bit for bit; for ChatGLM,
that the translated model computes what a second implementation of its published arithmetic (rotary angles of adjacent
pairs in the first half of each head, grouped keys, SwiGLU) computes, to 1e-5.
Not verified: answers of the published checkpoints against the code in their repositories, which this package does not
run; tokenizers, which need that code as well.  In half precision the originals round in other places.
Invariant: what would compute anything else is refused; nothing is guessed.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import GlmConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, Split, WeightConverter, WeightRenaming

from vflair_flower.errors import ModelError

Raw = Mapping[str, Any]
_CHATGLM_VOCABULARY = 65024  # of ChatGLM2 and 3; GLM-4 has 151552
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True, kw_only=True)
class _Original:
    """How checkpoints of one foreign `model_type` are read."""

    architecture: str
    translate: Callable[[Raw, str], PreTrainedConfig]
    transforms: Callable[[], list[WeightConverter | WeightRenaming]]


def translated_config(raw: Raw, location: str) -> PreTrainedConfig | None:
    """Return the configuration that a foreign ``config.json`` amounts to, or None if transformers knows it itself.

    Parameters
    ----------
    raw : mapping
        The ``config.json``.
    location : str
        Where it comes from; for messages, and as the configuration's `name_or_path`.

    Raises
    ------
    ModelError
        If it is of a kind that computes something else: Baichuan-13B (ALiBi positions), Baichuan2 (normalised head),
        ChatGLM-6B of the first generation, quantised files, and settings that the target family does not have.
    """
    original = _ORIGINALS.get(str(raw.get("model_type")))
    if original is None:
        return None
    try:
        config = original.translate(raw, location)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"the config.json of {location!r} says {raw['model_type']!r}, but it cannot be read as one "
            f"({type(error).__name__}: {error}). Copy it from the model's repository again."
        ) from error
    config.name_or_path = location
    return config


@contextmanager
def original_layout(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Iterator[None]:
    """Let a class read the original layout while it loads, if its configuration was translated.

    transformers finds a weight conversion by the name of the class; afterwards the class has its own name again, so
    that what is saved is a plain Llama or GLM.

    Parameters
    ----------
    model_class : type
        A class of nobody else's: it is given another name for a while.
    config : transformers.PreTrainedConfig
        The model's.
    """
    original = _original_of(config)
    if original is None:
        yield
        return
    name = model_class.__name__
    model_class.__name__ = _registered(original, name)
    try:
        yield
    finally:
        model_class.__name__ = name


def was_translated(config: PreTrainedConfig) -> bool:
    """Whether the configuration is a translation, and the checkpoint in the original layout."""
    return _original_of(config) is not None


def _original_of(config: PreTrainedConfig) -> _Original | None:
    names = config.architectures or ()
    return next((original for original in _ORIGINALS.values() if original.architecture in names), None)


@functools.cache
def _registered(original: _Original, class_name: str) -> str:
    """Tell transformers the conversion, once per class, and return the name that it knows it by."""
    name = f"{original.architecture}As{class_name}"
    register_checkpoint_conversion_mapping(name, original.transforms(), overwrite=True)
    return name


def _baichuan(raw: Raw, location: str) -> PreTrainedConfig:
    names = raw.get("architectures") or []
    if "z_loss_weight" in raw or raw.get("vocab_size") == 125696:
        raise _refusal(location, "is a Baichuan2, whose language-model head normalises its rows before it multiplies")
    if "max_position_embeddings" not in raw:
        raise _refusal(location, "is a Baichuan-13B, which has ALiBi positions where a Llama has rotary ones")
    if names != [_BAICHUAN_7B]:
        raise _refusal(
            location,
            f"names the architectures {names!r}, where Baichuan-7B has {[_BAICHUAN_7B]!r}; Baichuan-13B and Baichuan2 "
            "compute something else",
        )
    _refuse_quantised(raw, location)
    return LlamaConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=raw["num_attention_heads"],
        hidden_act=raw.get("hidden_act", "silu"),
        max_position_embeddings=raw["max_position_embeddings"],
        initializer_range=raw.get("initializer_range", 0.02),
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        pad_token_id=raw.get("pad_token_id", 0),
        bos_token_id=raw.get("bos_token_id", 1),
        eos_token_id=raw.get("eos_token_id", 2),
        architectures=[_BAICHUAN_7B],
    )


def _chatglm(raw: Raw, location: str) -> PreTrainedConfig:
    if "inner_hidden_size" in raw or "position_encoding_2d" in raw:
        raise _refusal(location, "is a ChatGLM-6B of the first generation, which has two-dimensional positions")
    if raw.get("vision_config"):
        raise _refusal(location, "has a vision tower, whose names are not translated")
    if any("ForSequenceClassification" in name for name in raw.get("architectures") or ()):
        raise _refusal(location, "has a classifier of its own kind, whose tensors would be left out")
    for name, (wanted, default) in _CHATGLM_FIXED.items():
        if (seen := raw.get(name, default)) != wanted:
            raise _refusal(location, f"has {name} = {seen!r}; GLM in transformers computes as with {wanted!r} alone")
    _refuse_quantised(raw, location)
    heads = raw["num_attention_heads"]
    config = GlmConfig(
        vocab_size=raw["padded_vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["ffn_hidden_size"],
        num_hidden_layers=raw["num_layers"],
        num_attention_heads=heads,
        num_key_value_heads=raw["multi_query_group_num"],
        head_dim=raw.get("kv_channels") or raw["hidden_size"] // heads,
        hidden_act="silu",
        attention_dropout=raw.get("attention_dropout", 0.0),
        max_position_embeddings=raw["seq_length"],
        rms_norm_eps=raw["layernorm_epsilon"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0 * _rope_ratio(raw, location),
            "partial_rotary_factor": 0.5,
        },
        attention_bias=bool(raw.get("add_qkv_bias", False)),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        pad_token_id=raw.get("pad_token_id"),
        architectures=[_CHATGLM],
    )
    # GlmConfig's own end tokens are GLM-4's, which the vocabularies of ChatGLM2 and 3 do not have.
    config.eos_token_id = raw.get("eos_token_id")
    return config


def _rope_ratio(raw: Raw, location: str) -> float:
    """Return what the rotary base is multiplied with.

    ChatGLM3 and GLM-4 multiply the base with `rope_ratio`; ChatGLM2-6B-32K divides positions by it, and its config.json
    differs from ChatGLM3's in nothing that says so.
    """
    ratio = float(raw.get("rope_ratio", 1.0))
    ambiguous = raw["padded_vocab_size"] == _CHATGLM_VOCABULARY and ratio != 1.0
    if ambiguous and "chatglm3" not in f"{raw.get('_name_or_path', '')} {location}".lower():
        raise _refusal(
            location,
            f"has rope_ratio = {ratio:g}, which ChatGLM3 multiplies the rotary base with and ChatGLM2-32K divides "
            "positions by, and does not say which of them it is (if it is a ChatGLM3, say so in the folder's name or "
            "in _name_or_path)",
        )
    return ratio


def _refuse_quantised(raw: Raw, location: str) -> None:
    if raw.get("quantization_bit") or raw.get("quantization_config"):
        raise _refusal(location, "is quantised, in a way that only its own code reads")


def _refusal(location: str, what: str) -> ModelError:
    return ModelError(
        f"the model {location!r} {what}. It cannot be read without the code of its repository, which is never run, "
        "and read as something else it would answer wrongly without a word. Read without that code are Baichuan-7B, "
        "ChatGLM2, ChatGLM3 and GLM-4; else choose a model that transformers itself has."
    )


def _fused(source: str, kinds: tuple[str, ...], operation: Callable[[], Chunk | Split]) -> list[WeightConverter]:
    return [WeightConverter(f"{source}.{kind}", [f"{name}.{kind}" for name in _QKV], [operation()]) for kind in kinds]


def _baichuan_transforms() -> list[WeightConverter | WeightRenaming]:
    return [*_fused("self_attn.W_pack", ("weight",), lambda: Chunk(dim=0))]


def _chatglm_transforms() -> list[WeightConverter | WeightRenaming]:
    names = {
        r"^transformer\.embedding\.word_embeddings\.": "model.embed_tokens.",
        r"^transformer\.encoder\.final_layernorm\.": "model.norm.",
        r"^transformer\.output_layer\.": "lm_head.",
        r"^transformer\.encoder\.layers\.": "model.layers.",
        r"\.self_attention\.dense\.": ".self_attn.o_proj.",
        r"\.dense_h_to_4h\.": ".gate_up_proj.",
        r"\.dense_4h_to_h\.": ".down_proj.",
    }
    renamed = [WeightRenaming(theirs, ours) for theirs, ours in names.items()]
    return [*renamed, *_fused("self_attention.query_key_value", ("weight", "bias"), lambda: Split(dim=0))]


_BAICHUAN_7B, _CHATGLM = "BaiChuanForCausalLM", "ChatGLMModel"
_CHATGLM_FIXED: dict[str, tuple[object, object]] = {
    "rmsnorm": (True, True),
    "post_layer_norm": (True, True),
    "multi_query_attention": (True, False),  # without, the fused matrix is laid out head by head
    "add_bias_linear": (False, False),
    "apply_residual_connection_post_layernorm": (False, False),
    "hidden_dropout": (0.0, 0.0),
    "pre_seq_len": (None, None),
}
"""Settings that GLM in transformers does not have: the value that it computes with, and that of a file without it."""
_ORIGINALS = {
    "baichuan": _Original(architecture=_BAICHUAN_7B, translate=_baichuan, transforms=_baichuan_transforms),
    "chatglm": _Original(architecture=_CHATGLM, translate=_chatglm, transforms=_chatglm_transforms),
}
