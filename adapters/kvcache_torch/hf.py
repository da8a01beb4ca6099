"""Hugging Face transformers: a ``transformers.Cache`` over the blocks of a ``KVCache`` (extra ``hf``).

After ``cache.attach(model)``, which is how the cache comes to see token ids, all of these reuse what is cached:
``model.generate(ids, past_key_values=HFCache(cache))``, ``with cache: model.generate(ids)``, ``with cache: model(ids)``
and ``kvcache_torch.generate(model, prompts, ...)``.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.errors import InvalidInput, UsageError
from kvcache_core.sequence import Sequence as CachedSequence

try:
    from transformers import Cache
except ImportError as missing:
    raise ImportError(
        "kvcache_torch.hf needs transformers: install the extra 'hf' (pip install 'kvcache-core[hf]')"
    ) from missing

__all__ = ["HFCache", "Refused", "close_abandoned"]

_abandoned: deque[CachedSequence] = deque()


class Refused(InvalidInput):
    """A call that cannot be served from the cache; says why."""


class HFCache(Cache):
    """The past of one batch in a transformers model, kept in the blocks of a ``KVCache``.

    It starts empty. The first forward pass takes from the cache whatever head of each row is there; the rows' own
    tokens are found again by later passes, also of other batches. Padding never enters. Beam search forks and closes
    sequences instead of copying, ``crop`` truncates them. Keep it to continue the same rows later.

    When it is garbage collected its sequences are closed: their blocks stay findable until they are evicted.

    Args:
        cache: the ``KVCache`` that the model is attached to.
        max_new_tokens: room to reserve per row beyond its prompt, if there is.
        transparent: made by ``with cache:``; without room the call is then computed as outside.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, cache: Any, *, max_new_tokens: int = 0, transparent: bool = False) -> None:
        super().__init__(layers=[])
        self.cache = cache
        self.max_new_tokens = max_new_tokens
        self.transparent = transparent
        self.rows: list[CachedSequence] = []
        """One open sequence per row; empty before the first pass."""
        self.ids: NDArray[np.int64] = np.zeros((0, 0), np.int64)
        """[B, C] token ids of all columns so far, padding included."""
        self.valid: NDArray[np.bool_] = np.zeros((0, 0), np.bool_)
        """[B, C], False where a column is padding."""
        self.shifts: NDArray[np.int64] = np.zeros(0, np.int64)
        """[B], how far the positions of a row lie from 0, 1, 2, ..."""
        self.sources: tuple[bytes, ...] | None = None
        """Per row, the digest of the encoder's output that it attends to."""
        weakref.finalize(self, _abandon, self.rows)

    # ---- what generate and the models ask ------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """C, columns so far, padding included."""
        return self.ids.shape[1]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(columns after the next ``query_length``, 0)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no limit but the room in the cache."""
        return -1

    @property
    def batch_size(self) -> int:
        """B, or -1 before the first pass."""
        return len(self.ids) or -1

    @property
    def is_initialized(self) -> bool:
        """Whether a pass was made."""
        return bool(self.ids.size)

    @property
    def is_sliding(self) -> list[bool]:
        """False for every layer: windows are the cache's own business."""
        return [False] * len(self)

    is_linear = is_sliding
    is_dummy = is_sliding

    def __len__(self) -> int:
        return sum(spec.kind == "attention" for spec in self.cache.store.layout.layers)

    def __repr__(self) -> str:
        return f"HFCache(rows={self.rows})"

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Not for layers to call.

        Raises:
            UsageError: always. It means that the model is not attached to the cache.
        """
        raise UsageError("an HFCache works with an attached model: call cache.attach(model) first")

    # ---- what generation does to rows ----------------------------------------------------------

    def reorder_cache(self, beam_idx: Any) -> None:
        """Row b goes on from row ``beam_idx[b]``: no K or V is copied."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the rows at ``indices``, integers or booleans [B]."""
        indices = np.asarray(indices.cpu())
        self._select(np.flatnonzero(indices).tolist() if indices.dtype == np.bool_ else indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        self._select(np.repeat(np.arange(len(self.ids)), repeats).tolist())

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns; a number above 0 is the length to keep, as it once was."""
        columns = self.get_seq_length()
        length = columns + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, columns)
        if length < 0:
            raise InvalidInput(f"cannot crop {-tokens_to_remove} of {columns} tokens")
        try:
            for row, kept in zip(self.rows, self.valid[:, :length].sum(axis=1).tolist(), strict=bool(self.rows)):
                row.truncate(kept)
        except InvalidInput:
            # A window has let go of tokens that would be seen again, and they are evicted: the next call opens the
            # rows anew from their ids.
            self.replace([], self.ids, self.valid, self.shifts)
        self.ids, self.valid = self.ids[:, :length], self.valid[:, :length]

    def reset(self) -> None:
        """Close all rows and start anew."""
        self.replace([], np.zeros((0, 0), np.int64), np.zeros((0, 0), np.bool_), np.zeros(0, np.int64))

    def activate_past_recording(self) -> None:
        """Nothing to do: a row can always be truncated."""

    def _select(self, indices: Sequence[int]) -> None:
        taken: set[int] = set()
        rows = []
        for index in indices if self.rows else ():
            rows.append(self.rows[index].fork() if index in taken else self.rows[index])
            taken.add(index)
        at = np.asarray(indices, np.int64)
        self.replace(rows, self.ids[at], self.valid[at], self.shifts[at])
        self.sources = self.sources and tuple(self.sources[index] for index in indices)

    def replace(
        self,
        rows: Sequence[CachedSequence],
        ids: NDArray[np.int64],
        valid: NDArray[np.bool_],
        shifts: NDArray[np.int64],
    ) -> None:
        """Hold these rows and columns from now on; rows that are not among them are closed."""
        kept = {id(row) for row in rows}
        for row in self.rows:
            if id(row) not in kept:
                row.close()
        self.rows[:] = rows
        self.ids, self.valid, self.shifts = ids, valid, shifts


def _abandon(rows: list[CachedSequence]) -> None:
    """Close the rows of a cache that is gone.

    A finalizer may run in the middle of anything, also of the core's own work on this thread: then the rows wait
    for the next call.
    """
    _abandoned.extend(rows)
    if not any(row.cache_is_locked_here for row in rows):
        close_abandoned()


def close_abandoned() -> None:
    """Close the rows of caches that are gone."""
    while _abandoned:
        _abandoned.popleft().close()
