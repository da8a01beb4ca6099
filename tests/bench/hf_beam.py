"""transformers: beam search, time to the first token and of each further step."""

from __future__ import annotations

from typing import Any

import torch
from hf_smol import model
from measure import Row, Table, alternate, clock
from smol import prompt
from transformers import StoppingCriteria, StoppingCriteriaList

from kvcache_torch import KVCache
from kvcache_torch.hf import HFCache

BEAMS, PROMPT, NEW = 4, 1024, 10
THEIRS = "transformers' own"


class Times(StoppingCriteria):
    """Notes when each step has ended; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(clock())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def main(*, quick: bool = False) -> Table:
    """A prompt that nobody has computed before, 4 beams."""
    lm = model()
    ids = torch.tensor([prompt(PROMPT, seed=0)])
    cache = KVCache(size=PROMPT // 16 + 64)
    cache.attach(lm, outputs="last")
    cache.compile()
    further: dict[str, list[float]] = {"ours": [], THEIRS: []}
    found: dict[str, torch.Tensor] = {}

    def search(name: str) -> float:
        cache.clear()
        times = Times()
        more = {"cache": HFCache(cache)} if name == "ours" else {}
        start = clock()
        found[name] = lm.generate(
            ids,
            max_new_tokens=NEW,
            num_beams=BEAMS,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([times]),
            **more,
        )
        further[name].append((times.times[-1] - times.times[0]) / (len(times.times) - 1) * 1e3)
        return times.times[0] - start

    runs = 2 if quick else 5
    lm.generate(ids[:, :32], max_new_tokens=2, num_beams=BEAMS, do_sample=False)
    first = alternate({"ours": lambda: search("ours"), THEIRS: lambda: search(THEIRS)}, runs, "beam search", warm_up=0)
    if not torch.equal(found["ours"], found[THEIRS]):
        raise AssertionError("beam search with the cache chose other tokens than without")
    cache.detach()
    case = f"{BEAMS} beams, {PROMPT:,} tokens"
    rows = [
        Row.of(f"{case}: first token", "s", first, targets={THEIRS: 0.35}),
        Row.of(f"{case}: each further step", "ms", further, targets={THEIRS: 0.5}),
    ]
    text = [
        "`generate(num_beams=4)` of SmolLM2 in transformers; nothing of the prompt is cached before. Ours after "
        "`cache.compile()`."
    ]
    return Table("hf_beam", "transformers: beam search", text, rows)
