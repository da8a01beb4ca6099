"""``with cache: y = model(x)``: the same y, less work."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from torch import nn

from kvcache_core import KVCacheWarning, StaleSequence
from kvcache_torch import KVCache
from tests.adapters.torch.models import VOCAB, Small, close, ids, prompt


@pytest.fixture
def model():
    return Small()


@pytest.fixture
def cache(model):
    cache = KVCache(64, block_size=4)
    cache.attach(model)
    return cache


def plain(model, x):
    with torch.inference_mode():
        return model(x)


def cached(cache, x, **arguments):
    with torch.inference_mode(), cache:
        y = cache.model(x, **arguments)
    cache.core.check_valid()
    assert cache.stats().live_blocks == 0
    return y


# ---- transparent -------------------------------------------------------------------------------------------


def test_cold_and_warm(model, cache):
    x = ids(0, 3, 30)
    y = plain(model, x)
    close(cached(cache, x), y)
    model.computed = 0
    close(cached(cache, x), y)
    assert model.computed == 3, "one token per row"
    assert cache.stats().saved_output_tokens == 3 * 29


def test_partly_cached(model, cache):
    x = ids(0, 2, 30)
    cached(cache, x[:, :18])
    model.computed = 0
    close(cached(cache, x), plain(model, x))
    assert cache.stats().hit_tokens >= 2 * 17
    other = torch.cat((x[:, :11], ids(5, 2, 9)), dim=1)
    close(cached(cache, other), plain(model, other))


def test_reuse_is_to_the_token(model, cache):
    x = ids(0, 1, 23)
    cached(cache, x)
    before = cache.stats().hit_tokens
    other = x.clone()
    other[0, 18] = (x[0, 18] + 1) % VOCAB
    close(cached(cache, other), plain(model, other))
    assert cache.stats().hit_tokens - before == 18


@pytest.mark.parametrize("warm", [False, True])
def test_ragged_rows_by_lengths(model, cache, warm):
    x, lengths = ids(0, 3, 20), [20, 1, 9]
    if warm:
        cached(cache, x[:, :8])
    y = plain(model, x)
    for given in (lengths, torch.tensor(lengths)):
        z = cached(cache, x, lengths=given)
        for row, size in enumerate(lengths):
            close(z[row, :size], y[row, :size])
            assert not z[row, size:].any(), "padding is zero"


@pytest.mark.parametrize("name", ["mask", "attention_mask"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_rows_by_mask(model, cache, name, side):
    rows = [prompt(seed, size) for seed, size in ((0, 17), (1, 6), (2, 1))]
    x, mask = torch.zeros(3, 17, dtype=torch.int64), torch.zeros(3, 17, dtype=torch.bool)
    spans = [slice(17 - len(row), 17) if side == "left" else slice(len(row)) for row in rows]
    for at, (row, span) in enumerate(zip(rows, spans, strict=True)):
        x[at, span], mask[at, span] = torch.tensor(row), True
    for kind in (torch.bool, torch.int64):
        z = cached(cache, x, **{name: mask.to(kind)})
        for at, (row, span) in enumerate(zip(rows, spans, strict=True)):
            close(z[at, span], plain(model, torch.tensor([row]))[0])
            assert not z[at][~mask[at]].any()


def test_outputs_last(model):
    cache = KVCache(64, block_size=4)
    cache.attach(model, outputs="last")
    x = ids(0, 3, 20)
    y = plain(model, x)
    for _ in range(2):
        close(cached(cache, x), y[:, -1:])
    z = cached(cache, x, lengths=[5, 20, 1])
    close(z[:, 0], torch.stack([y[0, 4], y[1, 19], y[2, 0]]))
    assert cache.stats().saved_output_tokens == 0
    assert all(kind == "attention" for kind, _ in cache.core.layout.groups)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_other_integers(model, cache, dtype):
    x = ids(0, 2, 9)
    close(cached(cache, x.to(dtype)), plain(model, x))


def test_a_model_without_logits(cache):
    """A trunk: its output per token is any shape."""

    class Trunk(Small):
        def forward(self, x):
            return super().forward(x).unflatten(-1, (5, 10))

    trunk = Trunk()
    cache = KVCache(64, block_size=4)
    cache.attach(trunk)
    x = ids(0, 2, 12)
    for _ in range(2):
        close(cached(cache, x), plain(trunk, x))


@pytest.mark.parametrize("outputs", ["all", "last"])
def test_no_room_is_computed_as_outside_and_warned_of_once(model, outputs):
    cache = KVCache(3, block_size=4)
    cache.attach(model, outputs=outputs)
    x = ids(0, 2, 20)
    y = plain(model, x) if outputs == "all" else plain(model, x)[:, -1:]
    with pytest.warns(KVCacheWarning, match="no room"):
        first = cached(cache, x)
    close(first, y)
    close(cached(cache, x), y)  # a second warning would be an error
    assert cache.stats().bypassed_calls == 2
    assert cache.stats().bypassed_tokens == 80
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = ids(1, 1, 7)
        close(cached(cache, small), plain(model, small) if outputs == "all" else plain(model, small)[:, -1:])


def test_no_room_with_padding_is_as_with_room(model):
    """What stands at padding, and that masks are accepted, does not depend on how full the cache is."""
    x, lengths = ids(0, 2, 20), [20, 7]
    large, small = KVCache(64, block_size=4), KVCache(2, block_size=4)
    large.attach(model)
    expected = cached(large, x, lengths=lengths)
    large.detach()
    small.attach(model)
    with pytest.warns(KVCacheWarning, match="no room"):
        found = cached(small, x, lengths=lengths)
    close(found, expected)


def test_more_arguments_are_computed_as_outside(model, cache):
    class Two(Small):
        def forward(self, x, bias=0.0):
            return super().forward(x) + bias

    two = Two()
    cache = KVCache(64, block_size=4)
    cache.attach(two)
    x = ids(0, 1, 5)
    with torch.inference_mode():
        y = two(x, bias=2.0)
    with pytest.warns(KVCacheWarning, match="arguments besides"):
        close(cached(cache, x, bias=2.0), y)
    assert cache.stats().bypassed_calls == 1


def test_salts_do_not_share(model):
    cache = KVCache(64, block_size=4, salt=b"one")
    cache.attach(model)
    x = ids(0, 1, 20)
    cached(cache, x)
    cache.salt = b"two"
    cached(cache, x)
    assert cache.stats().hit_tokens == 0


def test_autocast_bfloat16(model):
    """K and V are bfloat16 because the model computes them so; one cache serves one way of computing."""
    x = ids(0, 2, 24)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        wide = plain(Small().double(), x)
        cache = KVCache(64, block_size=4)
        cache.attach(model)
        for _ in range(2):
            with cache:
                z = model(x)
            assert z.dtype == y.dtype
            own = (y.double() - wide).abs().max()
            assert (z.double() - wide).abs().max() <= 1.5 * own + 2**-7 * y.abs().max()
    assert cache.spec.dtype == "bfloat16"
    assert cache.stats().hit_tokens == 2 * 23


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_storage_dtype(model, dtype):
    cache = KVCache(64, block_size=4, dtype=dtype)
    cache.attach(model)
    x = ids(0, 2, 24)
    y = plain(model, x)
    cached(cache, x)
    z = cached(cache, x)
    assert z.dtype == y.dtype
    close(z, y, 0.05)
    assert not cache.exact
    exact = KVCache(64, dtype="float32")
    assert exact.exact


def test_bfloat16_model():
    model = Small().bfloat16()
    cache = KVCache(64, block_size=4)
    cache.attach(model)
    x = ids(0, 2, 24)
    y, wide = plain(model, x), plain(Small().bfloat16().double(), x)
    cached(cache, x[:, :10])
    z = cached(cache, x)
    assert z.dtype == torch.bfloat16
    own = (y.double() - wide).abs().max()
    assert (z.double() - wide).abs().max() <= 1.5 * own + 2**-7 * y.abs().max()


# ---- gradients and training --------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", ["all", "last"])
@pytest.mark.parametrize("warm", [False, True])
def test_gradients_equal_plain_ones_in_eval_mode(model, outputs, warm):
    cache = KVCache(64, block_size=4)
    cache.attach(model, outputs=outputs)
    x = ids(0, 2, 15)
    if warm:
        cached(cache, x)
    y = model(x) if outputs == "all" else model(x)[:, -1:]
    weight = torch.randn(y.shape)
    (y * weight).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with cache:
        z = model(x)
    close(z, y)
    (z * weight).sum().backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)


def train(model, optimiser, around):
    """Four steps on two batches in turn; the losses and the gradients of the last step."""
    step = optimiser(model.parameters(), lr=0.01)
    losses = []
    for at in range(4):
        x = ids(at % 2, 2, 12)
        torch.manual_seed(at)
        with around:
            y = model(x)
        loss = nn.functional.cross_entropy(y[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        step.zero_grad()
        loss.backward()
        losses.append(loss.item())
        step.step()
    return losses, [weight.grad for weight in model.parameters()]


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.Adam])
def test_training_inside_the_cache_is_training(optimiser):
    """A model in training mode is computed as outside: loss, gradients and weights stay equal."""
    one, two = Small().train(), Small().train()
    cache = KVCache(64, block_size=4)
    cache.attach(two)
    losses, grads = train(one, optimiser, contextlib.nullcontext())
    with pytest.warns(KVCacheWarning, match="being trained"):
        found = train(two, optimiser, cache)
    assert found[0] == losses
    assert all(map(torch.equal, found[1], grads))
    assert all(map(torch.equal, two.parameters(), one.parameters()))
    assert cache.stats().bypassed_calls == 4
    two.eval()
    one.eval()
    x = ids(0, 2, 12)
    close(cached(cache, x), plain(one, x))


def test_evaluation_between_training_steps_sees_the_new_weights(model, cache):
    x = ids(0, 2, 16)
    step = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(3):
        close(cached(cache, x), plain(model, x))
        before = cache.stats().hit_tokens
        close(cached(cache, x), plain(model, x))
        assert cache.stats().hit_tokens - before == 30
        model(x).logsumexp(-1).sum().backward()
        step.step()
        before = cache.stats().hit_tokens
        cached(cache, x)
        assert cache.stats().hit_tokens == before, "nothing of the old weights is found"


def _optimiser(model):
    model(ids(0, 1, 3)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def _load(model):
    model.load_state_dict({name: value + 0.1 for name, value in model.state_dict().items()})


def _in_place(model):
    with torch.no_grad():
        model.head.weight.mul_(1.5)


def _replaced(model):
    model.head.weight = nn.Parameter(model.head.weight * 2)


def _data(model):
    model.head.weight.data = model.head.weight.data * 2


CHANGES = [_optimiser, _load, _in_place, _replaced, _data]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights(model, cache, change):
    x = ids(0, 1, 20)
    cached(cache, x)
    tokens = x[0].tolist()
    seq = cache.open(tokens)
    cache.step([seq], [tokens[seq.num_cached :]])
    change(model)
    cache.refresh()
    with pytest.raises(StaleSequence, match="weights changed"):
        cache.step([seq], [[1]])
    seq.close()
    before = cache.stats().hit_tokens
    close(cached(cache, x), plain(model, x))
    assert cache.stats().hit_tokens == before
    close(cached(cache, x), plain(model, x))
    assert cache.stats().hit_tokens == before + 19


def test_a_step_notices_changed_weights_by_itself(model, cache):
    seq = cache.open([1, 2, 3])
    cache.step([seq], [[1, 2, 3]])
    _in_place(model)
    with pytest.raises(StaleSequence):
        cache.step([seq], [[4]])
    seq.close()
    assert cache.open([1, 2, 3]).num_cached == 0


def test_changed_weights_within_one_block(model, cache):
    x = ids(0, 1, 12)
    with torch.inference_mode(False), torch.no_grad(), cache:
        model(x)
        _in_place(model)
        y = model(x)
    close(y, plain(model, x))


def test_invalidate(model, cache):
    x = ids(0, 1, 20)
    cached(cache, x)
    cache.invalidate()
    cached(cache, x)
    assert cache.stats().hit_tokens == 0
    cached(cache, x)
    assert cache.stats().hit_tokens == 19


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_tracing_and_exporting_take_the_model_as_outside(model, cache):
    x = ids(0, 2, 12)
    with torch.no_grad(), cache:
        cache.model(x)
        traced, exported = torch.jit.trace(model, (x,), check_trace=False), torch.export.export(model, (x,)).module()
    for graph in (traced, exported):
        close(graph(x), plain(model, x))


def test_two_caches_of_two_models_in_turn():
    one, two = Small(seed=1), Small(seed=2)
    caches = [KVCache(64, block_size=4), KVCache(64, block_size=4)]
    for cache, model in zip(caches, (one, two), strict=True):
        cache.attach(model)
    x = ids(0, 2, 9)
    for _ in range(2):
        close(cached(caches[0], x), plain(one, x))
        close(cached(caches[1], x), plain(two, x))
    with torch.inference_mode(), caches[0]:
        close(two(x), plain(two, x))  # another model inside is not this cache's
