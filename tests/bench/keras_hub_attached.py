"""KerasHub: a model's own `generate`, and the same model attached to a cache."""

from __future__ import annotations

from collections.abc import Iterator

from kerashub import KerasHub
from measure import Row, Table, alternate
from smol import checkpoint, prompt

from kvcache_keras import KVCache
from kvcache_keras.hub import attach

HUB = "KerasHub generate"
STEPS = 16
CONTEXT = 1024
TOTAL = CONTEXT + STEPS + 1
"""One shape for two tables: KerasHub compiles for each."""


def step(ours: KerasHub, hub: KerasHub, runs: int) -> Row:
    """Milliseconds per step around 1,024 tokens."""
    tokens = prompt(CONTEXT, seed=CONTEXT)
    _, expected = hub.generate(tokens, TOTAL)
    _, chosen = ours.generate(tokens, TOTAL)
    if chosen != expected:
        raise AssertionError(f"chose {chosen}, KerasHub {expected}")
    nearly = tokens + expected[:STEPS]

    def per_step(model: KerasHub) -> float:
        # The same call with all but one token given: the rest is the prefill.
        return (model.generate(tokens, TOTAL)[0] - model.generate(nearly, TOTAL)[0]) / STEPS * 1e3

    samples = alternate({"ours": lambda: per_step(ours), HUB: lambda: per_step(hub)}, runs, "step at 1,024")
    return Row.of("step at 1,024 tokens", "ms/step", samples, targets={HUB: 0.75})


def second_request(ours: KerasHub, hub: KerasHub, runs: int) -> Row:
    """Seconds to the first token of a request that shares 1,024 tokens with an earlier one."""
    shared = prompt(CONTEXT, seed=7)
    ours.generate(shared + prompt(STEPS, seed=8), TOTAL)
    seeds = iter(range(100, 1000))

    def first_token(model: KerasHub) -> float:
        return model.generate(shared + prompt(STEPS, seed=next(seeds)), TOTAL)[0]

    samples = alternate({"ours": lambda: first_token(ours), HUB: lambda: first_token(hub)}, runs, "shared prefix")
    return Row.of(
        f"second request: 1,024 shared and {STEPS} own tokens", "s to first token", samples, targets={HUB: 0.15}
    )


def new_length(ours: KerasHub, hub: KerasHub, runs: int) -> Row:
    """Seconds of a first call at prompt lengths that were never seen before."""

    def lengths() -> Iterator[int]:
        yield from range(130, 250, 7)

    left = {"ours": lengths(), HUB: lengths()}

    def first_call(name: str, model: KerasHub) -> float:
        length = next(left[name])
        return model.generate(prompt(length, seed=1000 + length), length + 1)[0]

    candidates = {"ours": lambda: first_call("ours", ours), HUB: lambda: first_call(HUB, hub)}
    samples = alternate(candidates, runs, "new prompt lengths", warm_up=0)
    return Row.of("first call at a new length", "s to first token", samples, targets={HUB: 0.25})


def main(*, quick: bool = False) -> Table:
    """One model twice: as it ships, and attached."""
    hub, ours = KerasHub(checkpoint()), KerasHub(checkpoint())
    cache = KVCache(size=512)
    attach(ours.model, cache)
    began, _ = ours.generate(prompt(50, seed=4), 52)
    runs = 5 if quick else 9
    rows = [step(ours, hub, runs), second_request(ours, hub, runs), new_length(ours, hub, 5)]
    traces = ", ".join(f"{name} {count} times" for name, count in cache.runner.traces.items())
    text = [
        "Batch 1, greedy, KerasHub's `Llama3CausalLM` with XLA on as it ships, and the same model after "
        "`kvcache_keras.hub.attach`: both called through `generate`, with the same tokens chosen. A step is the "
        f"difference of two calls of one shape, {STEPS} tokens apart. Ours traced its graphs ({traces}) before that: "
        f"the very first call of the process took {began:.1f} s.",
    ]
    return Table("keras_hub_attached", "Keras: KerasHub's generate, attached", text, rows)
