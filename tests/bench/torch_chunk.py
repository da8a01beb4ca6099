"""PyTorch: one long prompt in chunks: what bounding the memory saves, and what it costs."""

from __future__ import annotations

import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from measure import Row, Table, alternate, seconds
from smol import checkpoint, prompt

WHOLE = "in one step"


@cache
def loaded(length: int) -> Any:
    """A model with a cache for one prompt, whose memory is in use, and the prompt."""
    import llama_torch
    from kvcache_torch import KVCache

    model, kept = llama_torch.from_checkpoint(checkpoint()), KVCache(size=length // 16 + 8)
    kept.attach(model, outputs="last")
    for layer in range(model.config.num_layers):
        for name in "kv":
            kept.store.array(layer, name).zero_()
    return model, kept, prompt(length, seed=5)


def answer(length: int, chunk: int | None) -> float:
    """Seconds to the prompt's next token, cold. Runs in a child process."""
    from kvcache_torch import generate

    model, kept, tokens = loaded(length)
    kept.clear()
    return seconds(lambda: generate(model, [tokens], max_new_tokens=1, cache=kept, prefill_chunk=chunk))


def growth(length: int, chunk: int | None) -> float:
    """MiB by which a child process grows while it computes the prompt, beyond weights and K/V."""
    loaded(length)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    answer(length, chunk)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before / 2**20


def main(*, quick: bool = False) -> Table:
    """Time by turns; memory once per process, for a process never gives its peak back."""
    length = 1024 if quick else 4096
    chunk = length // 8
    spawn = multiprocessing.get_context("spawn")

    def child(work: Any, size: int | None) -> float:
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            return float(process.submit(work, length, size).result())

    candidates = {"ours": lambda: child(growth, chunk), WHOLE: lambda: child(growth, None)}
    memory = alternate(candidates, 3 if quick else 5, "chunks, memory", warm_up=0)
    candidates = {"ours": lambda: answer(length, chunk), WHOLE: lambda: answer(length, None)}
    times = alternate(candidates, 5, "chunks, time")
    case = f"prompt of {length:,} tokens, {chunk:,} at a time"
    text = [
        "`generate(prefill_chunk=)`, cold, one new token. Memory: by how much a process grows at most while it "
        "computes the prompt, with weights and K/V already there; each run is a process of its own.",
    ]
    rows = [Row.of(f"{case}: memory", "MiB", memory), Row.of(f"{case}: time", "s", times, targets={WHOLE: 1.1})]
    return Table("torch_chunk", "PyTorch: chunked prefill", text, rows)
