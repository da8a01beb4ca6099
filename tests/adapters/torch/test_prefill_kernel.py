"""The C kernel for steps of several tokens per row, against float64 over the same tokens."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcache_torch import KVCache, generate, native
from tests.adapters.torch.hf_models import VOCAB, decoder
from tests.adapters.torch.models import Small, close, prompt

TOKENS, QUERIES = 32, 500
"""So many of each at least where errors are compared with PyTorch's: fewer tokens it adds up in another way, more
exactly, and of fewer queries one whose error is far from the others' shows in the mean of all."""


@pytest.fixture
def kernel_calls(monkeypatch):
    """One entry per call of the kernel."""
    calls = []
    attend = native.PrefillReads.attend
    monkeypatch.setattr(native.PrefillReads, "attend", lambda *args: calls.append(1) or attend(*args))
    return calls


@pytest.fixture
def threads():
    """Leaves the number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def exact(q, k, v, start, window=None, dtype=torch.float64):
    """One row's new tokens [Hq, T, D], from position ``start`` on, over all its tokens [H, S, D]."""
    mine, there = torch.arange(start, start + q.shape[1])[:, None], torch.arange(k.shape[1])
    mask = there <= mine
    if window is not None:
        mask = mask & (there > mine - window)
    q, k, v = (one.to(dtype)[None] for one in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0]


def rounding(q, k, v):
    """What float32 may add to any result: a score is a sum of D products, each rounded to half an ulp, whose error
    grows with sqrt(D) (Higham and Mary, 2019); a weight is off by as much in proportion, and so is the sum of weights.

    One score in thousands is off by several times what most are, PyTorch's as well, but not the same one: the largest
    error of one run says nothing about that of another.
    """
    groups, size = q.shape[0] // k.shape[0], q.shape[2]
    half_ulp = torch.finfo(torch.float32).eps / 2
    largest = (q.abs() @ k.abs().repeat_interleave(groups, 0).transpose(1, 2)).max().item() * size**-0.5
    return 2 * half_ulp * (size**0.5 * largest + 1) * v.abs().max().item()


def rms(error):
    return error.double().square().mean().sqrt().item()


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_kernel_equals_float64(compiled, threads, data):
    """Ragged rows over extents of any size anywhere in a pool that holds nothing but NaN besides."""
    draw = data.draw
    torch.set_num_threads(draw(st.integers(1, 2)))
    rows, heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 5, 50]))
    width, value_width = (draw(st.sampled_from([*range(32, 257, 16), 8])) for _ in "kv")
    counts = draw(st.lists(st.integers(1, 70), min_size=rows, max_size=rows))
    starts = draw(st.lists(st.integers(0, 200), min_size=rows, max_size=rows))
    window = draw(st.none() | st.integers(1, 100))
    sizes = [start + count for start, count in zip(starts, counts, strict=True)]
    cuts = [sorted(draw(st.sets(st.integers(1, size), max_size=4)) - {size}) for size in sizes]
    torch.manual_seed(0)
    # Each row's extents, in an order that mixes the rows, with a gap behind each.
    pieces = [(row, *ends) for row, size in enumerate(sizes) for ends in pairwise([0, *cuts[row], size])]
    per_row, free = [[] for _ in sizes], 1
    for row, first, end in draw(st.permutations(pieces)):
        per_row[row].append((free, end - first, first))
        free += end - first + 1
    keys, values = (torch.full((heads, free, size), float("nan")) for size in (width, value_width))
    q, k, v = (
        torch.randn(rows, max(counts), number, size).transpose(1, 2)
        for number, size in ((heads * groups, width), (heads, width), (heads, value_width))
    )
    slots, places = np.zeros((rows, max(counts)), np.int64), []
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        extents = sorted(per_row[row], key=lambda extent: extent[2])
        place = [slot + at for slot, size, _ in extents for at in range(size)]
        keys[:, place[:start]] = torch.randn(heads, start, width)
        values[:, place[:start]] = torch.randn(heads, start, value_width)
        slots[row, :count] = place[start:]
        places.append(place)
    assert native.PrefillReads.serve(q, k, v, keys, values) == (max(counts) * groups >= 8)
    reads = native.PrefillReads(compiled, per_row, slots, np.array(starts), np.array(counts), window)
    found = reads.attend(q, k, v, keys, values, None)
    assert keys[:, 0].isnan().all() and values[:, 0].isnan().all()  # where padding would be written
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        mine = places[row]
        assert torch.equal(keys[:, mine[start:]], k[row, :, :count])
        assert torch.equal(values[:, mine[start:]], v[row, :, :count])
        same = q[row, :, :count], keys[:, mine], values[:, mine]
        error = found[row, :, :count] - exact(*same, start, window)
        assert error.abs().max() <= rounding(*same)
        if count >= TOKENS and heads * groups * count >= QUERIES:
            theirs = exact(*same, start, window, dtype=torch.float32) - exact(*same, start, window)
            assert rms(error) <= 1.5 * rms(theirs)
        assert not found[row, :, count:].any()


@pytest.mark.parametrize("spread", [0.1, 1, 8, 60])
@pytest.mark.parametrize("start", [0, 777])
def test_error_is_that_of_pytorch(compiled, spread, start):
    """The bound of cached results, however far apart the scores are."""
    torch.manual_seed(int(spread))
    q, k, v = spread * torch.randn(6, 200, 64), torch.randn(2, start + 200, 64), torch.randn(2, start + 200, 64)
    right, theirs = exact(q, k, v, start), exact(q, k, v, start, dtype=torch.float32)
    keys, values = torch.zeros(2, start + 200, 64), torch.zeros(2, start + 200, 64)
    keys[:, :start], values[:, :start] = k[:, :start], v[:, :start]
    slots = np.arange(start, start + 200)[None]
    reads = native.PrefillReads(compiled, [[(0, start + 200, 0)]], slots, np.array([start]), np.array([200]))
    ours = reads.attend(q[None], k[None, :, start:], v[None, :, start:], keys, values, None)[0]
    unit = torch.finfo(torch.float32).eps * right.abs().max()
    assert (ours - right).abs().max() <= 1.5 * (theirs - right).abs().max() + unit


def test_what_is_no_number_shows(compiled):
    """A NaN in a query or a key is in the result of whoever sees it, and of nobody else."""
    q, k, v = (torch.randn(1, 2, 40, 32) for _ in range(3))
    q[0, 0, 3, 5] = float("nan")
    k[0, 1, 20, 7] = float("nan")
    keys, values = torch.zeros(2, 40, 32), torch.zeros(2, 40, 32)
    reads = native.PrefillReads(compiled, [[(0, 40, 0)]], np.arange(40)[None], np.array([0]), np.array([40]))
    found = reads.attend(q, k, v, keys, values, None)[0].isnan()
    assert found[0].all(-1).tolist() == [token == 3 for token in range(40)]
    assert found[1].all(-1).tolist() == [token >= 20 for token in range(40)]
    assert torch.equal(found.any(-1), found.all(-1))


def test_what_the_kernel_is_not_for(compiled):
    good = [torch.zeros(1, 4, 4, 32), *torch.zeros(2, 1, 2, 4, 32), *torch.zeros(2, 2, 8, 32)]
    assert native.PrefillReads.serve(*good)
    assert not native.PrefillReads.serve(*(one.double() for one in good))
    assert not native.PrefillReads.serve(*(one[..., :12] for one in good))
    assert not native.PrefillReads.serve(*(torch.zeros(*one.shape[:-1], 264) for one in good))
    assert not native.PrefillReads.serve(good[0][:, :2], *good[1:])  # four queries of a K/V head
    assert not native.PrefillReads.serve(good[0].transpose(2, 3), *good[1:])


def test_a_model_runs_on_it(compiled, kernel_calls):
    """Prompts of several lengths behind a shared head, one layer with a window, from a cache through the kernel."""
    model = Small()
    prompts = [prompt(0, 30) + prompt(seed, 3 + 5 * seed) for seed in range(1, 5)]
    plain = generate(model, prompts, max_new_tokens=6)
    cache = KVCache(128, block_size=4)
    cache.attach(model, outputs="last")
    assert generate(model, prompts, max_new_tokens=6, cache=cache) == plain
    assert kernel_calls


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma 3"])
def test_transformers_models_run_on_it(compiled, kernel_calls, family):
    """Prompts behind a shared head; all layers or some have windows in Mistral and Gemma 3."""
    model = decoder(family)
    shared = torch.randint(1, VOCAB, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [shared + [1 + (seed * at) % 90 for at in range(3 + 5 * seed)] for seed in range(1, 4)]
    with torch.no_grad():
        plain = [model(torch.tensor([row])).logits[0, -1] for row in prompts]
    cache = KVCache(128, block_size=4)
    cache.attach(model)
    with torch.no_grad(), cache:
        found = [model(torch.tensor([row])).logits[0, -1] for row in prompts]
    for one, right in zip(found, plain, strict=True):
        close(one, right)
    assert cache.stats().hit_tokens
    assert kernel_calls
