"""Streams of frames: computed chunk by chunk, whatever the chunks, a model gives what it gives for the whole."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache_core import InvalidInput

FRAME = 64
SIZES = {"width": 16, "layers": 2, "heads": 2}
FRAMEWORKS = ("torch", "keras")
TOLERANCE = 2e-5


class Stream:
    """The example's encoder behind a cache, and the same computed whole."""

    def __init__(self, name: str) -> None:
        example = importlib.import_module(f"{name}_streaming_speech")
        self.name = name
        self.model = example.build(**SIZES)
        self.cache: Any = importlib.import_module(f"kvcache_{name}").KVCache(size=80, block_size=4)
        self.cache.attach(self.model, frames=FRAME, outputs="last")

    def native(self, frames: np.ndarray) -> Any:
        return importlib.import_module("torch").from_numpy(frames) if self.name == "torch" else frames

    def whole(self, frames: np.ndarray) -> np.ndarray:
        """[T, width] without the cache."""
        if self.name == "torch":
            with importlib.import_module("torch").no_grad():
                return self.model(self.native(frames[None]))[0].numpy()
        return self.model(frames[None])[0].numpy()


@pytest.fixture(scope="module", params=FRAMEWORKS)
def stream(request: pytest.FixtureRequest) -> Stream:
    return Stream(request.param)


streams: dict[str, Stream] = {}


def made(name: str) -> Stream:
    """One per framework: a graph is traced once."""
    if name not in streams:
        streams[name] = Stream(name)
    return streams[name]


def sound(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, FRAME)).astype(np.float32)


def near(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("name", FRAMEWORKS)
@given(
    chunks=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=7),
    seed=st.integers(0, 2**16),
    fork_at=st.integers(0, 6),
)
@settings(max_examples=20, deadline=None)
def test_streamed_equals_whole(name: str, chunks: list[tuple[int, int]], seed: int, fork_at: int) -> None:
    """Two streams of random chunks in one batch; one is forked on its way and its fork hears something else."""
    stream = made(name)
    lengths = [1 + sum(pair[row] for pair in chunks) for row in range(2)]
    sounds = [sound(seed + row, length) for row, length in enumerate(lengths)]
    seqs = [stream.cache.open(one) for one in sounds]
    found = [[np.zeros((0, SIZES["width"]), np.float32)] for _ in seqs]
    first = [seq.num_cached for seq in seqs]
    fork, other = None, sound(seed + 2, 5)
    for at, pair in enumerate([*chunks, (1, 1)]):
        rows = [row for row in range(2) if pair[row] and seqs[row].length < lengths[row]]
        news = [sounds[row][seqs[row].length : seqs[row].length + pair[row]] for row in rows]
        if rows:
            outputs = stream.cache.step_all([seqs[row] for row in rows], news)
            for row, output in zip(rows, outputs, strict=True):
                found[row].append(output)
        if at == fork_at and seqs[0].length:
            fork, before = seqs[0].fork(), seqs[0].length
    stream.cache.core.check_valid()
    for row, one in enumerate(sounds):
        near(np.concatenate(found[row]), stream.whole(one)[first[row] : seqs[row].length])
    if fork is not None:
        near(
            stream.cache.step_all([fork], [other])[0],
            stream.whole(np.concatenate((sounds[0][:before], other)))[before:],
        )
        fork.close()
    for seq in seqs:
        seq.close()


def test_sound_heard_before_is_found_by_its_content(stream):
    frames = sound(1, 30)
    first = stream.cache.open(frames)
    stream.cache.step_all([first], [frames[first.length :]])
    first.close()
    second = stream.cache.open(np.concatenate((frames[:25], sound(2, 5))))
    assert second.num_cached == 24
    found = stream.cache.step_all([second], [sound(2, 6)[:1]])
    whole = stream.whole(np.concatenate((frames[:24], sound(2, 6)[:1])))
    near(found[0], whole[24:])
    second.close()


def test_a_stream_is_saved_and_loaded(stream, tmp_path):
    frames = sound(3, 23)
    seq = stream.cache.open(frames)
    stream.cache.step_all([seq], [frames[seq.length : 18]])
    seq.save(tmp_path / "stream")
    seq.close()
    stream.cache.clear()
    loaded = stream.cache.load(tmp_path / "stream")
    near(stream.cache.step_all([loaded], [frames[18:]])[0], stream.whole(frames)[18:])
    stream.cache.core.check_valid()
    loaded.close()


def test_an_error_takes_a_stream_back_to_where_it_was(stream, monkeypatch):
    """In chunks: the second pass fails when the first is committed."""
    frames = sound(4, 20)
    seq = stream.cache.open(frames)
    stream.cache.step_all([seq], [frames[seq.length : 6]])
    run, calls = stream.cache._run_step, []

    def failing(plan):
        calls.append(plan)
        if len(calls) == 2:
            raise RuntimeError("on purpose")
        return run(plan)

    monkeypatch.setattr(stream.cache, "_run_step", failing)
    with pytest.raises(RuntimeError, match="on purpose"):
        stream.cache.step([seq], [frames[6:]], prefill_chunk=5)
    assert seq.length == 6
    near(stream.cache.step_all([seq], [frames[6:]])[0], stream.whole(frames)[6:])
    seq.close()


def test_what_is_no_frames_is_refused(stream):
    with pytest.raises(InvalidInput, match=r"takes frames \[T, 64\]"):
        stream.cache.open([1, 2, 3])
    with pytest.raises(InvalidInput, match=r"takes frames \[T, 64\], at least one; got \(3, 5\)"):
        stream.cache.open(np.zeros((3, 5), np.float32))


def test_with_cache_a_call_is_served_by_its_head(stream):
    frames = sound(5, 24)
    expected = stream.whole(frames)[-1]
    before = stream.cache.stats().hit_tokens
    x = stream.native(frames[None])
    no_grad = importlib.import_module("torch").no_grad if stream.name == "torch" else None
    with stream.cache:
        if no_grad is not None:
            with no_grad():
                found = [stream.model(x).numpy() for _ in range(2)]
        else:
            found = [stream.model(importlib.import_module("tensorflow").constant(x)).numpy() for _ in range(2)]
    for one in found:
        near(one[0, 0], expected)
    assert stream.cache.stats().hit_tokens - before == 20


def test_keras_traces_once_for_all_chunks():
    stream = made("keras")
    frames = sound(1 << 20, 40)  # no seed that is drawn above: none of it is cached
    seq = stream.cache.open(frames)
    at = seq.length
    for count in (1, 7, 2, 11, 1, 3):
        stream.cache.step_all([seq], [frames[at : at + count]])
        at += count
    assert stream.cache.runner.traces["logits"] == 1
    seq.close()


@pytest.mark.parametrize("chunk", [10, 7])
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_example(name, chunk, capsys):
    pytest.importorskip("espeakng_loader", reason="needs eSpeak NG")
    importlib.import_module(f"{name}_streaming_speech").main(seconds=0.8, chunk=chunk, **SIZES)
    assert "equal but for rounding: True" in capsys.readouterr().out
