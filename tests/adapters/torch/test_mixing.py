"""Modules whose result for a sample depends on the others of its batch are never served; all others are."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kvcache_core import KVCacheWarning
from kvcache_torch import KVCache

TOKENS, WIDTH = 5, 8


class Function(nn.Module):
    """A function of [B, T, D] as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class First(nn.Module):
    """The first output of a layer, called with its input so many times."""

    def __init__(self, layer, times=1):
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x):
        return self.layer(*[x] * self.times)[0]


def similar(x):
    rows = x.flatten(1)
    return (rows @ rows.T / 50).softmax(-1).matmul(rows).view_as(x)


OWN = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "batch norm": lambda: nn.BatchNorm1d(TOKENS),
    "convolution": lambda: nn.Conv1d(TOKENS, TOKENS, 3, padding=1),
    "tanh": nn.Tanh,
    "softmax": lambda: nn.Softmax(-1),
    "flip": lambda: Function(lambda x: x.flip(1)),
    "sum over time": lambda: Function(lambda x: x.cumsum(1)),
    "gru": lambda: First(nn.GRU(WIDTH, WIDTH, batch_first=True)),
    "attention": lambda: First(nn.MultiheadAttention(WIDTH, 2, batch_first=True), 3),
    "encoder": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True),
}

MIXING = {
    "mean": lambda: Function(lambda x: x - x.mean(0)),
    "norm": lambda: Function(lambda x: F.normalize(x, dim=0)),
    "largest": lambda: Function(lambda x: x - x[x.abs().amax((1, 2)).argmax()]),
    "first": lambda: Function(lambda x: x - x[:1]),
    "last": lambda: Function(lambda x: x + x[-1:]),
    "softmax": lambda: nn.Softmax(0),
    "place": lambda: Function(lambda x: x + torch.arange(len(x)).to(x)[:, None, None]),
    "sum over samples": lambda: Function(lambda x: x.cumsum(0)),
    "the one before": lambda: Function(lambda x: x + x.roll(1, 0)),
    "the one behind": lambda: Function(lambda x: torch.cat([x[1:], torch.zeros_like(x[:1])]) + x),
    "flip": lambda: Function(lambda x: x.flip(0)),
    "similarity": lambda: Function(similar),
    "statistics": lambda: Function(lambda x: F.batch_norm(x, None, None, training=True)),
    "time in front": lambda: First(nn.GRU(WIDTH, WIDTH)),
    "attention over samples": lambda: First(nn.MultiheadAttention(WIDTH, 2), 3),
    "encoder over samples": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 16),
}


def built(parts, seed, dtype):
    torch.manual_seed(seed)
    return nn.Sequential(*(part() for part in parts)).eval().to(dtype).requires_grad_(False)


def batch(seed, count, dtype=torch.float32):
    return torch.randn(count, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


own = st.lists(st.sampled_from(sorted(OWN)), min_size=1, max_size=4)
seeds, counts = st.integers(0, 2**20), st.integers(2, 40)
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16])


@given(own, seeds, counts, DTYPES, st.booleans())
def test_modules_that_compute_each_sample_by_itself_are_served(names, seed, count, dtype, autocast):
    model, x = built([OWN[name] for name in names], seed, dtype), batch(seed, count, dtype)
    cache = KVCache(256)
    cache.attach(model, kind="activation", check_in_parts=True)
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), cache:
        warnings.simplefilter("error")
        for given_ in (x, x, torch.cat([x[:1], batch(seed + 1, 2, dtype)])):
            model(given_)
    assert cache.stats().bypassed_calls == 0 and cache.stats().hit_entries == count + 1


@given(own, st.sampled_from(sorted(MIXING)), seeds, counts, st.sampled_from([torch.float32, torch.float64]))
def test_modules_that_mix_samples_are_bypassed(names, mixes, seed, count, dtype):
    """What comes before and behind is no softmax or normalisation that would make all samples nearly equal."""
    around = [OWN[name] for name in names if name in ("linear", "flip", "tanh", "sum over time", "convolution")]
    model, x = built([*around, MIXING[mixes], nn.Identity], seed, dtype), batch(seed, count, dtype)
    expected, other = model(x), model(x[1:])
    cache = KVCache(256)
    cache.attach(model, kind="activation", check_in_parts=True)
    with cache:
        with pytest.warns(KVCacheWarning, match="other samples of its batch"):
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected) and torch.equal(model(x[1:]), other)
    stats = cache.stats()
    assert (stats.bypassed_calls, stats.hit_entries, stats.entries) == (3, 0, 0)
    assert list(stats.bypass_reasons) == ["a sample's result depends on the other samples of its batch"]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("singles", [False, True])
def test_single_samples_before_the_first_batch_prove_nothing(context, singles):
    model, x = Function(lambda x: x - x.mean(0)), batch(0, 6)
    cache = KVCache(64)
    cache.attach(model, kind="activation", check_in_parts=True)
    with context(), cache:
        for row in range(6 if singles else 0):
            assert torch.equal(model(x[row : row + 1]), x[:1] * 0)
        equal = x[:1].expand(6, -1, -1)
        assert torch.equal(model(equal), equal - equal.mean(0)), "equal samples do not either"
        assert not cache.stats().bypassed_calls and cache.stats().entries == (6 if singles else 0)
        with pytest.warns(KVCacheWarning, match="other samples"):
            assert torch.equal(model(x), x - x.mean(0))


def test_a_batch_in_another_place_or_a_shared_input_that_was_not_named():
    class Table(nn.Module):
        def forward(self, x, table):
            return x @ table.T

    cache, x, table = KVCache(64), torch.rand(6, 4), torch.rand(6, 4)
    model = cache.attach(Table(), check_in_parts=True)
    with cache:
        with pytest.warns(KVCacheWarning, match=r"name inputs that belong to all samples in shared="):
            torch.testing.assert_close(model(x, table), x @ table.T)
        for _ in range(2):  # with another number of samples the table is known to be none
            torch.testing.assert_close(model(x[:5], table), x[:5] @ table.T)
    assert cache.stats().hit_entries == 5 and cache.stats().bypassed_calls == 1


def test_flags_decide():
    class Flagged(nn.Module):
        def forward(self, x, dim=1):
            return x - x.mean(dim, keepdim=True)

    cache, x = KVCache(64), batch(0, 6)
    model = cache.attach(Flagged(), kind="activation", check_in_parts=True)
    with cache:
        for _ in range(2):
            assert torch.equal(model(x), x - x.mean(1, keepdim=True))
        with pytest.warns(KVCacheWarning, match="other samples"):
            assert torch.equal(model(x, dim=0), x - x.mean(0))
        assert torch.equal(model(x), x - x.mean(1, keepdim=True))
    assert cache.stats().hit_entries == 12


def test_a_module_that_takes_whole_batches_only():
    model, x = Function(lambda x: x.view(-1, 6, *x.shape[1:]).softmax(1).view_as(x)), batch(0, 6)
    cache = KVCache(64)
    cache.attach(model, kind="activation", check_in_parts=True)
    with cache, pytest.warns(KVCacheWarning, match="alone raise RuntimeError"):
        assert torch.equal(model(x), model.function(x))


@pytest.mark.parametrize("mixes", [False, True])
def test_a_module_that_computes_into_memory_of_its_own(mixes):
    """The extra runs write over what the first one returned."""
    space = torch.zeros(6, TOKENS, WIDTH)

    def compute(x):
        return torch.sub(x, x.mean(0) if mixes else 1.0, out=space[: len(x)])

    model, x = Function(compute), batch(0, 6)
    cache = KVCache(64)
    cache.attach(model, kind="activation", check_in_parts=True)
    with torch.no_grad(), cache, pytest.warns(KVCacheWarning):
        assert torch.equal(model(x), x - (x.mean(0) if mixes else 1.0))


def test_labels_may_fall_on_the_other_side_where_there_are_many():
    """Two classes whose scores are equal but for rounding."""
    calls = []

    def label(x):
        calls.append(len(x))
        found = (x > 0).long()
        if len(calls) > 1:
            found.view(-1)[7] ^= 1
        return found

    cache = KVCache(64)
    model = cache.attach(Function(label), kind="activation", check_in_parts=True)
    with cache:
        model(torch.randn(4, 80, 80))
        model(torch.randn(4, 80, 80))
    assert not cache.stats().bypassed_calls and calls == [4, 3, 3, 4]


def test_gradients_are_those_of_the_whole_batch():
    model, x = nn.Sequential(nn.Linear(WIDTH, 4), nn.Softmax(0)).eval(), batch(0, 6)
    model(x).square().sum().backward()
    expected = model[0].weight.grad.clone()
    cache = KVCache(64)
    cache.attach(model, kind="activation", check_in_parts=True)
    for turn in range(2):
        model.zero_grad()
        with cache, warnings.catch_warnings():
            warnings.simplefilter("ignore" if not turn else "error")
            loss = model(x).square().sum()
        loss.backward()
        torch.testing.assert_close(model[0].weight.grad, expected)


def test_declared_side_effects_are_not_tried_out():
    calls = []
    cache = KVCache(64)
    model = cache.attach(Function(lambda x: calls.append(len(x)) or x * 2), side_effects=True, check_in_parts=True)
    with cache:
        model(batch(0, 6))
    assert calls == [6]


def test_a_compiled_module_that_mixes():
    torch._dynamo.reset()
    model, x = torch.compile(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Softmax(0)).eval(), backend="eager"), batch(0, 6)
    with torch.no_grad():
        expected = model(x)
        cache = KVCache(64)
        cache.attach(model, kind="activation", check_in_parts=True)
        with cache, pytest.warns(KVCacheWarning, match="other samples"):
            torch.testing.assert_close(model(x), expected)
    torch._dynamo.reset()


TIME_IN_FRONT = {
    "gru": lambda: First(nn.GRU(WIDTH, WIDTH)),
    "attention": lambda: First(nn.MultiheadAttention(WIDTH, 2), 3),
    "encoder": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 16),
    "the batch's statistics": lambda: nn.BatchNorm1d(TOKENS, track_running_stats=False),
}


@pytest.mark.parametrize("name", TIME_IN_FRONT)
def test_layers_known_to_take_time_in_front_are_checked_unasked(name):
    model, x = built([TIME_IN_FRONT[name]], 0, torch.float32), batch(0, 6)
    expected = model(x)
    cache = KVCache(64)
    cache.attach(model, kind="activation")
    with cache:
        with pytest.warns(KVCacheWarning, match="other samples"):
            torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model(x[1:]), model.forward.original(x[1:]))
    assert cache.stats().entries == 0


def test_attention_with_time_in_front_inside_a_module_with_the_batch_in_front_is_served():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 2)

        def forward(self, x):
            x = x.transpose(0, 1)
            return self.attention(x, x, x)[0].transpose(0, 1)

    model, x = built([Turned], 0, torch.float32), batch(0, 6)
    expected = model(x)
    cache = KVCache(64)
    cache.attach(model, kind="activation")
    for _ in range(2):
        with cache:
            torch.testing.assert_close(model(x), expected)
    assert cache.stats().hit_entries == 6


@pytest.mark.parametrize("check", [None, False, True])
def test_what_is_not_checked_runs_once_per_sample(check):
    rows = []
    cache, x = KVCache(64), batch(0, 6)
    model = cache.attach(Function(lambda x: rows.append(len(x)) or x * 2), kind="activation", check_in_parts=check)
    with cache:
        model(x[:4])
        model(x)
    assert rows == ([4, 3, 3, 2] if check else [4, 2])


def test_a_mask_as_large_as_the_batch_that_was_not_named():
    """Its rows pass for the samples': a part of the batch would get a part of the mask."""
    model = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True).eval().requires_grad_(False)
    mask = torch.triu(torch.ones(TOKENS, TOKENS), 1).bool()
    cache, x = KVCache(64), batch(0, TOKENS)
    mixture = torch.cat([x[:3], batch(1, 2)])
    expected = model(x, mask), model(mixture, mask)
    cache.attach(model)
    with cache:
        torch.testing.assert_close(model(x, mask), expected[0])
        with pytest.warns(KVCacheWarning, match=r"2 of 5 samples alone raise RuntimeError.*in shared="):
            torch.testing.assert_close(model(mixture, mask), expected[1])
        torch.testing.assert_close(model(mixture, mask), expected[1])
    assert cache.stats().hit_entries == 3 and cache.stats().bypassed_calls == 2


def test_an_input_that_a_module_refuses_does_not_speak_against_the_module():
    model = nn.Sequential(nn.Embedding(10, WIDTH)).requires_grad_(False)
    cache, x = KVCache(64), torch.arange(8).view(4, 2)
    cache.attach(model, kind="activation")
    with cache:
        model(x)
        with pytest.raises(IndexError):
            model(torch.cat([x[:1], x[:1] + 100]))
        assert torch.equal(model(x), model[0].weight[x])
    assert cache.stats().hit_entries == 1 + 4 and not cache.stats().bypassed_calls
