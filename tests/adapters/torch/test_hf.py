"""What attaching a transformers model does and does not do."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers

from kvcache_core.errors import CacheFull, InvalidInput, KVCacheWarning, StaleSequence, UsageError
from kvcache_torch import KVCache, generate, hf_linear, linear, native
from kvcache_torch.hf import HFCache
from tests.adapters.torch.hf_models import VOCAB, decoder, encoder_decoder

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")

GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture
def model() -> Any:
    return decoder("Llama")


@pytest.fixture
def cache(model: Any) -> KVCache:
    cache = KVCache(size=128, block_size=4)
    cache.attach(model)
    return cache


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, VOCAB, (2, 15), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "build", [lambda: decoder("Mistral"), lambda: encoder_decoder("BART"), lambda: decoder("BLOOM")]
)
def test_detach_gives_back_exactly_the_model(build: Any) -> None:
    model = build()
    before = [(name, dict(vars(module))) for name, module in model.named_modules()]
    cache = KVCache(size=64)
    cache.attach(model)
    assert cache.core.layout is not None  # described
    cache.detach()
    after = [(name, dict(vars(module))) for name, module in model.named_modules()]
    assert [(name, list(known)) for name, known in before] == [(name, list(known)) for name, known in after]
    for (_, one), (_, two) in zip(before, after, strict=True):
        assert all(one[key] is two[key] for key in one)


def test_outside_the_attached_model_is_as_before(model: Any, cache: KVCache, ids: torch.Tensor) -> None:
    implementation = model.config._attn_implementation
    with torch.no_grad():
        model.generate(ids, **GREEDY, past_key_values=HFCache(cache))
        assert model.config._attn_implementation == implementation
        steps = cache.stats().miss_tokens
        output = model(ids)
    assert isinstance(output.cache, transformers.DynamicCache)
    assert cache.stats().miss_tokens == steps
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, output.logits)
    assert torch.equal(copy.deepcopy(model)(ids).logits, output.logits)


def test_another_thread_runs_the_model_outside_a_step(model: Any, cache: KVCache, ids: torch.Tensor) -> None:
    with torch.no_grad():
        plain = model(ids).logits
        expected = model.generate(ids, **GREEDY)
    right: list[bool] = []

    def outside() -> None:
        with torch.no_grad():
            right.extend(torch.allclose(model(ids).logits, plain, atol=1e-5) for _ in range(30))

    def inside() -> None:
        for _ in range(4):
            right.append(torch.equal(model.generate(ids, **GREEDY, past_key_values=HFCache(cache)), expected))  # noqa: PERF401 - one by one, beside the other threads

    threads = [threading.Thread(target=run) for run in (outside, inside, outside, inside)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) == 2 * 30 + 2 * 4
    assert all(right)


def test_an_hf_cache_needs_its_model(model: Any, cache: KVCache, ids: torch.Tensor) -> None:
    other = decoder("Llama", seed=1)
    with pytest.raises(UsageError, match="attach"):
        other.generate(ids, **GREEDY, past_key_values=HFCache(cache))
    second = KVCache(size=64)
    second.attach(other)
    with pytest.raises(UsageError, match="another cache"):
        other.generate(ids, **GREEDY, past_key_values=HFCache(cache))


def test_out_of_room(model: Any, ids: torch.Tensor) -> None:
    cache = KVCache(size=6, block_size=4)
    cache.attach(model)
    with pytest.raises(CacheFull):
        model.generate(ids, **GREEDY, past_key_values=HFCache(cache))
    expected = model.generate(ids[:1], max_new_tokens=20, do_sample=False)
    with cache, pytest.warns(KVCacheWarning, match="no room"):  # it fits at first, and no more after some tokens
        assert torch.equal(model.generate(ids[:1], max_new_tokens=20, do_sample=False), expected)
    assert cache.stats().open_sequences == 0
    cache.core.check_valid()


def test_what_is_not_cached_is_computed_as_outside(model: Any, cache: KVCache, ids: torch.Tensor) -> None:
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        plain = model(inputs_embeds=embeds).logits
        states = model(ids, output_hidden_states=True).hidden_states
        with cache, warnings.catch_warnings():
            warnings.simplefilter("ignore", KVCacheWarning)
            assert torch.equal(model(inputs_embeds=embeds).logits, plain)
            assert torch.equal(model(ids, output_hidden_states=True).hidden_states[-1], states[-1])
            assert cache.stats().bypassed_calls == 2
            model.config.output_hidden_states = True
            assert torch.equal(model(ids).hidden_states[-1], states[-1])
            assert cache.stats().bypassed_calls == 3
        with pytest.raises(InvalidInput, match="token ids"):
            model(inputs_embeds=embeds, cache=HFCache(cache))


def test_gradients_are_those_of_the_uncached_model(model: Any, cache: KVCache, ids: torch.Tensor) -> None:
    model(ids).logits.square().sum().backward()
    plain = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    with cache:
        model(ids)
        model(ids).logits.square().sum().backward()
    for weight, expected in zip(model.parameters(), plain, strict=True):
        assert torch.allclose(weight.grad, expected, rtol=1e-3, atol=1e-4)


def test_changed_weights_are_noticed(model: Any, cache: KVCache, ids: torch.Tensor) -> None:
    kept = HFCache(cache)
    out = model.generate(ids, **GREEDY, past_key_values=kept)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    with pytest.raises(StaleSequence):
        model.generate(out, **GREEDY, past_key_values=kept)
    hits = cache.stats().hit_tokens
    assert torch.equal(model.generate(ids, **GREEDY, past_key_values=HFCache(cache)), model.generate(ids, **GREEDY))
    assert cache.stats().hit_tokens == hits


def test_positions_shape_the_key(cache: KVCache, ids: torch.Tensor) -> None:
    cache.detach()
    model = cache.attach(decoder("GPT-2"))
    shifted = torch.arange(7, 22)[None]
    with torch.no_grad():
        plain = model(ids, position_ids=shifted).logits
        with cache:
            model(ids)
            assert torch.allclose(model(ids, position_ids=shifted).logits, plain, atol=1e-5)
            assert torch.allclose(model(ids, position_ids=shifted).logits, plain, atol=1e-5)


def test_a_mask_that_changes_later_is_followed(model: Any, cache: KVCache, ids: torch.Tensor) -> None:
    kept = HFCache(cache)
    out = model.generate(ids, **GREEDY, past_key_values=kept)
    mask = torch.ones_like(out)
    mask[0, 17:] = 0  # as if row 0 had ended early and the rest were padding
    turn = torch.cat([out, ids[:, :3]], dim=1)
    mask = torch.cat([mask, torch.ones(2, 3, dtype=torch.int64)], dim=1)
    new = model.generate(turn, attention_mask=mask, **GREEDY, past_key_values=kept)
    for row in range(2):
        alone = model.generate(turn[row][mask[row].bool()][None], **GREEDY)
        assert torch.equal(new[row, turn.shape[1] :], alone[0, -5:])


def test_beam_search_equals_the_librarys_own(model: Any, cache: KVCache, ids: torch.Tensor) -> None:
    theirs = model.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False, past_key_values=HFCache(cache))
    ours = generate(model, ids.tolist(), max_new_tokens=6, num_beams=3, cache=cache)
    assert theirs[:, 15:].tolist() == ours


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2}, "linear_attention.*recurrent"),
        ("Rwkv", {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}, "recurrent state"),
        (
            "Lfm2",
            {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "layer_types": ["conv", "full_attention"],
            },
            "conv",
        ),
    ],
)
def test_other_state_is_refused(name: str, settings: dict[str, Any], reason: str) -> None:
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCAB, **settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with pytest.raises(InvalidInput, match=reason):
        KVCache(size=16).attach(model)
    assert "forward" not in vars(model)


def test_a_bidirectional_decoder_is_refused() -> None:
    model = decoder("Gemma 3")
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    cache = KVCache(size=16)
    cache.attach(model)
    with pytest.raises(InvalidInput, match="later tokens"), torch.no_grad(), cache:
        model(torch.ones(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("name", ["LlamaModel", "LlamaForSequenceClassification"])
def test_other_heads(name: str, ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    config = copy.deepcopy(decoder("Llama").config)
    model = getattr(transformers, name)(config).eval()
    cache = KVCache(size=64, block_size=4)
    cache.attach(model)
    with torch.no_grad():
        plain = model(ids)
        with cache:
            for _ in range(2):
                assert torch.allclose(model(ids)[0], plain[0], atol=1e-5)
    assert cache.stats().hit_tokens == 2 * 14


def test_chunked_prefill_and_streaming(model: Any, cache: KVCache, ids: torch.Tensor) -> None:
    expected = model.generate(ids, **GREEDY)
    for _ in range(2):
        out = model.generate(ids, **GREEDY, prefill_chunk_size=4, past_key_values=HFCache(cache))
        assert torch.equal(out, expected)


def test_a_first_chunk_that_is_all_padding(model: Any, cache: KVCache, ids: torch.Tensor) -> None:
    ids, mask = ids.clone(), torch.ones_like(ids)
    ids[1, :6], mask[1, :6] = 0, 0
    options = {**GREEDY, "attention_mask": mask, "prefill_chunk_size": 4}
    expected = model.generate(ids, **options)
    with cache, pytest.warns(KVCacheWarning, match="row 1 has none in its first 4"):
        assert torch.equal(model.generate(ids, **options), expected)
    assert cache.stats().bypassed_calls == 1
    with pytest.raises(InvalidInput, match="row 1 has none in its first 4"):
        model.generate(ids, **options, past_key_values=HFCache(cache))
    cache.core.check_valid()
    assert cache.stats().open_sequences == 0


def test_bfloat16(ids: torch.Tensor) -> None:
    model = decoder("Llama").bfloat16()
    expected = model.generate(ids, **GREEDY)
    cache = KVCache(size=64)
    cache.attach(model)
    for _ in range(2):
        assert torch.equal(model.generate(ids, **GREEDY, past_key_values=HFCache(cache)), expected)


def test_attaching_again_goes_on_with_what_is_cached(ids: torch.Tensor) -> None:
    model = decoder("GPT-OSS")  # what its attention is passed is found out again by the new attachment
    expected = model.generate(ids, **GREEDY)
    cache = KVCache(size=128, block_size=4)
    for _ in range(2):
        cache.attach(model)
        assert torch.equal(model.generate(ids, **GREEDY, past_key_values=HFCache(cache)), expected)
        cache.detach()
    assert cache.stats().hit_tokens == 2 * 14


def test_a_crop_behind_a_window_whose_tokens_are_evicted(ids: torch.Tensor) -> None:
    model = decoder("Mistral")
    cache = KVCache(size=26, block_size=4)
    cache.attach(model)
    kept = HFCache(cache)
    with torch.no_grad():
        model(torch.cat([ids, ids], dim=1), cache=kept, logits_to_keep=1)
        model.generate(ids.flip(0), max_new_tokens=12, do_sample=False, past_key_values=HFCache(cache))
        kept.crop(-12)
        more = torch.full((2, 1), 7)
        cached = model(more, cache=kept, position_ids=torch.full((2, 1), 18)).logits
        plain = model(torch.cat([ids, ids[:, :3], more], dim=1)).logits[:, -1:]
    assert torch.allclose(cached, plain, atol=1e-5)


# ---- rows that end before others ----------------------------------------------------------------------------------


def ending(model: Any, ids: torch.Tensor, **options: Any) -> tuple[int, list[int]]:
    """An end token that stops the rows at different steps, and how many new tokens each row then has."""
    free = model.generate(ids, **options)[:, ids.shape[1] :].tolist()
    for token in free[0]:
        counts = [row.index(token) + 1 if token in row else len(row) for row in free]
        if min(counts) < max(counts) - 1:
            return token, counts
    raise AssertionError(f"no token stops the rows at different steps: {free}")


@pytest.mark.parametrize("pad", ["another token", "the end token"])
@pytest.mark.parametrize("mode", ["kept", "with"])
def test_padding_behind_a_row_that_ended_is_not_stored(model: Any, cache: KVCache, pad: str, mode: str) -> None:
    ids = torch.randint(1, VOCAB, (3, 15), generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    end, counts = ending(model, ids, **options)
    options |= {"eos_token_id": end, "pad_token_id": end if pad == "the end token" else 0}
    plain = model.generate(ids, **options)
    assert plain.shape[1] == 15 + max(counts)
    kept = HFCache(cache)
    if mode == "kept":
        out = model.generate(ids, **options, past_key_values=kept)
        assert [row.length for row in kept.rows] == [15 + min(count, max(counts) - 1) for count in counts]
        assert cache.stats().live_blocks <= sum(-(-row.length // 4) for row in kept.rows)
        kept.reset()
    else:
        with cache:
            out = model.generate(ids, **options)
    assert torch.equal(out, plain)
    for row, count in zip(plain.tolist(), counts, strict=True):
        stored = 15 + min(count, max(counts) - 1)  # the last step's token is chosen and not computed
        assert cache.core.cached_length([*row[:stored], *[options["pad_token_id"]] * 9]) == stored
    cache.core.check_valid()


def test_a_turn_behind_rows_that_ended_computes_the_turn_alone(model: Any, cache: KVCache) -> None:
    ids = torch.randint(1, VOCAB, (3, 15), generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    end, counts = ending(model, ids, **options)
    kept = HFCache(cache)
    out = model.generate(ids, **options, eos_token_id=end, past_key_values=kept)
    real = torch.arange(out.shape[1])[None] < 15 + torch.tensor(counts)[:, None]
    turn = torch.cat([out, ids[:, :4]], dim=1)
    mask = torch.cat([real, torch.ones(3, 4, dtype=torch.bool)], dim=1).long()
    before = cache.stats()
    new = model.generate(turn, attention_mask=mask, max_new_tokens=5, do_sample=False, past_key_values=kept)
    # The kept rows went on: none was looked up and opened anew.
    assert (cache.stats().hit_tokens, cache.stats().miss_tokens) == (before.hit_tokens, before.miss_tokens)
    for row in range(3):
        alone = model.generate(turn[row][mask[row].bool()][None], max_new_tokens=5, do_sample=False)
        assert torch.equal(new[row, turn.shape[1] :], alone[0, -5:])


def test_rows_that_ended_in_a_generate_without_a_past(model: Any, cache: KVCache) -> None:
    ids = torch.randint(1, VOCAB, (3, 15), generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    options |= {"eos_token_id": ending(model, ids, **options)[0], "use_cache": False}
    with cache:
        out = model.generate(ids, **options)
    assert torch.equal(out, model.generate(ids, **options))


def test_scoring_what_generate_gave_is_a_call_like_any_other(model: Any, cache: KVCache) -> None:
    """Without a mask the padding behind a row's end is tokens, as it is outside."""
    ids = torch.randint(1, VOCAB, (3, 15), generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    options["eos_token_id"], _ = ending(model, ids, **options)
    with torch.no_grad(), cache:
        out = model.generate(ids, **options)
        scored = model(out).logits
    with torch.no_grad():
        assert torch.allclose(scored, model(out).logits, atol=1e-5)


@pytest.mark.parametrize("end", [None, 1])
def test_rows_that_end_by_a_criterion_of_the_callers_own(
    model: Any, cache: KVCache, ids: torch.Tensor, end: int | None
) -> None:
    """Only with an end token does transformers pad such a row; without one it goes on with tokens of its own."""

    class FirstRowAfterTwo(transformers.StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.tensor([input_ids.shape[1] >= 17, False])

    criteria = transformers.StoppingCriteriaList([FirstRowAfterTwo()])
    options = {"max_new_tokens": 8, "do_sample": False, "stopping_criteria": criteria, "eos_token_id": end}
    plain = model.generate(ids, **options)
    kept = HFCache(cache)
    assert torch.equal(model.generate(ids, **options, past_key_values=kept), plain)
    assert [row.length for row in kept.rows] == [22 if end is None else 17, 22]


def test_a_call_of_ones_own_with_the_same_tokens_is_no_generate(model: Any, cache: KVCache, ids: torch.Tensor) -> None:
    """What a generate has said of its rows holds for its own calls: the same tokens by hand are tokens."""
    kept = HFCache(cache)
    out = model.generate(ids, max_new_tokens=3, do_sample=False, past_key_values=kept)
    with torch.no_grad():
        by_hand = model(out[:, -1:], cache=kept, position_ids=torch.full((2, 1), out.shape[1] - 1)).logits
        plain = model(out).logits[:, -1:]
    assert torch.allclose(by_hand, plain, atol=1e-5)
    assert [row.length for row in kept.rows] == [18, 18]


def test_an_encoder_decoders_rows_end_too() -> None:
    model = encoder_decoder("BART")
    cache = KVCache(size=128, block_size=4)
    cache.attach(model)
    ids = torch.randint(2, VOCAB, (3, 11), generator=torch.Generator().manual_seed(0))

    def sample(**more: Any) -> torch.Tensor:
        torch.manual_seed(0)
        result: torch.Tensor = model.generate(ids, max_new_tokens=10, do_sample=True, **more)
        return result

    free = sample(eos_token_id=None)[:, 1:].tolist()
    end = next(token for token in free[0] if not any(token in row for row in free[1:]))
    kept = HFCache(cache)
    assert torch.equal(sample(eos_token_id=end, past_key_values=kept), sample(eos_token_id=end))
    # The start token and those up to the end token; the last step's token is chosen and not computed.
    assert [row.length for row in kept.rows] == [1 + min(free[0].index(end) + 1, 9), 10, 10]
    assert kept.rows[0].length < 10


# ---- linear layers ------------------------------------------------------------------------------------------------


def test_linear_layers_take_the_fast_way_inside(
    model: Any, cache: KVCache, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven a layer and the head, inside the cache alone; nothing of it stays in the model."""
    rows: list[int] = []

    def counting(x: torch.Tensor, *weights: Any) -> torch.Tensor:
        rows.append(x.numel() // x.shape[-1])
        return linear(x, *weights)

    monkeypatch.setattr(hf_linear, "linear", counting)
    long = ids.repeat(1, 3)
    plain = model.generate(long, **GREEDY)
    assert not rows
    assert torch.equal(model.generate(long, **GREEDY, past_key_values=HFCache(cache)), plain)
    assert rows == [90] * (2 * 7) + [2] + [2] * (4 * (2 * 7 + 1))  # the head is run on the last tokens
    assert not any("forward" in vars(module) for module in model.modules() if isinstance(module, torch.nn.Linear))
    rows.clear()
    generate(model, long.tolist(), max_new_tokens=5, cache=cache)
    assert rows


def test_only_plain_linear_layers_of_this_thread_take_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.nn.Parameter] = []

    def noting(x: torch.Tensor, weight: torch.nn.Parameter, bias: Any) -> torch.Tensor:
        seen.append(weight)
        return linear(x, weight, bias)

    class Own(torch.nn.Linear):
        pass

    def hooked(x: torch.Tensor) -> torch.Tensor:
        return x

    monkeypatch.setattr(hf_linear, "linear", noting)
    plain, derived, replaced, normed = (
        build(8, 8) for build in (torch.nn.Linear, Own, torch.nn.Linear, torch.nn.Linear)
    )
    replaced.forward = hooked  # type: ignore[method-assign]
    torch.nn.utils.spectral_norm(normed)  # its weight is computed anew at each call
    normed.eval()
    layers, x = (plain, derived, replaced, normed), torch.randn(3, 8)
    with torch.no_grad():
        expected = [layer(x) for layer in layers]
        with hf_linear.FastLinear(layers).inside():
            inside = [layer(x) for layer in layers]
            assert seen == [plain.weight]
            with ThreadPoolExecutor(1) as pool:
                assert torch.equal(pool.submit(plain, x).result(), expected[0])
            assert len(seen) == 1
            with torch.autocast("cpu", torch.bfloat16):
                assert plain(x).dtype == torch.bfloat16
    for one, other in zip(inside, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert vars(replaced)["forward"] is hooked
    assert not any("forward" in vars(layer) for layer in (plain, derived, normed))


# ---- kernels in C -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_prompts_and_decode_steps_reach_the_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After ``cache.compile()``, through the registered attention function: every layer of every step, windows too."""
    calls: Counter[str] = Counter()

    def counted(kind: type[Any]) -> None:
        attend = kind.attend
        monkeypatch.setattr(kind, "attend", lambda *args: calls.update([kind.__name__]) or attend(*args))

    counted(native.PrefillReads)
    counted(native.DecodeReads)
    model = decoder(name)
    ids = torch.randint(1, VOCAB, (2, 30), generator=torch.Generator().manual_seed(0))
    ids[1, :8] = ids[0, :8]
    plain = model.generate(ids, **GREEDY)
    assert not calls
    cache = KVCache(size=64, block_size=4)
    cache.attach(model, outputs="last")
    assert torch.equal(model.generate(ids, **GREEDY, past_key_values=HFCache(cache)), plain)
    assert calls == {"PrefillReads": 2, "DecodeReads": 2 * 4}
