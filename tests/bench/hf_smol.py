"""SmolLM2 in transformers, and a filled past for it."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import transformers
from smol import checkpoint, prompt

from kvcache_torch import KVCache
from kvcache_torch.hf import HFCache

__all__ = ["filled", "model", "plain_past"]


@cache
def model() -> Any:
    """`LlamaForCausalLM` with the checkpoint's weights, greedy, no end token."""
    found = checkpoint().config
    config = transformers.LlamaConfig(
        vocab_size=found.vocab_size,
        hidden_size=found.hidden_size,
        intermediate_size=found.intermediate_size,
        num_hidden_layers=found.num_layers,
        num_attention_heads=found.num_heads,
        num_key_value_heads=found.num_kv_heads,
        rms_norm_eps=found.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": found.rope_theta},
        tie_word_embeddings=found.tied,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    result = transformers.LlamaForCausalLM(config).eval()
    weights = {name: torch.from_numpy(np.array(value)) for name, value in checkpoint().weights.items()}
    missing = result.load_state_dict(weights, strict=False)
    if missing.unexpected_keys or set(missing.missing_keys) - {"lm_head.weight"}:
        raise ValueError(f"the checkpoint does not fit: {missing}")
    result.tie_weights()
    return result


def plain_past(rows: int, length: int) -> Any:
    """A `DynamicCache` that holds `length` tokens per row: random K and V, since only the time of a step counts."""
    config = model().config
    past = transformers.DynamicCache(config=config)
    shape = (rows, config.num_key_value_heads, length, config.head_dim)
    for layer in range(config.num_hidden_layers):
        past.update(torch.randn(shape), torch.randn(shape), layer)
    return past


def filled(cache: KVCache, rows: int, length: int, *, shared: int = 0) -> HFCache:
    """An `HFCache` whose rows hold `length` tokens, the first `shared` of them in common."""
    head = prompt(shared, seed=0) if shared else []
    core, opened = cache.core, []
    tokens = [head + prompt(length - shared, seed=1 + row) for row in range(rows)]
    for row in tokens:
        seq = core.open(row, cache.salt, max_new_tokens=64)
        core.commit(core.plan([seq], [row[seq.num_cached :]]))
        opened.append(seq)
    for layer in range(model().config.num_hidden_layers):
        for name in ("k", "v"):
            cache.store.array(layer, name).normal_()
    past = HFCache(cache)
    past.replace(opened, np.array(tokens), np.ones((rows, length), np.bool_), np.zeros(rows, np.int64))
    return past
