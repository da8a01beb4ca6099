"""The example models compute in whatever dtype their weights have, with and without a cache."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch

import kvcache_keras
import kvcache_torch
import llama_keras
import llama_torch
from smollm2 import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=10000.0,
    norm_eps=1e-5,
    tied=True,
    max_positions=128,
)
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.1}
TOKENS = [7, 3, 9, 9, 1, 30, 3, 9, 2]


def check(cache, plain, dtype):
    """A step behind cached tokens gives what the whole gives."""
    for end in (5, len(TOKENS)):
        seq = cache.open(TOKENS[:end])
        logits = cache.step([seq], [TOKENS[seq.num_cached : end]])
        seq.close()
    assert seq.num_cached == 5
    assert np.abs(plain).max() > 0.1
    np.testing.assert_allclose(logits[0], plain, atol=TOLERANCE[dtype] * np.abs(plain).max())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_torch(dtype):
    model = llama_torch.Llama(CONFIG).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.3, generator=generator)
    model = model.to(getattr(torch, dtype))
    cache = kvcache_torch.KVCache(16, block_size=4)
    cache.attach(model)
    check(cache, model(torch.tensor([TOKENS]))[0, -1].double().numpy(), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_keras(dtype):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        model = llama_keras.Llama(CONFIG)
    finally:
        keras.config.set_dtype_policy(before)
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.normal(0, 0.3, variable.shape))
    cache = kvcache_keras.KVCache(16, block_size=4)
    cache.attach(model)
    plain = keras.ops.convert_to_numpy(keras.ops.cast(model(np.array([TOKENS])), "float64"))
    check(cache, plain[0, -1], dtype)
