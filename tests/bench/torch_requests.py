"""PyTorch: many requests at once, and drafts, each against the plain way."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from measure import Row, Table, alternate, seconds
from smol import checkpoint, prompt
from torch_batch import greedy
from torch_decode import transformers_model
from transformers import DynamicCache

import llama_torch
from kvcache_torch import KVCache, generate

SEQUENTIAL, PLAIN = "transformers generate, one by one", "without drafts"
LOOKUP = "transformers, prompt_lookup_num_tokens"


def requests(quick: bool) -> Row:
    """32 requests of mixed length: all at once, or one after another."""
    rng = np.random.default_rng(0)
    count, longest, most = (8, 128, 32) if quick else (32, 256, 16)
    lengths, new = rng.integers(16, longest, count), rng.integers(4, most + 1, count).tolist()
    prompts = [prompt(int(length), seed=10 + at) for at, length in enumerate(lengths)]
    model, theirs = llama_torch.from_checkpoint(checkpoint()), transformers_model()
    theirs.generation_config.eos_token_id = None
    cache = KVCache(size=int(sum(lengths) + sum(new)) // 16 + 3 * count)
    cache.attach(model, outputs="last")
    cache.compile()
    answers: dict[str, list[list[int]]] = {}

    def ours() -> float:
        def answer() -> None:
            answers["ours"] = generate(model, prompts, max_new_tokens=new, cache=cache)

        cache.clear()
        return seconds(answer)

    @torch.inference_mode()
    def sequential(some: int = count) -> float:
        def answer() -> None:
            answers[SEQUENTIAL] = []
            for tokens, limit in zip(prompts[:some], new, strict=False):
                ids = torch.tensor([tokens])
                options = {**greedy(theirs, limit), "attention_mask": torch.ones_like(ids)}
                found = theirs.generate(ids, past_key_values=DynamicCache(), **options)
                answers[SEQUENTIAL].append(found[0, len(tokens) :].tolist())

        return seconds(answer)

    # Warmed up: ours by all requests, so that both graphs are compiled; the other, which compiles nothing, by one.
    ours(), sequential(1)
    samples = alternate({"ours": ours, SEQUENTIAL: sequential}, 1 if quick else 5, "requests", warm_up=0)
    equal = np.mean([one == other for one, other in zip(answers["ours"], answers[SEQUENTIAL], strict=True)])
    case = f"{count} requests, prompts of 16 to {longest} tokens, 4 to {most} new tokens"
    return Row.of(case, "s", samples, targets={SEQUENTIAL: 0.5}, extra={"share of equal answers": float(equal)})


def drafts(quick: bool) -> Row:
    """A text that repeats itself: the model is asked to copy."""
    words = "The cache keeps what was computed, and nobody computes it again. "
    text = checkpoint().chat("Repeat the text word by word.", words * 4)
    new = 32 if quick else 64
    model, theirs = llama_torch.from_checkpoint(checkpoint()), transformers_model()
    theirs.generation_config.eos_token_id = None
    cache = KVCache(size=(len(text) + new) // 16 + 32)
    cache.attach(model, outputs="last")
    ids = torch.tensor([text])
    answers: dict[str, list[int]] = {}

    def run(name: str, speculate: int | None) -> float:
        def answer() -> None:
            answers[name] = generate(model, [text], max_new_tokens=new, cache=cache, speculate=speculate)[0]

        cache.clear()
        return seconds(answer)

    @torch.inference_mode()
    def lookup() -> float:
        options = {**greedy(theirs, new), "attention_mask": torch.ones_like(ids), "prompt_lookup_num_tokens": 8}
        return seconds(lambda: theirs.generate(ids, **options))

    candidates = {"ours": lambda: run("ours", 8), PLAIN: lambda: run(PLAIN, None), LOOKUP: lookup}
    samples = alternate(candidates, 3 if quick else 5, "drafts")
    if answers["ours"] != answers[PLAIN]:
        raise AssertionError(f"drafts changed the answer: {answers}")
    return Row.of(f"copying a text, {new} new tokens, speculate=8", "s", samples, targets={PLAIN: 0.6})


def main(*, quick: bool = False) -> Table:
    """Both cases."""
    warnings.simplefilter("ignore")
    text = [
        "The same prompts and numbers of new tokens for all, greedy, cold. Continuous batching: all requests in one "
        "`generate`. Drafts: prompt lookup; the same tokens as without, checked in the run. Ours after "
        "`cache.compile()` in the first row. transformers' own continuous batching, `generate_batch`, is in the table "
        "of prompts behind one prefix: it takes minutes here.",
    ]
    rows = [requests(quick), drafts(quick)]
    return Table("torch_requests", "PyTorch: continuous batching, speculation", text, rows)
