"""How the rows of a step read what is cached: few attention calls over views of the pool, made once per step.

An extent that several rows share is one call for all of them, their queries stacked (the cascade of Hydragen and
FlashInfer, found from the block tables). Rows whose own extents are of one size and equally spaced are one strided
view. Where many short extents are left, those of the same rows are copied together first, and those of single rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from kvcache_core.extents import SharedExtent, shared_extents
from kvcache_torch.kernels import Part, attend_with_lse, merge

__all__ = ["Read", "attend_reads", "plan_reads"]

_SHORT = 256
"""Tokens from which on an extent keeps a view of its own. Measured by `python tests/bench/torch_gather.py`: copying
four to sixteen extents together is as fast or faster at 128 tokens, slower at 256."""

_MANY = 2
"""So many short extents are read as views; more are copied together. By the same command two extents take equally long
either way, four of 16 tokens half as long when copied."""


@dataclass(frozen=True, slots=True)
class Read:
    """One attention call: some rows over slots that they see whole.

    Attributes:
        rows: which rows, an index for dimension 0; None for all in order.
        count: how many rows.
        shared: all rows read the same slots; else each row its own.
        slot: first slot of the first row.
        size: slots per row.
        stride: slots from one row's first slot to the next one's.
        index: instead of a view, the slots [count * size] to copy together.
        padding: with ``index``, bool [count, 1, 1, size], where a row has fewer slots than ``size``; or None.
    """

    rows: slice | Tensor | None
    count: int
    shared: bool
    slot: int
    size: int
    stride: int = 0
    index: Tensor | None = None
    padding: Tensor | None = None

    def view(self, array: Tensor, dtype: torch.dtype) -> Tensor:
        """The slots in a pool tensor [H, slots, D] as [count, H, size, D]; one row if shared."""
        heads, slots, width = array.shape
        rows = 1 if self.shared else self.count
        if self.index is not None:
            found = array.index_select(1, self.index).view(heads, rows, self.size, width).transpose(0, 1)
        else:
            strides = (self.stride * width, slots * width, width, 1)
            found = array.as_strided((rows, heads, self.size, width), strides, self.slot * width)
        return found.to(dtype)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        """Attention of the read's rows, q [B, Hq, T, D] -> [count, Hq, T, Dv] and its log-sum-exp."""
        if self.rows is not None:
            q = q[self.rows]
        k, v = self.view(keys, q.dtype), self.view(values, q.dtype)
        if not self.shared:
            mask = None
            if self.padding is not None:
                mask = q.new_zeros(self.padding.shape).masked_fill_(self.padding, float("-inf"))
            return attend_with_lse(q, k, v, scale, mask=mask)
        heads = k.shape[1]
        rows, queries, count, size = q.shape
        stacked = q.reshape(rows, heads, -1, size).transpose(0, 1).reshape(1, heads, -1, size)
        result, lse = attend_with_lse(stacked, k, v, scale)
        result = result.view(heads, rows, -1, v.shape[3]).transpose(0, 1).reshape(rows, queries, count, -1)
        return result, lse.view(heads, rows, -1).transpose(0, 1).reshape(rows, queries, count)


def attend_reads(
    reads: Sequence[Read],
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float | None,
    new: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """All reads of a step, merged.

    Args:
        reads: from :func:`plan_reads`.
        q: [B, Hq, T, D].
        keys: the layer's pool [Hkv, slots, D].
        values: [Hkv, slots, Dv].
        scale: factor on the scores; default 1 / sqrt(D).
        new: result and log-sum-exp of attention over tokens that are in no read.

    Returns:
        [B, Hq, T, Dv].
    """
    parts: list[Part] = [] if new is None else [(None, *new)]
    parts += [(read.rows, *read.attend(q, keys, values, scale)) for read in reads]
    if not parts:
        raise ValueError("a step without tokens")
    return merge(parts, len(q)).to(q.dtype)


def plan_reads(per_row: Sequence[Sequence[tuple[int, int, int]]], device: torch.device) -> list[Read]:
    """The reads that cover every row's extents once; those of all rows come first.

    Args:
        per_row: per row, (first slot, tokens, first position) of each of its extents.
        device: where index tensors go.
    """
    rows = len(per_row)
    pieces = shared_extents(per_row)
    # A shared piece is a run of its own; pieces of single rows come in runs at equal distances.
    runs = [[piece] for piece in pieces if len(piece.rows) > 1]
    runs += _equally_spaced(piece for piece in pieces if len(piece.rows) == 1)
    many_short = sum(run[0].size < _SHORT for run in runs) > _MANY
    viewed: list[list[SharedExtent]] = []
    together: dict[tuple[int, ...], list[list[SharedExtent]]] = defaultdict(list)
    for run in runs:
        if many_short and run[0].size < _SHORT:
            readers = run[0].rows
            together[readers if len(readers) > 1 else ()].append(run)
        else:
            viewed.append(run)
    reads = [_viewed(run, rows, device) for run in viewed]
    reads += [
        _viewed(alike[0], rows, device) if len(alike) == 1 else _gathered(chain(*alike), rows, device)
        for alike in together.values()
    ]
    return sorted(reads, key=lambda read: read.rows is not None)


def _viewed(run: Sequence[SharedExtent], rows: int, device: torch.device) -> Read:
    """A read of the pool where it lies: one piece that rows share, or pieces of single rows at equal distances."""
    first, shared = run[0], len(run[0].rows) > 1
    readers = first.rows if shared else [piece.rows[0] for piece in run]
    stride = run[1].slot - first.slot if len(run) > 1 else 0
    return Read(_index(readers, rows, device), len(readers), shared, first.slot, first.size, stride)


def _equally_spaced(pieces: Iterable[SharedExtent]) -> Iterable[list[SharedExtent]]:
    """Pieces of single rows, put together where size and distance are the same and no row comes twice."""
    by_size = defaultdict(list)
    for piece in pieces:
        by_size[piece.size].append(piece)
    for equal in by_size.values():
        run: list[SharedExtent] = []
        for piece in equal:  # in ascending order of their slots
            known = any(piece.rows == other.rows for other in run)
            if known or (len(run) > 1 and piece.slot - run[-1].slot != run[1].slot - run[0].slot):
                yield run
                run = []
            run.append(piece)
        yield run


def _gathered(pieces: Iterable[SharedExtent], rows: int, device: torch.device) -> Read:
    """One read that copies short pieces together: all of the same rows, or each of a single row."""
    slots: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for piece in pieces:
        slots[piece.rows].extend(range(piece.slot, piece.slot + piece.size))
    readers = sorted(slots)
    size = max(map(len, slots.values()))
    # Padding repeats a slot of the row's own: what it holds is a number, and masked.
    index = torch.tensor([slots[one] + slots[one][:1] * (size - len(slots[one])) for one in readers], device=device)
    lengths = torch.tensor([len(slots[one]) for one in readers], device=device)
    padding = (torch.arange(size, device=device) >= lengths[:, None])[:, None, None]
    shared = len(readers[0]) > 1
    readers = list(readers[0]) if shared else [row for (row,) in readers]
    ragged = bool((lengths < size).any())
    return Read(
        _index(readers, rows, device),
        len(readers),
        shared,
        0,
        size,
        index=index.reshape(-1),
        padding=padding if ragged else None,
    )


def _index(chosen: Sequence[int], rows: int, device: torch.device) -> slice | Tensor | None:
    """Rows as the cheapest index: None for all, a slice for neighbours, else a tensor."""
    first = chosen[0]
    if list(chosen) == list(range(first, first + len(chosen))):
        return None if len(chosen) == rows else slice(first, first + len(chosen))
    return torch.tensor(chosen, device=device)
