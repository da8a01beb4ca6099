"""Keras: one decode step, against KerasHub's own `generate`; and a second request behind a shared prefix."""

from __future__ import annotations

import time

from kerashub import KerasHub
from measure import Row, Table, alternate
from smol import checkpoint, prompt

import llama_keras
from kvcache_keras import KVCache

HUB = "KerasHub generate"
STEPS = 32
CONTEXTS = (128, 1024, 4096)
TARGET = 0.6
SHARED, OWN = 1024, 64
ALONE = "64 tokens alone behind a cached past"
TARGET_PREFIX = 1.15


class Ours:
    """The example model behind a cache."""

    def __init__(self) -> None:
        self.cache = KVCache(size=512)
        self.cache.attach(llama_keras.from_checkpoint(checkpoint()), outputs="last")

    def first_token(self, tokens: list[int]) -> float:
        """Seconds from a new prompt to its first token."""
        start = time.perf_counter()
        seq = self.cache.open(tokens)
        self.cache.step_greedy([seq], [tokens[seq.num_cached :]])
        took = time.perf_counter() - start
        seq.close()
        return took

    def decode(self, tokens: list[int], steps: int) -> tuple[float, list[int]]:
        """Seconds per step, and the new tokens."""
        seq = self.cache.open(tokens, max_new_tokens=steps)
        first = int(self.cache.step_greedy([seq], [tokens[seq.num_cached :]])[0])
        start = time.perf_counter()
        new = self.cache.decode_greedy([seq], [[first]], steps)
        took = time.perf_counter() - start
        seq.close()
        return took / steps, [first, *new[0].tolist()]


def decode(ours: Ours, hub: KerasHub, context: int, runs: int, *, compiled: bool) -> Row:
    """Milliseconds per step around one context length. Only compiled with XLA, as KerasHub is, has it a target."""
    tokens = prompt(context, seed=context)
    total = context + STEPS + 1
    hub.keep_prefill(tokens, total)
    _, expected = hub.generate(tokens, total)  # compiles
    _, chosen = ours.decode(tokens, STEPS)
    if chosen != expected:
        raise AssertionError(f"chose {chosen}, KerasHub {expected}")
    nearly = tokens + expected[:STEPS]

    def theirs() -> float:
        # The same compiled call with all but one token given: what is left is the steps alone.
        whole, _ = hub.generate(tokens, total)
        rest, _ = hub.generate(nearly, total)
        return (whole - rest) / STEPS * 1e3

    candidates = {"ours": lambda: ours.decode(tokens, STEPS)[0] * 1e3, HUB: theirs}
    samples = alternate(candidates, runs, f"Keras decode at {context:,}")
    case, targets = (", cache.compile()", {HUB: TARGET}) if compiled else ("", {})
    return Row.of(f"decode at {context:,} tokens{case}", "ms/step", samples, targets=targets)


def second_request(ours: Ours, runs: int) -> Row:
    """A prompt that shares its first part with one that was computed, against stepping the rest of an open sequence."""
    shared = prompt(SHARED, seed=77)
    seeds = iter(range(10_000))
    ours.first_token(shared)

    def alone() -> float:
        tokens = [*shared, *prompt(OWN, seed=next(seeds))]
        seq = ours.cache.open(tokens)
        start = time.perf_counter()
        ours.cache.step_greedy([seq], [tokens[seq.num_cached :]])
        took = time.perf_counter() - start
        seq.close()
        return took * 1e3

    def request() -> float:
        return ours.first_token([*shared, *prompt(OWN, seed=next(seeds))]) * 1e3

    samples = alternate({"ours": request, ALONE: alone}, runs, "Keras, second request")
    return Row.of(f"{SHARED:,} shared + {OWN} own tokens", "ms to first token", samples, targets={ALONE: TARGET_PREFIX})


def main(*, quick: bool = False) -> Table:
    """Decode at three context lengths, and the second request."""
    hub, ours = KerasHub(checkpoint()), Ours()
    runs = 5 if quick else 7
    rows = [decode(ours, hub, context, runs, compiled=False) for context in CONTEXTS]
    rows.append(second_request(ours, runs))
    ours.cache.compile()
    rows = [decode(ours, hub, context, runs, compiled=True) for context in CONTEXTS] + rows
    text = [
        "Batch 1, greedy, KerasHub's `Llama3CausalLM` with XLA on as it ships. `cache.compile()` compiles ours with "
        f"XLA too: those rows have the target. The others are without XLA. A run is {STEPS} steps. KerasHub's "
        "prefill is run once and kept, and its steps are the difference of two calls of one compiled function: only "
        "`generate`'s own loop is compared. Same tokens chosen.",
    ]
    return Table("keras_decode", "Keras: decode step", text, rows)
