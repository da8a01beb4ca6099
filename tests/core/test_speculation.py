"""Drafts by prompt lookup: where they come from, when they are worth a step, what they save."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache_core.generation import generate_tokens
from kvcache_core.options import GenerateOptions
from kvcache_core.speculation import Drafter, Speculation, worth_verifying
from tests.numpy_cache import decoders
from tests.reference_decoder import DecoderConfig, InjectedFault, decoder_configs


def looked_up(tokens, speculation, limit):
    """The definition: what followed the last earlier occurrence of the longest run of last tokens."""
    for size in range(speculation.ngram, speculation.min_ngram - 1, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if size <= len(tokens) and tokens[start : start + size] == tokens[len(tokens) - size :]:
                return ([*tokens[start + size :]] * limit)[:limit]
    return []


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    pieces=st.lists(st.integers(1, 5), max_size=4),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)).map(sorted),
    limit=st.integers(1, 4),
)
def test_a_draft_is_what_followed_last_time(tokens, pieces, sizes, limit):
    speculation = Speculation(4, sizes[1], sizes[0])
    drafter = Drafter(tokens[:1], speculation)
    rest = tokens[1:]
    for piece in [*pieces, len(rest)]:
        drafter.extend(rest[:piece])
        rest = rest[piece:]
    assert drafter.draft(limit) == looked_up(tokens, speculation, limit)


def test_drafts_grow_with_success_and_end_with_failure():
    drafter = Drafter([1, 2] * 40, Speculation(16))
    assert len(drafter.draft(99)) <= 4
    for _ in range(3):
        drafter.learn(4, 4)
    assert drafter.draft(5) == [1, 2, 1, 2, 1]
    drafter = Drafter([*range(30), *range(30), 0, 1, 2], Speculation(16))
    for _ in range(3):
        drafter.learn(4, 4)
    assert len(drafter.draft(99)) == 16
    while drafter.hopeful:
        drafter.learn(4, 0)
    assert drafter.draft(99) == []


def test_what_is_worth_a_step():
    assert not worth_verifying([[], []], [1.0, 1.0])
    assert worth_verifying([[1, 2, 3, 4]], [0.5])
    assert not worth_verifying([[1, 2, 3, 4, 5, 6, 7, 8]], [0.01])
    few, many = [[1] * 8] + [[]] * 7, [[1] * 8] * 8
    assert not worth_verifying(few, [1.0] * 8), "one draft would pad seven rows"
    assert worth_verifying(many, [0.9] * 8)


CONFIG = DecoderConfig(dtype="float64", windows=(None, 5), width=8)


@given(
    config=decoder_configs(dtypes=["float64"], max_layers=2, head_sizes=[4]),
    prompts=st.lists(
        st.tuples(st.lists(st.integers(0, 10), min_size=1, max_size=5), st.integers(1, 5)).map(lambda p: p[0] * p[1]),
        min_size=1,
        max_size=3,
    ),
    speculation=st.tuples(st.integers(1, 8), st.integers(1, 3)).map(lambda p: Speculation(p[0], p[1], 1)),
    new=st.integers(2, 20),
    eos=st.sampled_from([None, 2]),
)
@settings(max_examples=40)
def test_the_same_tokens_as_plain_greedy(config, prompts, speculation, new, eos):
    cached, plain = decoders(config, 300)
    expected = generate_tokens(plain, prompts, GenerateOptions(new, eos))
    assert generate_tokens(cached, prompts, GenerateOptions(new, eos, speculate=speculation)) == expected
    cached.cache.check_at_rest()


def losing(cached, monkeypatch, *, fail):
    """Behind every draft others have evicted what the window dropped. Returns the prompts of the sequences opened."""
    run, start, opened = cached.step_greedy_all, cached.open, []

    def step(seqs, tokens):
        found = run(seqs, tokens)
        cached.cache.core.clear()
        return found

    def start_anew(tokens, new):
        opened.append(tokens)
        if fail and len(opened) > 1:
            raise InjectedFault(0)
        return start(tokens, new)

    monkeypatch.setattr(cached, "step_greedy_all", step)
    monkeypatch.setattr(cached, "open", start_anew)
    return opened


@pytest.mark.parametrize("fail", [False, True])
def test_rejected_tokens_behind_a_window_that_cannot_be_regained(monkeypatch, fail):
    """The row is opened anew; if that fails too, nothing stays open."""
    config = DecoderConfig(dtype="float64", windows=(3,), width=8, block_size=1)
    again = 0
    for seed in range(20):
        cached, plain = decoders(config, 40)
        prompt = np.random.default_rng(seed).integers(0, 3, 9).tolist()
        options = GenerateOptions(12, speculate=Speculation(6, 1, 1))
        opened = losing(cached, monkeypatch, fail=fail)
        expected = generate_tokens(plain, [prompt], GenerateOptions(12))
        try:
            assert generate_tokens(cached, [prompt], options) == expected
        except InjectedFault:
            assert fail
        again += len(opened) > 1
        cached.cache.check_at_rest()
    assert again > 5


def test_fewer_steps_for_text_that_repeats_itself():
    """A model that has fallen into a loop repeats its own text: random decoders do so within some tokens."""
    counts = []
    for speculate in (None, 8):
        cached, _ = decoders(DecoderConfig(dtype="float64", width=8, seed=1), 300)
        generate_tokens(cached, [[1, 2, 3]], GenerateOptions(80, speculate=speculate))
        counts.append(len(cached.cache.steps))
    assert counts[0] == 80
    assert counts[1] < 30
