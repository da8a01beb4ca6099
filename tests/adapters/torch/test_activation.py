"""``with cache:`` around modules that are no token models: rows seen before are served, the rest is computed."""

from __future__ import annotations

import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kvcache_core.activation
import kvcache_torch.activation
from kvcache_core import AfterSightings, InvalidInput, KVCacheWarning, Sampled, UsageError
from kvcache_torch import KVCache, generate
from tests.adapters.clock import Clock
from tests.adapters.torch.models import Small, prompt


class Counting(nn.Module):
    """Counts the rows it computes."""

    def __init__(self, width=6, out=4):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(width, 8), nn.Linear(8, out)
        self.rows, self.calls = 0, 0

    def forward(self, x):
        self.calls += 1
        self.rows += len(x)
        return self.second(torch.relu(self.first(x)))


@pytest.fixture
def model():
    return Counting().eval()


@pytest.fixture
def cache(model):
    cache = KVCache(64)
    assert cache.attach(model) is model
    return cache


def rows(seed, count=5, width=6):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def plain(cache, *args, **kwargs):
    with torch.no_grad():
        return cache.model.forward.original(*args, **kwargs)


def cached(cache, *args, **kwargs):
    with torch.no_grad(), cache:
        result = cache.model(*args, **kwargs)
    cache.sites.entries.check_valid()
    return result


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_the_second_time_nothing_is_computed(model, cache):
    x = rows(0)
    first = cached(cache, x)
    assert (model.calls, model.rows) == (1, 5)
    second = cached(cache, x)
    assert (model.calls, model.rows) == (1, 5)
    assert torch.equal(first, second) and second.dtype == first.dtype and not second.requires_grad
    stats = cache.stats()
    assert (stats.hit_entries, stats.miss_entries, stats.entries) == (5, 5, 5)
    assert stats.entry_hit_ratio == 0.5 and stats.bytes == 5 * 4 * 4


def test_only_new_rows_are_computed_and_the_order_is_kept(model, cache):
    old, new = rows(0), rows(1)
    cached(cache, old)
    x = torch.stack([new[0], old[3], new[1], old[0], new[0], old[3]])
    model.rows = 0
    close(cached(cache, x), plain(cache, x))
    assert model.rows == 2 + 6  # two new rows; six by `plain`


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=8), min_size=1, max_size=12), st.integers(1, 12))
def test_any_history_of_batches_gives_what_the_model_gives(history, size):
    model, pool = Counting().eval(), rows(0, 10)
    expected = model(pool).detach()
    cache = KVCache(size)
    cache.attach(model)
    for batch in history:
        close(cached(cache, pool[batch]), expected[batch])
    assert cache.stats().entries <= size


def test_what_is_returned_is_nobody_elses(cache):
    x = rows(0)
    first = cached(cache, x)
    kept = first.clone()
    first.zero_()
    second = cached(cache, x)
    assert torch.equal(second, kept)
    second.zero_()
    assert torch.equal(cached(cache, x), kept)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int32, torch.bool]
)
def test_dtypes(dtype):
    class Same(nn.Module):
        def forward(self, x):
            return x.flip(1)

    cache = KVCache(16)
    cache.attach(Same())
    x = (rows(0) * 10).to(dtype)
    for _ in range(2):
        y = cached(cache, x)
        assert torch.equal(y, x.flip(1)) and y.dtype == dtype
    assert cache.stats().hit_entries >= 5


def test_equal_bits_in_another_dtype_or_shape_are_other_inputs(cache):
    class Same(nn.Module):
        def forward(self, x):
            return x + x

    cache = KVCache(16)
    cache.attach(Same())
    x = torch.arange(8, dtype=torch.int32).reshape(2, 4)
    for y in (x, x.view(torch.float32), x.view(2, 2, 2), x.view(torch.int16)):
        assert torch.equal(cached(cache, y), y + y)
    assert cache.stats().hit_entries == 0


def test_nan_and_signed_zero_are_told_apart_by_bits(model, cache):
    x = rows(0)
    x[0, 0], x[1, 1] = float("nan"), 0.0
    cached(cache, x)
    model.rows = 0
    y = cached(cache, x)
    assert model.rows == 0 and y[0].isnan().all()
    x[1, 1] = -0.0
    cached(cache, x)
    assert model.rows == 1


def test_views_are_read_as_they_look(model, cache):
    x = rows(0, 6)
    cached(cache, x)
    model.rows = 0
    wide = torch.stack([x, x], 2).reshape(6, 12)[:, ::2]
    close(cached(cache, x.T.contiguous().T), plain(cache, x))
    close(cached(cache, wide), plain(cache, x))
    assert model.rows == 12


# ---- inputs and outputs of any structure -----------------------------------------------------------------------------

Pair = namedtuple("Pair", ["mean", "top"])


@dataclass
class Record:
    mean: torch.Tensor
    label: str
    extra: object = None


class Structured(nn.Module):
    def __init__(self, build):
        super().__init__()
        self.build, self.rows = build, 0

    def forward(self, x, mask=None, *, scale=1.0):
        self.rows += len(x)
        mask = torch.ones_like(x) if mask is None else mask
        return self.build((x * mask).mean(1) * scale, (x * mask * scale).cumsum(1))


BUILDS = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, (b, None)],
    "dict": lambda a, b: {"a": a, "b": {"deep": b, "name": "x"}},
    "namedtuple": Pair,
    "dataclass": lambda a, b: Record(a, "label", (b, "x")),
}


def leaves_of(value):
    from kvcache_core.tree import flatten

    return flatten(value, lambda leaf: isinstance(leaf, torch.Tensor))


@pytest.mark.parametrize("name", BUILDS)
def test_structured_outputs(name):
    model = Structured(BUILDS[name])
    cache = KVCache(64)
    cache.attach(model)
    x = rows(0)
    expected = plain(cache, x)
    for batch in (x[:2], x, x):
        found = cached(cache, batch)
    (mine, shape), (theirs, same) = leaves_of(found), leaves_of(expected)
    assert type(found) is type(expected) and shape == same
    for one, other in zip(mine, theirs, strict=True):
        close(one, other)
    assert cache.stats().hit_entries == 7


def test_model_outputs_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    cache = KVCache(64)
    cache.attach(model)
    ids = torch.randint(40, (4, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    expected = plain(cache, input_ids=ids, attention_mask=mask, output_hidden_states=True)
    for _ in range(2):
        found = cached(cache, input_ids=ids, attention_mask=mask, output_hidden_states=True)
    assert type(found) is type(expected) and list(found) == list(expected)
    close(found.last_hidden_state, expected.last_hidden_state)
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        close(one, other)
    assert cache.stats().hit_entries == 4
    close(cached(cache, ids, attention_mask=mask)[0], expected[0])
    assert cache.stats().hit_entries == 4  # without hidden states it is another result


def test_every_input_and_flag_counts():
    model = Structured(BUILDS["tuple"])
    cache = KVCache(64)
    cache.attach(model)
    x, mask = rows(0), torch.ones(5, 6)
    cached(cache, x, mask)
    model.rows = 0
    for arguments in ({"scale": 2.0}, {"scale": 2}, {"scale": True}):
        close(cached(cache, x, mask, **arguments), plain(cache, x, mask, **arguments))
    other = mask.clone()
    other[2, 3:] = 0
    model.rows = 0
    close(cached(cache, x, other), plain(cache, x, other))
    assert model.rows == 1 + 5


def test_a_tensor_without_the_batch_belongs_to_every_sample():
    class Shifted(nn.Module):
        def forward(self, x, shift):
            return x + shift

    cache = KVCache(64)
    cache.attach(Shifted(), shared=["shift"])
    x = rows(0)
    for shift in (torch.tensor(1.0), rows(1, 1)[0], rows(2, 5, 1)):
        # [5, 1] could be one number per sample, if it were not declared as shared
        for batch in (x[:5], x[[1, 0]] if shift.dim() < 2 else x):
            close(cached(cache, batch, shift=shift), batch + shift)
    assert cache.stats().hit_entries == 2 + 2 + 5


# ---- what is not served ----------------------------------------------------------------------------------------------


def reasons(cache):
    return list(cache.stats().bypass_reasons)


def test_training_is_bypassed_and_counted(model, cache):
    model.train()
    with cache:
        y = model(rows(0))
    assert y.requires_grad
    assert cache.stats().bypassed_calls == 1 and "being trained" in reasons(cache)[0]
    assert cache.stats().entries == 0


def test_inputs_that_need_gradients_are_bypassed(model, cache):
    x = rows(0).requires_grad_()
    with cache:
        model(x).sum().backward()
    assert x.grad is not None and reasons(cache) == ["an input needs gradients"]
    cached(cache, x)  # under no_grad it is an input as any other
    assert cache.stats().miss_entries == 5


def test_dropout_and_batch_statistics_in_training_mode():
    for layer in (nn.Dropout(0.5), nn.BatchNorm1d(6)):
        model = nn.Sequential(nn.Linear(6, 6), layer)
        cache = KVCache(8)
        cache.attach(model)
        x = rows(0)
        cached(cache, x)
        assert "training mode" in reasons(cache)[0] and cache.stats().entries == 0
        model.eval()
        for _ in range(2):
            close(cached(cache, x), plain(cache, x))
        assert cache.stats().hit_entries == 5


def test_random_results_are_noticed_whoever_draws_them():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x) if self.training else x + 1

    cache = KVCache(8)
    model = cache.attach(Noisy())
    x = rows(0)
    with pytest.warns(KVCacheWarning, match="drew random numbers"):
        one = cached(cache, x)
    assert not torch.equal(one, cached(cache, x))
    assert cache.stats().entries == 0 and cache.stats().bypassed_calls == 2
    model.eval()
    assert torch.equal(cached(cache, x), cached(cache, x))
    assert cache.stats().hit_entries == 5


def test_a_module_that_changes_its_own_buffers_is_never_served():
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen += 1
            return x + self.seen

    cache = KVCache(8)
    model = cache.attach(Running())
    x = rows(0)
    with pytest.warns(KVCacheWarning, match="its own weights or buffers"):
        close(cached(cache, x), x + 1)
    close(cached(cache, x), x + 2)
    assert model.seen == 2 and cache.stats().entries == 0


def test_declared_side_effects_run_each_time():
    model = Counting().eval()
    cache = KVCache(8)
    cache.attach(model, side_effects=True)
    for _ in range(3):
        cached(cache, rows(0))
    assert model.calls == 3 and cache.stats().bypassed_calls == 3


@pytest.mark.parametrize("what", ["input", "weight"])
def test_an_output_that_shares_memory_stays_shared(what):
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6), requires_grad=False)

        def forward(self, x):
            return x[:, :3] if what == "input" else self.weight.expand(len(x), 6)

    cache = KVCache(8)
    model = cache.attach(Alias().eval())
    x = rows(0)
    with pytest.warns(KVCacheWarning, match="shares memory"):
        y = cached(cache, x)
    (x if what == "input" else model.weight.data).fill_(7)
    assert (y == 7).all()
    cached(cache, x)
    assert cache.stats().bypassed_calls == 2 and cache.stats().entries == 0


@pytest.mark.parametrize(
    "given",
    [
        lambda: (value for value in ()),
        lambda: torch.ones(2).to_sparse(),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: len,
    ],
    ids=["generator", "sparse", "nested", "object"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse invariant checks")
def test_inputs_that_cannot_be_hashed_are_computed_as_outside(given):
    class Takes(nn.Module):
        def forward(self, x, other):
            return x * 2

    cache = KVCache(8)
    cache.attach(Takes())
    x = rows(0)
    with pytest.warns(KVCacheWarning, match="cannot be hashed"):
        assert torch.equal(cached(cache, x, given()), x * 2)
    assert torch.equal(cached(cache, x, given()), x * 2)
    assert cache.stats().bypassed_calls == 2


def test_a_ragged_nest_is_an_input_like_any_other():
    """Lists of unequal lengths and depths, with tensors of the batch and without."""

    class Takes(nn.Module):
        def forward(self, x, other):
            return x * 2

    cache, x = KVCache(64), rows(0)
    cache.attach(Takes())
    for last in (3, 3, 4):
        nest = [[x, [x + 1]], (torch.tensor(2.0), {"deep": [last, []]}), ()]
        assert torch.equal(cached(cache, x, nest), x * 2)
    assert (cache.stats().miss_entries, cache.stats().hit_entries) == (10, 5)


@pytest.mark.parametrize(
    "output", [lambda x: x.sum(), lambda x: (x * 2, x.mean(0)), lambda x: iter(()), lambda x: None]
)
def test_outputs_without_a_row_per_sample_are_computed_as_outside(output):
    class Takes(nn.Module):
        def forward(self, x):
            return output(x)

    cache = KVCache(8)
    cache.attach(Takes())
    with pytest.warns(KVCacheWarning, match="output"):
        cached(cache, rows(0))
    cached(cache, rows(0))
    cached(cache, rows(0)[:1])
    assert cache.stats().bypassed_calls == 3 and cache.stats().entries == 0
    assert len(cache.stats().bypass_reasons) == 1, "not one for each size of batch"


def test_a_shape_that_depends_on_the_other_samples_is_noticed():
    class Padded(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), int(x.max()))

    cache = KVCache(8)
    cache.attach(Padded())
    cached(cache, torch.tensor([[1.0], [2.0]]))
    cached(cache, torch.tensor([[4.0], [3.0]]))
    x = torch.tensor([[1.0], [3.0]])
    with pytest.warns(KVCacheWarning, match="depends on the other samples"):
        assert cached(cache, x).shape == (2, 3)


def test_zero_rows_and_no_tensors(model, cache):
    assert cached(cache, torch.zeros(0, 6)).shape == (0, 4)
    assert "no samples" in reasons(cache)[0]


def test_a_row_larger_than_the_budget_is_computed_and_not_kept(model):
    cache = KVCache(memory=15)
    cache.attach(model)
    x = rows(0)
    for _ in range(2):
        close(cached(cache, x), plain(cache, x))
    stats = cache.stats()
    assert (stats.entries, stats.refused_entries, stats.hit_entries) == (0, 10, 0)


def test_an_exception_in_the_module_loses_nothing(model, cache):
    cached(cache, rows(0))
    hook = model.second.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("boom")))
    with pytest.raises(RuntimeError, match="boom"):
        cached(cache, torch.cat([rows(0), rows(1)]))
    hook.remove()
    assert cache.stats().entries == 5
    close(cached(cache, rows(1)), plain(cache, rows(1)))


# ---- gradients without training --------------------------------------------------------------------------------------


def test_eval_with_gradients_is_served_and_its_gradients_are_right(model, cache):
    x = rows(0)
    cached(cache, x)
    model(x).square().sum().backward()
    expected = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    hits = cache.stats().hit_entries
    with cache:
        y = model(x)
    assert cache.stats().hit_entries == hits + 5
    y.square().sum().backward()
    for weight, grad in zip(model.parameters(), expected, strict=True):
        close(weight.grad, grad)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("order", [[True, False], [False, True]])
def test_an_encoder_that_computes_otherwise_without_gradients(order):
    """PyTorch's fast path leaves zeros at padding; it is taken where no gradients flow."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    x, hidden = torch.randn(6, 5, 8), torch.arange(5) > torch.arange(6)[:, None]
    expected = {}
    for gradients in order:
        with torch.set_grad_enabled(gradients):
            expected[gradients] = model(x, src_key_padding_mask=hidden)
    assert not torch.allclose(expected[True], expected[False])
    cache = KVCache(64)
    cache.attach(model)
    for gradients in (*order, *order):
        for part in (slice(1, 4), slice(None)):
            with torch.set_grad_enabled(gradients), cache:
                found = model(x[part], src_key_padding_mask=hidden[part])
            close(found, expected[gradients][part])
            assert found.requires_grad == gradients
    assert cache.stats().hit_entries == 2 * (3 + 9)


def test_a_complex_number_beside_a_batch_of_two():
    class Turned(nn.Module):
        def forward(self, x, turn):
            return (x * turn).real

    cache, x, turn = KVCache(64), rows(0, 2), torch.tensor(1 + 2j)
    model = cache.attach(Turned())
    with cache:
        for batch in (x, torch.cat([x[:1], rows(1, 1)])):
            close(model(batch, turn), batch)
    assert cache.stats().hit_entries == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_module_is_served_and_detached():
    x = rows(0)
    model = torch.jit.trace(nn.Linear(6, 4).eval(), x)
    expected = model(x)
    for _ in range(2):
        cache = KVCache(64)
        cache.attach(model)
        close(cached(cache, x), expected)
        close(cached(cache, x), expected)
        assert cache.stats().hit_entries == 5
        cache.detach()
        close(model(x), expected)


# ---- the cache's own ---------------------------------------------------------------------------------------------


def test_salts_do_not_meet(model):
    x = rows(0)
    for salt in (b"a", b"b"):
        cache = KVCache(8, salt=salt)
        cache.attach(model)
        cached(cache, x)
        cache.salt = b"other"
        cached(cache, x)
        assert cache.stats().hit_entries == 0
        cache.detach()


def test_admission(model):
    x = rows(0)
    cache = KVCache(64, admit=AfterSightings(2))
    cache.attach(model)
    found = []
    for _ in range(3):
        cached(cache, x)
        found.append(cache.stats().hit_entries)
    assert found == [0, 0, 5]
    cache.detach()
    cache = KVCache(4096, admit=Sampled(0.2, seed=0))
    cache.attach(model)
    cached(cache, rows(0, 1000))
    assert 150 < cache.stats().entries < 250


def test_warm_resize_clear_invalidate(model, cache):
    assert cache.warm([rows(0), (rows(1),), {"x": rows(2)}, rows(0)]) == 15
    model.rows = 0
    cached(cache, rows(1))
    assert model.rows == 0
    cache.resize(6)
    assert cache.stats().entries == 6
    cached(cache, rows(1))
    assert model.rows == 0, "the most recently used stay"
    cache.invalidate()
    cached(cache, rows(1))
    assert model.rows == 5
    cache.clear()
    assert cache.stats().entries == 0
    cache.resize(memory=64)
    cached(cache, rows(1))
    assert cache.stats().entries == 4 and cache.stats().bytes == 64


def test_warm_takes_one_batch_alone_and_any_iterable(model, cache):
    assert cache.warm(rows(0)) == 5
    assert cache.warm({"x": rows(1)}) == 5
    assert cache.warm((batch for batch in (rows(2), rows(0))), bar=True) == 5
    model.rows = 0
    cached(cache, torch.cat([rows(2), rows(0)]))
    assert model.rows == 0


def test_warm_draws_a_bar_and_stats_advise(model, cache, capsys):
    cache.record(100)
    assert cache.warm([rows(0), rows(1), rows(0)], bar=True) == 10
    assert capsys.readouterr().err.endswith("] 3/3\n")
    assert cache.warm([rows(0)]) == 0
    assert capsys.readouterr().err == ""  # no terminal
    said = str(cache.stats(advice=True))
    assert "miss_entries: 10" in said and "recorded accesses" in said.splitlines()[-1]
    assert cache.stats().advice == ""
    cache.record(0)
    with pytest.raises(UsageError, match="no accesses are recorded"):
        cache.stats(advice=True)


def test_several_parts_share_one_cache_and_keep_apart():
    model = nn.Sequential(Counting(6, 6), Counting(6, 6)).eval()
    expected = model(rows(0)).detach()
    cache = KVCache(64)
    for part in model:
        cache.attach(part, kind="activation")
    for _ in range(2):
        with torch.no_grad(), cache:
            close(model(rows(0)), expected)
    assert (cache.stats().entries, cache.stats().hit_entries) == (10, 10)
    cache.detach(model[0])
    with torch.no_grad(), cache:
        close(model(rows(0)), expected)
    assert model[0].calls == 3 and model[1].calls == 2
    cache.detach()
    with pytest.raises(UsageError, match="no model is attached"):
        cache.detach()
    assert "forward" not in vars(model[0]) and "forward" not in vars(model[1])


def test_what_is_cached_survives_detaching(model, cache):
    cached(cache, rows(0))
    cache.detach()
    cache.attach(model)
    model.rows = 0
    cached(cache, rows(0))
    assert model.rows == 0


def test_a_token_model_and_an_encoder_in_one_cache():
    decoder, encoder = Small(), Counting().eval()
    cache = KVCache(64, block_size=4)
    cache.attach(decoder)
    cache.attach(encoder, kind="activation")
    expected = generate(decoder, [prompt(0, 9)], max_new_tokens=4)
    for _ in range(2):
        with torch.no_grad(), cache:
            close(encoder(rows(0)), encoder.forward.original(rows(0)))
            assert generate(decoder, [prompt(0, 9)], max_new_tokens=4) == expected
    assert cache.stats().hit_entries == 5 and cache.stats().hit_tokens == 8


def test_which_kind_a_module_is():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 3)

        def forward(self, ids):
            return self.table(ids).mean(1)

    cache = KVCache(64)
    cache.attach(Bag())
    ids = torch.arange(12).reshape(3, 4)
    for _ in range(2):
        close(cached(cache, ids), plain(cache, ids))
    assert cache.stats().hit_entries == 3
    with pytest.raises(UsageError, match="activations of a module"):
        cache.open([1, 2])
    with pytest.raises(InvalidInput, match="kind must be"):
        KVCache(4).attach(Bag(), kind="image")
    other = KVCache(64)
    other.attach(Small())
    with torch.no_grad(), other:
        other.model(ids)
    assert other.stats().miss_tokens == 12 and other.stats().miss_entries == 0


def test_two_models_need_to_say_so(cache):
    with pytest.raises(UsageError, match="kind='activation'"):
        cache.attach(Counting())


def test_no_warning_where_nothing_is_unexpected(model, cache):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()
        with cache:
            model(rows(0)).sum().backward()


def test_threads_share_entries(model, cache):
    import threading

    pool = rows(0, 40)
    expected = plain(cache, pool)
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(30):
            batch = torch.randint(40, (7,), generator=generator)
            if not torch.allclose(cached(cache, pool[batch]), expected[batch], atol=1e-6):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.stats().entries == 40


# ---- whether it pays -------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch, kvcache_core.activation, kvcache_torch.activation)


@pytest.mark.usefixtures("clock")
def test_a_module_too_small_for_a_cache_is_left_out_and_said_so():
    """Finding all rows takes a second, as computing them does; keeping them took two."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    cache = KVCache(64, bypass="auto")
    cache.attach(model)
    x = rows(0, 32, 16)
    with torch.no_grad(), cache:
        for _ in range(300):
            close(model(x), model.forward.original(x))
    stats = cache.stats()
    assert stats.bypass_reasons == {"the cache costs more than it saves": 300 - 32}
    assert stats.seconds_spent > stats.seconds_saved > 0


def test_a_module_that_pays_is_not_left_out(clock):
    class Slow(nn.Module):
        def forward(self, x):
            clock.now += 100
            return x * 2

    cache = KVCache(64, bypass="auto")
    cache.attach(Slow())
    x = torch.rand(2, 12, 12)
    with torch.no_grad(), cache:
        for _ in range(80):
            cache.model(x)
    stats = cache.stats()
    assert stats.bypassed_calls == 0 and stats.hit_entries == 158
    assert stats.seconds_saved > stats.seconds_spent


# ---- compiled modules ------------------------------------------------------------------------------------------------


def test_an_attached_compiled_module_computes_its_misses_compiled(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", dynamic=True)
    x = rows(0, 8)
    cache = KVCache(64)
    cache.attach(compiled)
    with torch.no_grad():
        expected = model(x)
        with cache:
            compiled(x[:4])
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert graphs
            for count in (6, 8, 8):
                close(compiled(x[:count]), expected[:count])
    assert cache.stats().hit_entries == 4 + 6 + 8
    torch._dynamo.reset()


def test_compiling_an_attached_module_is_right_though_not_cached(model, cache):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    x = rows(0)
    with torch.no_grad(), cache:
        for _ in range(2):
            close(compiled(x), model.forward.original(x))
    torch._dynamo.reset()


# ---- a call's circumstances ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_module_that_changes_its_input_is_never_served(context, gradients):
    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Linear(4, 4)

        def forward(self, x):
            return self.part(x.add_(1))

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Changes()

        def forward(self, x):
            x = x * 1
            return self.block(x) + x

    model = Whole().eval().requires_grad_(gradients)
    x = torch.randn(5, 4)
    with context():
        expected = model(x)
    cache = KVCache(64)
    cache.attach(model.block)
    with context(), cache:
        with pytest.warns(KVCacheWarning, match="changed an input in place"):
            close(model(x), expected)
        close(model(x), expected)
        close(model(x[:2]), expected[:2])
    assert cache.stats().entries == 0 and cache.stats().bypassed_calls == 3


@torch.inference_mode()
def test_a_module_that_another_thread_proves_meanwhile_is_no_one_that_changes_its_input():
    """Under inference mode no version tells, and the bits are compared only until a first call has shown that."""
    others = [torch.randn(3, 4)]

    class Waits(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Linear(4, 4)

        def forward(self, x):
            if others:
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(call, others.pop()).result()
            return self.part(x)

    @torch.inference_mode()
    def call(x):
        with cache:
            return model(x)

    model, cache, x = Waits().eval(), KVCache(64), torch.randn(5, 4)
    cache.attach(model)
    close(call(x), model.part(x))
    close(call(x), model.part(x))
    assert cache.stats().hit_entries == 5 and not cache.stats().bypassed_calls


@pytest.mark.parametrize("number", [3, 0.5, True])
def test_a_number_in_the_output_is_no_result_of_a_sample(number):
    cache = KVCache(64)
    model = cache.attach(Structured(lambda a, b: (a, {"count": len(a), "other": number})))
    with pytest.warns(KVCacheWarning, match="plain number"):
        assert cached(cache, rows(0))[1] == {"count": 5, "other": number}
    assert cached(cache, rows(0)[:2])[1] == {"count": 2, "other": number}
    assert cache.stats().entries == 0 and model.rows == 7


def gradients_of(model, x, **between):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in between):
        loss = model(x).float().pow(2).sum()
    if "train" in between:
        model.train()
    loss.backward()
    model.eval()
    return [weight.grad.clone() for weight in model.parameters()]


@pytest.mark.parametrize("between", ["autocast", "train"])
def test_backward_runs_the_module_as_it_was_when_it_was_called(between):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)).eval()
    expected = gradients_of(model, rows(0), **{between: True})
    cache = KVCache(64)
    cache.attach(model)
    with cache:
        for _ in range(2):
            for found, wanted in zip(gradients_of(model, rows(0), **{between: True}), expected, strict=True):
                assert torch.equal(found, wanted)
    assert cache.stats().hit_entries == 5 and not model.training


def test_gradients_of_gradients():
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh()).eval()

    def second():
        weights = list(model.parameters())
        first = torch.autograd.grad(model(rows(0)).pow(2).sum(), weights, create_graph=True)
        return torch.autograd.grad(sum(gradient.pow(2).sum() for gradient in first), weights)

    expected, cache = second(), KVCache(64)
    cache.attach(model)
    with cache:
        for _ in range(2):
            for found, wanted in zip(second(), expected, strict=True):
                close(found, wanted)
    assert cache.stats().hit_entries == 5


def test_gradients_of_complex_outputs():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 3, dtype=torch.complex64))

        def forward(self, x):
            return x.to(torch.complex64) @ self.weight

    model, cache = Complex().eval(), KVCache(64)
    (expected,) = torch.autograd.grad(model(rows(0)).abs().sum(), [model.weight])
    cache.attach(model)
    with cache:
        for _ in range(2):
            (found,) = torch.autograd.grad(model(rows(0)).abs().sum(), [model.weight])
            close(found, expected)


def test_an_input_changed_before_backward_raises_as_it_does_in_pytorch():
    model, cache = nn.Linear(6, 4).eval(), KVCache(64)
    cache.attach(model)
    x = rows(0)
    with cache:
        model(x)
        loss = model(x).sum()
    x.mul_(2)
    with pytest.raises(UsageError, match="changed in place"):
        loss.backward()


def test_transforms_of_torch_func_are_computed_as_outside():
    model, cache, x = nn.Linear(6, 4).eval(), KVCache(64), rows(0)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(given):
        return torch.func.functional_call(model, given, (x,)).pow(2).sum()

    expected = torch.vmap(model)(x), torch.func.grad(loss)(weights)["weight"], torch.func.jacrev(model)(x)
    cache.attach(model)
    with cache:
        with torch.no_grad():
            model(x)
        found = torch.vmap(model)(x), torch.func.grad(loss)(weights)["weight"], torch.func.jacrev(model)(x)
    for one, other in zip(found, expected, strict=True):
        close(one, other)
    assert cache.stats().bypass_reasons == {"a transform of torch.func is active": 3}


def test_a_hook_on_a_part_changes_what_is_found():
    model, cache = nn.Sequential(nn.Linear(6, 4), nn.ReLU()).eval(), KVCache(64)
    cache.attach(model)
    x = rows(0)
    cached(cache, x)
    handle = model[0].register_forward_hook(lambda module, args, output: output * 2)
    close(cached(cache, x), plain(cache, x))
    handle.remove()
    close(cached(cache, x), plain(cache, x))


def test_one_sample_does_not_show_which_dimension_is_the_batchs():
    """The state of an LSTM is [layers, B, H]: of one layer and one sample it looks like a row per sample."""
    model, cache = nn.LSTM(4, 5, batch_first=True).eval(), KVCache(64)
    x = torch.randn(3, 6, 4)
    cache.attach(model)
    with torch.no_grad():
        expected = model(x)
        with cache:
            for at in range(3):
                model(x[at : at + 1])
            with pytest.warns(KVCacheWarning, match="no row per sample"):
                found = model(x)
    close(found[0], expected[0])
    for one, other in zip(found[1], expected[1], strict=True):
        close(one, other)


def test_single_samples_are_served_and_then_batches_of_them(model, cache):
    x = rows(0)
    expected = plain(cache, x)
    for _ in range(2):
        for at in range(5):
            close(cached(cache, x[at : at + 1]), expected[at : at + 1])
    assert cache.stats().hit_entries == 5
    for _ in range(2):  # the first shows that a batch gives a row per sample
        close(cached(cache, x), expected)
    assert model.rows == 5 + 5 + 5, "computed plainly, one by one, and once as a batch"


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_sparse_buffer_is_one_of_the_weights(layout):
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            dense = torch.eye(4)
            self.register_buffer("links", dense.to_sparse() if layout is torch.sparse_coo else dense.to_sparse_csr())

        def forward(self, x):
            return (self.links @ x.mT).mT

    model, cache, x = Graph(), KVCache(64), torch.randn(3, 4)
    cache.attach(model)
    for factor in (1, 2, 6):
        close(cached(cache, x), x * factor)
        close(cached(cache, x), x * factor)
        values = model.links._values() if layout is torch.sparse_coo else model.links.values()
        if factor == 1:
            values.mul_(2)
        else:
            values.data.mul_(3)
    assert cache.stats().hit_entries == 9


def test_an_attached_module_is_exported_and_traced_as_the_plain_one():
    model, cache, x, other = nn.Sequential(nn.Linear(6, 4), nn.ReLU()).eval(), KVCache(64), rows(0), rows(1)
    cache.attach(model)
    expected = plain(cache, other)
    cached(cache, x)
    with torch.no_grad(), cache:
        exported = torch.export.export(model, (x,)).module()
        traced = torch.jit.trace(model, x, check_trace=False)
    close(exported(other), expected)
    close(traced(other), expected)
