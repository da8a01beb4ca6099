"""Attention over shared extents, strided rows and gathered pieces against a wide numpy reference."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcache_core import BlockCache, BlockLayout, LayerSpec
from kvcache_core.attention import attend
from kvcache_core.store import NumpyStore
from kvcache_core.testing_bound import Errors, over_draws
from kvcache_torch import TensorStore, kernels, native, reading
from kvcache_torch.step import Step
from tests.reference_decoder import ulp

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Twin:
    """One layer of a cache, the same K and V in numpy, and the same attention in torch over tokens brought together."""

    def __init__(self, dtype, heads, groups, sizes, window, block_size, seed):
        self.dtype, self.heads, self.groups, self.sizes = DTYPES[dtype], heads, groups, sizes
        spec = LayerSpec.attention(heads, *sizes, window=window)
        layout = BlockLayout([spec], block_size, dtype)
        self.core = BlockCache(600, block_size=block_size, layout=layout)
        self.store = TensorStore(layout, 600)
        for name in "kv":
            self.store.array(0, name).fill_(torch.nan)  # who reads a slot that nobody wrote gets NaN
        self.numpy = NumpyStore(BlockLayout([spec], block_size, "float64"), 600)
        self.random = np.random.default_rng(seed)
        self.window = window
        self.rows = []

    def draw(self, *shape):
        return torch.from_numpy(self.random.standard_normal(shape)).to(self.dtype)

    def step(self, seqs, counts):
        plan = self.core.plan(seqs, [self.random.integers(0, 10**6, count).tolist() for count in counts])
        rows, width = plan.tokens.shape
        q = self.draw(rows, self.heads * self.groups, width, self.sizes[0])
        k, v = (self.draw(rows, self.heads, width, size) for size in self.sizes)
        self.numpy.apply_copies(plan)
        for name, new in (("k", k), ("v", v)):
            flat = new.transpose(1, 2).flatten(0, 1).double().numpy()
            self.numpy.write(0, name, plan.groups[0].slots.reshape(-1), flat)
        found = Step(plan, self.store, self.dtype).attend(q, k, v, 0, self.window, None, None)
        for row, count in enumerate(counts):
            extents = plan.groups[0].extents[row]
            slots = [slot for start, size, _ in extents for slot in range(start, start + size)]
            k, v = (self.numpy.read(0, name, slots).swapaxes(0, 1) for name in "kv")
            mine, where = plan.positions[row, :count], extents[0][2] + np.arange(len(slots))
            self.rows.append(Row(found[row, :, :count].double().numpy(), q[row, :, :count], k, v, mine, where))
        self.core.commit(plan)

    def errors(self):
        """The largest ones over all rows of all steps."""
        exact = []
        for row in self.rows:
            q, k, v = (array.astype(np.longdouble) for array in (row.q.double().numpy(), row.k, row.v))
            exact.append(attend(q, k, v, row.mine, row.where, window=self.window))
        cached, own = (
            float(np.max([np.abs(one - true).max() for one, true in zip(found, exact, strict=True)]))
            for found in ([row.found for row in self.rows], [self.plain(row) for row in self.rows])
        )
        magnitude = max(float(np.abs(one).max()) for one in exact)
        return Errors(cached, own, ulp(str(self.dtype).removeprefix("torch."), magnitude))

    def plain(self, row):
        """The row's attention over its tokens brought together."""
        behind = torch.from_numpy(row.mine[:, None] - row.where)
        mask = (behind >= 0) & (behind < (self.window or 10**9))
        k, v = (torch.from_numpy(array).to(self.dtype) for array in (row.k, row.v))
        return kernels.attend_masked(row.q[None], k[None], v[None], mask, None, None)[0].double().numpy()


class Row(NamedTuple):
    """What a row's step gave, from what, and where its new tokens and those it reads stand."""

    found: np.ndarray
    q: torch.Tensor
    k: np.ndarray
    v: np.ndarray
    mine: np.ndarray
    where: np.ndarray


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_tree_of_rows_equals_the_reference(dtype, data):
    grow_a_tree(dtype, data.draw)


def grow_a_tree(dtype, draw):
    """Rows fork from each other at random, grow by ragged numbers of tokens, and are stepped together.

    Invariant 1, as the driver of the random decoders checks it: where the bound is passed, it must hold between the
    means of more draws, here of other numbers.
    """
    size = draw(st.integers(1, 5) | st.just(8))  # 8: what the kernel in C for several tokens takes
    shape = {
        "heads": draw(st.integers(1, 3)),
        "groups": draw(st.integers(1, 3)),
        "sizes": (size, draw(st.sampled_from([size, size + 1]))),
        "window": draw(st.none() | st.integers(1, 30)),
        "block_size": draw(st.integers(1, 4)),
    }
    steps, count = [((), [0], [draw(st.integers(1, 20))])], 1
    for _ in range(draw(st.integers(1, 4))):
        forks = [draw(st.integers(0, count + at - 1)) for at in range(draw(st.integers(0, 2)))]
        count += len(forks)
        chosen = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=6, unique=True))
        one_each = draw(st.booleans())
        steps.append((forks, chosen, [1 if one_each else draw(st.integers(1, 6)) for _ in chosen]))
    first = grown(dtype, shape, steps, 0)
    judged, draws = over_draws(first, lambda seed: grown(dtype, shape, steps, seed))
    assert judged.holds, f"{first}; over {draws} draws {judged}"


def grown(dtype, shape, steps, seed):
    """The errors of one draw of all numbers."""
    twin = Twin(dtype, **shape, seed=seed)
    seqs = [twin.core.open([1])]
    for forks, chosen, counts in steps:
        for one in forks:
            seqs.append(seqs[one].fork())
        twin.step([seqs[one] for one in chosen], counts)
    return twin.errors()


def test_shared_prefix_is_one_call_and_equal_tails_another():
    """Eight rows behind a common prefix: two calls a layer, not one per row."""
    core = BlockCache(400, block_size=4)
    parent = core.open([1])
    core.commit(core.plan([parent], [list(range(64))]))
    rows = [parent.fork() for _ in range(8)]
    for at, row in enumerate(rows):
        core.commit(core.plan([row], [[100 + at] * 8]))
    plan = core.plan(rows, [[7]] * 8)
    reads = reading.plan_reads(plan.groups[0].extents, torch.device("cpu"))
    assert [(read.count, read.shared, read.size) for read in reads if read.shared] == [(8, True, 64)]
    assert len(reads) <= 5
    core.rollback(plan)


def test_many_short_extents_are_copied_together():
    per_row = [[(40 * row + 3 * piece, 2, 2 * piece) for piece in range(3 + row % 2)] for row in range(6)]
    (read,) = reading.plan_reads(per_row, torch.device("cpu"))
    assert read.index is not None
    assert read.padding is not None
    assert read.padding.flatten(1).sum(1).tolist() == [2, 0, 2, 0, 2, 0]


def test_portable_kernel_gives_what_the_native_one_gives():
    q, k, v = torch.randn(2, 6, 300, 8), torch.randn(2, 3, 300, 8), torch.randn(2, 3, 300, 8)
    mask = torch.zeros(2, 1, 1, 300).masked_fill_(torch.rand(2, 1, 1, 300) < 0.3, float("-inf"))
    for causal, added in ((True, None), (False, None), (False, mask)):
        native = kernels.attend_with_lse(q, k, v, None, causal=causal, mask=added)
        wider = torch.nn.functional.pad(v, (0, 1))  # another head size of V: the native kernel refuses it
        portable = kernels.attend_with_lse(q, k, wider, None, causal=causal, mask=added)
        torch.testing.assert_close(portable[0][..., :8], native[0], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(portable[1], native[1], atol=2e-6, rtol=1e-5)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_decode_kernel_equals_float64(compiled, data):
    """Rows over extents of any size, shared and not, few queries and many; the new tokens are written and seen."""
    rows, heads = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    groups = data.draw(st.sampled_from([1, 2, 3, 4, 12, 17, 50]))
    width = data.draw(st.sampled_from([1, 7, 16, 64, 80, 128]))
    shared, own = data.draw(st.integers(0, 600)), data.draw(st.lists(st.integers(1, 300), min_size=rows, max_size=rows))
    torch.manual_seed(0)
    keys, values = torch.randn(2, heads, shared + sum(own) + 5, width)
    starts = [shared + sum(own[:row]) + row for row in range(rows)]
    per_row = [[(0, shared, 0)] * bool(shared) + [(at, size, shared)] for at, size in zip(starts, own, strict=True)]
    slots = [at + size - 1 for at, size in zip(starts, own, strict=True)]
    q, k, v = (torch.randn(rows, 1, count, width).transpose(1, 2) for count in (heads * groups, heads, heads))
    assert native.DecodeReads.serve(q, k, v, keys, values)
    found = native.DecodeReads(compiled, per_row, slots).attend(q, k, v, keys, values, None)
    assert torch.equal(keys[:, slots], k[:, :, 0].transpose(0, 1))
    assert torch.equal(values[:, slots], v[:, :, 0].transpose(0, 1))
    for row, extents in enumerate(per_row):
        seen = [slot for at, size, _ in extents for slot in range(at, at + size)]
        exact = torch.nn.functional.scaled_dot_product_attention(
            q[row].double(), keys[:, seen].double(), values[:, seen].double(), enable_gqa=True
        )
        torch.testing.assert_close(found[row].double(), exact, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_tree_with_the_kernels_in_c(compiled, dtype, data):
    grow_a_tree(dtype, data.draw)
