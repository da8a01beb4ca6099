"""Keras: one decode step, against KerasHub's own `generate`."""

from __future__ import annotations

import time

import numpy as np
from kerashub import KerasHub
from measure import Row, Table, alternate
from smol import checkpoint, prompt

import llama_keras
from kvcache_keras import KVCache

HUB = "KerasHub generate"
STEPS = 16
TARGET = 0.75


class Ours:
    """The example model behind a cache."""

    def __init__(self) -> None:
        self.cache = KVCache(size=512)
        self.cache.attach(llama_keras.from_checkpoint(checkpoint()), outputs="last")

    def first_token(self, tokens: list[int]) -> float:
        """Seconds from a new prompt to its first token."""
        start = time.perf_counter()
        seq = self.cache.open(tokens)
        self.step(seq, tokens[seq.num_cached :])
        took = time.perf_counter() - start
        seq.close()
        return took

    def step(self, seq: object, tokens: list[int]) -> int:
        return int(np.argmax(self.cache.step([seq], [tokens])[0]))

    def decode(self, tokens: list[int], steps: int) -> tuple[float, list[int]]:
        """Seconds per step, and the new tokens."""
        seq = self.cache.open(tokens, max_new_tokens=steps)
        new = [self.step(seq, tokens[seq.num_cached :])]
        start = time.perf_counter()
        for _ in range(steps):
            new.append(self.step(seq, new[-1:]))
        took = time.perf_counter() - start
        seq.close()
        return took / steps, new


def decode(ours: Ours, hub: KerasHub, context: int, runs: int) -> Row:
    """Milliseconds per step around one context length."""
    tokens = prompt(context, seed=context)
    total = context + STEPS + 1
    _, expected = hub.generate(tokens, total)  # compiles
    _, chosen = ours.decode(tokens, STEPS)
    if chosen != expected:
        raise AssertionError(f"chose {chosen}, KerasHub {expected}")
    nearly = tokens + expected[:STEPS]

    def theirs() -> float:
        # The same compiled call with all but one token given: the rest is the prefill, which both do alike.
        whole, _ = hub.generate(tokens, total)
        prefill, _ = hub.generate(nearly, total)
        return (whole - prefill) / STEPS * 1e3

    candidates = {"ours": lambda: ours.decode(tokens, STEPS)[0] * 1e3, HUB: theirs}
    samples = alternate(candidates, runs, f"Keras decode at {context:,}")
    return Row.of(f"decode at {context:,} tokens", "ms/step", samples, target=(HUB, TARGET))


def main(*, quick: bool = False) -> Table:
    """Decode at two context lengths."""
    hub, ours = KerasHub(checkpoint()), Ours()
    rows = [decode(ours, hub, context, 5 if quick else 9) for context in (128, 1024)]
    text = [
        f"Batch 1, greedy, KerasHub's `Llama3CausalLM` with XLA on as it ships. A run is {STEPS} steps; KerasHub's are "
        "the difference of two calls of one compiled function, so that the prefill is out. Same tokens chosen.",
    ]
    return Table("keras_decode", "Keras: decode step", text, rows)
