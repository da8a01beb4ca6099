"""Attention arithmetic: plain, over extents, and with a mask. No cache here, only tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend_context_and_new", "attend_extents", "attend_masked", "plain_attention"]


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
    """Attention where ``mask`` (bool, broadcastable to [B, 1, T, S]) says what is visible.

    Args:
        q: [B, Hq, T, D].
        k: [B, Hkv, S, D].
        v: [B, Hkv, S, Dv].
    """
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    groups = q.shape[1] // k.shape[1]
    folded = q.unflatten(1, (k.shape[1], groups))
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = folded @ k.unsqueeze(2).transpose(-1, -2) * factor
    scores = softcap * torch.tanh(scores / softcap)
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    scores = scores.masked_fill(~mask.unsqueeze(2), float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    return (weights.to(q.dtype) @ v.unsqueeze(2)).flatten(1, 2)


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
    """One row's new tokens over extents that they all see whole; no mask, no copy of K/V.

    The extents' results are merged by their log-sum-exp (as in FlashDecoding, Dao et al. 2023).

    Args:
        q: [Hq, T, D].
        extents: (K [Hkv, S, D], V [Hkv, S, Dv]) views.

    Returns:
        [Hq, T, Dv].
    """
    if len(extents) == 1:
        k, v = extents[0]
        return attend_all(q[None], k[None], v[None], scale)[0]
    folded = q.reshape(1, extents[0][0].shape[0], -1, q.shape[-1])
    parts = [_with_lse(folded, k[None], v[None], False, scale) for k, v in extents]
    return _merge(parts).reshape(q.shape[0], q.shape[1], -1)


def attend_context_and_new(
    q: Tensor, context: tuple[Tensor, Tensor], k: Tensor, v: Tensor, scale: float | None
) -> Tensor:
    """One row's new tokens over their whole context, and causally over themselves; merged exactly.

    Args:
        q: [Hq, T, D].
        context: (K [Hkv, S, D], V [Hkv, S, Dv]) views.
        k: [Hkv, T, D], the new tokens' own.
        v: [Hkv, T, Dv].

    Returns:
        [Hq, T, Dv].
    """
    heads, (new, size) = k.shape[0], q.shape[1:]
    groups = q.shape[0] // heads
    before = _with_lse(q.reshape(1, heads, groups * new, size), context[0][None], context[1][None], False, scale)
    # Batch = K/V heads, heads = query groups: K/V are broadcast views, and each group keeps its causal mask.
    own = _with_lse(
        q.reshape(heads, groups, new, size),
        k.unsqueeze(1).expand(-1, groups, -1, -1),
        v.unsqueeze(1).expand(-1, groups, -1, -1),
        True,
        scale,
    )
    before = (before[0].reshape(own[0].shape), before[1].reshape(own[1].shape))
    return _merge([before, own]).reshape(q.shape[0], new, -1)


def _with_lse(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of its scores, [B, H, T]."""
    if q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        # The operation below reads a head's elements as adjacent and does not check that they are.
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        result = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return result[0], result[1]
    return _portable_with_lse(q, k, v, causal, scale)


def _portable_with_lse(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """The same on any device, for any head sizes, from public operations."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-1, -2)).to(exact) * factor
    if causal:
        hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    return torch.exp(scores - lse.unsqueeze(-1)).to(v.dtype) @ v, lse


def _merge(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Combine attention over disjoint sets of tokens: weight each by the softmax of its log-sum-exp."""
    weights = torch.softmax(torch.stack([lse for _, lse in parts]), dim=0).unsqueeze(-1)
    total = parts[0][0] * weights[0]
    for (result, _), weight in zip(parts[1:], weights[1:], strict=True):
        total = total + result * weight
    return total.to(parts[0][0].dtype)
