"""Attention by block table: FlexAttention on the CPU; the others by stand-ins that do what their documentation says."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvcache_core import BlockCache, BlockLayout, LayerSpec
from kvcache_torch import KVCache, TensorStore, generate, paged
from kvcache_torch.step import Step
from tests.adapters.torch.models import Small, prompt

HEADS, GROUPS, WIDTH = 2, 3, 64


class Case:
    """Rows that share a prefix, one of which has dropped blocks behind its window, in the middle of a ragged step."""

    def __init__(self, counts, window=None, block_size=16, dtype=torch.float32):
        spec = LayerSpec.attention(HEADS, WIDTH, window=window)
        layout = BlockLayout([spec], block_size, str(dtype).removeprefix("torch."))
        core = BlockCache(60, block_size=block_size, layout=layout)
        self.store = TensorStore(layout, 60)
        self.dtype, self.window = dtype, window
        torch.manual_seed(0)
        parent = core.open([1])
        core.commit(core.plan([parent], [list(range(37))]))
        rows = [parent, *(parent.fork() for _ in counts[1:])]
        for at, row in enumerate(rows):
            core.commit(core.plan([row], [[100 + at] * (5 + 20 * at)]))
        for name in "kv":
            array = self.store.array(0, name)
            array.copy_(torch.randn(array.shape))
        self.plan = core.plan(rows, [[7] * count for count in counts])
        rows, width = self.plan.tokens.shape
        self.q = torch.randn(rows, HEADS * GROUPS, width, WIDTH, dtype=dtype)
        self.k, self.v = (torch.randn(rows, HEADS, width, WIDTH, dtype=dtype) for _ in range(2))

    def check(self, kind, *, softcap=None, scale=None, tolerance=1e-5):
        """The kind's result is what extents give, which also writes the new K and V."""
        expected = Step(self.plan, self.store, self.dtype).attend(
            self.q, self.k, self.v, 0, self.window, scale, softcap
        )
        reads = kind(self.plan, 0, torch.device("cpu"))
        assert reads.serves(self.q, *self.store.pair(0))
        found = reads.attend(self.q, *self.store.pair(0), scale, softcap)
        assert found.shape == expected.shape
        for row, count in enumerate(self.plan.counts):
            torch.testing.assert_close(found[row, :, :count], expected[row, :, :count], atol=tolerance, rtol=tolerance)


CASES = [
    pytest.param({"counts": (1, 1, 1)}, {}, id="decode"),
    pytest.param({"counts": (5, 1, 3)}, {}, id="ragged"),
    pytest.param({"counts": (4, 4), "window": 20}, {}, id="window"),
    pytest.param({"counts": (2, 3), "window": 9}, {"softcap": 5.0, "scale": 0.3}, id="capped"),
]


@pytest.fixture
def plain_flex(monkeypatch):
    """FlexAttention as plain tensor operations, as PyTorch runs it uncompiled."""
    torch._dynamo.reset()
    monkeypatch.setattr(paged, "_flex", lambda: paged.flex_over_blocks)
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("case", "options"), CASES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention(plain_flex, case, options):
    Case(**case).check(paged.FlexReads, **options)


def attend_pages(q, keys, values, tables, ends, *, scale, window, softcap):
    """Row by row in float64: q [T, Hq, D], pages [blocks, tokens, H, D]; the last query is the row's last token."""
    results = []
    for row, table, end in zip(q, tables, ends, strict=True):
        k, v = (pages[table].flatten(0, 1)[:end].double().repeat_interleave(GROUPS, 1) for pages in (keys, values))
        scores = torch.einsum("thd,shd->hts", row.double(), k) * (WIDTH**-0.5 if scale is None else scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        mine, where = torch.arange(end - len(row), end)[:, None], torch.arange(end)
        seen = (where <= mine) & (where >= mine - (end if window < 0 else window))
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        results.append(torch.einsum("hts,shd->thd", weights, v).to(row.dtype))
    return results


class FakeFlashInfer:
    """`BatchPrefillWithPagedKVCacheWrapper` as documented, for the arguments that we pass."""

    def __init__(self, workspace, layout):
        assert layout == "HND"

    def plan(self, starts, indptr, indices, last, heads, kv_heads, width, size, **options):
        assert (heads, kv_heads, width) == (HEADS * GROUPS, HEADS, WIDTH)
        assert options["causal"]
        assert all(one.dtype == torch.int32 for one in (starts, indptr, indices, last))
        self.starts, self.options = starts.tolist(), options
        bounds = indptr.tolist()
        self.tables = [indices[a:b].long() for a, b in pairwise(bounds)]
        self.ends = [(len(table) - 1) * size + int(n) for table, n in zip(self.tables, last, strict=True)]

    def run(self, q, pages):
        rows = [q[a:b] for a, b in pairwise(self.starts)]
        keys, values = (one.transpose(1, 2) for one in pages)
        window, softcap = self.options["window_left"], self.options["logits_soft_cap"]
        options = {"scale": self.options["sm_scale"], "window": window, "softcap": softcap}
        return torch.cat(attend_pages(rows, keys, values, self.tables, self.ends, **options))


def fake_flash_attention(q, keys, values, *, cache_seqlens, block_table, softmax_scale, causal, window_size, softcap):
    """`flash_attn_with_kvcache` as documented, for the arguments that we pass."""
    assert causal
    assert cache_seqlens.dtype == block_table.dtype == torch.int32
    assert window_size[1] in (-1, 0)
    options = {"scale": softmax_scale, "window": window_size[0], "softcap": softcap}
    return torch.stack(attend_pages(q, keys, values, block_table.long(), cache_seqlens.tolist(), **options))


@pytest.fixture
def packages(monkeypatch):
    found = {
        "flashinfer": SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=FakeFlashInfer),
        "flash_attn": SimpleNamespace(flash_attn_with_kvcache=fake_flash_attention),
    }
    monkeypatch.setattr(paged, "_module", found.get)
    monkeypatch.setattr(paged, "_flashinfer", paged._FlashInfer())


@pytest.mark.parametrize(("case", "options"), CASES)
def test_what_flashinfer_is_asked_for(packages, case, options):
    Case(**case, dtype=torch.bfloat16).check(paged.FlashInferReads, **options, tolerance=2e-2)


@pytest.mark.parametrize("counts", [(1, 1), (3, 3)])
@pytest.mark.parametrize(("window", "options"), [(None, {}), (20, {"softcap": 5.0, "scale": 0.3})])
def test_what_flash_attention_is_asked_for(packages, counts, window, options):
    case = Case(counts, window=window, block_size=256, dtype=torch.bfloat16)
    case.check(paged.FlashAttentionReads, **options, tolerance=2e-2)


def test_what_flash_attention_does_not_take(packages):
    for case in (Case((1, 2), block_size=256, dtype=torch.bfloat16), Case((1, 1), dtype=torch.bfloat16)):
        reads = paged.FlashAttentionReads(case.plan, 0, torch.device("cpu"))
        assert not reads.serves(case.q, *case.store.pair(0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(monkeypatch):
    monkeypatch.setattr(paged, "_in_use", [True])
    model = Small().cuda()
    prompts = [prompt(seed, 20 + 7 * seed) for seed in range(3)]
    plain = generate(model, prompts, max_new_tokens=12)
    assert generate(model, prompts, max_new_tokens=12, cache=KVCache(128, block_size=16)) == plain


def test_seen_blocks_are_those_of_the_window():
    group = Case((4, 4), window=20).plan.groups[0]
    seen = paged._seen_blocks(group)
    for row, (start, end) in enumerate(zip(group.starts, group.ends, strict=True)):
        wanted = {at // 16 for at in range(max(0, start - 19), end)}
        assert set(np.flatnonzero(seen[row])) == wanted
