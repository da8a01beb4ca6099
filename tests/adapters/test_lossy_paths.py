"""Lossy stored dtypes where K and V go another way than through attention over blocks: returned to the model, kept in a
saved cache, or beside a state.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from kvcache_core.errors import BlockRefused
from kvcache_core.quantization import decode, encode
from kvcache_torch import KVCache
from tests.adapters.torch.hf_models import DECODERS, ENCODER_DECODERS, VOCAB, decoder, encoder_decoder
from tests.reference_decoder import DecoderConfig, make_weights, run_uncached
from tests.tiers.backends import CACHES, over

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")

LOSSY = ["float16", "bfloat16", "float8_e4m3", "int8"]
# ---- K and V returned to the model --------------------------------------------------------------------------------


def ids(rows: int = 2, length: int = 21) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


class Rounding(DynamicCache):
    """transformers' own cache, given K and V as they are stored."""

    def __init__(self, dtype: str) -> None:
        super().__init__()
        self.dtype = dtype

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().update(rounded(key_states, self.dtype), rounded(value_states, self.dtype), *args, **kwargs)


def rounded(x: torch.Tensor, dtype: str) -> torch.Tensor:
    if dtype in ("float16", "bfloat16"):
        return x.to(getattr(torch, dtype)).to(x.dtype)
    return torch.from_numpy(decode(*encode(x.contiguous().numpy(), dtype), dtype)).to(x.dtype)


def round_behind_latents(model: Any, dtype: str, patch: pytest.MonkeyPatch) -> None:
    """DeepSeek's own cache holds a latent; what attention sees, and we store, are the K and V made of it."""
    for module in model.modules():
        if hasattr(module, "expand_kv"):
            patch.setattr(module, "expand_kv", functools.partial(rounded_pair, module.expand_kv, dtype))


def rounded_pair(expand: Any, dtype: str, *latent: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(rounded(x, dtype) for x in expand(*latent))


@pytest.mark.parametrize("dtype", LOSSY)
@pytest.mark.parametrize("family", [*DECODERS, *ENCODER_DECODERS])
def test_k_and_v_of_every_family_are_those_that_are_stored(family: str, dtype: str) -> None:
    """Whatever was cached before, the answer is that of the library's cache over rounded K and V."""
    has_encoder = family in ENCODER_DECODERS
    model = (encoder_decoder if has_encoder else decoder)(family).double()  # equal inputs round alike
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # PyTorch's grouped matrix product takes no float64
    x, named = ids(), encoder_input(family) if has_encoder else {}
    name = "decoder_input_ids" if has_encoder else "input_ids"
    rounding: Any = DynamicCache() if family == "DeepSeek-V3" else Rounding(dtype)
    if has_encoder:
        rounding = EncoderDecoderCache(rounding, DynamicCache())

    def logits(tokens: torch.Tensor, **more: Any) -> torch.Tensor:
        result: torch.Tensor = model(**named, **{name: tokens}, **more).logits
        return result

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        plain_logits = logits(x)
        round_behind_latents(model, dtype, patch)
        expected = logits(x, past_key_values=rounding)
    limit = 1e-6 * expected.abs().max()
    assert (expected - plain_logits).abs().max() > 10 * limit, "nothing was rounded"
    cache = KVCache(size=256, block_size=4, dtype=dtype)
    cache.attach(model)
    with torch.no_grad(), cache:
        for _ in range(2):
            assert (logits(x) - expected).abs().max() <= limit
        assert cache.stats().hit_tokens == x.numel() - len(x)
        cache.clear()
        for length in (5, 6, 14, 21):  # in parts
            assert (logits(x[:, :length]) - expected[:, :length]).abs().max() <= limit
    assert not cache.exact
    assert cache.stats().bypassed_calls == 0
    cache.core.check_valid()


def encoder_input(family: str) -> dict[str, torch.Tensor]:
    if family == "Whisper":
        sound = torch.randn(2, 6, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        return {"input_features": sound}
    return {"input_ids": ids(2, 9)}


# ---- a saved cache ------------------------------------------------------------------------------------------------

PLAIN = DecoderConfig(windows=(None, 5), heads=2, kv_heads=1, width=8, block_size=3, dtype="float64")
LENGTH = 4 * PLAIN.block_size + 1


def prompts() -> list[list[int]]:
    draw = np.random.default_rng(7)
    return [[row, *draw.integers(0, PLAIN.vocab, LENGTH - 1).tolist()] for row in range(3)]


def check(backend: Any, prompt: list[int], cached: int, dtype: str) -> None:
    """``cached`` tokens of the prompt are there, and its logits are those of the model with rounded K and V."""
    seq = backend.cache.open(prompt)
    assert seq.num_cached == cached
    logits = backend.cache.step([seq], [prompt[cached:]])[0]
    expected = run_uncached(PLAIN, make_weights(PLAIN), prompt, np.float64, dtype)[-1]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6 * abs(expected).max())
    exact = run_uncached(PLAIN, make_weights(PLAIN), prompt, np.float64)[-1]
    assert abs(logits - exact).max() > 1e-5 * abs(exact).max(), "nothing was rounded"
    seq.close()
    backend.cache.core.check_valid()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """What a framework's cache saved; each saves once, for all that load it."""

    @functools.cache
    def write(framework: str, dtype: str) -> Path:
        path = tmp_path_factory.mktemp("written") / "cache"
        backend = lossy(framework, CACHES[framework](size=40, block_size=PLAIN.block_size, dtype=dtype))
        for prompt in prompts():
            check(backend, prompt, 0, dtype)
        backend.cache.save(path)
        return path

    return write


@pytest.mark.parametrize("dtype", LOSSY)
@pytest.mark.parametrize("writer", ["torch", "keras"])
@pytest.mark.parametrize("reader", ["torch", "keras"])
def test_a_lossy_cache_is_saved_here_and_loaded_there(
    written: Callable[[str, str], Path], writer: str, reader: str, dtype: str
) -> None:
    path = written(writer, dtype)
    loaded = CACHES[reader].load(path, promote="always")
    assert loaded.exact is (dtype in ("float16", "bfloat16"))  # whether these lose something the model decides
    other = lossy(reader, loaded)
    for prompt in prompts():
        check(other, prompt, LENGTH - 1, dtype)
    assert not other.cache.exact
    assert other.cache.stats().promoted_tokens == 3 * (LENGTH - 1)
    assert other.cache.core.layout.dtype == dtype
    assert other.cache.close()
    with pytest.raises(BlockRefused, match="layout"):
        lossy(reader, CACHES[reader].load(path, dtype="float32")).cache.open([1])


def lossy(framework: str, cache: Any) -> Any:
    return over(framework, PLAIN, make_weights(PLAIN), cache)


# ---- beside a state -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOSSY)
@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_a_state_stays_as_the_model_gave_it(framework: str, dtype: str) -> None:
    """K and V are rounded, the convolutions' states are not: in chunks and found again, the stream is the same."""
    example = importlib.import_module(f"{framework}_streaming_speech")
    model = example.build(width=16, layers=2, heads=2)
    cache = CACHES[framework](size=80, block_size=4, dtype=dtype)
    cache.attach(model, frames=64, outputs="last")
    sound = np.random.default_rng(0).standard_normal((22, 64)).astype(np.float32)

    def heard(cuts: list[int]) -> tuple[np.ndarray, int]:
        seq = cache.open(sound)
        start = seq.length
        found = [cache.step_all([seq], [sound[seq.length : cut]])[0] for cut in cuts if cut > start]
        seq.close()
        return np.concatenate(found), start

    whole, _ = heard([22])
    cache.clear()
    parts, _ = heard([3, 4, 9, 22])
    near = 2**-4 * abs(whole).max()  # float32: what differs in the last bit may be rounded the other way
    assert abs(parts - whole).max() <= near
    again, start = heard([22])
    assert start >= 16
    assert abs(again - whole[start:]).max() <= near
    layout = cache.core.layout
    assert layout.dtype == dtype
    states = [spec for spec in layout.layers if spec.kind == "state"]
    assert states
    assert {layout.array_dtype(spec.arrays[0]) for spec in states} == {"float32"}
    assert not cache.exact
    cache.core.check_valid()
