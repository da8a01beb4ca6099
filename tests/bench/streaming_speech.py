"""A speech encoder that hears 100 ms at a time, against running the whole utterance again for each chunk."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from measure import Row, Table, alternate, seconds

import speech

AGAIN = "the whole utterance so far again"
TARGET = 0.1
CHUNK = 10
"""Frames of 10 ms."""
TIMED = 20
"""Chunks whose seconds count, on both sides; the middle ones of as many equal stretches."""
SIZES = {"width": 256, "layers": 6}


def main(*, quick: bool = False) -> Table:
    """Both frameworks, streamed and not, by turns."""
    runs, length = (2, 4.0) if quick else (5, 20.0)
    frames = speech.speech(length)
    shape = f"{SIZES['layers']} layers of width {SIZES['width']}, random weights"
    text = [
        f"The encoder of `examples/torch_streaming_speech.py` and its Keras twin ({shape}) over {length:g} s of spoken "
        f"text, {CHUNK * 10} ms at a time. What {TIMED} chunks take, the same for both and spread evenly over the "
        "utterance. Each run starts with an empty cache; all outputs of all chunks are compared.",
    ]
    # What is saved grows with the length: the target is for 20 s.
    targets = {} if quick else {AGAIN: TARGET}
    rows = [case(name, frames, runs, targets) for name in ("torch", "keras")]
    return Table("streaming_speech", "Streaming speech encoder", text, rows)


def case(name: str, frames: np.ndarray, runs: int, targets: dict[str, float]) -> Row:
    """Milliseconds for a chunk."""
    example = importlib.import_module(f"{name}_streaming_speech")
    model = example.build(**SIZES)
    again: Any = whole_torch(model, frames) if name == "torch" else whole_keras(model, frames)
    cache = importlib.import_module(f"kvcache_{name}").KVCache(size=len(frames) // 16 + 4)
    cache.attach(model, frames=speech.FRAME, outputs="last")
    chunks = len(frames) // CHUNK
    timed = [(2 * at + 1) * chunks // (2 * TIMED) for at in range(TIMED)]
    streamed: list[np.ndarray] = []
    list(example.stream(cache, frames[: 4 * CHUNK], CHUNK))  # a graph is traced at its first use

    def ours() -> float:
        cache.clear()
        streamed.clear()
        chunk = example.stream(cache, frames, CHUNK)
        spent = [seconds(lambda: streamed.append(next(chunk))) for _ in range(chunks)]
        return 1e3 * sum(spent[at] for at in timed) / TIMED

    def without() -> float:
        return 1e3 * sum(seconds(lambda end=(at + 1) * CHUNK: again(end)) for at in timed) / TIMED

    samples = alternate({"ours": ours, AGAIN: without}, runs, f"speech, {name}", warm_up=int(not targets))
    whole = again(len(frames))
    np.testing.assert_allclose(np.concatenate(streamed), whole, rtol=0, atol=1e-4 * np.abs(whole).max())
    label = {"torch": "PyTorch", "keras": "Keras"}[name]
    return Row.of(f"{label}, {len(frames) // 100} s, a chunk", "ms", samples, targets=targets)


def whole_torch(model: Any, frames: np.ndarray) -> Any:
    """The first ``end`` frames through the model."""
    import torch

    def run(end: int) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(frames[None, :end]))[0].numpy()

    return run


def whole_keras(model: Any, frames: np.ndarray) -> Any:
    """The same in one graph for every length."""
    import tensorflow as tf

    graph = tf.function(model, input_signature=[tf.TensorSpec([1, None, speech.FRAME])])
    return lambda end: graph(frames[None, :end])[0].numpy()
