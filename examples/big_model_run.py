"""What `torch_big_model.py` and `keras_big_model.py` share: what is asked, what is said, the command line."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demo_prompts import QUESTIONS, SYSTEM
from smollm2 import Checkpoint, load_checkpoint

LanguageModel = Callable[[Path, Checkpoint, list[int], int, float], None]
Mixture = Callable[[Path, int, int], None]


def run(
    language_model: LanguageModel,
    mixture: Mixture,
    new_tokens: int = 16,
    share: float = 1 / 3,
    checkpoint: Checkpoint | None = None,
    steps: int = 300,
) -> None:
    """Both parts, in a folder that goes when they are done; SmolLM2 unless there is a ``checkpoint``."""
    with tempfile.TemporaryDirectory() as folder:
        if checkpoint is None:
            checkpoint = load_checkpoint()
            prompt = checkpoint.chat(SYSTEM, QUESTIONS[0])
        else:
            prompt = list(range(1, 20))
        language_model(Path(folder), checkpoint, prompt, new_tokens, share)
        mixture(Path(folder), steps, 8)


def wanted(description: str | None) -> dict[str, Any]:
    """From the command line: arguments of :func:`run`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--share", type=float, default=1 / 3, help="of the weights that memory is for")
    return vars(parser.parse_args())


def answer(
    generate: Callable[..., list[list[int]]], model: Any, cache: Any, prompt: list[int], new_tokens: int
) -> tuple[list[int], float]:
    """Greedy tokens, and the seconds; those for tracing are in them. ``generate`` is either adapter's."""
    cache.attach(model)
    start = time.perf_counter()
    (tokens,) = generate(model, [prompt], max_new_tokens=new_tokens, cache=cache)
    seconds = time.perf_counter() - start
    cache.detach()
    return tokens, seconds


def show_language_model(
    name: str, stats: Any, total: int, share: float, plain: tuple[list[int], float], found: tuple[list[int], float]
) -> None:
    """Tokens and seconds with all ``total`` bytes of weights in memory, and with a share."""
    print(f"{name}: {mib(total)} of weights, never more than {mib(stats.peak_bytes)} of them in memory")
    print(
        f"read {mib(stats.bytes_read)} for {len(found[0])} tokens; the embedding, held by the model itself, once a step"
    )
    print(f"{plain[1]:.1f} s with all weights in memory, {found[1]:.1f} s with {share:.0%}")
    print(f"tokens equal: {found[0] == plain[0]}")
    assert found[0] == plain[0]


def show_mixture(stats: Any, count: int, per_token: int, room: int, steps: int, *, equal: bool) -> None:
    """How often one of ``count`` experts was in memory, which has room for some."""
    experts = sorted((stats.of(f"experts.{at}") for at in range(count)), key=lambda one: -(one.hits + one.misses))
    hottest = experts[: room // 2]
    hits, calls = sum(one.hits for one in hottest), sum(one.hits + one.misses for one in hottest)
    print(f"mixture: {count} experts, memory for {room}; {steps} tokens, {per_token} experts each")
    print(f"hit ratio {stats.of('experts').hit_ratio:.2f}, of the {room // 2} hottest experts {hits / calls:.2f}")
    print(f"read {mib(stats.bytes_read)}; outputs equal: {equal}")
    assert equal


def mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
