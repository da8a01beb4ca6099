"""The example models compute in whatever dtype their weights have, with and without a cache."""

from __future__ import annotations

from dataclasses import replace

import keras
import numpy as np
import pytest
import torch

import kvcache_keras
import kvcache_torch
import llama_keras
import llama_torch
from kvcache_core.testing import assert_cached_equals_recompute
from smollm2 import LlamaConfig

CONFIG = LlamaConfig(40, 32, 48, 2, 4, 2, 8, 1e4, 1e-5, tied=True, max_positions=128)
DTYPES = ["float64", "float32", "bfloat16"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch(dtype):
    model = llama_torch.Llama(CONFIG).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.3, generator=generator)
    cache = kvcache_torch.KVCache(64, block_size=4)
    model = cache.attach(model.to(getattr(torch, dtype)))
    assert_cached_equals_recompute(model, cache, rounds=2)
    assert cache.spec.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_keras(dtype):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        model = llama_keras.Llama(replace(CONFIG, num_layers=1))  # more of them: the other examples' tests
    finally:
        keras.config.set_dtype_policy(before)
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.normal(0, 0.3, variable.shape))
    cache = kvcache_keras.KVCache(64, block_size=4)
    assert_cached_equals_recompute(cache.attach(model), cache, rounds=2)
    assert cache.spec.dtype == dtype
