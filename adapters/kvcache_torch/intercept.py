"""Models that know nothing of the cache: PyTorch's own attention calls, caught inside a step.

``nn.MultiheadAttention`` (and with it ``nn.TransformerEncoder`` and ``nn.TransformerDecoder``) and
``F.scaled_dot_product_attention`` are caught by a torch function mode. Causal self-attention goes through the cache;
attention over something else, like the memory of a decoder, is computed as it is. The layers are numbered in the order
in which they are called.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kvcache_core.errors import InvalidInput
from kvcache_torch.attention import attention

__all__ = ["AttentionCalls", "Extras", "MemoryStates", "NotCausal"]

_MHA = (
    "query",
    "key",
    "value",
    "embed_dim_to_check",
    "num_heads",
    "in_proj_weight",
    "in_proj_bias",
    "bias_k",
    "bias_v",
)
_MHA += ("add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", "training", "key_padding_mask")
_MHA += ("need_weights", "attn_mask", "use_separate_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_MHA += ("static_k", "static_v", "average_attn_weights", "is_causal")
_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


_KEPT_AT_MOST = 512
"""K and V pairs kept of memories, one per content and layer; the least recently used go first."""


@dataclass(frozen=True)
class Extras:
    """What a model is called with besides token ids, like a decoder's memory.

    Attributes:
        args: positional arguments behind the ids.
        kwargs: keyword arguments.
        digest: of the content of all.
        keys: per row, what it adds to the key of the row's tokens.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    digest: bytes
    keys: tuple[bytes, ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Extras | None:
        """None if something is no tensor, and so cannot be a part of a key."""
        tensors = [*args, *(kwargs[name] for name in sorted(kwargs))]
        if not all(isinstance(tensor, Tensor) for tensor in tensors):
            return None
        whole = _digest(tensors, b"".join(name.encode() + b";" for name in sorted(kwargs)))
        if all(tensor.dim() > 1 and len(tensor) == rows != tensor.shape[1] for tensor in tensors):
            return cls(args, kwargs, whole, tuple(_digest([t[row] for t in tensors]) for row in range(rows)))
        # The batch may be another axis: a row's key then stands for the whole batch and its place in it.
        return cls(args, kwargs, whole, tuple(whole + b"%d" % row for row in range(rows)))


def _digest(tensors: list[Tensor], head: bytes = b"") -> bytes:
    digest = hashlib.blake2b(head, digest_size=16)
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


class MemoryStates:
    """K and V of memories by content.

    Args:
        kept: where they are kept, shared between calls.
        key: stands for the weights and the content.
    """

    def __init__(self, kept: OrderedDict[Any, list[Tensor]], key: tuple[bytes, bytes]) -> None:
        self._kept = kept
        self._key = key

    def states(self, call: int, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """K and V of the ``call``-th attention over a memory in a forward pass."""
        key = (*self._key, call)
        found = self._kept.pop(key, None)  # put back behind all others: as one used just now
        self._kept[key] = found = compute() if found is None else found
        with contextlib.suppress(KeyError):  # another thread may have been faster
            while len(self._kept) > _KEPT_AT_MOST:
                self._kept.popitem(last=False)
        return found


class NotCausal(InvalidInput):
    """Self-attention without a causal mask: an encoder's."""


class AttentionCalls(TorchFunctionMode):
    """Routes the attention calls of one forward pass through the step under way.

    Args:
        width: T, the step's new tokens: self-attention is over as many.
        memory: keeps K and V of what a decoder attends to besides its own tokens.
    """

    def __init__(self, width: int, memory: MemoryStates | None = None) -> None:
        super().__init__()
        self.width = width
        self.memory = memory
        self.others = 0
        """Attention calls over a memory seen."""
        self.layers = 0
        """Self-attention layers seen."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every torch function that the model calls."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._multi_head(func, _named(_MHA, args, kwargs))
        if func is F.scaled_dot_product_attention:
            return self._dot_product(func, _named(_SDPA, args, kwargs))
        return func(*args, **kwargs)

    def _next_layer(self) -> int:
        self.layers += 1
        return self.layers - 1

    def _multi_head(self, func: Callable[..., Any], given: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        query, key, value = given["query"], given["key"], given["value"]
        if key is not query or value is not query:
            return self._over_memory(func, given)
        layer = self._next_layer()
        if query.dim() != 3 or given["bias_k"] is not None or given["add_zero_attn"]:
            raise InvalidInput(f"attention {layer} needs a batch, and neither add_bias_kv nor add_zero_attn")
        # A mask here says what is hidden where it is boolean; is_causal is a hint that it is the causal one.
        self._check_causal(given.get("attn_mask"), layer, hidden=True, is_causal=False)
        self._check_padding(given.get("key_padding_mask"), layer)
        weights, biases = _projections(given)
        q, k, v = (
            _heads(F.linear(query, weight, bias), given["num_heads"])
            for weight, bias in zip(weights, biases, strict=True)
        )
        result = attention(q, k, v, layer=layer)
        joined = result.permute(2, 0, 1, 3).flatten(2)  # [T, B, E]
        return F.linear(joined, given["out_proj_weight"], given["out_proj_bias"]), None

    def _over_memory(self, func: Callable[..., Any], given: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Attention of [T, B, E] over a memory [S, B, E]; its K and V are computed once per content."""
        call, self.others = self.others, self.others + 1
        special = ("bias_k", "attn_mask", "key_padding_mask", "static_k")
        if self.memory is None or given.get("add_zero_attn") or any(given.get(name) is not None for name in special):
            return func(**given)  # type: ignore[no-any-return]
        weights, biases = _projections(given)
        k, v = self.memory.states(
            call,
            lambda: [
                _heads(F.linear(given[part], weight, bias), given["num_heads"])
                for part, weight, bias in zip(("key", "value"), weights[1:], biases[1:], strict=True)
            ],
        )
        q = _heads(F.linear(given["query"], weights[0], biases[0]), given["num_heads"])
        joined = F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).flatten(2)
        return F.linear(joined, given["out_proj_weight"], given["out_proj_bias"]), None

    def _dot_product(self, func: Callable[..., Any], given: dict[str, Any]) -> Tensor:
        query, key = given["query"], given["key"]
        if query.dim() != 4 or key.shape[-2] != self.width or query.shape[-2] != self.width:
            if given.get("is_causal"):
                raise InvalidInput(
                    f"causal attention over {key.shape[-2]} tokens in a step of {self.width}: the model adds or drops "
                    "tokens of its own, which the cache cannot follow"
                )
            return func(**given)  # type: ignore[no-any-return]
        layer = self._next_layer()
        self._check_causal(given.get("attn_mask"), layer, hidden=False, is_causal=bool(given.get("is_causal")))
        return attention(query, key, given["value"], layer=layer, scale=given.get("scale"))

    def _check_padding(self, mask: Tensor | None, layer: int) -> None:
        if mask is not None and bool(mask.any()):
            raise InvalidInput(
                f"attention {layer} has a key_padding_mask inside `with cache:`; call the model with lengths= or mask= "
                "instead, padding never enters the cache"
            )

    def _check_causal(self, mask: Tensor | None, layer: int, *, hidden: bool, is_causal: bool) -> None:
        """Raise unless the mask is the causal one over the step's tokens."""
        if mask is None:
            if is_causal or self.width == 1:
                return
            raise NotCausal(
                f"attention {layer} has no causal mask: its tokens see later ones, so nothing computed for a prefix "
                "stays right when tokens follow; only causal self-attention can be cached"
            )
        steps = torch.arange(self.width, device=mask.device)
        causal = steps[None] <= steps[:, None]
        seen = (mask == 0 if hidden else mask) if mask.dtype == torch.bool else mask == 0
        right = seen.shape[-2:] == causal.shape and bool((seen == causal).all())
        if right and mask.dtype != torch.bool:
            right = bool((mask.masked_fill(causal, -torch.inf) <= torch.finfo(mask.dtype).min / 2).all())
        if not right:
            raise InvalidInput(
                f"attention {layer} has a mask {tuple(mask.shape)} that is not the causal one over the step's "
                f"{self.width} new tokens; the cache cannot honour it. Windows and biases need "
                "kvcache_torch.attention(..., window=)"
            )


def _named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _projections(given: dict[str, Any]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights and biases of queries, keys and values."""
    biases = [None] * 3 if given["in_proj_bias"] is None else list(given["in_proj_bias"].chunk(3))
    if given.get("use_separate_proj_weight"):
        return [given[f"{name}_proj_weight"] for name in "qkv"], biases
    return list(given["in_proj_weight"].chunk(3)), biases


def _heads(x: Tensor, heads: int) -> Tensor:
    """[T, B, E] -> [B, H, T, D]."""
    return x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
