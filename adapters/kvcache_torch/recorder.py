"""Describing a model: what each of its attention layers would store."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcache_core.errors import InvalidInput, InvalidType
from kvcache_core.layout import LayerSpec
from kvcache_torch.kernels import plain_attention
from kvcache_torch.states import note_context
from kvcache_torch.store import dtype_name

__all__ = ["Recorder", "check_query"]


class Recorder:
    """Runs in place of a step while a model is described: notes what each layer would store."""

    def __init__(self, device: torch.device, width: int = 1) -> None:
        self.positions = torch.arange(width, device=device)[None]
        self.last_index = torch.zeros(1, dtype=torch.int64, device=device)
        self.layers: dict[int, LayerSpec] = {}
        self.dtype: torch.dtype | None = None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int,
        window: int | None,
        scale: float | None,
        softcap: float | None,
    ) -> Tensor:
        """Plain attention; the layer's shape is noted."""
        check_query(q, k, layer)
        spec = LayerSpec.attention(k.shape[1], k.shape[3], v.shape[3], window=window)
        self._note(layer, torch.promote_types(k.dtype, v.dtype), spec)
        return plain_attention(q, k, v, window, scale, softcap)

    def with_context(self, x: Tensor, rows: int, layer: int) -> Tensor:
        """Zeros before the inputs; the layer's state is noted."""
        self._note(layer, x.dtype, note_context(x, rows, layer, dtype_name))
        return F.pad(x, (rows, 0))

    def _note(self, layer: int, dtype: torch.dtype, spec: LayerSpec) -> None:
        if layer in self.layers:
            raise InvalidInput(f"layer {layer} was used twice in one step: give each attention call its own layer=")
        if self.dtype is not None and dtype != self.dtype:
            raise InvalidType(f"all layers must have one K/V dtype, got {self.dtype} and {dtype} in layer {layer}")
        self.dtype = dtype
        self.layers[layer] = spec

    @property
    def has_attention(self) -> bool:
        """Whether the model called ``attention``."""
        return any(spec.kind == "attention" for spec in self.layers.values())

    def specs(self) -> tuple[LayerSpec, ...]:
        """The layers in order.

        Raises:
            InvalidInput: no attention call was seen, or the layer numbers have gaps.
        """
        if not self.layers:
            raise InvalidInput(
                "the model made no call of kvcache_torch.attention (or causal_conv1d): build its attention layers from "
                "it to cache them"
            )
        if sorted(self.layers) != list(range(len(self.layers))):
            raise InvalidInput(f"layer numbers must be 0 .. L - 1 without gaps, got {sorted(self.layers)}")
        return tuple(self.layers[layer] for layer in range(len(self.layers)))

    def kv_dtype(self) -> str:
        """The layers' dtype as the core names it."""
        return dtype_name(self.dtype if self.dtype is not None else torch.float32)


def check_query(q: Tensor, k: Tensor, layer: int) -> None:
    """Check the query against K."""
    if q.dim() != 4 or k.dim() != 4:
        raise InvalidInput(f"q, k, v of layer {layer} must be [B, H, T, D], got q {tuple(q.shape)}, k {tuple(k.shape)}")
    same = q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:]
    if not same or q.shape[1] % k.shape[1]:
        raise InvalidInput(
            f"q of layer {layer} must be [B, Hq, T, D] like k, Hq a multiple of its K/V heads; got q "
            f"{tuple(q.shape)}, k {tuple(k.shape)}"
        )
