"""PyTorch: one decode step of one sequence, against hand-written caches and those of other libraries."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measure import Row, Table, alternate, clock, read_bandwidth
from preallocated import Preallocated
from smol import checkpoint, prompt
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import llama_torch
from kvcache_torch import KVCache

HAND, DYNAMIC = "hand-written cache, same model and kernels", "transformers DynamicCache"
STATIC, X_TRANSFORMERS = "transformers StaticCache", "x-transformers, same shape, random weights"
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


class XTransformers:
    """x-transformers' own model of the same shape, and its cache, filled with random numbers."""

    def __init__(self, context: int) -> None:
        from x_transformers import Decoder, TransformerWrapper
        from x_transformers.attend import Intermediates
        from x_transformers.x_transformers import LayerIntermediates

        ours = checkpoint().config
        layers = Decoder(
            dim=ours.hidden_size,
            depth=ours.num_layers,
            heads=ours.num_heads,
            attn_kv_heads=ours.num_kv_heads,
            attn_dim_head=ours.head_dim,
            attn_flash=True,
            rotary_pos_emb=True,
            use_rmsnorm=True,
            ff_glu=True,
            ff_swish=True,
            ff_no_bias=True,
            ff_mult=ours.intermediate_size / ours.hidden_size,
        )
        self.model = TransformerWrapper(
            num_tokens=ours.vocab_size,
            max_seq_len=0,
            attn_layers=layers,
            tie_embedding=True,
            input_not_include_cache=True,
        )
        self.model.eval().requires_grad_(False)
        shape = (1, ours.num_kv_heads, context, ours.head_dim)
        past = [Intermediates(cached_kv=(torch.randn(shape), torch.randn(shape))) for _ in range(ours.num_layers)]
        self.past = LayerIntermediates(attn_intermediates=past, cache_length=context)

    @torch.inference_mode()
    def step(self, token: int) -> int:
        """One token further."""
        logits, self.past = self.model(torch.tensor([[token]]), cache=self.past, return_intermediates=True)
        return int(logits[0, -1].argmax())


class Contenders:
    """Caches with the same past, each of which can take one step.

    The past is computed once, by ours, and copied to the others: so all of them go on from the same numbers.
    """

    def __init__(self, context: int, room: int) -> None:
        self.model = llama_torch.from_checkpoint(checkpoint())
        self.context, self.room = context, room
        self.cache = KVCache(size=(context + room) // 16 + 8)
        self.cache.attach(self.model, outputs="last")
        tokens = prompt(context, seed=context)
        self.seq = self.cache.open(tokens, max_new_tokens=room)
        self.first = int(np.argmax(self.cache.step([self.seq], [tokens])[0]))
        plan = self.cache.core.plan([self.seq], [[0]])
        ((self.start, _, _),) = plan.groups[0].extents[0]
        self.cache.core.rollback(plan)
        self.transformers = transformers_model()
        self.read = read_bandwidth()
        config = self.model.config
        self.weights = sum(weight.nbytes for weight in self.model.parameters())
        self.per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4

    def past(self, layer: int) -> list[torch.Tensor]:
        """K and V of a layer, [1, H, context, D]."""
        return [array[None, :, self.start : self.start + self.context] for array in self.cache.store.pair(layer)]

    def hand(self, *, compiled: bool) -> Preallocated:
        """A hand-written cache with the same past."""
        found = Preallocated(self.model, self.context + self.room, folded=True, compiled=compiled)
        for layer in range(self.model.config.num_layers):
            found.keys[layer][:, :, : self.context], found.values[layer][:, :, : self.context] = self.past(layer)
        found.length = self.context
        return found

    def theirs(self, past: Any) -> Callable[[int], int]:
        """A step of transformers' model over one of its own caches, filled here."""
        for layer in range(self.model.config.num_layers):
            past.update(*(one.clone() for one in self.past(layer)), layer)

        @torch.inference_mode()
        def step(token: int) -> int:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # it will be named `cache` one day
                output = self.transformers(torch.tensor([[token]]), past_key_values=past, use_cache=True)
            return int(output.logits[0, -1].argmax())

        return step

    def ours(self) -> Callable[[int], int]:
        """A step of the sequence, which goes back to the same past first."""
        self.seq.truncate(self.context)

        @torch.inference_mode()
        def step(token: int) -> int:
            return int(np.argmax(self.cache.step([self.seq], [[token]])[0]))

        return step

    def floor(self) -> float:
        """Milliseconds."""
        return (self.weights + self.per_token * self.seq.length) / self.read() * 1e3

    def compare(self, steps: dict[str, Callable[[int], int]], runs: int, what: str) -> dict[str, list[float]]:
        """Milliseconds per step over a few steps, greedy, by turns."""
        tokens = {name: [self.first] for name in steps}

        def run(name: str) -> float:
            token, start = tokens[name][-1], clock()
            for _ in range(STEPS):
                token = steps[name](token)
                tokens[name].append(token)
            return (clock() - start) / STEPS * 1e3

        candidates: dict[str, Callable[[], float]] = {name: (lambda name=name: run(name)) for name in steps}
        samples = alternate({**candidates, FLOOR: self.floor}, runs, what)
        chosen = {name: found for name, found in tokens.items() if name != X_TRANSFORMERS}
        if len({tuple(found) for found in chosen.values()}) > 1:
            raise AssertionError(f"the caches chose different tokens: {chosen}")
        return samples


def measure(context: int, runs: int) -> list[Row]:
    """One context length: as it is, then compiled."""
    contenders = Contenders(context, STEPS * (runs + 2) + 16)
    case = f"context {context:,}"
    hand = contenders.hand(compiled=False)
    eager = {"ours": contenders.ours(), HAND: lambda token: int(hand.step([token]).argmax())}
    plain = contenders.compare(eager, runs, f"PyTorch decode at {context:,}, not compiled")
    contenders.cache.compile()
    compiled = contenders.hand(compiled=True)
    x_transformers = XTransformers(context)
    limit = context + contenders.room
    steps = {
        "ours": contenders.ours(),
        HAND: lambda token: int(compiled.step([token]).argmax()),
        DYNAMIC: contenders.theirs(DynamicCache()),
        STATIC: contenders.theirs(StaticCache(contenders.transformers.config, max_cache_len=limit)),
        X_TRANSFORMERS: x_transformers.step,
    }
    samples = contenders.compare(steps, runs, f"PyTorch decode at {context:,}")
    return [
        Row.of(f"{case}, not compiled", "ms/step", plain, targets={HAND: 1.05}),
        Row.of(case, "ms/step", samples, targets=TARGETS),
    ]


def main(*, quick: bool = False) -> Table:
    """Both context lengths."""
    rows = [row for context in (1024, 4096) for row in measure(context, 5 if quick else 15)]
    text = [
        f"Batch 1, greedy, all in `torch.inference_mode()`. A run is {STEPS} steps; the whole step counts: plan, "
        "model, commit and choosing the token. "
        "The hand-written cache is the same example model on fixed tensors (`tests/bench/preallocated.py`) with the "
        "same kernels: in the first row PyTorch's, both uncompiled; in the others both compiled as `cache.compile()` "
        "does it, attention in the same kernel in C. So the ratio to it is the cache's own cost. transformers runs "
        "uncompiled, as its `generate` does here; x-transformers' model has the same shape and random weights. All "
        "others chose the same tokens. The floor is what the memory allows: the bytes of weights and live K/V over "
        "the read bandwidth that `torch.dot` reaches in the same run.",
    ]
    return Table("torch_decode", "PyTorch: decode step", text, rows)
