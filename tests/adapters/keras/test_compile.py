"""Decode steps that XLA compiles, and loops of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache_core.errors import UsageError
from kvcache_core.frontend import FrontendCache
from kvcache_keras import KVCache
from tests.adapters.keras.models import VOCAB, KerasBackend, Small, as_new, ids
from tests.adapters.keras.test_greedy import PROMPTS, check
from tests.reference_decoder import DecoderConfig, Driver, Script, decoder_configs, make_weights


def test_random_rows_and_lengths() -> None:
    """Invariant 1, with a window, forks and a growing context."""
    config = DecoderConfig(windows=(None, 9), heads=4, kv_heads=2, head_size=8, v_head_size=4)
    rng = np.random.default_rng(0)

    def made(weights: dict[str, np.ndarray]) -> KerasBackend:
        backend = KerasBackend(config, weights, 60)
        backend.cache.compile()
        return backend

    actions = [("open", 0, 20, (1,), 0), ("step", ((0, 64, 0),)), ("open", 1, 7, (2,), 0), ("step", ((1, 64, 0),))]
    actions += [("fork", 0), ("truncate", 2, 3)]
    for _ in range(16):
        actions.append(("step", tuple((row, 1, int(rng.integers(99))) for row in range(int(rng.integers(1, 4))))))
    driver = Driver(config, made)
    driver.run(Script(60, tuple(actions)))
    assert driver.backend.cache.runner.traces == {"prefill": 1, "compiled": 1}


@settings(max_examples=2)
@given(decoder_configs(head_sizes=(4, 8), max_layers=2), PROMPTS, st.sets(st.integers(0, 10), max_size=1))
def test_a_loop_equals_steps_that_are_not_compiled(config, prompts, eos_ids) -> None:
    check(config, prompts, [5, 3], eos_ids, None, compiled=True)


# int8 is scaled as float8 is; how it rounds is tested in loops that are not compiled.
@pytest.mark.parametrize("stored", ["float16", pytest.param("int8", marks=pytest.mark.slow), "float8_e4m3"])
def test_a_loop_rounds_what_the_store_rounds(stored: str) -> None:
    config = DecoderConfig(windows=(None, 6), heads=4, kv_heads=2, head_size=8)
    check(config, [[1, 2, 3, 4, 5], [6, 7]], [5], set(), stored, compiled=True)


@pytest.fixture(scope="module")
def attached() -> KVCache:
    cache = KVCache(size=12, block_size=4)
    cache.attach(Small(), outputs="last")
    cache.compile()
    return cache


@pytest.fixture
def cache(attached: KVCache) -> KVCache:
    """As new, with the graphs that were compiled before."""
    for seq in list(attached.core._open.values()):
        seq.close()
    return as_new(attached)


def watched(cache: KVCache, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Filled with the name of each graph that runs and the shapes of its inputs."""
    runs, graph_of = [], cache.runner.function

    def function(name: str, levels: int = 0) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            runs.append((name, *(array.shape for array in inputs[1:])))
            return graph_of(name, levels)(*inputs)

        return run

    monkeypatch.setattr(cache.runner, "function", function)
    return runs


def test_what_padding_chooses_ends_no_loop(cache: KVCache) -> None:
    prompts = [[1, 2, 3], [4, 5], [6]]
    seqs = [cache.open(prompt) for prompt in prompts]
    whole = FrontendCache.decode_greedy(cache, [seq.fork() for seq in seqs], prompts, 6)
    ends = set(range(VOCAB)) - set(whole.flat)
    np.testing.assert_array_equal(cache.decode_greedy(seqs, prompts, 6, ends), whole)
    assert cache.runner.traces["compiled loop"] == 1


def test_a_shorter_loop_has_the_shapes_of_a_longer_one(cache: KVCache, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = watched(cache, monkeypatch)
    seq = cache.open([1, 2, 3])
    expected = FrontendCache.decode_greedy(cache, [seq.fork()], [[1, 2, 3]], 6)
    found = [cache.step_greedy([seq], [[1, 2, 3]])[:, None]]
    runs.clear()
    for count in (3, 1, 1):
        found.append(cache.decode_greedy([seq], found[-1][:, -1:].tolist(), count))
    np.testing.assert_array_equal(np.concatenate(found, axis=1), expected)
    assert len(set(runs)) == 1


def test_a_context_that_is_larger_than_the_pool_when_padded_runs_in_the_loop_that_is_not_compiled(
    cache: KVCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = ids(34).tolist()
    seq = cache.open(prompt)
    expected = FrontendCache.decode_greedy(cache, [seq], [prompt], 3)
    seq.truncate(len(prompt) - 1)
    runs = watched(cache, monkeypatch)
    np.testing.assert_array_equal(cache.decode_greedy([seq], [prompt[-1:]], 3), expected)
    assert [name for name, *_ in runs] == ["loop"]


def test_state_layers_are_refused() -> None:
    config = DecoderConfig(convs=((2, 1),))
    with pytest.raises(UsageError, match="state layers"):
        KerasBackend(config, make_weights(config), 20).cache.compile()


def test_compiling_ends_when_the_model_is_detached() -> None:
    config = DecoderConfig()
    cache = KerasBackend(config, make_weights(config), 20).cache
    cache.compile()
    model = cache.model
    cache.detach()
    cache.attach(model)
    seq = cache.open([1, 2, 3])
    cache.step([seq], [[1, 2, 3]])
    cache.step([seq], [[4]])
    assert cache.runner.traces == {"prefill": 1, "decode": 1}
