"""The demo's measurements, the same code for both frameworks: `Engine.ask` and `Engine.curve`."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from smollm2 import Checkpoint

TITLES = {"torch": "PyTorch", "keras": "Keras"}
WITHOUT, COLD, WARM = MODES = ("without cache", "with cache", "again, warm")
PATIENCE = 2.0


@dataclass(frozen=True)
class Answer:
    """One question, answered once."""

    framework: str
    mode: str
    question: str
    tokens: list[int]
    text: str
    prompt_tokens: int
    reused_tokens: int  # prompt tokens found in the cache instead of computed
    prefill_seconds: float  # until the first new token
    ms_per_token: float | None  # each further token; None if there was only one
    seconds: float
    cache_bytes: int  # K/V bytes that hold something after this answer


@dataclass(frozen=True)
class Point:
    """Milliseconds for one new token behind `context` tokens."""

    framework: str
    cached: bool
    context: int
    ms: float


class Engine:
    """The example model in one framework, with a cache of `size` blocks."""

    def __init__(self, framework: str, checkpoint: Checkpoint, size: int) -> None:
        with _quiet():
            adapter = importlib.import_module(f"kvcache_{framework}")
        self.framework, self.title, self.checkpoint = framework, TITLES[framework], checkpoint
        self.model: Any = importlib.import_module(f"llama_{framework}").from_checkpoint(checkpoint)
        self.cache: Any = adapter.KVCache(size=size)
        self.cache.attach(self.model, outputs="last")
        self._stream: Callable[..., Iterator[int]] = adapter.stream

    def warm_up(self) -> None:
        """Run every path once, so that tracing graphs and growing memory pools is in no figure."""
        prompt = self.checkpoint.tokenizer.encode("Ready? " * 20).ids
        for cached in (False, True, True):  # the second time its last token alone is computed
            list(self._timed(prompt, 3, cached))
        self.cache.clear()

    def ask(self, mode: str, question: str, prompt: Sequence[int], max_new: int, show: Callable[[str], None]) -> Answer:
        """Answer `prompt` greedily; `show` gets the text so far after every token."""
        found = self.cache.stats().hit_tokens
        tokens: list[int] = []
        times: list[float] = []
        for token, seconds in self._timed(prompt, max_new, cached=mode != WITHOUT):
            tokens.append(token)
            times.append(seconds)
            show(self.checkpoint.decode(tokens))
        stats = self.cache.stats()
        return Answer(
            framework=self.framework,
            mode=mode,
            question=question,
            tokens=tokens,
            text=self.checkpoint.decode(tokens),
            prompt_tokens=len(prompt),
            reused_tokens=stats.hit_tokens - found,
            prefill_seconds=times[0],
            ms_per_token=1000 * sum(times[1:]) / (len(times) - 1) if times[1:] else None,
            seconds=sum(times),
            cache_bytes=(stats.live_blocks + stats.cached_blocks) * stats.bytes_per_block,
        )

    def curve(self, tokens: Sequence[int], contexts: Sequence[int], steps: int) -> Iterator[Point]:
        """Time of one new token at each context length, with the cache and without it.

        The line without the cache ends where one token takes longer than `PATIENCE` seconds.
        """
        seconds = 0.0
        for context in contexts:
            prompt = tokens[:context]
            _, *times = [seconds for _, seconds in self._timed(prompt, 1 + steps, cached=True, stop=False)]
            yield Point(self.framework, True, context, 1000 * median(times))
            if seconds > PATIENCE:
                continue
            # without a cache the first token already costs what every token costs: the whole context
            ((_, seconds),) = self._timed(prompt, 1, cached=False, stop=False)
            yield Point(self.framework, False, context, 1000 * seconds)

    def _timed(
        self, prompt: Sequence[int], max_new: int, cached: bool, stop: bool = True
    ) -> Iterator[tuple[int, float]]:
        """New tokens, each with the seconds that it took."""
        eos_id = self.checkpoint.eos_id if stop else None
        cache = self.cache if cached else None
        start = time.perf_counter()
        for token in self._stream(self.model, prompt, max_new_tokens=max_new, cache=cache, eos_id=eos_id):
            yield token, time.perf_counter() - start
            start = time.perf_counter()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep TensorFlow's notes about missing GPUs off the screen: while it loads, no setting reaches them."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def same_tokens(answers: Sequence[Answer]) -> bool:
    """Whether every question got the same tokens in all of `answers`."""
    first: dict[str, list[int]] = {}
    return all(first.setdefault(answer.question, answer.tokens) == answer.tokens for answer in answers)
