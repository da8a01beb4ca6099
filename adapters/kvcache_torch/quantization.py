"""Stored dtypes in PyTorch: what a value becomes in the store, bit for bit as in kvcache_core.quantization."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcache_core.layout import SCALED_DTYPES
from kvcache_core.quantization import LARGEST

__all__ = ["DTYPES", "STORED", "decoded", "encoded"]

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""The dtypes that a model computes in."""

STORED = {**DTYPES, "float8_e4m3": torch.uint8, "int8": torch.int8}
"""The dtypes of pool tensors: float8 lies as its bits, because PyTorch cannot index it."""

_TINY = torch.finfo(torch.float32).tiny


def encoded(values: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """What is kept of ``values`` [..., D]: elements or their bits, and float32 scales [..., 1] or None."""
    if dtype not in SCALED_DTYPES:
        return values.to(STORED[dtype]), None
    values = values.to(torch.float32)
    scales = values.abs().amax(dim=-1, keepdim=True) / LARGEST[dtype]
    scales = scales.masked_fill_(scales < _TINY, 0)
    scaled = values / scales.clamp(min=_TINY)
    if dtype == "int8":
        return scaled.round_().to(torch.int8), scales
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scales


def decoded(bits: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What was stored, in ``dtype``; the multiplication by scales in float32."""
    if scales is None:
        return bits.to(dtype)
    values = bits.view(torch.float8_e4m3fn) if bits.dtype == torch.uint8 else bits
    return values.to(torch.float32).mul_(scales).to(dtype)
