"""What `torch_activation` and `keras_activation` share: sizes, targets, and the case without samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from measure import Row, alternate, seconds
from smol import prompt

PLAIN = "the same without the cache"
REPEATED, EPOCHS = 0.6, 5
_WIDE, _NARROW = 32, 8
"""Channels of a frozen CNN: the example's; and one with a tenth of the work, where the head and the loop weigh more."""
TEXT_TARGET, _TRAIN_TARGET = 0.5, 0.35
BYPASS_TARGET = 1.05
BATCHES, AT_ONCE, TURNS = 400, 40, 24
"""For the module that is bypassed: inputs, calls in a run, and how many runs stand for one of the other cases'. Short
runs that take turns meet the same moments of a machine that others share."""

_STEP, _CHECK_TARGET = "one decode step", 0.02
_LOOKS = 16


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    runs: int
    sentences: int
    pictures: int

    @classmethod
    def of(cls, *, quick: bool) -> Sizes:
        """Those of a short run, or those that are published."""
        return cls(2, 400, 640) if quick else cls(5, 2000, 5000)


def all_rows(
    sizes: Sizes,
    encoder: Callable[[int, int], Row],
    training: Callable[[int, int, int, dict[str, float]], Row],
    others: list[Callable[[int], Row]],
) -> list[Row]:
    """Every case; ``training(runs, width, pictures, targets)`` with each width of the trunk."""
    return [
        encoder(sizes.runs, sizes.sentences),
        training(2 * sizes.runs, _WIDE, sizes.pictures, {PLAIN: _TRAIN_TARGET}),
        training(sizes.runs, _NARROW, sizes.pictures, {}),
        *(case(sizes.runs) for case in others),
    ]


def check_bypassed(cache: Any, calls: int) -> None:
    """Raise unless nearly all of the last ``calls`` calls went past the cache, and none was served."""
    stats = cache.stats()
    skipped = stats.bypass_reasons.get("the cache costs more than it saves", 0)
    if skipped < 0.95 * calls or stats.hit_entries:
        raise AssertionError(f"{skipped} of {calls} calls were bypassed, {stats.hit_entries} samples served: {stats}")


def weights_check(runs: int, cache: Any, decode: Callable[[Any, int], object], steps: int) -> Row:
    """Milliseconds to notice whether the weights changed; ``decode(seq, steps)`` takes so many decode steps."""
    tokens = prompt(128, 0)
    seq = cache.open(tokens, max_new_tokens=steps * (4 * runs + 2))
    cache.step_greedy([seq], [tokens[seq.num_cached :]])

    def look() -> float:
        return 1e3 * seconds(lambda: [cache.refresh() for _ in range(_LOOKS)]) / _LOOKS

    def step() -> float:
        return 1e3 * seconds(lambda: decode(seq, steps)) / steps

    samples = alternate({"ours": look, _STEP: step}, 4 * runs, "look at the weights")
    seq.close()
    return Row.of("a look at SmolLM2's weights", "ms", samples, targets={_STEP: _CHECK_TARGET})
