"""torch.compile: one graph, and no new one per token, length or step."""

from __future__ import annotations

import pytest
import torch

from kvcache_core.errors import KVCacheWarning
from kvcache_torch import KVCache, generate
from tests.adapters.torch.models import Small, close, ids, prompt

COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # reset() leaves what other test files compiled
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compiler", COMPILERS)
def test_decode_is_one_graph_for_every_token(compiler):
    model = Small()
    plain = generate(model, [prompt(0, 21)], max_new_tokens=30)
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    cache = KVCache(64, block_size=4)
    cache.attach(compiled, outputs="last")
    generate(compiled, [prompt(1, 9)], max_new_tokens=4, cache=cache)  # compiles: prefill, decode
    generate(compiled, [prompt(2, 11)], max_new_tokens=4, cache=cache)  # prefill for any length
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 2 <= graphs <= 4
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, length in ((3, 13), (4, 30), (5, 17)):
            generate(compiled, [prompt(seed, length)], max_new_tokens=20, cache=cache)
        assert generate(compiled, [prompt(0, 21)], max_new_tokens=30, cache=cache) == plain
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_batch_of_another_size_needs_no_graph_of_its_own():
    model = Small()
    prompts = [prompt(seed, 5 + 3 * seed) for seed in range(5)]
    plain = generate(model, prompts, max_new_tokens=8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    cache = KVCache(256, block_size=4)
    for rows in (2, 3):
        generate(compiled, [prompt(50 + row, 6 + row) for row in range(rows)], max_new_tokens=4, cache=cache)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert generate(compiled, prompts, max_new_tokens=8, cache=cache) == plain
        assert generate(compiled, prompts[:4], max_new_tokens=8, cache=cache) == plain[:4]


def test_a_compiled_model_inside_with_cache():
    model = Small()
    x = ids(0, 2, 20)
    with torch.inference_mode():
        plain = model(x)
    compiled = torch.compile(model, backend="eager", dynamic=True)
    cache = KVCache(64, block_size=4)
    cache.attach(compiled)
    for _ in range(2):
        with torch.inference_mode(), cache:
            close(compiled(x), plain)
    assert cache.stats().hit_tokens == 38
    cache.detach()
    with torch.inference_mode():
        close(compiled(x), plain)


def test_compiled_outside_the_cache_is_plain_attention():
    model = Small()
    x = ids(0, 2, 20)
    with torch.inference_mode():
        plain = model(x)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        close(compiled(x), plain)


@pytest.mark.slow
def test_cache_compile_changes_no_token():
    model = Small()
    prompts = [prompt(seed, 5 + 3 * seed) for seed in range(3)]
    plain = generate(model, prompts, max_new_tokens=12)
    cache = KVCache(128, block_size=4)
    cache.attach(model, outputs="last")
    cache.compile(pack_weights=True)
    assert generate(model, prompts, max_new_tokens=12, cache=cache) == plain
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= 2
    assert [generate(model, [one], max_new_tokens=12, cache=cache)[0] for one in prompts] == plain


def test_without_a_compiler_steps_run_as_before(monkeypatch):
    monkeypatch.setattr("kvcache_torch.cache.compiler_works", lambda: "no C++ compiler")
    model = Small()
    plain = generate(model, [prompt(0, 9)], max_new_tokens=5)
    cache = KVCache(64, block_size=4)
    cache.attach(model, outputs="last")
    with pytest.warns(KVCacheWarning, match="no C"):
        cache.compile()
    assert generate(model, [prompt(0, 9)], max_new_tokens=5, cache=cache) == plain
