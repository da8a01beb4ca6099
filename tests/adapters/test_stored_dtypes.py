"""K and V stored in another dtype than the model's: the result is that of the model with rounded K and V, to the last
bits, in every framework, whatever was cached before.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import torch
from hypothesis import given, settings

import kvcache_keras
import kvcache_torch
from kvcache_core import InvalidType
from kvcache_core.layout import DTYPE_BYTES
from tests.adapters.keras import models as keras_models
from tests.adapters.torch import models as torch_models
from tests.reference_decoder import (
    DecoderConfig,
    Driver,
    NumpyBackend,
    Script,
    decoder_configs,
    make_weights,
    run_uncached,
    scripts,
)

LOSSY = ["bfloat16", "float8_e4m3", "int8"]
BACKENDS = {
    "numpy": NumpyBackend,
    "torch": torch_models.TorchBackend,
    "keras": keras_models.KerasBackend,
}
# Each Keras cache has its graphs traced anew. Layers with windows are in the random decoders below.
SMALL = {"torch": torch_models.Small, "keras": partial(keras_models.Small, layers=1)}
CACHES = {"torch": kvcache_torch.KVCache, "keras": kvcache_keras.KVCache}
CONFIGS = decoder_configs(dtypes=["float64"], max_layers=2, head_sizes=(4, 8, 16))


class RoundedDriver(Driver):
    """Compares with full computation over rounded K and V; all of it in float64, so that equal inputs round alike."""

    stored = ""

    def check_outputs(self, script: Script) -> None:
        weights = make_weights(self.config)
        for record in self.records:
            expected = run_uncached(self.config, weights, record.tokens, np.float64, self.stored)[record.start :]
            np.testing.assert_allclose(record.logits, expected, rtol=0, atol=1e-6 * abs(expected).max())
            self.counts["outputs compared"] += 1


def run(framework: str, dtype: str, config: DecoderConfig, script: Any) -> None:
    driver = RoundedDriver(
        config, lambda weights: BACKENDS[framework](config, weights, script.num_blocks, stored=dtype)
    )
    driver.stored = dtype
    driver.run(script)
    driver.report()


@pytest.mark.parametrize("dtype", LOSSY)
@pytest.mark.parametrize("framework", ["numpy", "torch"])
@given(config=CONFIGS, script=scripts(max_actions=20))
@settings(max_examples=12)
def test_equals_the_model_with_rounded_k_and_v(framework, dtype, config, script):
    run(framework, dtype, config, script)


@pytest.mark.parametrize("dtype", LOSSY)
@given(config=CONFIGS, script=scripts(max_actions=16))
@settings(max_examples=3)
def test_keras_eager(dtype, config, script):
    tf.config.run_functions_eagerly(True)
    try:
        run("keras", dtype, config, script)
    finally:
        tf.config.run_functions_eagerly(False)


@pytest.mark.parametrize("dtype", LOSSY)
@given(config=CONFIGS, script=scripts(max_actions=10))
@settings(max_examples=1)
def test_keras_graph(dtype, config, script):
    run("keras", dtype, config, script)


@pytest.mark.parametrize("framework", ["torch", "keras"])
@pytest.mark.parametrize("dtype", list(DTYPE_BYTES))
def test_calls_and_generation(framework, dtype):
    """``model(x)`` and ``generate``, cold and warm: the same answer, near to the uncached one."""
    model, cache = SMALL[framework](), CACHES[framework](size=64, block_size=4, dtype=dtype)
    cache.attach(model)
    rows = np.random.default_rng(0).integers(1, 30, (2, 21))
    x = cache.native_ids(rows)
    with torch.no_grad():
        plain = cache.to_numpy(model(x))
        with cache:
            cold, warm = cache.to_numpy(model(x)), cache.to_numpy(model(x))
    assert cache.stats().hit_tokens == 2 * 20
    exact = dtype in ("float32", "float64")
    assert cache.exact is exact
    np.testing.assert_allclose(warm, cold, rtol=0, atol=2e-5)
    error = abs(cold - plain).max()
    bound = {"float16": 0.01, "bfloat16": 0.1, "int8": 0.1, "float8_e4m3": 0.4}.get(dtype, 2e-5)
    assert error <= bound
    assert exact or error > 1e-5, "nothing was rounded"
    generate = {"torch": kvcache_torch.generate, "keras": kvcache_keras.generate}[framework]
    prompts = [row.tolist() for row in rows]
    first = generate(model, prompts, max_new_tokens=6, cache=cache)
    assert generate(model, prompts, max_new_tokens=6, cache=cache) == first
    assert len(first[0]) == 6
    cache.core.check_valid()


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
def test_in_a_tf_function(dtype):
    model, cache = SMALL["keras"](), kvcache_keras.KVCache(size=64, block_size=4, dtype=dtype)
    cache.attach(model)
    x = tf.constant(np.random.default_rng(0).integers(1, 30, (2, 13)), tf.int32)
    with cache:
        eager = model(x)

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int32)])
    def call(ids):
        with cache:
            return model(ids)

    np.testing.assert_allclose(call(x), eager, atol=2e-5)
    assert cache.stats().hit_tokens == 2 * 12


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_nothing_is_lossy_unless_it_is_asked_for(framework):
    cache = CACHES[framework](size=8)
    cache.attach(SMALL[framework]())
    assert cache.exact
    assert cache.core.layout.dtype == "float32"
    with pytest.raises(InvalidType, match=r"dtype must be one of \['bfloat16', 'float16', .* 'int8'\], got 'int4'"):
        CACHES[framework](size=8, dtype="int4")


@pytest.mark.parametrize("name", [torch.float8_e4m3fn, "float8_e4m3fn", torch.int8])
def test_native_names(name):
    cache = kvcache_torch.KVCache(size=8, dtype=name)
    cache.attach(torch_models.Small())
    assert cache.core.layout.dtype == ("int8" if name is torch.int8 else "float8_e4m3")


def test_a_wider_store_is_exact():
    model = torch_models.Small().bfloat16()
    cache = kvcache_torch.KVCache(size=8, dtype="float32")
    cache.attach(model)
    cache.core  # noqa: B018 - describes the model
    assert cache.exact


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_bytes_are_what_the_layout_says(framework):
    found = {}
    for dtype in ("float32", "int8", "float8_e4m3"):
        cache = CACHES[framework](size=20, block_size=4, dtype=dtype)
        cache.attach(SMALL[framework](), outputs="last")
        cache.warm([list(range(1, 10))])
        layout = cache.core.layout
        assert cache.stats().bytes == 21 * layout.bytes_per_block
        found[dtype] = layout.bytes_per_token
    assert found["int8"] == found["float8_e4m3"] < found["float32"] / 2


def test_keras_names():
    cache = kvcache_keras.KVCache(size=8, dtype=tf.int8)
    cache.attach(keras_models.Small())
    assert cache.core.layout.dtype == "int8"
