"""PyTorch: beam search, time to the first token and of each further step, against transformers'."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from measure import Row, Table, alternate, clock
from smol import checkpoint, prompt
from torch_batch import greedy
from torch_decode import transformers_model

import llama_torch
from kvcache_torch import KVCache, generate

BEAMS, CONTEXT, NEW = 4, 1024, 13
THEIRS = "transformers beam search"


class Ours:
    """Our beam search; notes when each step begins."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.model = llama_torch.from_checkpoint(checkpoint())
        self.cache = KVCache(size=CONTEXT // 16 + 200)
        self.cache.attach(self.model, outputs="last")
        self.cache.compile()
        self.marks: list[float] = []
        self._step_top = self.cache.step_top
        self.cache.step_top = self._marked  # type: ignore[method-assign]

    def _marked(self, *args: object, **options: object) -> object:
        self.marks.append(clock())
        return self._step_top(*args, **options)  # type: ignore[arg-type]

    def run(self) -> list[int]:
        """The best beam, with an empty cache; leaves the times at which its tokens were chosen."""
        self.cache.clear()
        self.marks = []
        found = generate(self.model, [self.tokens], max_new_tokens=NEW, num_beams=BEAMS, cache=self.cache)[0]
        self.marks.append(clock())
        return found


class Theirs:
    """transformers' own; a stopping criterion is called when a step has ended."""

    def __init__(self, tokens: list[int]) -> None:
        self.ids = torch.tensor([tokens])
        self.model = transformers_model()
        self.model.generation_config.eos_token_id = None
        self.marks: list[float] = []

    def _mark(self, ids: torch.Tensor, scores: object, **options: object) -> torch.Tensor:
        self.marks.append(clock())
        return torch.zeros(len(ids), dtype=torch.bool)

    @torch.inference_mode()
    def run(self) -> list[int]:
        """The best beam; leaves the times at which its tokens were chosen."""
        options = {**greedy(self.model, NEW), "num_beams": BEAMS, "attention_mask": torch.ones_like(self.ids)}
        self.marks = [clock()]
        found = self.model.generate(self.ids, stopping_criteria=[self._mark], **options)
        return found[0, CONTEXT:].tolist()


def main(*, quick: bool = False) -> Table:
    """First token, and the median of the steps behind it."""
    warnings.simplefilter("ignore")
    tokens = prompt(CONTEXT, seed=1)
    sides: dict[str, Ours | Theirs] = {"ours": Ours(tokens), THEIRS: Theirs(tokens)}
    found: dict[str, list[int]] = {}
    steps: dict[str, list[float]] = {name: [] for name in sides}

    def run(name: str) -> float:
        found[name] = sides[name].run()
        took = np.diff(sides[name].marks)
        steps[name].append(float(np.median(took[1:])) * 1e3)
        return float(took[0])

    first = alternate({name: (lambda name=name: run(name)) for name in sides}, 3 if quick else 5, "beam search")
    warm = {name: values[1:] for name, values in steps.items()}
    rows = [
        Row.of("first token", "s", first, targets={THEIRS: 0.3}),
        Row.of("each further step", "ms", warm, targets={THEIRS: 0.4}),
    ]
    rows[0].extra["same best beam (1 = yes)"] = float(found["ours"] == found[THEIRS])
    text = [
        f"{BEAMS} beams, a prompt of {CONTEXT:,} tokens, {NEW} new tokens. A further step is the median over the "
        "steps of one run. Ours after `cache.compile()`.",
    ]
    return Table("torch_beam", "PyTorch: beam search", text, rows)
