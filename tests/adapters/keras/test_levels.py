"""Rows that share blocks read them once, and get what each row would get alone."""

from __future__ import annotations

from collections import Counter
from itertools import combinations_with_replacement

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache_core.frontend import FrontendCache
from kvcache_keras import KVCache, generate, packing
from kvcache_keras.levels import LEVELS, cut, pack_levels
from tests.adapters.keras.models import VOCAB, KerasBackend, Small
from tests.reference_decoder import DecoderConfig, Driver, Script, decoder_configs, make_weights

HEADS = (4, 8, 16, 64)
VOCAB_OF_REFERENCE = DecoderConfig().vocab


@st.composite
def tables(draw: st.DrawFn) -> np.ndarray:
    """Block tables of rows that branched off one after the other, some shorter than others."""
    fresh = iter(range(1, 1000))
    width = draw(st.integers(1, 8))
    rows = [[next(fresh) for _ in range(width)]]
    for _ in range(draw(st.integers(0, 6))):
        parent, branch = draw(st.sampled_from(rows)), draw(st.integers(0, width))
        rows.append(parent[:branch] + [next(fresh) for _ in range(width - branch)])
    table = np.array(rows)
    for row, length in enumerate(draw(st.lists(st.integers(1, width), min_size=len(rows), max_size=len(rows)))):
        table[row, length:] = 0
    return table


@given(tables())
def test_levels_give_back_the_table(table: np.ndarray) -> None:
    cuts, _ = cut(table)
    packed, columns = pack_levels(table, cuts), []
    assert len(packed) == 3 * len(cuts)
    for at in range(0, len(packed), 3):
        blocks, members, places = packed[at : at + 3]
        whose = np.repeat(np.arange(len(members)), members.shape[1])[places]
        np.testing.assert_array_equal(members.reshape(-1)[places], np.arange(len(table)))
        columns.append(blocks[whose])
    np.testing.assert_array_equal(np.concatenate([*columns, table[:, cuts[-1] if cuts else 0 :]], axis=1), table)


@given(tables())
def test_no_other_cuts_read_fewer_blocks(table: np.ndarray) -> None:
    rows, width = table.shape
    whole = np.where(table, table, -1 - np.arange(rows)[:, None])  # no row ends before another

    def read(cuts: tuple[int, ...]) -> int:
        count = rows * (width - max(cuts, default=0))
        for begin, end in zip((0, *cuts), cuts, strict=False):
            count += len(np.unique(whole[:, begin:end], axis=0)) * (end - begin) if end > begin else 0
        return count

    cuts, spared = cut(whole)
    assert (
        read(cuts) == rows * width - spared == min(map(read, combinations_with_replacement(range(width + 1), LEVELS)))
    )


@st.composite
def family_scripts(draw: st.DrawFn) -> Script:
    """One text, samples of it, samples of these, and other prompts: decoded together again and again."""
    which, small = st.integers(0, 5), st.integers(0, 5)
    rows = st.lists(st.tuples(which, st.just(1), st.integers(0, 9)), min_size=4, max_size=8).map(tuple)
    decoded = st.tuples(st.just("step"), rows)
    opened = st.tuples(st.just("open"), st.just(0), st.integers(1, 40), st.tuples(small), st.just(0))
    rare = st.one_of(opened, st.tuples(st.just("truncate"), which, small), st.tuples(st.just("close"), which))
    action = st.one_of(decoded, st.tuples(st.just("fork"), which), decoded, decoded, rare)
    start = (("open", 0, draw(st.integers(8, 40)), (1,), 0), ("step", ((0, 64, 0),)), ("fork", 0), ("fork", 0))
    return Script(draw(st.integers(30, 120)), (*start, *draw(st.lists(action, min_size=6, max_size=24))))


def test_random_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 1, with everything that is shared read once."""
    monkeypatch.setattr(packing, "WORTH", 1)
    shared = Counter[str]()

    @settings(max_examples=4)
    @given(decoder_configs(head_sizes=HEADS, max_layers=2), family_scripts())
    def check(config: DecoderConfig, script: Script) -> None:
        driver = Driver(config, lambda weights: KerasBackend(config, weights, script.num_blocks))
        driver.run(script)
        driver.report()
        traces = driver.backend.cache.runner.traces
        shared.update(traces.keys())
        assert set(traces.values()) == {1}

    check()
    assert any(name.startswith("decode, ") for name in shared)


@pytest.mark.parametrize("convs", [((2, 1),), ()], ids=["convolution", "window"])
def test_one_trace_for_every_tree(monkeypatch: pytest.MonkeyPatch, convs: tuple[tuple[int, int], ...]) -> None:
    """A system prompt, conversations over it, samples of these: rows join, branch off and leave."""
    monkeypatch.setattr(packing, "WORTH", 8)
    config = DecoderConfig(windows=(None, 12)[: 1 if convs else 2], heads=4, kv_heads=2, convs=convs)
    backend = KerasBackend(config, make_weights(config), 300)
    system = list(range(9)) * 3
    rows, texts, answers = [], [], []
    for talk in range(3):
        texts.append([*system, *[talk] * (3 + 5 * talk)])
        rows.append(backend.core.open(texts[-1]))
        backend.step(rows[-1:], [texts[-1][rows[-1].num_cached :]])
    for number in (0, 0, 1, 3):
        rows.append(rows[number].fork())
        texts.append(list(texts[number]))
    for step in range(12):
        chosen = [row for row in range(len(rows)) if (row * 7 + step) % 5]
        new = [[(row + step) % 11] for row in chosen]
        logits = backend.step([rows[row] for row in chosen], new)
        for row, tokens, found in zip(chosen, new, logits, strict=True):
            answers.append((row, len(texts[row]), found))
            texts[row] += tokens
    whole = [backend.uncached(text) for text in texts]
    for row, at, found in answers:
        np.testing.assert_allclose(found, whole[row][at], atol=2e-5, rtol=2e-5)
    assert backend.cache.runner.traces == {"prefill": 1, "decode, 2 shared": 1}
    backend.core.check_valid()


def family(cache: KVCache, prompt: list[int], branches: list[tuple[int, list[int]]]) -> tuple[list, list[list[int]]]:
    """A prompt's sequence and ones that branch off, each from one before it; and a last token for each."""
    seqs = [cache.open(prompt)]
    cache.step(seqs, [prompt[seqs[0].num_cached :]])
    for parent, tokens in branches:
        seqs.append(seqs[parent % len(seqs)].fork())
        if tokens:
            cache.step(seqs[-1:], [tokens])
    return seqs, [[number % VOCAB_OF_REFERENCE] for number in range(len(seqs))]


def test_several_greedy_steps_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop chooses what single steps choose, and leaves the same state behind."""
    monkeypatch.setattr(packing, "WORTH", 1)
    shared = Counter[str]()
    token = st.integers(0, VOCAB_OF_REFERENCE - 1)

    @settings(max_examples=3)
    @given(
        decoder_configs(head_sizes=(4, 8, 16), max_layers=2),
        st.lists(token, min_size=8, max_size=30),
        st.lists(st.tuples(st.integers(0, 3), st.lists(token, max_size=9)), min_size=1, max_size=4),
        st.integers(2, 9),
        st.sampled_from([None, None, "float16"]),
    )
    def check(config: DecoderConfig, prompt: list[int], branches: list, count: int, stored: str | None) -> None:
        backend = KerasBackend(config, make_weights(config), 300, stored=stored)
        cache = backend.cache
        one_by_one, in_a_graph = (family(cache, prompt, branches) for _ in range(2))
        expected = FrontendCache.decode_greedy(cache, *one_by_one, count)
        np.testing.assert_array_equal(cache.decode_greedy(*in_a_graph, count), expected)
        cache.core.check_valid()
        last = expected[:, -1:].tolist()
        tolerance = 1e-9 if config.dtype == "float64" and stored is None else 2e-5 if stored is None else 2e-2
        found, right = cache.step(in_a_graph[0], last), cache.step(one_by_one[0], last)
        np.testing.assert_allclose(found, right, rtol=tolerance, atol=tolerance)
        shared.update(cache.runner.traces.keys())
        assert set(cache.runner.traces.values()) == {1}

    check()
    assert any(name.startswith("loop, ") for name in shared)


def test_a_copy_of_what_is_shared_fits_where_a_copy_of_the_rows_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WORTH", 1)
    config = DecoderConfig()
    cache = KerasBackend(config, make_weights(config), 12).cache
    seqs, last = family(cache, [1, 2, 3] * 8, [(0, []), (0, [])])
    chosen = cache.decode_greedy(seqs, last, 4)
    assert chosen.shape == (3, 4)
    assert cache.runner.traces == {"prefill": 1, "loop, 1 shared": 1}
    cache.core.check_valid()


def test_beams_read_their_common_past_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams fork, drop out and fork again; they end where beams that compute everything anew end."""
    monkeypatch.setattr(packing, "WORTH", 1)
    keras.utils.set_random_seed(5)
    model = Small(window=None)
    cache = KVCache(400, block_size=4)
    cache.attach(model, outputs="last")

    @settings(max_examples=5)
    @given(
        st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=4, max_size=40), min_size=1, max_size=2),
        st.integers(2, 5),
        st.integers(4, 8),
        st.sampled_from([None, 3]),
    )
    def check(prompts: list[list[int]], beams: int, new: int, eos: int | None) -> None:
        options = {"max_new_tokens": new, "num_beams": beams, "n": beams, "eos_id": eos}
        assert generate(model, prompts, cache=cache, **options) == generate(model, prompts, **options)
        cache.core.check_valid()

    check()
    traces = cache.runner.traces
    assert set(traces.values()) == {1}
    assert any(name.startswith("decode, ") for name in traces), traces
