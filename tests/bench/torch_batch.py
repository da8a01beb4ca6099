"""PyTorch: a batch of prompts behind one prefix, cold and warm, against what transformers offers."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Iterable

import numpy as np
import torch
from measure import Row, Table, alternate, read_bandwidth, seconds
from smol import checkpoint, prompt
from torch_decode import transformers_model
from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM

import llama_torch
from kvcache_torch import KVCache, generate

SHARED, OWN, PROMPTS, NEW = 1024, 64, 8, 16
NO_REUSE, BY_HAND, CONTINUOUS = "transformers generate", "DynamicCache, prefix by hand", "transformers generate_batch"
FLOOR = "floor: each token's products once, the weights read once per further step"


class Work:
    """The prompts, and everybody's way to continue them. Keeps what each has answered."""

    def __init__(self) -> None:
        self.shared = prompt(SHARED, seed=1)
        self.own = [prompt(OWN, seed=2 + number) for number in range(PROMPTS)]
        self.prompts = [self.shared + own for own in self.own]
        self.model = llama_torch.from_checkpoint(checkpoint())
        self.cache = KVCache(size=SHARED // 16 + PROMPTS * (OWN + NEW) // 16 + 64)
        self.cache.attach(self.model, outputs="last")
        self.cache.compile()
        self.theirs = transformers_model()
        self.theirs.generation_config.eos_token_id = None
        self.answers: dict[str, list[list[int]]] = {}
        self.read = read_bandwidth()
        self.matrices = [weight for block in self.model.blocks for weight in block.parameters() if weight.ndim == 2]

    def ours(self) -> float:
        """With whatever the cache holds."""

        def answer() -> None:
            self.answers["ours"] = generate(self.model, self.prompts, max_new_tokens=NEW, cache=self.cache)

        return seconds(answer)

    def cold(self) -> float:
        """With an empty cache."""
        self.cache.clear()
        return self.ours()

    def warm(self) -> float:
        """With the prompts cached; what was generated is as new as the first time."""
        self.cache.clear()
        self.cache.warm(self.prompts)
        return self.ours()

    @torch.inference_mode()
    def no_reuse(self) -> float:
        """All prompts in one padded batch, as `generate` takes them."""
        ids = torch.tensor(self.prompts)

        def answer() -> None:
            found = self.theirs.generate(ids, attention_mask=torch.ones_like(ids), **greedy(self.theirs))
            self.answers[NO_REUSE] = found[:, ids.shape[1] :].tolist()

        return seconds(answer)

    @torch.inference_mode()
    def by_hand(self) -> float:
        """The prefix once, its cache repeated for every prompt, then the own tokens and greedy steps in one batch."""

        def answer() -> None:
            past = DynamicCache()
            self.theirs(torch.tensor([self.shared]), past_key_values=past, use_cache=True, logits_to_keep=1)
            past.batch_repeat_interleave(PROMPTS)
            tokens, found = torch.tensor(self.own), []
            for _ in range(NEW):
                logits = self.theirs(tokens, past_key_values=past, use_cache=True, logits_to_keep=1).logits
                tokens = logits[:, -1].argmax(-1, keepdim=True)
                found.append(tokens)
            self.answers[BY_HAND] = torch.cat(found, dim=1).tolist()

        return seconds(answer)

    def continuous(self) -> float:
        """transformers' own continuous batching, which shares prefixes too."""
        model = copy.deepcopy(self.theirs)
        config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=True)
        start = time.perf_counter()
        found = model.generate_batch(inputs=self.prompts, generation_config=config)
        took = time.perf_counter() - start
        self.answers[CONTINUOUS] = [list(row.generated_tokens) for row in found.values()]
        return took

    def floor(self) -> float:
        """What no cache can save: PyTorch's products of the layers with the tokens that differ, no attention, and the
        bytes of the weights for each step after the first.
        """
        widths = {weight.shape[1] for weight in self.matrices}
        inputs = {width: [torch.zeros(rows, width) for rows in (SHARED, PROMPTS * OWN)] for width in widths}

        def multiply() -> None:
            for weight in self.matrices:
                for x in inputs[weight.shape[1]]:
                    torch.nn.functional.linear(x, weight)

        steps = (NEW - 1) * sum(weight.nbytes for weight in self.model.parameters()) / self.read()
        return seconds(multiply) + steps

    def agreement(self, peers: Iterable[str]) -> dict[str, float]:
        """Share of tokens in which a peer chose what ours did: rounding can turn a near tie."""
        ours = np.array(self.answers["ours"])
        return {f"tokens equal to those of {peer}": float((ours == self.answers[peer]).mean()) for peer in peers}


def greedy(model: LlamaForCausalLM, new: int = NEW) -> dict[str, object]:
    """`generate` options: greedy, all tokens wanted."""
    return {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}


def main(*, quick: bool = False) -> Table:
    """Cold against each way, and warm."""
    warnings.simplefilter("ignore")
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    work = Work()
    runs = 1 if quick else 5
    candidates = {"cold": work.cold, "warm": work.warm, BY_HAND: work.by_hand, NO_REUSE: work.no_reuse}
    candidates[FLOOR] = work.floor
    samples = alternate(candidates, runs, "8 prompts", warm_up=1)
    rows = [
        row("cold", samples, {BY_HAND: 0.68, NO_REUSE: 0.15}, work),
        Row.of("cold, against the floor", "s", {"ours": samples["cold"], FLOOR: samples[FLOOR]}),
        row("warm", samples, {NO_REUSE: 0.06}, work),
    ]
    if not quick:
        once = alternate({"cold": work.cold, CONTINUOUS: work.continuous}, 1, "8 prompts, once", warm_up=0)
        rows.append(row("cold", once, {CONTINUOUS: 0.1}, work, note=", once"))
    text = [
        f"{PROMPTS} prompts that share {SHARED:,} tokens and have {OWN} of their own, {NEW} new tokens each, greedy. "
        "Ours: the example model and `kvcache_torch.generate` after `cache.compile()`, the prefix computed once, then "
        "all own tokens in one step. Warm: the prompts are cached, the answers are not. The floor is what no cache can "
        f"save: PyTorch's products of all layers with the {SHARED + PROMPTS * OWN:,} tokens that differ, without "
        f"attention, and {NEW - 1} times the bytes of the weights over the read bandwidth.",
    ]
    return Table("torch_batch", "PyTorch: 8 prompts behind one prefix", text, rows)


def row(case: str, samples: dict[str, list[float]], targets: dict[str, float], work: Work, note: str = "") -> Row:
    """One case against the peers that have a target."""
    sides = {"ours": samples[case], **{peer: samples[peer] for peer in targets}}
    return Row.of(case + note, "s", sides, targets=targets, extra=work.agreement(targets))
