"""Tiny configurations of model families: what makes a family odd is kept, its size is not.

A certificate is about structure: how masks, positions, caches and shared weights go through a cut.  Four blocks of
width 64 show that as well as eighty of 8192, in a fraction of a second.
Invariant: dropout is off, because every party draws from a stream of its own.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from transformers import (
    AlbertConfig,
    BertConfig,
    CLIPVisionConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    MiniCPM3Config,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    T5Config,
    XLNetConfig,
)

NUM_BLOCKS = 4
VOCABULARY = 128
IMAGE_TOKEN = 120
FIRST_WORD, LAST_WORD = 6, 120
"""Ids that tiny inputs are made of: no special token is among them."""

_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_BLOCKS,
}
_SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64}
_NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_ENCODER: dict[str, Any] = {**_SIZES, **_NO_DROPOUT, "pad_token_id": 0}
_DECODER: dict[str, Any] = {**_SIZES, **_SPECIAL, "num_key_value_heads": 2}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": NUM_BLOCKS,
    "n_head": 4,
    "n_positions": 64,
    **_SPECIAL,
}
_GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_FALCON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
}
_FALCON |= _SPECIAL
_XLNET: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 64, "n_layer": NUM_BLOCKS, "n_head": 4, "d_inner": 96}
_XLNET |= {"pad_token_id": 0, "dropout": 0.0, "summary_last_dropout": 0.0}
_T5: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4}
_T5 |= {"num_layers": NUM_BLOCKS + 1, "num_decoder_layers": NUM_BLOCKS, "dropout_rate": 0.0}  # two lengths
_T5 |= {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
_UNTIED: dict[str, Any] = {"tie_word_embeddings": False}  # how checkpoints of T5 1.1 say that outputs are not scaled
_LATENT: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_DEEPSEEK: dict[str, Any] = {
    **_DECODER,
    **_LATENT,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
}
_DEEPSEEK |= {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "topk_group": 1}
_QWEN3_MOE: dict[str, Any] = {**_DECODER, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2}
_QWEN3_MOE |= {"moe_intermediate_size": 32}
_LLAVA: dict[str, Any] = {"image_token_index": IMAGE_TOKEN, "image_seq_length": 4, "vision_feature_layer": -1}
_LLAVA |= {"pad_token_id": 0}
_WINDOWS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION |= {"image_size": 8, "patch_size": 4, "projection_dim": 32}

TINY: dict[str, Callable[[], PreTrainedConfig]] = {
    "albert": lambda: AlbertConfig(**_ENCODER, embedding_size=32, classifier_dropout_prob=0.0),
    "bert": lambda: BertConfig(**_ENCODER),
    "deepseek-v2": lambda: DeepseekV2Config(**_DEEPSEEK, n_group=1),
    "deepseek-v3": lambda: DeepseekV3Config(**_DEEPSEEK, n_group=2),
    "falcon-alibi": lambda: FalconConfig(
        **_FALCON, alibi=True, new_decoder_architecture=False, multi_query=False, parallel_attn=False, bias=True
    ),
    "falcon-rotary": lambda: FalconConfig(
        **_FALCON, alibi=False, new_decoder_architecture=False, multi_query=True, parallel_attn=True, bias=False
    ),
    "gemma": lambda: GemmaConfig(**_DECODER, head_dim=16),
    "gemma2": lambda: Gemma2Config(**_DECODER, head_dim=16, sliding_window=5),
    "gemma3": lambda: Gemma3TextConfig(**_DECODER, head_dim=16, sliding_window=5, layer_types=list(_WINDOWS)),
    "glm": lambda: GlmConfig(**_DECODER, head_dim=16),
    "glm4": lambda: Glm4Config(**_DECODER, head_dim=16),
    "gpt-oss": lambda: GptOssConfig(
        **_DECODER,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gpt2": lambda: GPT2Config(**_GPT2),
    "granite": lambda: GraniteConfig(
        **_DECODER, embedding_multiplier=12.0, residual_multiplier=0.7, logits_scaling=4.0
    ),
    "llama": lambda: LlamaConfig(**_DECODER),
    "llama-tied": lambda: LlamaConfig(**_DECODER, tie_word_embeddings=True),
    "llava": lambda: LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION, attention_dropout=0.0), text_config=LlamaConfig(**_DECODER), **_LLAVA
    ),
    "mamba": lambda: MambaConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=NUM_BLOCKS, state_size=8, **_SPECIAL
    ),
    "minicpm3": lambda: MiniCPM3Config(**{**_DECODER, **_LATENT, "num_key_value_heads": 4}),
    "mistral-window": lambda: MistralConfig(**_DECODER, sliding_window=5),
    "mixtral": lambda: MixtralConfig(**_DECODER, num_local_experts=8, num_experts_per_tok=2),
    "olmoe": lambda: OlmoeConfig(**_DECODER, num_experts=8, num_experts_per_tok=2),
    "phi3": lambda: Phi3Config(**_DECODER, sliding_window=5),
    "qwen2": lambda: Qwen2Config(**_DECODER),
    "qwen2-window": lambda: Qwen2Config(**_DECODER, use_sliding_window=True, sliding_window=5, max_window_layers=2),
    "qwen3": lambda: Qwen3Config(**_DECODER, head_dim=16),
    "qwen3-moe": lambda: Qwen3MoeConfig(**_QWEN3_MOE),
    "roberta": lambda: RobertaConfig(
        **{**_ENCODER, "pad_token_id": 1, "bos_token_id": 3, "eos_token_id": 2, "max_position_embeddings": 66}
    ),
    "t5": lambda: T5Config(**_T5),
    "t5-gated": lambda: T5Config(**_T5, feed_forward_proj="gated-gelu", **_UNTIED),
    "xlnet": lambda: XLNetConfig(**_XLNET),
}
"""One or more configurations per family, by the name that the matrix gives them."""

_SMALL: Mapping[str, int] = {
    **_SIZES,
    "head_dim": 16,
    "sliding_window": 5,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "state_size": 8,
    "d_ff": 96,
    "num_decoder_layers": NUM_BLOCKS,
    **_LATENT,
}


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a tiny configuration of the same architecture, for families that the table above does not have.

    Numbers that set sizes are made small, dropout is switched off, patterns over layers are cut to the first blocks;
    all else stays as it is.
    """
    small = copy.deepcopy(config)
    text = small.get_text_config()
    heads, groups = getattr(text, "num_attention_heads", None), getattr(text, "num_key_value_heads", None)
    own = {text.attribute_map.get(name, name): value for name, value in _SMALL.items()}
    settings: dict[str, Any] = {n: v for n, v in own.items() if getattr(text, n, None) is not None}
    if groups is not None:
        settings["num_key_value_heads"] = 4 if groups == heads else 2
    for name, value in vars(text).items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            settings[name] = 0.0
        if isinstance(value, list) and len(value) == config.get_text_config().num_hidden_layers:
            settings[name] = value[: NUM_BLOCKS - 1] + value[-1:]
    settings |= {name: value for name, value in _SPECIAL.items() if name != "bos_token_id"}
    for name, value in settings.items():
        setattr(text, name, value)
    return small
