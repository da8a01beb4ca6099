"""PyTorch: what the activation cache saves: a sentence encoder over repeating sentences, a head on a frozen CNN."""

from __future__ import annotations

import contextlib
import time

import torch
from measure import Row, Table, alternate

import sentences
import torch_encoder
import torch_images
from kvcache_torch import KVCache

PLAIN = "the same without the cache"
SENTENCES, REPEATED, EPOCHS = 2000, 0.6, 5
TEXT_TARGET, TRAIN_TARGET = 0.5, 0.35


def main(*, quick: bool = False) -> Table:
    """Both cases, cached and not, by turns."""
    runs, count = (2, 400) if quick else (5, SENTENCES)
    rows = [encoder(runs, count), training(runs)]
    text = [
        f"all-MiniLM-L6-v2 over {count:,} real sentences of which {REPEATED:.0%} came before; a new head on a frozen "
        f"CNN, {EPOCHS} epochs over 1,797 real digits. Each run starts with an empty cache; results are compared.",
    ]
    return Table("torch_activation", "PyTorch: activations kept per sample", text, rows)


def encoder(runs: int, count: int) -> Row:
    """Seconds for all sentences."""
    model, tokenizer = torch_encoder.load()
    texts = sentences.stream(count, REPEATED)
    found: dict[str, torch.Tensor] = {}
    cache = KVCache(memory="1GiB")
    cache.attach(model, kind="activation")

    def run(name: str) -> float:
        cache.clear()
        start = time.perf_counter()
        with torch.inference_mode(), cache if name == "ours" else contextlib.nullcontext():
            found[name] = torch_encoder.encode(model, tokenizer, texts)
        return time.perf_counter() - start

    with torch.inference_mode():
        torch_encoder.encode(model, tokenizer, texts[:64])
    samples = alternate({"ours": lambda: run("ours"), PLAIN: lambda: run(PLAIN)}, runs, "MiniLM", warm_up=0)
    torch.testing.assert_close(found["ours"], found[PLAIN], rtol=0, atol=1e-5)
    return Row.of(f"MiniLM, {count:,} sentences", "s", samples, target=(PLAIN, TEXT_TARGET))


def training(runs: int) -> Row:
    """Seconds for all epochs."""
    trunk = torch_images.build_trunk()
    torch_images.fit(trunk, torch_images.new_head(5), torch_images.digits(range(5)), 1)
    trunk.requires_grad_(False).eval()
    data = torch_images.digits()
    cache = KVCache(size=len(data))
    cache.attach(trunk)
    losses: dict[str, list[float]] = {}

    def run(name: str) -> float:
        cache.clear()
        around = (lambda: cache) if name == "ours" else contextlib.nullcontext
        losses[name], seconds = torch_images.fit(trunk, torch_images.new_head(10), data, EPOCHS, around)
        return seconds

    samples = alternate({"ours": lambda: run("ours"), PLAIN: lambda: run(PLAIN)}, runs, "frozen CNN", warm_up=0)
    torch.testing.assert_close(torch.tensor(losses["ours"]), torch.tensor(losses[PLAIN]), rtol=1e-3, atol=1e-4)
    return Row.of(f"frozen CNN, new head, {EPOCHS} epochs", "s", samples, target=(PLAIN, TRAIN_TARGET))
