"""Attention arithmetic: plain, over extents, and with a mask. No cache here, only tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend_all", "attend_extents", "attend_masked", "plain_attention"]


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None, softcap: float | None
) -> Tensor:
    """Causal attention without a cache.

    Args:
        q: [B, Hq, T, D].
        k: [B, Hkv, T, D].
        v: [B, Hkv, T, Dv].
    """
    if window is None and softcap is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    steps = torch.arange(q.shape[2], device=q.device)
    mask = steps[None, :] <= steps[:, None]
    if window is not None:
        mask = mask & (steps[None, :] > steps[:, None] - window)
    return attend_masked(q, k, v, mask, scale, softcap)


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, softcap: float | None) -> Tensor:
    """Attention where ``mask`` (bool [T, S]) says what is visible.

    Args:
        q: [B, Hq, T, D].
        k: [B, Hkv, S, D].
        v: [B, Hkv, S, Dv].

    Returns:
        [B, Hq, T, Dv].
    """
    groups = q.shape[1] // k.shape[1]
    # Batch = rows and K/V heads, heads = query groups: K and V are broadcast views, never repeated in memory.
    folded = q.reshape(-1, groups, *q.shape[2:])
    k = k.reshape(-1, 1, *k.shape[2:]).expand(-1, groups, -1, -1)
    v = v.reshape(-1, 1, *v.shape[2:]).expand(-1, groups, -1, -1)
    if softcap is None:
        result = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale)
    else:
        scores = folded @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = softcap * torch.tanh(scores / softcap)
        result = _softmax(scores.masked_fill(~mask, float("-inf"))) @ v
    return result.reshape(*q.shape[:3], v.shape[-1])


def attend_all(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Attention of tokens that see all of K/V: no mask.

    Args:
        q: [B, Hq, T, D].
        k: [B, Hkv, S, D].
        v: [B, Hkv, S, Dv].

    Returns:
        [B, Hq, T, Dv].
    """
    # Query groups become query rows: each K/V head is read once for its whole group.
    folded = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    result = F.scaled_dot_product_attention(folded, k, v, scale=scale)
    return result.reshape(*q.shape[:3], v.shape[-1])


def attend_extents(q: Tensor, extents: Sequence[tuple[Tensor, Tensor]], scale: float | None) -> Tensor:
    """One row's new tokens over extents that they all see whole: only scores are put together, never K or V.

    Args:
        q: [Hq, T, D].
        extents: (K [Hkv, S, D], V [Hkv, S, Dv]) views.

    Returns:
        [Hq, T, Dv].
    """
    if len(extents) == 1:
        k, v = extents[0]
        return attend_all(q[None], k[None], v[None], scale)[0]
    folded = q.reshape(extents[0][0].shape[0], -1, q.shape[-1])
    folded = folded * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = _softmax(torch.cat([folded @ k.transpose(-1, -2) for k, _ in extents], dim=-1))
    parts = weights.split([k.shape[1] for k, _ in extents], dim=-1)
    total = parts[0] @ extents[0][1]
    for part, (_, v) in zip(parts[1:], extents[1:], strict=True):
        total = torch.baddbmm(total, part, v)
    return total.reshape(q.shape[0], q.shape[1], -1)


def _softmax(scores: Tensor) -> Tensor:
    """Over the last axis, at least in float32."""
    exact = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=exact).to(scores.dtype)
