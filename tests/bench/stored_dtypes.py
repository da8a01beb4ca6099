"""PyTorch: what each stored dtype costs in accuracy and saves in bytes, on a real model and a real text."""

from __future__ import annotations

import math
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from measure import Row, Table
from smol import checkpoint

import llama_torch
from kvcache_torch import KVCache, generate

DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3", "int8")
TOKENS, PROMPT, NEW = 1024, 128, 200
EXACT = "float32, the model's own"


def text_ids() -> list[int]:
    """English prose that Python ships: its language reference on the execution model."""
    prose = " ".join(topics["execmodel"].split())
    return checkpoint().tokenizer.encode(prose).ids[:TOKENS]


def main(*, quick: bool = False) -> Table:
    """One row per stored dtype; the model computes in float32."""
    model = llama_torch.from_checkpoint(checkpoint())
    ids = text_ids()
    starts = range(0, TOKENS - PROMPT, TOKENS) if quick else range(0, TOKENS - PROMPT, TOKENS // 4)
    prompts = [ids[start : start + PROMPT] for start in starts]
    with torch.no_grad():
        plain = model(torch.tensor([ids]))[0]
    uncached = _greedy(model, prompts)
    rows = []
    for dtype in DTYPES:
        cache = KVCache(size=TOKENS // 16 + 2 * len(prompts) * ((PROMPT + NEW) // 16 + 2), dtype=dtype)
        cache.attach(model)
        with torch.no_grad(), cache:
            model(torch.tensor([ids[: TOKENS // 2]]))
            logits = model(torch.tensor([ids]))[0]  # its second half attends to what the first call has stored
        forced = _forced(cache, model, prompts, uncached)
        found = generate(model, prompts, max_new_tokens=NEW, cache=cache)
        agreed = [_agreed(one, other) for one, other in zip(found, uncached, strict=True)]
        spec = cache.core.layout
        per_token = [sum(spec.layer_bytes_per_token(layer) for layer in range(len(spec.layers) - 1))]
        exact = [float(sum(spec_bytes(layer) for layer in spec.layers[:-1]))]
        extra = {
            "largest logit difference": float((logits - plain).abs().max()),
            "perplexity": _perplexity(logits, ids),
            "percent above the uncached model's": 100 * (_perplexity(logits, ids) / _perplexity(plain, ids) - 1),
            f"greedy tokens of {NEW} before the first other one": sum(agreed) / len(agreed),
            f"the same next token behind the uncached model's own, of {NEW}": forced,
        }
        rows.append(Row.of(dtype, "bytes per token", {"ours": per_token, EXACT: exact}, extra=extra))
        cache.detach()
    text = [
        f"SmolLM2 computing in float32, K and V stored in another dtype. The text is the first {TOKENS:,} tokens of "
        "`pydoc_data.topics['execmodel']`, English prose that Python ships. Logit difference and perplexity: over all "
        "its positions, the second half computed in a call of its own, against the uncached model. Greedy: means over "
        f"{len(prompts)} prompts of {PROMPT} tokens of the text, against {NEW} tokens that the uncached model chooses: "
        "how many come before the first other one (what follows is another text), and how often the next token is the "
        "same where all before it are the uncached model's. "
        "One run: nothing here is a time, and nothing is random.",
    ]
    return Table("stored_dtypes", "PyTorch: stored dtypes", text, rows)


def _forced(cache: KVCache, model: Any, prompts: list[list[int]], uncached: list[list[int]]) -> float:
    """Behind how many of the uncached model's tokens the most likely next one is the same; mean over the prompts."""
    rows = torch.tensor([[*prompt, *new] for prompt, new in zip(prompts, uncached, strict=True)])
    with torch.no_grad(), cache:
        chosen = model(rows)[:, PROMPT - 1 : -1].argmax(dim=-1)
    return float((chosen == torch.tensor(uncached)).sum()) / len(prompts)


def spec_bytes(layer: Any) -> int:
    """Bytes of a layer's K and V of one token in float32."""
    return 4 * int(layer.elements_per_token)


def _greedy(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """What the uncached model chooses: proposed by an exact cache, checked by one pass without any."""
    cache = KVCache(size=len(prompts) * ((PROMPT + NEW) // 16 + 2))
    cache.attach(model, outputs="last")
    found = generate(model, prompts, max_new_tokens=NEW, cache=cache)
    cache.detach()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *new] for prompt, new in zip(prompts, found, strict=True)]))
    for row, new in enumerate(found):
        chosen = logits[row, PROMPT - 1 : -1]
        best = chosen.max(dim=-1).values - chosen[torch.arange(NEW), torch.tensor(new)]
        if float(best.max()) > 1e-3:  # two tokens as good as each other may change places
            raise AssertionError("the exact cache chose other tokens than the uncached model")
    return found


def _agreed(one: list[int], other: list[int]) -> int:
    """How many tokens are the same before the first that is not."""
    differing = np.flatnonzero(np.array(one) != np.array(other))
    return int(differing[0]) if len(differing) else len(one)


def _perplexity(logits: torch.Tensor, ids: list[int]) -> float:
    """Of the text, each token given those before it."""
    loss = torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:]))
    return math.exp(float(loss))
