"""Generation over the numpy cache: the same tokens as plain decoding, whatever the schedule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache_core import CacheFull, InvalidInput, generation
from kvcache_core.beam import beam_search
from kvcache_core.generation import generate_tokens, stream_tokens
from kvcache_core.options import GenerateOptions
from kvcache_core.sampling import Sampling
from kvcache_core.speculation import Speculation
from tests.numpy_cache import decoders
from tests.reference_decoder import DecoderConfig, InjectedFault, decoder_configs

CONFIG = DecoderConfig(dtype="float64", windows=(None, 6), width=8)
CONFIGS = decoder_configs(dtypes=["float64"], max_layers=2, head_sizes=[4])


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 11, length).tolist()


@st.composite
def ragged_prompts(draw):
    """Prompts that share beginnings of one text, and may repeat themselves."""
    base = draw(st.lists(st.integers(0, 10), min_size=1, max_size=12)) * draw(st.integers(1, 4))
    tails = st.lists(st.integers(0, 10), min_size=0, max_size=6)
    cuts = draw(st.lists(st.tuples(st.integers(0, 48), tails), min_size=1, max_size=5))
    return [(base[:cut] + tail) or [1] for cut, tail in cuts]


@given(
    config=CONFIGS,
    prompts=ragged_prompts(),
    num_blocks=st.sampled_from([30, 80, 400]),
    chunk=st.sampled_from([None, 1, 3, 8, 64]),
    new=st.integers(1, 9),
    eos=st.sampled_from([None, 3, [0, 5]]),
    speculate=st.sampled_from([None, None, 4, Speculation(6, 2, 1)]),
    temperature=st.sampled_from([0.0, 0.0, 0.9]),
    n=st.sampled_from([1, 1, 2]),
    seed=st.integers(0, 9),
)
@settings(max_examples=60)
def test_equals_recompute(config, prompts, num_blocks, chunk, new, eos, speculate, temperature, n, seed):
    cached, plain = decoders(config, num_blocks)
    options = GenerateOptions(new, eos, Sampling(temperature, seed=seed), n)
    expected = generate_tokens(plain, prompts, options)
    fast = replace(options, prefill_chunk=chunk, speculate=speculate)
    try:
        found = [generate_tokens(cached, prompts, fast) for _ in range(2)]
    except CacheFull as full:
        assert "the whole cache has" in str(full), "room that was there must be found by waiting"
    else:
        assert found == [expected, expected]
    cached.cache.check_at_rest()


@given(config=CONFIGS, prompt=st.lists(st.integers(0, 10), min_size=1, max_size=30), chunk=st.integers(1, 9))
@settings(max_examples=15)
def test_stream_equals_generate(config, prompt, chunk):
    cached, plain = decoders(config, 200)
    options = GenerateOptions(8, 4, prefill_chunk=chunk, speculate=3)
    assert list(stream_tokens(cached, prompt, options)) == generate_tokens(plain, [prompt], GenerateOptions(8, 4))[0]
    cached.cache.check_at_rest()


def test_a_stream_that_is_dropped_closes_its_sequence():
    cached, _ = decoders(CONFIG, 100)
    tokens = stream_tokens(cached, text(0, 9), GenerateOptions(8))
    next(tokens)
    assert cached.cache.stats().open_sequences == 1
    tokens.close()
    cached.cache.check_at_rest()


# ---- the schedule ------------------------------------------------------------------------------------


def test_each_prompt_may_have_its_own_limit():
    cached, plain = decoders(CONFIG, 200)
    prompts, limits = [text(seed, 5 + seed) for seed in range(4)], [3, 1, 7, 2]
    found = generate_tokens(cached, prompts, GenerateOptions(limits))
    assert [len(row) for row in found] == limits
    assert found == generate_tokens(plain, prompts, GenerateOptions(limits))
    assert beam_search(cached, prompts, GenerateOptions(limits, num_beams=2))
    with pytest.raises(InvalidInput, match="one per prompt"):
        generate_tokens(cached, prompts, GenerateOptions([1, 2]))


def test_a_shared_prefix_is_one_wave_and_the_rest_one_step():
    cached, _ = decoders(CONFIG, 400)
    shared = text(0, 64)
    prompts = [[*shared, *text(seed, 8)] for seed in range(1, 9)]
    generate_tokens(cached, prompts, GenerateOptions(1, prefill_chunk=64))
    assert cached.cache.steps == [(1, 64), (8, 8)]


def test_rows_of_about_equal_length_share_a_step():
    cached, _ = decoders(CONFIG, 400)
    prompts = [text(seed, length) for seed, length in enumerate((80, 3, 78, 5, 4))]
    generate_tokens(cached, prompts, GenerateOptions(1))
    assert cached.cache.steps == [(2, 80), (3, 5)]


def test_a_chunk_bounds_every_step():
    cached, _ = decoders(CONFIG, 400)
    prompts = [text(seed, length) for seed, length in enumerate((50, 3, 33, 5, 9))]
    generate_tokens(cached, prompts, GenerateOptions(1, prefill_chunk=16))
    assert max(rows * count for rows, count in cached.cache.steps) <= 16


def test_waiting_prompts_join_while_others_run():
    """Room for about two rows: a short row leaves, the next prompt joins beside the long one that runs on."""
    cached, plain = decoders(replace(CONFIG, windows=(None,)), 11)
    prompts, limits = [[seed, *text(seed, 7)] for seed in range(4)], [16, 2, 2, 2]
    found = generate_tokens(cached, prompts, GenerateOptions(limits))
    assert found == generate_tokens(plain, prompts, GenerateOptions(limits))
    joined = [at for at, (rows, count) in enumerate(cached.cache.steps) if count == 8 and at]
    assert joined and joined[-1] < 15, "the last prompt is computed long before the first row has its 16 tokens"
    assert sum(rows == 2 for rows, count in cached.cache.steps if count == 1) >= 2


def test_continuations_that_are_not_forked_yet_need_room_too():
    cached, plain = decoders(replace(CONFIG, windows=(None,), block_size=2), 24)
    prompts, options = [[7, 2], [7], [7], [7, 7]], GenerateOptions(9, sampling=Sampling(0.9, seed=0), n=2)
    assert generate_tokens(cached, prompts, options) == generate_tokens(plain, prompts, options)
    cached.cache.check_at_rest()


@given(
    window=st.integers(8, 17),
    length=st.integers(4, 16),
    rows=st.integers(1, 2),
    n=st.integers(1, 2),
    spare=st.integers(0, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=30)
def test_drafts_need_no_room_of_their_own(window, length, rows, n, spare, seed):
    """What admission counts is enough for plain decoding; a draft that does not fit a window's room is not tried."""
    config = DecoderConfig(dtype="float64", windows=(window,), width=8, block_size=1, seed=seed)
    options = GenerateOptions(9, sampling=Sampling(0.9, seed=0), n=n, speculate=Speculation(6, 2, 1))
    least = min(length + 9, max(length, window) + 2) + (n - 1) * 10
    cached, plain = decoders(config, least + spare)
    prompts = [[0] * length] * rows
    assert generate_tokens(cached, prompts, options) == generate_tokens(plain, prompts, options)
    cached.cache.check_at_rest()


def test_a_long_prompt_does_not_starve_the_rows_that_run():
    cached, _ = decoders(replace(CONFIG, windows=(None,)), 30)
    prompts, limits = [[0, *text(0, 7)], [1, *text(1, 39)], [2, *text(2, 63)]], [20, 2, 1]
    generate_tokens(cached, prompts, GenerateOptions(limits, prefill_chunk=8))
    first = [(1, 8)] * 6
    waits_for_room = [(2, 1)]
    joins = [(1, 8), (1, 1)] * 8
    assert cached.cache.steps[: 6 + 1 + 16] == first + waits_for_room + joins


def test_an_error_in_any_step_closes_everything():
    prompts = [text(0, 40), [*text(0, 36), 1], text(2, 5)]
    for number in range(12):
        cached, _ = decoders(CONFIG, 200)
        cached.cache.fail_at = number
        with pytest.raises(InjectedFault):
            generate_tokens(cached, prompts, GenerateOptions(20, eos_id=99, prefill_chunk=16, n=2))
        cached.cache.check_at_rest()


# ---- options -----------------------------------------------------------------------------------------


def test_an_error_between_steps_closes_everything(monkeypatch):
    """Two prompts are complete at once; whichever of their first tokens cannot be chosen, neither stays open."""
    for failing in range(4):
        cached, _ = decoders(CONFIG, 300)
        calls = []

        def fail(*args, failing=failing, calls=calls):
            calls.append(args)
            if len(calls) > failing:
                raise InjectedFault(0)
            return 1

        monkeypatch.setattr(generation, "pick", fail)
        with pytest.raises(InjectedFault):
            generate_tokens(cached, [text(1, 9), text(2, 9)], GenerateOptions(4, None, Sampling(1.0), 2))
        assert len(calls) == failing + 1
        cached.cache.check_at_rest()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": [3, 0]}, "each of max_new_tokens"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
        ({"prefill_chunk": 2.5}, "prefill_chunk"),
        ({"speculate": 0}, "Speculation.tokens"),
        ({"speculate": 4, "num_beams": 2}, "cannot speculate"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InvalidInput, match=message):
        GenerateOptions(**{"max_new_tokens": 4, **options})


# ---- a step in chunks --------------------------------------------------------------------------------


@given(config=CONFIGS, lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3), chunk=st.integers(1, 40))
@settings(max_examples=30)
def test_a_step_in_chunks_equals_a_step(config, lengths, chunk):
    whole, parts = (decoders(config, 300)[0].cache for _ in range(2))
    tokens = [text(seed, length) for seed, length in enumerate(lengths)]
    logits = [
        cache.step([cache.open(row) for row in tokens], tokens, **options)
        for cache, options in ((whole, {}), (parts, {"prefill_chunk": chunk}))
    ]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-10)
    assert max(count for _, count in parts.steps) <= max(1, chunk // len(tokens))


def test_an_error_in_a_later_chunk_takes_the_earlier_ones_back():
    cache = decoders(CONFIG, 60)[0].cache
    seqs = [cache.open(text(0, 30)), cache.open(text(1, 13))]
    cache.step(seqs, [text(0, 9), text(1, 5)])
    before = [seq.tokens for seq in seqs], cache.stats().live_blocks
    rest = [text(0, 30)[9:], text(1, 13)[5:]]
    for number in range(1, 6):
        cache.fail_at = number + len(cache.steps) - 1
        with pytest.raises(InjectedFault):
            cache.step(seqs, rest, prefill_chunk=8)
        assert ([seq.tokens for seq in seqs], cache.stats().live_blocks) == before
        cache.core.check_valid()
    cache.fail_at = None
    cache.step(seqs, rest, prefill_chunk=8)
    assert [seq.tokens for seq in seqs] == [text(0, 30), text(1, 13)]


def test_too_little_room_for_a_later_chunk_changes_nothing():
    cache = decoders(CONFIG, 6)[0].cache
    seq = cache.open(text(0, 40))
    with pytest.raises(CacheFull):
        cache.step([seq], [text(0, 40)], prefill_chunk=8)
    assert (seq.length, cache.stats().live_blocks) == (0, 0)
    cache.core.check_valid()
