"""The peer to beat in PyTorch: a hand-written cache in the same example model.

Fixed tensors [1, G, max, D] per layer, written at the position and sliced up to it: what one writes for a single
sequence when nothing has to be shared, evicted or found again. The model is `examples/llama_torch.py` itself, loaded a
second time with this module's `attention` and `positions` in the place of the library's, on the same weights.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvcache_torch.native import DecodeReads, active

__all__ = ["Preallocated"]


class Preallocated:
    """One sequence's cache, and the model that reads it.

    Args:
        model: the example model whose weights are used.
        capacity: most tokens.
        folded: how decode attention treats grouped queries: fold them into the query length, or `enable_gqa=True`.
        compiled: compile the decode step, attention as one opaque operation, as `KVCache.compile` does, and run
            it in the library's kernel in C where that is in use: then the two differ in the cache alone.
    """

    def __init__(self, model: nn.Module, capacity: int, *, folded: bool, compiled: bool = False) -> None:
        module = _example_of_its_own()
        module.attention = self._called if compiled else self._attention
        module.positions = self._positions
        module.select_outputs = lambda hidden: hidden[:, -1:]
        self.model = module.Llama(model.config)
        self.model.load_state_dict(model.state_dict(), assign=True)
        self.model.eval().requires_grad_(False)
        config = model.config
        shape = (1, config.num_kv_heads, capacity, config.head_dim)
        self.keys = [torch.zeros(shape) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape) for _ in range(config.num_layers)]
        self.length = 0
        self._folded = folded
        self._compiled = compiled
        self._reads: DecodeReads | None = None
        self._mask: Tensor | None = None
        self._where = torch.zeros(1, 1, dtype=torch.int64)
        self._decode = torch.compile(self.model, dynamic=False) if compiled else self.model

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> Tensor:
        """Append tokens; returns the logits [V] behind the last one."""
        count = len(tokens)
        if count > 1:
            seen = torch.arange(self.length + count)
            self._mask = seen <= torch.arange(self.length, self.length + count)[:, None]
        kernels = active() if self._compiled and count == 1 else None
        self._reads = DecodeReads(kernels, [[(0, self.length + 1, 0)]], [self.length]) if kernels else None
        self._where.fill_(self.length)
        _ACTIVE[:] = [self]
        logits = (self._decode if count == 1 else self.model)(torch.tensor([tokens]))[0, -1]
        self.length += count
        return logits

    def _positions(self, length: int, *, device: Any = None) -> Tensor:
        if length == 1:
            return self._where
        return torch.arange(self.length, self.length + length, device=device).unsqueeze(0)

    def _called(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int) -> Tensor:
        return torch.ops.kvbench.attend(q, k, v, layer)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int) -> Tensor:
        end = self.length + q.shape[2]
        keys, values = self.keys[layer], self.values[layer]
        if self._reads is not None:
            return self._reads.attend(q, k, v, keys[0], values[0], None)
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        keys, values = keys[:, :, :end], values[:, :, :end]
        if q.shape[2] > 1:
            if not self.length:
                return F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=self._mask, enable_gqa=True)
        if not self._folded:
            return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        groups = q.reshape(1, keys.shape[1], -1, q.shape[3])
        return F.scaled_dot_product_attention(groups, keys, values).reshape(q.shape)


_ACTIVE: list[Preallocated] = []
"""The one whose step is under way: a compiled graph must not depend on which one it is, nor on its length."""


def _attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    return _ACTIVE[0]._attention(q, k, v, layer=layer).contiguous()


_library = torch.library.Library("kvbench", "FRAGMENT")
_library.define("attend(Tensor q, Tensor k, Tensor v, int layer) -> Tensor")
_library.impl("attend", _attend, "CompositeExplicitAutograd")


@torch.library.register_fake("kvbench::attend", lib=_library)
def _(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    return torch.empty(q.shape)


def _example_of_its_own() -> ModuleType:
    """A second copy of the example's module, whose names can be replaced without touching the first."""
    spec = importlib.util.find_spec("llama_torch")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
