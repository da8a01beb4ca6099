"""``generate`` and ``stream``: the same tokens as without a cache, and as the definitions say."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from kvcache_core import CacheFull, InvalidInput
from kvcache_core.options import GenerateOptions
from kvcache_core.sampling import Sampling, pick
from kvcache_torch import KVCache, generate, stream
from tests.adapters.torch.models import Small, prompt

PROMPTS = [prompt(seed, length) for seed, length in ((0, 17), (1, 1), (2, 40), (3, 5))]


@pytest.fixture
def model():
    return Small()


@pytest.fixture
def cache(model):
    cache = KVCache(128, block_size=4)
    cache.attach(model, outputs="last")
    return cache


def at_rest(cache):
    cache.core.check_valid()
    stats = cache.stats()
    assert (stats.live_blocks, stats.open_sequences) == (0, 0)


def naive_logits(model, tokens):
    with torch.inference_mode():
        return model(torch.tensor([tokens]))[0, -1].double().numpy()


def naive_greedy(model, tokens, count, eos=()):
    new = []
    while len(new) < count and not (new and new[-1] in eos):
        new.append(int(naive_logits(model, tokens + new).argmax()))
    return new


# ---- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_greedy_equals_recompute(model, block_size):
    cache = KVCache(400, block_size=block_size)
    expected = [naive_greedy(model, tokens, 12) for tokens in PROMPTS]
    for _ in range(2):
        assert generate(model, PROMPTS, max_new_tokens=12, cache=cache) == expected
    assert generate(model, PROMPTS, max_new_tokens=12) == expected
    at_rest(cache)


def test_inside_with_cache_that_cache_is_used(model, cache):
    with cache:
        found = generate(model, PROMPTS, max_new_tokens=5)
    assert found == generate(model, PROMPTS, max_new_tokens=5)
    assert cache.stats().miss_tokens == sum(map(len, PROMPTS))


def test_results_come_in_the_order_of_the_prompts(model, cache):
    """Shared prefixes are computed in waves; the caller does not notice."""
    base = prompt(9, 40)
    prompts = [[*base, 1], [2], [*base, 1, 5], base, [*base, 3], [2, 4]]
    expected = [naive_greedy(model, tokens, 6) for tokens in prompts]
    assert generate(model, prompts, max_new_tokens=6, cache=cache) == expected
    assert generate(model, prompts[::-1], max_new_tokens=6, cache=cache) == expected[::-1]


def test_no_prompts(model, cache):
    assert generate(model, [], max_new_tokens=4, cache=cache) == []


def test_numpy_prompts(model, cache):
    arrays = [np.array(tokens) for tokens in PROMPTS]
    assert generate(model, arrays, max_new_tokens=4, cache=cache) == generate(model, PROMPTS, max_new_tokens=4)


def test_eos_ends_a_row_and_is_kept(model, cache):
    free = naive_greedy(model, PROMPTS[0], 12)
    eos = free[4]
    first = free.index(eos)
    for given in (eos, [eos, 999], np.int64(eos)):
        found = generate(model, PROMPTS, max_new_tokens=12, cache=cache, eos_id=given)
        assert found[0] == free[: first + 1]
        assert found == [naive_greedy(model, tokens, 12, (eos,)) for tokens in PROMPTS]
    at_rest(cache)


def test_a_shared_prefix_is_computed_once(model, cache):
    base = prompt(9, 48)
    prompts = [[*base, token] for token in range(5)]
    model.computed = 0
    generate(model, prompts, max_new_tokens=1, cache=cache)
    assert model.computed <= 49 + 4 + 4, "one whole prompt, and one token (or two) for each other"
    model.computed = 0
    generate(model, prompts, max_new_tokens=1, cache=cache)
    assert model.computed == 5


def test_a_prompt_is_computed_once_for_all_continuations(model, cache):
    assert cache.core is not None  # looks at the model with one token
    model.computed = 0
    generate(model, [PROMPTS[2]], max_new_tokens=3, cache=cache, n=6, temperature=1.0, seed=0)
    assert model.computed == 40 + 6 * 2


def test_waiting_prompts_join_when_there_is_room(model):
    prompts = [prompt(seed, 12 + seed) for seed in range(8)]
    expected = [naive_greedy(model, tokens, 6) for tokens in prompts]
    cache = KVCache(14, block_size=4)
    assert generate(model, prompts, max_new_tokens=6, cache=cache) == expected
    assert cache.stats().evicted_blocks > 0
    at_rest(cache)


# ---- sampling --------------------------------------------------------------------------------------------------------


SAMPLING = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}


def test_sampling_is_repeatable_and_equals_recompute(model, cache):
    one = generate(model, PROMPTS, max_new_tokens=10, cache=cache, seed=3, **SAMPLING)
    assert one == generate(model, PROMPTS, max_new_tokens=10, cache=cache, seed=3, **SAMPLING)
    assert one == generate(model, PROMPTS, max_new_tokens=10, seed=3, **SAMPLING)
    assert one != generate(model, PROMPTS, max_new_tokens=10, cache=cache, seed=4, **SAMPLING)


def test_a_row_does_not_depend_on_the_rows_beside_it(model, cache):
    together = generate(model, PROMPTS, max_new_tokens=10, cache=cache, seed=3, **SAMPLING)
    for count in (1, 2):
        found = generate(model, PROMPTS[:count], max_new_tokens=10, cache=cache, seed=3, **SAMPLING)
        assert found == together[:count]


def test_n_continuations_are_prompt_major_and_differ(model, cache):
    found = generate(model, PROMPTS[:2], max_new_tokens=8, cache=cache, n=3, temperature=1.5, seed=1)
    assert len(found) == 6
    assert found == generate(model, PROMPTS[:2], max_new_tokens=8, n=3, temperature=1.5, seed=1)
    assert len({tuple(tokens) for tokens in found}) == 6
    greedy = generate(model, PROMPTS[:2], max_new_tokens=8, cache=cache, n=2)
    assert greedy[0] == greedy[1] != greedy[2] == greedy[3]
    at_rest(cache)


def naive_distribution(logits, temperature, top_k, top_p):
    scores = np.asarray(logits, np.float64) / temperature
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    if top_k:
        order = order[:top_k]
    kept, total = [], 0.0
    whole = sum(weights[token] for token in order)
    for token in order:
        kept.append(token)
        total += weights[token] / whole
        if top_p is not None and total >= top_p:
            break
    result = np.zeros(len(weights))
    result[kept] = weights[kept] / weights[kept].sum()
    return result


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, None, None),
        (0.5, None, None),
        (1.0, 3, None),
        (1.0, None, 0.7),
        (1.3, 5, 0.8),
        (1.0, 1, None),
        (1, 99, 1.0),
    ],
)
def test_sampling_draws_from_the_distribution_it_should(temperature, top_k, top_p):
    logits = np.random.default_rng(0).standard_normal(12) * 1.5
    expected = naive_distribution(logits, temperature, top_k, top_p)
    random, sampling = np.random.default_rng(1), Sampling(temperature, top_k, top_p)
    count = 6000
    drawn = Counter(pick(logits, sampling, random) for _ in range(count))
    for token, probability in enumerate(expected):
        if not probability:
            assert drawn[token] == 0
        deviation = math.sqrt(count * probability * (1 - probability))
        assert abs(drawn[token] - count * probability) <= 5 * deviation + 1e-6


def test_the_sampling_of_the_real_model_keeps_to_top_k(model, cache):
    found = generate(model, [PROMPTS[0]], max_new_tokens=1, cache=cache, n=60, temperature=5.0, top_k=3, seed=0)
    best = set(np.argsort(-naive_logits(model, PROMPTS[0]))[:3].tolist())
    assert {tokens[0] for tokens in found} == best


# ---- beams -----------------------------------------------------------------------------------------------------------


def naive_beams(model, tokens, count, beams, penalty=1.0, eos=()):
    """Beam search by its definition, no cache, no early stop: every hypothesis in a plain list."""
    running, finished = [(0.0, [])], []
    for length in range(1, count + 1):
        candidates = []
        for score, new in running:
            logits = naive_logits(model, tokens + new)
            logits = logits - logits.max()
            scores = score + logits - np.log(np.exp(logits).sum())
            candidates += [(value, [*new, token]) for token, value in enumerate(scores.tolist())]
        candidates = sorted(candidates, key=lambda one: -one[0])[: 2 * beams]
        running = []
        for rank, (score, new) in enumerate(candidates):
            if new[-1] in eos or length == count:
                if rank < beams:
                    finished.append((score / length**penalty, new))
            elif len(running) < beams:
                running.append((score, new))
        finished = sorted(finished, key=lambda one: -one[0])[:beams]
        if len(finished) == beams and running and finished[-1][0] >= running[0][0] / length**penalty:
            break
    return [new for _, new in finished]


@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize("eos", [(), (7, 12)])
@pytest.mark.parametrize("penalty", [1.0, 0.2])
def test_beam_search(model, cache, beams, eos, penalty):
    arguments = {"max_new_tokens": 7, "num_beams": beams, "eos_id": eos or None, "length_penalty": penalty}
    expected = [new for tokens in PROMPTS for new in naive_beams(model, tokens, 7, beams, penalty, eos)[:2]]
    assert generate(model, PROMPTS, cache=cache, n=2, **arguments) == expected
    assert generate(model, PROMPTS, n=2, **arguments) == expected
    at_rest(cache)


def test_beams_compute_the_prompt_once_and_copy_no_past(model, cache):
    assert cache.core is not None  # looks at the model with one token
    model.computed = 0
    generate(model, [PROMPTS[2]], max_new_tokens=6, cache=cache, num_beams=4)
    assert model.computed <= 40 + 4 * 5
    assert cache.stats().live_blocks == 0


@pytest.mark.slow  # transformers takes long to import
def test_beam_search_agrees_with_transformers():
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        theirs.lm_head.weight.mul_(40)  # otherwise all tokens are about equally likely

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = theirs

        def forward(self, x):
            return self.inner(x, use_cache=False).logits

    tokens = [int(token) % 40 for token in PROMPTS[3]]
    for eos in (None, 11):
        reference = theirs.generate(
            torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens), dtype=torch.long), max_new_tokens=8,
            num_beams=3, num_return_sequences=3, do_sample=False, eos_token_id=eos, pad_token_id=0,
        )  # fmt: skip
        rows = reference[:, len(tokens) :].tolist()
        expected = [row[: row.index(eos) + 1] if eos in row else row for row in rows]
        assert generate(Logits(), [tokens], max_new_tokens=8, num_beams=3, n=3, eos_id=eos) == expected


# ---- stream ----------------------------------------------------------------------------------------------------------


def test_stream_equals_generate(model, cache):
    whole = generate(model, [PROMPTS[0]], max_new_tokens=9)[0]
    assert list(stream(model, PROMPTS[0], max_new_tokens=9, cache=cache)) == whole
    assert list(stream(model, PROMPTS[0], max_new_tokens=9)) == whole
    assert (
        list(stream(model, PROMPTS[0], max_new_tokens=9, cache=cache, eos_id=whole[3]))
        == whole[: whole.index(whole[3]) + 1]
    )
    at_rest(cache)


def test_closing_a_stream_early_frees_its_blocks(model, cache):
    tokens = stream(model, PROMPTS[0], max_new_tokens=50, cache=cache)
    first = [next(tokens), next(tokens)]
    assert cache.stats().live_blocks > 0
    tokens.close()
    at_rest(cache)
    assert generate(model, [PROMPTS[0]], max_new_tokens=2, cache=cache) == [first]


def test_two_streams_at_once(model, cache):
    pairs = list(zip(*(stream(model, tokens, max_new_tokens=6, cache=cache) for tokens in PROMPTS[:2]), strict=True))
    assert [list(one) for one in zip(*pairs, strict=True)] == generate(model, PROMPTS[:2], max_new_tokens=6)
    at_rest(cache)


# ---- no room, bad options ------------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_cache(model):
    cache = KVCache(8, block_size=4)
    cache.attach(model)
    for call in (
        lambda: generate(model, [[1, 2], prompt(0, 30)], max_new_tokens=8, cache=cache),
        lambda: list(stream(model, prompt(0, 30), max_new_tokens=8, cache=cache)),
        lambda: generate(model, [prompt(0, 10)], max_new_tokens=8, cache=cache, num_beams=4),
    ):
        model.calls = 0
        with pytest.raises(
            CacheFull, match=r"needs \d+ blocks of 4 tokens; the whole cache has 8; make it larger"
        ) as e:
            call()
        assert e.value.needed > e.value.capacity == 8
        assert model.calls <= 1, "nothing but the look at the model's layers was computed"
        at_rest(cache)


def test_continuations_that_do_not_fit_are_named(model):
    cache = KVCache(8, block_size=4)
    cache.attach(model)
    with pytest.raises(CacheFull, match="with 8 new tokens in each of 5 continuations needs"):
        generate(model, [prompt(0, 10)], max_new_tokens=8, cache=cache, n=5)
    at_rest(cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be"),
        ({"n": 0}, "n must be"),
        ({"num_beams": True}, "num_beams must be"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_k": 0}, "top_k must be"),
        ({"eos_id": "</s>"}, "eos_id must be"),
        ({"eos_id": [1, None]}, "eos_id must be"),
        ({"eos_id": 1.0}, "eos_id must be"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"top_p": 1.1}, "top_p must be"),
        ({"num_beams": 2, "temperature": 1.0}, "takes no temperature"),
        ({"num_beams": 2, "n": 3}, "at least as many beams"),
    ],
)
def test_bad_options(model, cache, options, message):
    with pytest.raises(InvalidInput, match=message):
        generate(model, [[1]], cache=cache, **{"max_new_tokens": 2, **options})
    assert cache.stats().miss_tokens == 0


def test_options_are_a_value():
    assert GenerateOptions(3, eos_id=[1, 2]).eos_ids == {1, 2}
    assert GenerateOptions(3, eos_id=torch.tensor([1, 2])).eos_ids == {1, 2}
    assert GenerateOptions(3, eos_id=np.int64(1)).eos_ids == {1}
    assert GenerateOptions(3).eos_ids == frozenset()
