"""Keras: the first call at a prompt length that was never seen before, against KerasHub's own `generate`."""

from __future__ import annotations

from keras_decode import HUB, Ours
from kerashub import KerasHub
from measure import Row, Table, alternate
from smol import checkpoint, prompt

HUB_PADDED = "KerasHub generate, padded to 256"
PADDED_TO = 256
TARGET = 0.25


def new_lengths(ours: Ours, hub: KerasHub, runs: int) -> Row:
    """Seconds of a first call at prompt lengths that were never seen before."""
    hub.generate(prompt(100, seed=5), PADDED_TO)
    lengths = {name: iter(range(130, 250, 7)) for name in ("ours", HUB, HUB_PADDED)}

    def next_prompt(name: str) -> list[int]:
        length = next(lengths[name])
        return prompt(length, seed=1000 + length)

    def shipped() -> float:
        tokens = next_prompt(HUB)
        return hub.generate(tokens, len(tokens) + 1)[0]

    def padded() -> float:
        tokens = next_prompt(HUB_PADDED)
        # All but one token of the padded row is given, so that one token is generated as by the others.
        filled = tokens + prompt(PADDED_TO - 1 - len(tokens), seed=len(tokens))
        return hub.generate(filled, PADDED_TO)[0]

    candidates = {"ours": lambda: ours.first_token(next_prompt("ours")), HUB: shipped, HUB_PADDED: padded}
    samples = alternate(candidates, runs, "Keras, new prompt lengths", warm_up=0)
    return Row.of("first call at a new length", "s to first token", samples, targets={HUB: TARGET})


def main(*, quick: bool = False) -> Table:
    """Five new lengths each."""
    hub, ours = KerasHub(checkpoint()), Ours()
    began = ours.first_token(prompt(50, seed=4))
    row = new_lengths(ours, hub, 3 if quick else 5)
    traces = ", ".join(f"{name} {count} times" for name, count in ours.cache.runner.traces.items())
    text = [
        "Prompts of 130 to 160 tokens, one new token. KerasHub compiles anew for every length unless all prompts are "
        f"padded to one. Ours traced its graphs ({traces}) before that: the very first call of the process took "
        f"{began:.1f} s.",
    ]
    return Table("keras_lengths", "Keras: first call at a new prompt length", text, [row])
