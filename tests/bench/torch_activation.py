"""PyTorch: what the activation cache saves: a sentence encoder over repeating sentences, a head on a frozen CNN."""

from __future__ import annotations

import contextlib
import copy
import itertools
import time

import torch
from activations import (
    AT_ONCE,
    BATCHES,
    BYPASS_TARGET,
    EPOCHS,
    PLAIN,
    REPEATED,
    TEXT_TARGET,
    TURNS,
    Sizes,
    all_rows,
    check_bypassed,
    weights_check,
)
from measure import Row, Table, alternate
from smol import checkpoint
from torch import nn

import llama_torch
import sentences
import torch_encoder
import torch_images
from kvcache_torch import KVCache


def main(*, quick: bool = False) -> Table:
    """Both cases, cached and not, by turns."""
    sizes = Sizes.of(quick=quick)
    count, pictures = sizes.sentences, sizes.pictures
    rows = all_rows(sizes, encoder, training, [bypass, look])
    text = [
        f"all-MiniLM-L6-v2 over {count:,} real sentences of which {REPEATED:.0%} came before; a new head on a frozen "
        f"CNN, {EPOCHS} epochs over {pictures:,} pictures of MNIST, with the example's channels and with a quarter of "
        "them, a tenth of the work. Each run starts with an empty cache; results are compared.",
        'Then what a cache costs where it cannot help: a two-layer MLP with `bypass="auto"` after its first hundred '
        "calls, and the look at SmolLM2's weights that each `with cache:` and `generate` takes, against one decode "
        "step.",
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
    return Row.of(f"MiniLM, {count:,} sentences", "s", samples, targets={PLAIN: TEXT_TARGET})


def training(runs: int, width: int, pictures: int, targets: dict[str, float]) -> Row:
    """Seconds for all epochs."""
    trunk = torch_images.build_trunk(width)
    torch_images.fit(trunk, torch_images.new_head(5), torch_images.pictures(pictures, range(5)), 1)
    trunk.requires_grad_(False).eval()
    data = torch_images.pictures(pictures)
    cache = KVCache(size=len(data))
    cache.attach(trunk)
    losses: dict[str, list[float]] = {}

    def run(who: str) -> float:
        cache.clear()
        around = (lambda: cache) if who == "ours" else contextlib.nullcontext
        losses[who], seconds = torch_images.fit(trunk, torch_images.new_head(10), data, EPOCHS, around)
        return seconds

    samples = alternate({"ours": lambda: run("ours"), PLAIN: lambda: run(PLAIN)}, runs, "frozen CNN", warm_up=0)
    torch.testing.assert_close(torch.tensor(losses["ours"]), torch.tensor(losses[PLAIN]), rtol=1e-3, atol=1e-4)
    return Row.of(f"frozen CNN, {width} channels, new head, {EPOCHS} epochs", "s", samples, targets=targets)


def bypass(runs: int) -> Row:
    """Microseconds a call of a module that is cheaper than its cache."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)).eval()
    plain = copy.deepcopy(model)
    cache = KVCache(4096, bypass="auto")
    cache.attach(model, kind="activation")
    inputs = [torch.randn(32, 256) for _ in range(BATCHES)]  # more samples than fit: none is there when it comes again
    with torch.inference_mode(), cache:
        for x in inputs[:100]:
            model(x)

    batches = itertools.cycle(inputs)

    def run(module: nn.Module) -> float:
        with torch.inference_mode(), cache:
            start = time.perf_counter()
            for x in itertools.islice(batches, AT_ONCE):
                module(x)
            return 1e6 * (time.perf_counter() - start) / AT_ONCE

    samples = alternate({"ours": lambda: run(model), PLAIN: lambda: run(plain)}, TURNS * runs, "two-layer MLP")
    check_bypassed(cache, (TURNS * runs + 1) * AT_ONCE)
    return Row.of("two-layer MLP, bypassed", "us", samples, targets={PLAIN: BYPASS_TARGET})


def look(runs: int) -> Row:
    """Milliseconds to notice whether SmolLM2's weights changed."""
    cache = KVCache(256)
    cache.attach(llama_torch.from_checkpoint(checkpoint()), outputs="last")
    return weights_check(runs, cache, lambda seq, steps: [cache.step_greedy([seq], [[1]]) for _ in range(steps)], 4)
