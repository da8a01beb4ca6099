"""transformers: `generate` over prompts that share a prefix, against what transformers ships."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from hf_smol import model
from measure import Row, Table, alternate, seconds
from smol import prompt

from kvcache_torch import KVCache
from kvcache_torch.hf import HFCache

ROWS, SHARED, OWN, NEW = 8, 1024, 64, 16
NO_REUSE, BY_HAND, BATCHED = "generate, no reuse", "DynamicCache kept by hand", "generate_batch"


def main(*, quick: bool = False) -> Table:
    """`generate` with an HFCache, from an empty cache, against three ways of transformers' own."""
    lm = model()
    shared = prompt(SHARED, seed=0)
    ids = torch.tensor([shared + prompt(OWN, seed=1 + row) for row in range(ROWS)])
    cache = KVCache(size=SHARED // 16 + ROWS * ((OWN + NEW) // 16 + 2) + 8)
    cache.attach(lm, outputs="last")
    cache.compile()
    found: dict[str, torch.Tensor] = {}

    def greedy(name: str, **more: Any) -> None:
        found[name] = lm.generate(ids, max_new_tokens=NEW, do_sample=False, **more)

    def ours() -> float:
        cache.clear()
        return seconds(lambda: greedy("ours", cache=HFCache(cache)))

    def ours_again() -> float:
        cache.clear()
        cache.warm([shared])
        return seconds(lambda: greedy("ours", cache=HFCache(cache)))

    def prefix() -> Any:
        past = transformers.DynamicCache(config=lm.config)
        with torch.no_grad():
            lm(torch.tensor([shared]), cache=past, logits_to_keep=1)
        return past

    def continued(past: Any) -> None:
        rows = copy.deepcopy(past)
        rows.batch_repeat_interleave(ROWS)
        greedy(BY_HAND, cache=rows)

    def by_hand() -> float:
        return seconds(lambda: continued(prefix()))

    def by_hand_again() -> float:
        past = prefix()
        return seconds(lambda: continued(past))

    def no_reuse() -> float:
        return seconds(lambda: greedy(NO_REUSE))

    def batched() -> float:
        config = transformers.GenerationConfig(
            max_new_tokens=NEW, do_sample=False, pad_token_id=0, num_blocks=800, max_batch_tokens=2048
        )
        return seconds(lambda: lm.generate_batch(ids.tolist(), generation_config=config, progress_bar=False))

    case = f"{ROWS} prompts, {SHARED:,} shared + {OWN} own tokens, {NEW} new"
    runs = 1 if quick else 5
    lm.generate(ids[:, :32], max_new_tokens=2, do_sample=False)  # warm: a whole turn would take half a minute
    cold = alternate({"ours": ours, BY_HAND: by_hand, NO_REUSE: no_reuse}, runs, "transformers, cold", warm_up=0)
    warm = alternate({"ours": ours_again, BY_HAND: by_hand_again}, runs, "transformers, prefix there", warm_up=0)
    paged = {} if quick else alternate({"ours": ours, BATCHED: batched}, 1, "transformers, generate_batch", warm_up=0)
    if not torch.equal(found["ours"], found[NO_REUSE]):
        raise AssertionError("generate with the cache chose other tokens than without")
    cache.detach()
    rows = [Row.of(case, "s", cold, targets={NO_REUSE: 0.15, BY_HAND: 0.7})]
    if paged:
        rows.append(Row.of(f"{case}, once", "s", paged, targets={BATCHED: 0.1}))
    rows.append(Row.of(f"{case}, the prefix computed before", "s", warm, targets={BY_HAND: 0.7}))
    text = [
        "SmolLM2 in transformers, `generate` as it is, greedy. Ours: after `cache.compile()`, `HFCache` on an empty "
        "cache, so that the shared "
        "prefix is computed once within the call; by hand it is computed into a `DynamicCache`, copied and repeated "
        "for the rows. In the last case both have the prefix before the clock starts.",
        "`generate_batch` is transformers' continuous batching with its own prefix sharing; it is run once, because it "
        "takes more than a minute, and not at all with `--quick`.",
    ]
    return Table("hf_generate", "transformers: generate with a shared prefix", text, rows)
