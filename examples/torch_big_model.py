"""Models whose weights do not fit: read from a file when a layer runs. Beside it: keras_big_model.py.

First SmolLM2 with memory for a third of its weights: the same tokens, and what had to be read for them. Then a
mixture of experts, tiny and random, with memory for some of its experts: the ones that are asked for stay.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import llama_torch
from demo_prompts import QUESTIONS, SYSTEM
from kvcache_torch import KVCache, ParameterCache, generate
from smollm2 import Checkpoint, load_checkpoint

WIDTH, EXPERTS, PER_TOKEN = 64, 16, 2


def answer(model, prompt, new_tokens):
    """Greedy tokens, and the seconds."""
    cache = KVCache(size=256)
    cache.attach(model)
    start = time.perf_counter()
    (tokens,) = generate(model, [prompt], max_new_tokens=new_tokens, cache=cache)
    seconds = time.perf_counter() - start
    cache.detach()
    return tokens, seconds


def language_model(folder: Path, checkpoint: Checkpoint, prompt: list[int], new_tokens: int, share: float) -> None:
    model = llama_torch.from_checkpoint(checkpoint)
    ParameterCache.save(model, folder / "model.safetensors")
    expected, plain_seconds = answer(model, prompt, new_tokens)
    total = sum(weight.nbytes for weight in model.parameters())
    del model

    with torch.device("meta"):  # nothing is allocated
        model = llama_torch.Llama(checkpoint.config).eval()
    parameters = ParameterCache(folder / "model.safetensors", memory=int(share * total))
    parameters.attach(model)
    tokens, seconds = answer(model, prompt, new_tokens)

    stats = parameters.stats()
    print(f"{checkpoint.name}: {mib(total)} of weights, never more than {mib(stats.peak_bytes)} of them in memory")
    print(f"read {mib(stats.bytes_read)} for {new_tokens} tokens; the embedding, held by the model itself, once a step")
    print(f"{plain_seconds:.1f} s with all weights in memory, {seconds:.1f} s with {share:.0%}")
    print(f"tokens equal: {tokens == expected}")
    assert tokens == expected


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Mixture(nn.Module):
    """Tokens [N, C] -> [N, C]: each goes through the experts that its router likes best, and some are popular."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x):
        scores, chosen = self.router(x).softmax(-1).topk(PER_TOKEN, -1)
        result = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            result[rows] += scores[rows, place, None] * self.experts[expert](x[rows])
        return result


def mixture(folder: Path, steps: int, room: int) -> None:
    torch.manual_seed(0)
    model = Mixture().eval()
    with torch.no_grad():
        model.router.bias.copy_(-1.5 * torch.arange(1.0, EXPERTS + 1).log())  # what popularity looks like in practice
    ParameterCache.save(model, folder / "mixture.safetensors")
    inputs = torch.randn(steps, 1, WIDTH)
    expected = [model(x) for x in inputs]

    each = sum(weight.nbytes for weight in model.experts[0].parameters())
    memory = room * each + sum(weight.nbytes for weight in model.router.parameters())
    parameters = ParameterCache(folder / "mixture.safetensors", memory=memory)
    parameters.attach(model)
    found = [model(x) for x in inputs]

    stats = parameters.stats()
    experts = sorted((stats.of(f"experts.{at}") for at in range(EXPERTS)), key=lambda one: -(one.hits + one.misses))
    hits, calls = (
        sum(one.hits for one in experts[: room // 2]),
        sum(one.hits + one.misses for one in experts[: room // 2]),
    )
    equal = all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    print(f"mixture: {EXPERTS} experts, memory for {room}; {steps} tokens, {PER_TOKEN} experts each")
    print(f"hit ratio {stats.of('experts').hit_ratio:.2f}, of the {room // 2} hottest experts {hits / calls:.2f}")
    print(f"read {mib(stats.bytes_read)}; outputs equal: {equal}")
    assert equal


def mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


@torch.inference_mode()
def main(new_tokens: int = 16, share: float = 1 / 3, checkpoint: Checkpoint | None = None, steps: int = 300) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if checkpoint is None:
            checkpoint = load_checkpoint()
            prompt = checkpoint.chat(SYSTEM, QUESTIONS[0])
        else:
            prompt = list(range(1, 20))
        language_model(Path(folder), checkpoint, prompt, new_tokens, share)
        mixture(Path(folder), steps, room=8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--share", type=float, default=1 / 3, help="of the weights that memory is for")
    main(**vars(parser.parse_args()))
