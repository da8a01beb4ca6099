"""PyTorch: one decode step of one sequence, against transformers and a hand-written cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from measure import Row, Table, alternate, clock, read_bandwidth
from preallocated import Preallocated
from smol import checkpoint, prompt
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import llama_torch
from kvcache_torch import KVCache

HAND, DYNAMIC = "hand-written cache, same model, compiled too", "transformers DynamicCache"
EAGER = "ours, not compiled"
FLOOR = "floor: weights and live K/V read once"
STEPS = 8
TARGETS = {FLOOR: 1.5, DYNAMIC: 0.65, HAND: 1.03}


def transformers_model() -> LlamaForCausalLM:
    """transformers' Llama on the same weights."""
    ours, weights = checkpoint().config, checkpoint().weights
    config = LlamaConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_heads,
        num_key_value_heads=ours.num_kv_heads,
        head_dim=ours.head_dim,
        rms_norm_eps=ours.norm_eps,
        rope_theta=ours.rope_theta,
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
        max_position_embeddings=ours.max_positions,
        tie_word_embeddings=ours.tied,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()}, strict=False)
    return model.eval().requires_grad_(False)


class Contenders:
    """Three caches with the same past, each of which can take one step.

    The past is computed once, by ours, and copied to the others: so all of them go on from the same numbers.
    """

    def __init__(self, context: int, room: int) -> None:
        model = llama_torch.from_checkpoint(checkpoint())
        self.cache = KVCache(size=(context + room) // 16 + 8)
        self.cache.attach(model, outputs="last")
        self.cache.compile()
        self.compiled = self.cache._driver.decode
        tokens = prompt(context, seed=context)
        self.seq = self.cache.open(tokens, max_new_tokens=room)
        first = int(np.argmax(self.cache.step([self.seq], [tokens])[0]))
        self.hand = Preallocated(model, context + room, folded=True, compiled=True)
        self.transformers = transformers_model()
        self.dynamic = DynamicCache()
        ((start, size, _),) = self._extents()
        for layer in range(model.config.num_layers):
            past = [array[:, :, start : start + size] for array in self.cache.store.batched(layer)]
            self.hand.keys[layer][:, :, :context] = past[0]
            self.hand.values[layer][:, :, :context] = past[1]
            self.dynamic.update(past[0].clone(), past[1].clone(), layer)
        self.hand.length = context
        self.fork = self.seq.fork()
        self.tokens: dict[str, list[int]] = {name: [first] for name in ("ours", EAGER, HAND, DYNAMIC)}
        self.read = read_bandwidth()
        config = model.config
        self.weights = sum(weight.nbytes for weight in model.parameters())
        self.per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4

    def _extents(self) -> list[tuple[int, int, int]]:
        plan = self.cache.core.plan([self.seq], [[0]])
        self.cache.core.rollback(plan)
        start, size, first = plan.groups[0].extents[0][0]
        return [(start, size - 1, first)]

    def ours(self, token: int) -> int:
        self.cache._driver.decode = self.compiled
        return int(np.argmax(self.cache.step([self.seq], [[token]])[0]))

    def eager(self, token: int) -> int:
        self.cache._driver.decode = None
        return int(np.argmax(self.cache.step([self.fork], [[token]])[0]))

    def floor(self) -> float:
        """Milliseconds."""
        return (self.weights + self.per_token * self.seq.length) / self.read() * 1e3

    @torch.inference_mode()
    def transformers_step(self, token: int) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it will be named `cache` one day
            output = self.transformers(torch.tensor([[token]]), past_key_values=self.dynamic, use_cache=True)
        return int(output.logits[0, -1].argmax())

    def run(self, name: str) -> float:
        """Milliseconds per step over a few steps, greedy."""
        step: Callable[[int], int] = {
            "ours": self.ours,
            EAGER: self.eager,
            HAND: lambda token: int(self.hand.step([token]).argmax()),
            DYNAMIC: self.transformers_step,
        }[name]
        token = self.tokens[name][-1]
        start = clock()
        for _ in range(STEPS):
            token = step(token)
            self.tokens[name].append(token)
        return (clock() - start) / STEPS * 1e3


def measure(context: int, runs: int) -> list[Row]:
    """One context length: one row per target, all from the same runs."""
    room = STEPS * (runs + 2) + 16
    contenders = Contenders(context, room)
    candidates = {name: (lambda name=name: contenders.run(name)) for name in contenders.tokens}
    candidates[FLOOR] = contenders.floor
    samples = alternate(candidates, runs, f"PyTorch decode at {context:,}")
    if len({tuple(tokens) for tokens in contenders.tokens.values()}) > 1:
        raise AssertionError(f"the caches chose different tokens: {contenders.tokens}")
    rows = []
    for peer, target in TARGETS.items():
        kept = samples if not rows else {"ours": samples["ours"], peer: samples[peer]}
        case = f"context {context:,}" if not rows else f"context {context:,}, the same runs"
        rows.append(Row.of(case, "ms/step", kept, target=(peer, target)))
    return rows


def main(*, quick: bool = False) -> Table:
    """Both context lengths."""
    rows = [row for context in (1024, 4096) for row in measure(context, 5 if quick else 15)]
    text = [
        f"Batch 1, greedy. A run is {STEPS} steps; the whole step counts: plan, model, commit and choosing the token. "
        "Ours after `cache.compile()`. The hand-written cache is the same example model on fixed tensors "
        "(`tests/bench/preallocated.py`), compiled in the same way: the ratio to it is the cache's own cost. All chose "
        "the same tokens. The floor is what the memory allows: the bytes of weights and live K/V over the read "
        "bandwidth that `torch.dot` reaches in the same run.",
    ]
    return Table("torch_decode", "PyTorch: decode step", text, rows)
