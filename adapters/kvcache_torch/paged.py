"""Attention straight from block tables, one call per layer: FlashInfer, FlashAttention or FlexAttention on a GPU.

Instead of extents (:mod:`kvcache_torch.reading`) these kernels read the pool by block table, past and new tokens
alike. After ``cache.compile()`` on a GPU the first that is installed and serves the layer is used; where none does,
extents are. Written to the documentation of flashinfer 0.2 and later, flash-attn 2.5 and later, and PyTorch's
FlexAttention; only the last can run, and is tested, without a GPU.
"""

from __future__ import annotations

import importlib
import threading
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kvcache_core.plan import GroupPlan, StepPlan

__all__ = ["FlashAttentionReads", "FlashInferReads", "FlexReads", "PagedReads", "choose", "use_paged"]

_HALF = (torch.float16, torch.bfloat16)
_QUERY_BLOCK = 128


class PagedReads(Protocol):
    """How one layer group's layers read in one step. Every query sees its own position, what lies before it, and of
    that what the group's window leaves.
    """

    def __init__(self, plan: StepPlan, number: int, device: torch.device) -> None: ...

    def serves(self, q: Tensor, keys: Tensor, values: Tensor) -> bool:
        """Whether the kernel takes this layer: dtypes, head sizes, block size."""

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scale: float | None, softcap: float | None) -> Tensor:
        """Attention after the new K and V were written.

        Args:
            q: [B, Hq, T, D].
            keys: the layer's pool [H, slots, D].
            values: [H, slots, Dv].
            scale: factor on the scores; default 1 / sqrt(D).
            softcap: as in :func:`kvcache_torch.attention`.

        Returns:
            [B, Hq, T, Dv]; padding tokens hold no meaning.
        """


_in_use: list[bool] = []


def use_paged() -> None:
    """Let steps on a GPU read by block table from now on, in this process."""
    _in_use[:] = [True]


def choose(plan: StepPlan, number: int, q: Tensor, keys: Tensor, values: Tensor) -> PagedReads | None:
    """What reads a layer of group ``number``, or None where extents do."""
    if not _in_use or q.device.type != "cuda":
        return None
    for kind in (FlashInferReads, FlashAttentionReads, FlexReads):
        reads = kind(plan, number, q.device)
        if reads.serves(q, keys, values):
            return reads
    return None


class FlashInferReads:
    """FlashInfer's prefill kernel, which takes any number of new tokens per row; half precision only."""

    def __init__(self, plan: StepPlan, number: int, device: torch.device) -> None:
        self._group = plan.groups[number]
        self._device = device
        counts = torch.from_numpy(plan.counts)
        self._starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(device, torch.int32)
        self._real = (torch.arange(plan.tokens.shape[1]) < counts[:, None]).to(device)

    def serves(self, q: Tensor, keys: Tensor, values: Tensor) -> bool:
        """Half precision, head sizes that its kernels are made for."""
        sizes = q.shape[3] == values.shape[2] and q.shape[3] in (64, 128, 256)
        return sizes and q.dtype == keys.dtype and q.dtype in _HALF and _module("flashinfer") is not None

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scale: float | None, softcap: float | None) -> Tensor:
        """One call for the ragged batch."""
        group, wrapper = self._group, _flashinfer.wrapper(self._device)
        key = (self, q.shape[1], keys.shape[0], q.shape[3], scale, softcap)
        if wrapper.planned != key:  # a wrapper keeps one plan, and all groups of a step use the wrapper
            wrapper.plan(
                self._starts,
                torch.from_numpy(group.kv_indptr).to(self._device),
                torch.from_numpy(group.kv_indices).to(self._device),
                torch.from_numpy(group.kv_last_page_len).to(self._device),
                q.shape[1],
                keys.shape[0],
                q.shape[3],
                group.block_size,
                causal=True,
                sm_scale=scale,
                window_left=-1 if group.window is None else group.window - 1,
                logits_soft_cap=softcap,
                q_data_type=q.dtype,
                kv_data_type=keys.dtype,
            )
            wrapper.planned = key
        pages = tuple(_pages(array, group.block_size).transpose(0, 1) for array in (keys, values))  # "HND"
        by_token = q.transpose(1, 2)
        result = torch.zeros_like(by_token)
        result[self._real] = wrapper.run(by_token[self._real], pages)
        return result.transpose(1, 2)


class FlashAttentionReads:
    """FlashAttention over a paged cache: half precision, blocks of 256 tokens, equally many new tokens per row."""

    def __init__(self, plan: StepPlan, number: int, device: torch.device) -> None:
        self._group = plan.groups[number]
        self._even = bool((plan.counts == plan.counts[0]).all())
        self._lengths = torch.from_numpy(plan.kv_lengths).to(device, torch.int32)
        self._tables = torch.from_numpy(self._group.block_tables).to(device)

    def serves(self, q: Tensor, keys: Tensor, values: Tensor) -> bool:
        """What the kernel checks itself, and rows that end at the same query."""
        shapes = q.shape[3] == values.shape[2] <= 256 and not q.shape[3] % 8 and not self._group.block_size % 256
        halves = q.dtype == keys.dtype and q.dtype in _HALF
        return shapes and halves and self._even and _module("flash_attn") is not None

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scale: float | None, softcap: float | None) -> Tensor:
        """One call; causal is aligned to each row's end."""
        window, size = self._group.window, self._group.block_size
        pages = (_pages(array, size).permute(1, 2, 0, 3) for array in (keys, values))  # [blocks, tokens, heads, size]
        result: Tensor = _module("flash_attn").flash_attn_with_kvcache(
            q.transpose(1, 2),
            *pages,
            cache_seqlens=self._lengths,
            block_table=self._tables,
            softmax_scale=scale,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            softcap=softcap or 0.0,
        )
        return result.transpose(1, 2)


class FlexReads:
    """PyTorch's FlexAttention with the pool as one sequence of slots, of which a row sees its own blocks: any dtype."""

    def __init__(self, plan: StepPlan, number: int, device: torch.device) -> None:
        self._group = plan.groups[number]
        self._positions = torch.from_numpy(plan.positions).to(device)
        self._tables = torch.from_numpy(self._group.block_tables).to(device, torch.int64)
        self._seen = torch.from_numpy(_seen_blocks(self._group)).to(device)
        self._lookup: tuple[Tensor, Tensor, Tensor] | None = None

    def serves(self, q: Tensor, keys: Tensor, values: Tensor) -> bool:
        """Blocks that a tile of its kernel can hold."""
        return q.dtype == keys.dtype == values.dtype and not self._group.block_size % 16 and _flex() is not None

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scale: float | None, softcap: float | None) -> Tensor:
        """One call; which slots a row sees is a table from block to place in its sequence."""
        size = self._group.block_size
        if self._lookup is None:  # the same for all layers
            self._lookup = self._look_up(keys.shape[1] // size)
        result: Tensor = _flex()(
            q,
            keys,
            values,
            self._lookup[0],
            self._positions,
            *self._lookup[1:],
            size=size,
            window=self._group.window,
            scale=scale,
            softcap=softcap,
        )
        return result

    def _look_up(self, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
        """``place``, ``counts`` and ``indices`` of :func:`flex_over_blocks`, in a pool of so many blocks."""
        place = self._tables.new_full((len(self._tables), blocks), -1)
        order = torch.arange(self._tables.shape[1], device=place.device).expand_as(self._tables)
        place.scatter_(1, self._tables.where(self._seen, 0), order)
        place[:, 0] = -1  # the null block, where everything unseen has gone
        listed = torch.argsort((~self._seen).to(torch.int8), dim=1, stable=True)
        return place, self._seen.sum(1, dtype=torch.int32), self._tables.gather(1, listed).to(torch.int32)


def flex_over_blocks(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    place: Tensor,
    positions: Tensor,
    counts: Tensor,
    indices: Tensor,
    *,
    size: int,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    """FlexAttention over a pool.

    Args:
        q: [B, Hq, T, D].
        keys: [H, slots, D].
        values: [H, slots, Dv].
        place: int64 [B, blocks], where in the row's sequence a block of the pool stands; -1 for nowhere.
        positions: int64 [B, T] of the queries.
        counts: int32 [B], blocks that a row sees.
        indices: int32 [B, N], these blocks first.
        size: tokens per block.
        window: as :class:`PagedReads`.
        scale: factor on the scores.
        softcap: as :class:`PagedReads`.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def visible(b: Tensor, h: Tensor, query: Tensor, slot: Tensor) -> Tensor:
        at = place[b, slot // size]
        where, mine = at * size + slot % size, positions[b, query]
        seen = (at >= 0) & (where <= mine)
        return seen if window is None else seen & (where > mine - window)

    def capped(score: Tensor, b: Tensor, h: Tensor, query: Tensor, slot: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    tiles = -(-q.shape[2] // _QUERY_BLOCK)
    mask = BlockMask.from_kv_blocks(
        counts[:, None, None].expand(-1, 1, tiles).contiguous(),
        indices[:, None, None].expand(-1, 1, tiles, -1).contiguous(),
        BLOCK_SIZE=(_QUERY_BLOCK, size),
        mask_mod=visible,
        seq_lengths=(q.shape[2], keys.shape[1]),
        compute_q_blocks=False,  # only the way back would need them
    )
    result: Tensor = flex_attention(
        q,
        keys[None],
        values[None],
        score_mod=None if softcap is None else capped,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != keys.shape[0],
    )
    return result


def _seen_blocks(group: GroupPlan) -> Any:
    """Bool [B, blocks]: the entries of the block tables that a row's new tokens see something of."""
    size = group.block_size
    first = np.zeros_like(group.starts) if group.window is None else np.maximum(0, group.starts - group.window + 1)
    at = np.arange(group.block_tables.shape[1])
    return (at >= first[:, None] // size) & (at < -(-group.ends[:, None] // size))


def _pages(array: Tensor, size: int) -> Tensor:
    """A pool tensor [H, slots, D] as [H, blocks, size, D]."""
    return array.view(array.shape[0], -1, size, array.shape[2])


@cache
def _module(name: str) -> Any:
    """An optional package, or None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


@cache
def _flex() -> Any:
    """:func:`flex_over_blocks` compiled, or None in a PyTorch without it."""
    try:
        from torch.nn.attention.flex_attention import BlockMask
    except ImportError:
        return None
    known = BlockMask.from_kv_blocks.__func__.__code__.co_varnames
    return torch.compile(flex_over_blocks, dynamic=True) if "compute_q_blocks" in known else None


class _FlashInfer(threading.local):
    """A thread's wrapper and its workspace per device; a plan holds until the next."""

    def __init__(self) -> None:
        self.wrappers: dict[torch.device, Any] = {}

    def wrapper(self, device: torch.device) -> Any:
        """The device's wrapper; ``planned`` says what it was planned for last."""
        if device not in self.wrappers:
            workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device=device)
            self.wrappers[device] = _module("flashinfer").BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
            self.wrappers[device].planned = None
        return self.wrappers[device]


_flashinfer = _FlashInfer()
