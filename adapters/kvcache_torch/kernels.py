"""Attention arithmetic: plain, over extents, and with a mask. No cache here, only tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Part", "attend_all", "attend_masked", "attend_with_lse", "merge", "plain_attention"]

Part = tuple[slice | Tensor | None, Tensor, Tensor]
"""Attention of some rows over some of their tokens: the rows, None for all; result; log-sum-exp."""

_QUERIES_AT_ONCE = 256


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
        is_grouped = bool(q.shape[1] != k.shape[1])  # a tensor where torch.jit traces
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=is_grouped)
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


def attend_with_lse(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, *, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention and the log of its normaliser, so that parts over different tokens can be merged exactly.

    Args:
        q: [B, Hq, T, D].
        k: [B, Hkv, S, D]; strides are free.
        v: [B, Hkv, S, Dv].
        scale: factor on the scores; default 1 / sqrt(D).
        causal: token t sees the first t + 1 of S = T tokens; else all see all.
        mask: [B, 1, 1, S] of q's dtype, added to the scores; not together with ``causal``.

    Returns:
        [B, Hq, T, Dv], of q's dtype or float32, and [B, Hq, T] in at least float32.
    """
    rows, heads, count, size = q.shape
    groups = heads // k.shape[1]
    if causal:
        # A query group stands where the heads are, over broadcast views of its K and V.
        q = q.reshape(-1, groups, count, size)
        k, v = (one.reshape(-1, 1, *one.shape[2:]).expand(-1, groups, -1, -1) for one in (k, v))
    else:
        # Query groups become query rows: each K/V head is read once for its whole group.
        q = q.reshape(rows, k.shape[1], groups * count, size)
    attend = _flash_cpu if q.device.type == "cpu" and size == v.shape[-1] else _portable
    result, lse = attend(q, k, v, scale, causal, mask)
    return result.reshape(rows, heads, count, -1), lse.reshape(rows, heads, count)


def _flash_cpu(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    if mask is not None:
        mask = mask.expand(-1, -1, q.shape[2], -1)
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )
    return found[0], found[1]


def _portable(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same from matrix products alone, some queries at a time so that the scores stay small.

    In at least float32 throughout: a score of half precision is off by more than the whole result may be.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    q = q.to(exact) * (q.shape[-1] ** -0.5 if scale is None else scale)
    k, v = k.to(exact).transpose(-1, -2), v.to(exact)
    outputs, sums = [], []
    for at in range(0, q.shape[2], _QUERIES_AT_ONCE):
        scores = q[:, :, at : at + _QUERIES_AT_ONCE] @ k
        if mask is not None:
            scores = scores + mask
        if causal:
            where = torch.arange(k.shape[3], device=q.device)
            seen = where <= at + torch.arange(scores.shape[2], device=q.device)[:, None]
            scores = scores.masked_fill(~seen, float("-inf"))
        # As softmax does it: the rounding of a log-sum-exp would stand in every weight.
        largest = scores.amax(-1, keepdim=True)
        weights = (scores - largest).exp()
        total = weights.sum(-1, keepdim=True)
        outputs.append((weights / total) @ v)
        sums.append((largest + total.log()).squeeze(-1))
    return torch.cat(outputs, 2), torch.cat(sums, 2)


def merge(parts: Sequence[Part], rows: int) -> Tensor:
    """Attention over disjoint sets of tokens, put together to what one softmax over all of them gives.

    The log-sum-exp merge of cascade inference (FlashInfer). All parts at once, each with its weight relative to the
    largest and one normalisation: merged one after another, every part would add the rounding of a log-sum-exp.

    Args:
        parts: each the rows it is for (an index for dimension 0, None for all), the result [count, H, T, Dv] and its
            log-sum-exp [count, H, T], at least float32. Every row is in at least one; a part of all rows comes first
            if there is one.
        rows: rows of the whole, B.

    Returns:
        [B, H, T, Dv], at least float32.
    """
    chosen, result, lse = parts[0]
    if len(parts) == 1 and chosen is None:
        return result
    if len(parts) == 2 and chosen is None and parts[1][0] is None:
        _, other, other_lse = parts[1]
        share = torch.sigmoid(other_lse - lse).unsqueeze(-1)
        return torch.lerp(result.to(share.dtype), other.to(share.dtype), share)
    if all(part[0] is None for part in parts):
        sums = torch.stack([part[2] for part in parts])
    else:
        sums = lse.new_full((len(parts), rows, *lse.shape[1:]), float("-inf"))
        for whole, part in zip(sums, parts, strict=True):
            whole[slice(None) if part[0] is None else part[0]] = part[2]
    weights = torch.softmax(sums, 0).unsqueeze(-1)
    if chosen is None:
        merged, parts, weights = weights[0] * result, parts[1:], weights[1:]
    else:
        merged = weights.new_zeros(rows, *result.shape[1:])
    for (chosen, result, _), weight in zip(parts, weights, strict=True):
        if chosen is None:
            merged.addcmul_(weight, result.to(merged.dtype))
        else:
            merged[chosen] += weight[chosen] * result
    return merged


def _softmax(scores: Tensor) -> Tensor:
    """Over the last axis, at least in float32."""
    exact = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=exact).to(scores.dtype)
