"""Models whose weights do not fit: read from a file when a layer runs. Beside it: keras_big_model.py.

First SmolLM2 with memory for a third of its weights: the same tokens, and what had to be read for them. Then a
mixture of experts, tiny and random, with memory for some of its experts: the ones that are asked for stay.
"""

from pathlib import Path

import torch
from torch import nn

import big_model_run
import llama_torch
from kvcache_torch import KVCache, ParameterCache, generate
from smollm2 import Checkpoint

WIDTH, EXPERTS, PER_TOKEN = 64, 16, 2


def language_model(folder: Path, checkpoint: Checkpoint, prompt: list[int], new_tokens: int, share: float) -> None:
    model = llama_torch.from_checkpoint(checkpoint)
    ParameterCache.save(model, folder / "model.safetensors")
    plain = big_model_run.answer(generate, model, KVCache(size=256), prompt, new_tokens)
    total = sum(weight.nbytes for weight in model.parameters())
    del model

    with torch.device("meta"):  # nothing is allocated
        model = llama_torch.Llama(checkpoint.config).eval()
    parameters = ParameterCache(folder / "model.safetensors", memory=int(share * total))
    parameters.attach(model)
    found = big_model_run.answer(generate, model, KVCache(size=256), prompt, new_tokens)
    big_model_run.show_language_model(checkpoint.name, parameters.stats(), total, share, plain, found)


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

    equal = all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    big_model_run.show_mixture(parameters.stats(), EXPERTS, PER_TOKEN, room, steps, equal=equal)


@torch.inference_mode()
def main(**options) -> None:
    big_model_run.run(language_model, mixture, **options)


if __name__ == "__main__":
    main(**big_model_run.wanted(__doc__))
