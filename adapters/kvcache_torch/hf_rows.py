"""What a transformers model was called with, as rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvcache_core.errors import InvalidInput, InvalidType
from kvcache_torch.hf import Refused

__all__ = ["Columns", "columns_of", "shifts_of", "waves_of"]

_WORTH_A_WAVE = 32
"""Tokens of shared prefix for which a row waits: another pass reads all weights once more."""


@dataclass(frozen=True)
class Columns:
    """The columns of one call.

    Attributes:
        ids: int64 [B, C + T], earlier columns included.
        valid: bool [B, C + T], False where a column is padding.
        width: T, columns that this call adds.
        same_past: whether the earlier columns are what they were in the call before.
    """

    ids: NDArray[np.int64]
    valid: NDArray[np.bool_]
    width: int
    same_past: bool

    def new_tokens(self) -> list[NDArray[np.int64]]:
        """Each row's tokens among the new columns."""
        ids, valid = self.ids[:, -self.width :], self.valid[:, -self.width :]
        if valid.all():
            return list(ids)
        return [row[there] for row, there in zip(ids, valid, strict=True)]

    def all_tokens(self) -> list[NDArray[np.int64]]:
        """Each row's tokens among all columns."""
        return [row[there] for row, there in zip(self.ids, self.valid, strict=True)]


def columns_of(
    input_ids: Any, attention_mask: Any, past_ids: NDArray[np.int64], past_valid: NDArray[np.bool_]
) -> Columns:
    """Check the ids and the mask of a call.

    Args:
        input_ids: integer tensor [B, T].
        attention_mask: tensor [B, C + T], nonzero where there is a token; or None.
        past_ids: [B, C].
        past_valid: [B, C].

    Raises:
        InvalidInput, InvalidType: other shapes or types, or other rows than before.
        Refused: a row without a token, as where a prompt that is computed in chunks begins with padding.
    """
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point() or input_ids.dim() != 2:
        raise InvalidType("the cache needs token ids, an integer tensor [B, T]")
    ids = input_ids.detach().cpu().numpy().astype(np.int64, copy=False)
    count, width = ids.shape
    past = past_ids.shape[1]
    if not past:
        past_ids, past_valid = np.zeros((count, 0), np.int64), np.zeros((count, 0), np.bool_)
    if len(past_ids) != count or not width:
        raise InvalidInput(f"the cache holds {len(past_ids)} rows: ids must be [{len(past_ids)}, T], got {ids.shape}")
    same_past = True
    if attention_mask is None:
        valid = np.concatenate([past_valid, np.ones((count, width), np.bool_)], axis=1)
    else:
        valid = attention_mask.detach().cpu().numpy() != 0
        if valid.shape != (count, past + width):
            raise InvalidInput(
                f"the attention mask must be [B, C + T] = {(count, past + width)}: C = {past} earlier columns and "
                f"T = {width} new ones; got {valid.shape}"
            )
        same_past = bool((valid[:, :past] == past_valid).all())
    if not valid.any(axis=1).all():
        row, columns = int(valid.any(axis=1).argmin()), past + width
        raise Refused(
            f"every row needs a token that is not padding, and row {row} has none in its first {columns} columns: pad "
            "less, or compute larger chunks"
        )
    return Columns(np.concatenate([past_ids, ids], axis=1), valid, width, same_past)


def shifts_of(
    columns: Columns, position_ids: Any, past_shifts: NDArray[np.int64], *, from_mask: bool
) -> NDArray[np.int64] | None:
    """How far each row's positions lie from 0, 1, 2, ... over its own tokens: int64 [B].

    Args:
        columns: the call.
        position_ids: [B or 1, T] as passed to the model, or None.
        past_shifts: int64 [B] of the earlier columns; empty before the first call.
        from_mask: whether the model, given none, counts the tokens of the mask; most models count columns.

    Returns:
        None if a row's positions do not rise by one from token to token.
    """
    width, valid = columns.width, columns.valid
    past = valid.shape[1] - width
    count = len(valid)
    own = (valid.cumsum(axis=1) - 1)[:, -width:]
    if position_ids is None:
        if valid.all() or from_mask:
            return np.zeros(count, np.int64)
        given = np.arange(past, valid.shape[1])[None]
    else:
        given = position_ids.detach().cpu().numpy()
        if given.ndim != 2 or given.shape[1] != width or len(given) not in (1, count):
            return None
    differences = np.broadcast_to(given - own, (count, width))
    new = valid[:, -width:].copy()
    if past:
        # generate counts on from the last column, also where that is padding: such a row counts its own tokens.
        new[(np.diff(valid[:, :past].astype(np.int8), axis=1) < 0).any(axis=1) | ~valid[:, past - 1]] = False
    shifts: NDArray[np.int64] = differences[np.arange(count), new.argmax(axis=1)]
    if past:
        shifts = np.where(new.any(axis=1), shifts, past_shifts)
        if (shifts != past_shifts).any():
            return None
    return shifts if ((differences == shifts[:, None]) | ~new).all() else None


def waves_of(rows: Sequence[NDArray[np.int64]], cached: Sequence[int]) -> list[list[int]]:
    """Split rows into passes, so that a prefix that several rows share is computed by the first of them alone.

    Args:
        rows: each row's tokens.
        cached: how many leading tokens of each are in the cache now.
    """
    waves: list[list[int]] = []
    waiting = list(range(len(rows)))
    known = list(cached)
    while waiting:
        wave: list[int] = []
        deferred = []
        for at in waiting:
            shared = max((_common(rows[at], rows[other]) for other in wave), default=0)
            if min(shared, len(rows[at]) - 1) - known[at] >= _WORTH_A_WAVE:
                deferred.append(at)
            else:
                wave.append(at)
        for at in deferred:
            known[at] = max(known[at], *(_common(rows[at], rows[other]) for other in wave))
        waves.append(wave)
        waiting = deferred
    return waves


def _common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Length of the common head."""
    length = min(len(one), len(other))
    differing = np.flatnonzero(one[:length] != other[:length])
    return int(differing[0]) if len(differing) else length
