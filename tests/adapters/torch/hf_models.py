"""Tiny random transformers models, one per family, made from their configs: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

VOCAB = 96
PAD = 0

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": PAD,
    "attention_dropout": 0.0,
}
_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}

_BART_PART = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", _SMALL),
    "Mistral": ("Mistral", {**_SMALL, "sliding_window": 9}),
    "Mixtral": ("Mixtral", {**_SMALL, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "Qwen2": ("Qwen2", _SMALL),
    "Qwen3": ("Qwen3", {**_SMALL, "head_dim": 8}),
    "Gemma": ("Gemma", {**_SMALL, "head_dim": 8}),
    "Gemma 2": (
        "Gemma2",
        {**_SMALL, "head_dim": 8, "sliding_window": 9, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    ),
    "Gemma 3": ("Gemma3Text", {**_SMALL, "head_dim": 8, "sliding_window": 9, "query_pre_attn_scalar": 8}),
    "Phi-3": ("Phi3", {**_SMALL, "sliding_window": 9}),
    "GPT-2": ("GPT2", _GPT2),
    "GPT-NeoX": ("GPTNeoX", _SMALL),
    "OPT": ("OPT", {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "BLOOM": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "Falcon": ("Falcon", {**_SMALL, "num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False}),
    "Falcon (ALiBi)": ("Falcon", {**_SMALL, "multi_query": True, "new_decoder_architecture": False, "alibi": True}),
    "StarCoder2": ("Starcoder2", {**_SMALL, "sliding_window": 9}),
    "Cohere2": ("Cohere2", {**_SMALL, "sliding_window": 9}),
    "OLMo2": ("Olmo2", _SMALL),
    "GPT-OSS": (
        "GptOss",
        {**_SMALL, "head_dim": 8, "sliding_window": 9, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "DeepSeek-V3": (
        "DeepseekV3",
        {
            **_SMALL,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 16,
        },
    ),
}


def decoder(family: str, seed: int = 0) -> Any:
    """A random causal language model of the family, in evaluation mode."""
    name, settings = DECODERS[family]
    config = getattr(transformers, f"{name}Config")(**{**_COMMON, **settings})
    model = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    return _random(getattr(transformers, model), config, seed)


ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "T5": ("T5", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}),
    "BART": (
        "Bart",
        {
            **{f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in _BART_PART.items()},
            "d_model": 32,
            "max_position_embeddings": 64,
            "dropout": 0.0,
        },
    ),
    "Whisper": (
        "Whisper",
        {
            **{f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in _BART_PART.items()},
            "d_model": 32,
            "num_mel_bins": 6,
            "max_source_positions": 12,
            "max_target_positions": 64,
            "begin_suppress_tokens": None,
            "suppress_tokens": None,
        },
    ),
}


def encoder_decoder(family: str, seed: int = 0) -> Any:
    """A random encoder-decoder model of the family, in evaluation mode."""
    name, settings = ENCODER_DECODERS[family]
    config = getattr(transformers, f"{name}Config")(**{**_COMMON, "decoder_start_token_id": 1, **settings})
    return _random(getattr(transformers, f"{name}ForConditionalGeneration"), config, seed)


def _random(build: Callable[..., Any], config: Any, seed: int) -> Any:
    """A model whose weights are large enough for greedy choices to be clear."""
    torch.manual_seed(seed)
    model = build(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.15)
    return model
