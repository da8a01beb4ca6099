"""A sequence to a file and back: same framework, the other one, and files that must be refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache_core import BlockCache, InvalidInput, SequenceClosed, UsageError
from kvcache_core.errors import BlockRefused, CacheFull
from kvcache_core.tiers import RamTier
from tests.reference_decoder import DecoderConfig, decoder_configs, make_weights, run_uncached
from tests.tiers.backends import tiered

PLAIN = DecoderConfig(windows=(None, 5), heads=2, kv_heads=1, width=8, block_size=3)


def backend(framework: str, config: DecoderConfig = PLAIN, num_blocks: int = 40, seed: int = 0) -> Any:
    return tiered(framework, config, make_weights(config), num_blocks, [RamTier(1000)])


def prompt(config: DecoderConfig, length: int) -> list[int]:
    return np.random.default_rng(3).integers(0, config.vocab, length).tolist()


def saved(one: Any, path: Path, length: int = 20) -> list[int]:
    tokens = prompt(one.model.config, length)
    seq = one.cache.open(tokens)
    one.cache.step([seq], [tokens[: length // 2][seq.num_cached :]])
    one.cache.step([seq], [tokens[length // 2 :]])
    seq.save(path)
    assert seq.length == length
    seq.close()
    return tokens


def check_goes_on(other: Any, path: Path, tokens: list[int]) -> None:
    """The loaded sequence continues as the whole text computed anew; so does whoever finds its blocks later."""
    config = other.model.config
    new = [token % config.vocab for token in (5, 1, 2, 4)]
    expected = other.uncached([*tokens, *new])
    bound = 2e-4 * max(1.0, abs(expected).max())
    seq = other.cache.load(path)
    assert (seq.length, seq.num_cached, seq.tokens) == (len(tokens), len(tokens), tokens)
    for at in (0, 1, 2):
        logits = other.cache.step([seq], [new[at : at + 1]])[0]
        assert abs(logits - expected[len(tokens) + at]).max() < bound
    other.core.check_valid()
    seq.close()
    for length in (len(tokens) // 2, len(tokens)):
        again = other.cache.open([*tokens[:length], new[3]])
        logits = other.cache.step([again], [[*tokens[:length], new[3]][again.num_cached :]])[0]
        assert abs(logits - other.uncached([*tokens[:length], new[3]])[-1]).max() < bound
        again.close()
    other.core.check_valid()


@pytest.mark.parametrize("writer", ["torch", "keras"])
@pytest.mark.parametrize("reader", ["torch", "keras"])
@given(config=decoder_configs(max_layers=2), length=st.integers(2, 30))
@settings(max_examples=3)
def test_saved_here_and_loaded_there(tmp_path_factory, writer, reader, config, length):
    path = tmp_path_factory.mktemp("state") / "seq.safetensors"
    tokens = saved(backend(writer, config), path, length)
    check_goes_on(backend(reader, config), path, tokens)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
@pytest.mark.parametrize(("writer", "reader"), [("torch", "keras"), ("keras", "torch")])
def test_lossy_state_moves_as_it_is_stored(tmp_path, writer, reader, dtype):
    """Elements and scales: the other framework goes on as the model with rounded K and V, to the last bits."""
    config = replace(PLAIN, dtype="float64")
    weights, new = make_weights(config), [5, 1, 2]
    one, other = (tiered(name, config, weights, 40, [RamTier(1000)], dtype=dtype) for name in (writer, reader))
    tokens = saved(one, tmp_path / "seq")
    seq = other.cache.load(tmp_path / "seq")
    logits = other.cache.step([seq], [new])[0]
    expected = run_uncached(config, weights, [*tokens, *new], np.float64, dtype)[-1]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6)
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = safetensors.load_file(tmp_path / "seq")
    assert tensors["layers.0.k"].shape == (20, 1, config.head_size)
    assert str(tensors["layers.0.k"].dtype) == {"int8": "torch.int8", "float8_e4m3": "torch.float8_e4m3fn"}[dtype]
    assert tensors["layers.0.k_scale"].shape == (20, 1, 1)
    exact = tiered(reader, config, weights, 40, [RamTier(1000)])
    with pytest.raises(BlockRefused, match="another layout"):
        exact.cache.load(tmp_path / "seq")


def test_loaded_where_some_of_it_is_cached(tmp_path):
    one = backend("torch")
    tokens = saved(one, tmp_path / "seq")
    check_goes_on(one, tmp_path / "seq", tokens)


def test_the_file_is_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    tokens = saved(backend("torch"), tmp_path / "seq")
    tensors = safetensors.load_file(tmp_path / "seq")
    assert tensors["tokens"].tolist() == tokens
    assert tensors["layers.0.k"].shape[0] == 20
    assert tensors["layers.1.v"].shape[0] < 20, "what the window has dropped is not in the file"


def test_nothing_is_left_when_writing_fails(tmp_path):
    one = backend("torch")
    seq = one.cache.open([1, 2, 3])
    with pytest.raises(InvalidInput, match="it holds no tokens yet"):
        seq.save(tmp_path / "seq")
    one.cache.step([seq], [[1, 2, 3]])
    with pytest.raises(OSError, match="No such file"):
        seq.save(tmp_path / "nowhere" / "seq")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        seq.save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    seq.close()
    with pytest.raises(SequenceClosed):
        seq.save(tmp_path / "seq")


def test_bookkeeping_alone_saves_nothing(tmp_path):
    core = BlockCache(8)
    with pytest.raises(UsageError, match="keeps no tensors"):
        core.open([1]).save(tmp_path / "seq")


def test_no_room_changes_nothing(tmp_path):
    saved(backend("torch"), tmp_path / "seq")
    small = backend("torch", num_blocks=3)
    with pytest.raises(CacheFull):
        small.cache.load(tmp_path / "seq")
    assert small.core.stats().open_sequences == 0
    small.core.check_valid()


def test_another_model_layout_or_salt_is_refused(tmp_path, monkeypatch):
    one = backend("torch")
    saved(one, tmp_path / "seq")
    changed = {name: value * 2 for name, value in make_weights(PLAIN).items()}
    other = tiered("torch", PLAIN, changed, 40, [RamTier(1000)])
    with pytest.raises(BlockRefused, match="another model"):
        other.cache.load(tmp_path / "seq")
    wider = DecoderConfig(windows=(None, 7), heads=2, kv_heads=1, width=8, block_size=3)
    with pytest.raises(BlockRefused, match="another layout"):
        backend("torch", wider).cache.load(tmp_path / "seq")
    one.cache.salt = b"another tenant"
    with pytest.raises(BlockRefused, match="another salt"):
        one.cache.load(tmp_path / "seq")
    one.cache.salt = b""
    monkeypatch.setenv("KVCACHE_SECRET", "s")
    with pytest.raises(BlockRefused, match="signed with another secret"):
        one.cache.load(tmp_path / "seq")


def test_every_damage_is_refused(tmp_path):
    one = backend("torch")
    saved(one, tmp_path / "seq", 5)
    whole = (tmp_path / "seq").read_bytes()
    draw = np.random.default_rng(0)
    places = {*range(16), *draw.integers(0, len(whole), 150).tolist()}
    for at in places:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(draw.integers(8))
        if _same(bytes(damaged), whole):
            continue
        (tmp_path / "bad").write_bytes(damaged)
        with pytest.raises(BlockRefused):
            one.cache.load(tmp_path / "bad")
    for length in [*range(20), *draw.integers(0, len(whole), 40).tolist()]:
        (tmp_path / "bad").write_bytes(whole[:length])
        with pytest.raises(BlockRefused):
            one.cache.load(tmp_path / "bad")
    (tmp_path / "bad").write_bytes(whole + b"x")
    with pytest.raises(BlockRefused, match="belong to no tensor"):
        one.cache.load(tmp_path / "bad")
    assert one.core.stats().open_sequences == 0
    one.core.check_valid()


def _same(one: bytes, other: bytes) -> bool:
    """Whether two files say the same: white space behind the header means nothing."""
    try:
        sizes = [int.from_bytes(data[:8], "little") for data in (one, other)]
        heads = [json.loads(data[8 : 8 + size]) for data, size in zip((one, other), sizes, strict=True)]
    except ValueError:
        return False
    return heads[0] == heads[1] and one[8 + sizes[0] :] == other[8 + sizes[1] :]


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file({"weight": np.ones(4, np.float32)}, tmp_path / "model")
    with pytest.raises(BlockRefused):
        backend("torch").cache.load(tmp_path / "model")
