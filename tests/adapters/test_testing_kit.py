"""kvcache_core.testing: passes on right models, fails on each that is broken on purpose."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from hypothesis import given, settings
from torch import nn

import kvcache_keras
import kvcache_torch
from kvcache_core import InvalidInput, KVCacheWarning
from kvcache_core.testing import assert_cached_equals_recompute
from kvcache_core.testing_bound import REDRAWS, Errors, distance, longest, over_draws
from tests.adapters.torch.models import RandomDecoder, Small
from tests.reference_decoder import decoder_configs, make_weights

VOCAB, WIDTH, HEADS = 31, 16, 2
FAULTS = ["positions", "mixing", "leak", "own state", "layers", "later tokens", "scale", "batch"]


# ---- the same model in both frameworks, with a fault on request -------------------------------------------


class TorchModel(nn.Module):
    def __init__(self, fault: str = "", *, width: int = WIDTH) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.tokens, self.places = nn.Embedding(VOCAB, width), nn.Embedding(64, width)
            self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
            self.head = nn.Linear(width, VOCAB)
        self.fault = fault
        self.state: Any = 0.0
        self.eval()

    def forward(self, x):
        length = x.shape[1]
        where = torch.arange(length)[None] if self.fault == "positions" else kvcache_torch.positions(length)
        h = self.tokens(x) + self.places(where)
        inside = kvcache_torch.context.local.stepping
        for at, project in enumerate(self.qkv):
            q, k, v = project(h).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, dim=1)
            # Prefill and decode disagree about which layer is which.
            layer = 1 - at if self.fault == "layers" and length == 1 else at
            layer = 1 - at if self.fault == "swapped everywhere" else layer
            scale = 0.1 if self.fault == "scale" and inside else None
            y = kvcache_torch.attention(q, k, v, layer=layer, scale=scale)
            h = h + y.transpose(1, 2).flatten(2)
            if self.fault == "mixing":
                h = h + 0.1 * torch.cumsum(h, dim=1)  # causal, but not by attention
            if self.fault == "later tokens":
                h = h + 0.1 * h.mean(dim=1, keepdim=True)
            if self.fault == "batch":
                h = h + 0.1 * h.mean(dim=0, keepdim=True)
        if self.fault == "leak":
            h = h + self.state
            self.state = 0.1 * h.detach().mean()
        if self.fault == "own state" and inside:
            h = h + self.state
            self.state = 0.1 * h.detach()[:1, -1:]
        return self.head(h)


class KerasModel(keras.Model):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        keras.utils.set_random_seed(1)
        self.tokens, self.places = keras.layers.Embedding(VOCAB, WIDTH), keras.layers.Embedding(64, WIDTH)
        self.qkv = [keras.layers.Dense(3 * WIDTH) for _ in range(2)]
        self.head = keras.layers.Dense(VOCAB)
        self.fault = fault
        self.state = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        rows, length = tf.shape(x)[0], tf.shape(x)[1]
        where = tf.range(length)[None] if self.fault == "positions" else kvcache_keras.positions(length)
        h = self.tokens(x) + self.places(where)
        for at, project in enumerate(self.qkv):
            qkv = tf.reshape(project(h), (rows, length, 3 * HEADS, WIDTH // HEADS))
            q, k, v = tf.split(qkv, 3, axis=2)
            inside = kvcache_keras.context.local.step is not None
            layer = 1 - at if self.fault == "layers" and x.shape[1] == 1 else at
            layer = 1 - at if self.fault == "swapped everywhere" else layer
            scale = 0.1 if self.fault == "scale" and inside else None
            y = kvcache_keras.attention(q, k, v, layer=layer, scale=scale)
            h = h + tf.reshape(y, (rows, length, WIDTH))
            if self.fault == "mixing":
                h = h + 0.1 * tf.cumsum(h, axis=1)
            if self.fault == "later tokens":
                h = h + 0.1 * tf.reduce_mean(h, axis=1, keepdims=True)
            if self.fault == "batch":
                h = h + 0.1 * tf.reduce_mean(h, axis=0, keepdims=True)
        if self.fault == "leak":
            h = h + self.state
            self.state.assign(0.1 * tf.reduce_mean(h))
        return self.head(h)


def torch_case(fault: str = "", **options: Any) -> Any:
    return SimpleNamespace(model=TorchModel(fault), cache=kvcache_torch.KVCache(256, block_size=4, **options))


def keras_case(fault: str = "", **options: Any) -> Any:
    return SimpleNamespace(model=KerasModel(fault), cache=kvcache_keras.KVCache(256, block_size=4, **options))


FRAMEWORKS = {"torch": torch_case, "keras": keras_case}


@pytest.fixture(params=list(FRAMEWORKS))
def make(request: pytest.FixtureRequest) -> Any:
    return FRAMEWORKS[request.param]


# ---- right models ---------------------------------------------------------------------------------------------


def test_a_right_model_passes(make):
    case = make()
    report = assert_cached_equals_recompute(case.model, case.cache, [[3, 1, 4, 1, 5]])
    assert report.reference == ("float64" if isinstance(case.model, nn.Module) else "uncached")
    assert report.error <= report.bound < 1e-4
    assert {"cold", "warm", "steps", "fork", "truncate"} <= set(report.compared)
    assert report.reused_tokens > 100
    assert case.cache.model is None, "it was attached for the time of the check"


def test_renaming_the_layers_consistently_is_no_fault():
    case = torch_case("swapped everywhere")
    assert_cached_equals_recompute(case.model, case.cache)


def test_an_attached_cache_stays_attached_and_keeps_what_it_holds():
    case = torch_case()
    case.cache.attach(case.model, outputs="last")
    case.cache.warm([list(range(20))])
    report = assert_cached_equals_recompute(case.model, case.cache)
    assert case.cache.model is case.model
    assert case.cache.salt == b""
    assert case.cache.core.cached_length(list(range(20))) == 19
    assert report.compared["warm"] < 20, "outputs='last' compares the last outputs"


@given(config=decoder_configs(dtypes=("float32", "float64")))
@settings(max_examples=10, derandomize=True)  # the kit's bound is statistical: no new draws in every run
def test_random_decoders_pass(config):
    model = RandomDecoder(config, make_weights(config)).eval()
    cache = kvcache_torch.KVCache(512, block_size=config.block_size)
    assert_cached_equals_recompute(model, cache, vocab_size=config.vocab, rounds=2, seed=config.seed % 97)


def test_bfloat16_and_windows_pass():
    model = Small((None, 5)).bfloat16()
    report = assert_cached_equals_recompute(model, kvcache_torch.KVCache(256, block_size=4), seed=3)
    assert report.reference == "float64"
    assert report.error > 1e-4


# ---- broken on purpose ----------------------------------------------------------------------------------------


EXPECTED = {
    "positions": "positions",
    "mixing": "mixes",
    "leak": "keeps state",
    "own state": "differs|different|off by",
    "layers": "layer",
    "later tokens": "later tokens",
    "scale": "other arguments",
    "batch": "other rows",
}


# Each Keras model is traced anew, which takes seconds: four faults say enough by default. Its steps run as graphs,
# which keep no Python state: "own state" is PyTorch's alone.
CASES = [
    *(("torch", fault) for fault in FAULTS),
    *(("keras", fault) for fault in ("positions", "mixing", "layers", "leak")),
    *(pytest.param("keras", fault, marks=pytest.mark.slow) for fault in ("later tokens", "scale", "batch")),
]


@pytest.mark.parametrize(("framework", "fault"), CASES)
def test_a_broken_model_fails(framework, fault):
    case = FRAMEWORKS[framework](fault)
    with pytest.raises(AssertionError, match=EXPECTED[fault]):
        assert_cached_equals_recompute(case.model, case.cache, rounds=2)
    assert case.cache.model is None
    stats = case.cache.stats()
    assert stats.open_sequences == 0
    assert stats.live_blocks == 0


def test_a_small_fault_is_found():
    """1e-5 of another position's state: far above rounding, far below what a sampled text would show."""

    class Slight(TorchModel):
        def forward(self, x):
            inside = kvcache_torch.context.local.stepping
            y = super().forward(x)
            return y * (1 + 1e-5) if inside else y

    with pytest.raises(AssertionError, match=r"off by .*allowed are .*float64"):
        assert_cached_equals_recompute(Slight(), kvcache_torch.KVCache(256, block_size=4))


class Noisy(TorchModel):
    """In float32 its outputs are off at random: by 1e-5 outside the cache, by ``inside`` times that from the cache."""

    def __init__(self, inside: float, seed: int) -> None:
        super().__init__()
        self.inside, self.noise = inside, np.random.default_rng(seed)

    def forward(self, x):
        y = super().forward(x)
        if y.dtype == torch.float64:
            return y
        spread = self.inside if kvcache_torch.context.local.stepping else 1.0
        return y + 1e-5 * spread * torch.from_numpy(self.noise.standard_normal(y.shape)).float()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_error_just_above_the_bound_is_found_and_one_just_below_is_none(seed):
    """1.5 times the uncached error is allowed; below it one draw may pass the bound, the means do not."""
    report = assert_cached_equals_recompute(Noisy(1.4, seed), kvcache_torch.KVCache(256, block_size=4), seed=seed)
    assert report.draws == (1 + REDRAWS if seed == 1 else 1)
    assert report.error <= report.bound < 7e-5
    with pytest.raises(AssertionError, match=rf"off by .*means of {1 + REDRAWS} runs"):
        assert_cached_equals_recompute(Noisy(1.7, seed), kvcache_torch.KVCache(256, block_size=4), seed=seed)


def test_a_model_in_training_mode_is_told():
    model = Small().train()
    with pytest.raises(AssertionError, match=r"model\.eval\(\)"):
        assert_cached_equals_recompute(model, kvcache_torch.KVCache(256, block_size=4))


def test_a_call_that_goes_around_the_cache_is_told():
    case = torch_case()
    case.model.train()  # no dropout: repeatable, but never cached
    with (
        pytest.warns(KVCacheWarning, match="being trained"),
        pytest.raises(AssertionError, match="went around the cache"),
    ):
        assert_cached_equals_recompute(case.model, case.cache)


# ---- what it refuses --------------------------------------------------------------------------------------------


# The kit knows lossy caches and others, no dtypes: two by default say enough for Keras, as with its faults.
@pytest.mark.parametrize(
    ("framework", "dtype"),
    [
        *(("torch", dtype) for dtype in ("bfloat16", "float8_e4m3", "int8")),
        *(("keras", dtype) for dtype in ("bfloat16", "int8")),
        pytest.param("keras", "float8_e4m3", marks=pytest.mark.slow),
    ],
)
def test_a_lossy_cache_needs_a_tolerance(framework, dtype):
    case = FRAMEWORKS[framework](dtype=dtype)
    case.cache.attach(case.model)  # for all three checks
    with pytest.raises(InvalidInput, match="tolerance="):
        assert_cached_equals_recompute(case.model, case.cache)
    report = assert_cached_equals_recompute(case.model, case.cache, rounds=1, tolerance=0.3)
    assert report.reference == "tolerance"
    assert 1e-4 < report.error <= 0.3
    with pytest.raises(AssertionError, match=r"allowed are 1e-06"):
        assert_cached_equals_recompute(case.model, case.cache, rounds=1, tolerance=1e-6)


def test_bad_arguments(make):
    case = make()
    with pytest.raises(InvalidInput, match="max_length"):
        assert_cached_equals_recompute(case.model, case.cache, max_length=10)
    with pytest.raises(InvalidInput, match="leave room for every prompt"):
        assert_cached_equals_recompute(case.model, case.cache, [[1] * 30])
    small = type(case.cache)(8, block_size=4)
    with pytest.raises(InvalidInput, match=r"needs \d+ blocks .* has 8"):
        assert_cached_equals_recompute(case.model, small)


def test_without_a_vocabulary_ids_come_from_the_prompts():
    class OneHot(nn.Module):
        def forward(self, x):
            h = nn.functional.one_hot(x, 5).float().unsqueeze(1)
            return kvcache_torch.attention(h, h, h, layer=0).squeeze(1)

    cache = kvcache_torch.KVCache(256, block_size=4)
    with pytest.raises(InvalidInput, match="vocab_size="):
        assert_cached_equals_recompute(OneHot(), cache)
    assert_cached_equals_recompute(OneHot(), cache, [[0, 1, 4]])
    assert_cached_equals_recompute(OneHot(), cache, vocab_size=5)


def test_the_model_is_what_the_arrays_say():
    """The kit's own arithmetic, on numbers: shapes differ, NaN is never within a bound."""
    assert np.isnan(distance(np.array([np.nan]), np.array([0.0])))
    with pytest.raises(AssertionError, match="shape"):
        distance(np.zeros(2), np.zeros(3))
    assert longest({(1,), (1, 2), (2,)}) == [(1, 2), (2,)]


def test_a_draw_that_passes_the_bound_is_judged_by_the_means():
    """Invariant 1's rule on numbers: uncached errors of 2 or 4 by luck, 1 ulp of 0.5."""
    right = [(5.0, 2.0, 0.5), *[(5.0, 4.0, 0.5)] * REDRAWS]
    judged, draws = over_draws(Errors(*right[0]), lambda number: Errors(*right[number]))
    assert draws == 1 + REDRAWS
    assert judged.holds
    wrong = [(cached + 1.3, uncached, ulp) for cached, uncached, ulp in right]
    assert Errors(*wrong[1]).holds
    assert over_draws(Errors(*wrong[1]), lambda _: Errors(*wrong[0])) == (Errors(*wrong[1]), 1)
    judged, _ = over_draws(Errors(*wrong[0]), lambda number: Errors(*wrong[number]))
    assert judged.cached == pytest.approx(6.3)
    assert judged.bound == pytest.approx(1.5 * 50 / 13 + 0.5)
    assert not judged.holds
    with_nan = [*right[:5], (np.nan, 4.0, 0.5), *right[6:]]
    assert not over_draws(Errors(*with_nan[0]), lambda number: Errors(*with_nan[number]))[0].holds
