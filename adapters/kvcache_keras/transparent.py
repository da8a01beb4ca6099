"""``with cache: y = model(x)``: an input's rows, and where their outputs come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.errors import InvalidInput, InvalidType
from kvcache_core.plan import PAD_SLOT, GroupPlan

__all__ = ["Rows", "check_frames", "check_ids", "output_slots", "rows_of"]


@dataclass(frozen=True)
class Rows:
    """The rows of an input [B, T]: each row's tokens and the column its first token stands in."""

    tokens: list[NDArray[Any]]
    first: list[int]
    width: int

    @property
    def count(self) -> int:
        """Tokens of all rows."""
        return sum(map(len, self.tokens))

    @property
    def is_full(self) -> bool:
        """Whether no row is padded."""
        return all(len(row) == self.width for row in self.tokens)

    @property
    def last(self) -> NDArray[np.int32]:
        """int32 [B], index of each row's last token in :meth:`aligned`."""
        return np.array([len(row) - 1 for row in self.tokens], np.int32)

    def aligned(self) -> NDArray[Any]:
        """int32 [B, T] (frames: [B, T, F]): the rows from column 0 on, padded on the right."""
        first = self.tokens[0]
        shape = (len(self.tokens), self.width, *first.shape[1:])
        result = np.zeros(shape, np.int32 if first.ndim == 1 else first.dtype)
        for at, row in enumerate(self.tokens):
            result[at, : len(row)] = row
        return result

    def columns(self) -> NDArray[np.int32]:
        """int32 [B, T]: the column in :meth:`aligned` of each column of the input; T for padding."""
        result = np.full((len(self.tokens), self.width), self.width, np.int32)
        for at, (row, first) in enumerate(zip(self.tokens, self.first, strict=True)):
            result[at, first : first + len(row)] = np.arange(len(row))
        return result


def check_ids(x: Any) -> None:
    """Raise unless ``x`` is a tensor of integer ids [B, T]; open dimensions pass."""
    if not x.dtype.is_integer:
        raise InvalidType(f"token ids must be integers, got {x.dtype.name}")
    if x.shape.rank not in (None, 2) or 0 in x.shape:
        raise InvalidInput(f"token ids must be [B, T] with at least one row and one token, got {tuple(x.shape)}")


def check_frames(x: Any, size: int) -> None:
    """Raise unless ``x`` is a tensor of frames [B, T, F]; open dimensions pass."""
    if not x.dtype.is_floating:
        raise InvalidType(f"frames must be floating-point numbers, got {x.dtype.name}")
    if x.shape.rank not in (None, 3) or 0 in x.shape or (x.shape.rank == 3 and x.shape[2] not in (None, size)):
        raise InvalidInput(f"frames must be [B, T, {size}] with at least one row and one frame, got {tuple(x.shape)}")


def rows_of(ids: NDArray[Any], lengths: Any, mask: Any) -> Rows:
    """Split an input into rows.

    Args:
        ids: integers [B, T], or frames [B, T, F].
        lengths: [B], tokens per row, padded on the right; or None.
        mask: [B, T], nonzero where there is a token, padded on either side; or None.

    Raises:
        InvalidInput: no rows or tokens, an empty row, or a mask with holes.
    """
    if ids.ndim not in (2, 3) or not ids.size:
        raise InvalidInput(f"token ids must be [B, T] with at least one row and one token, got {ids.shape}")
    count, width = ids.shape[:2]
    first, sizes = np.zeros(count, np.int64), np.full(count, width)
    if mask is not None:
        valid = np.asarray(mask) != 0
        if valid.shape != (count, width):
            raise InvalidInput(f"the mask must be [B, T] = {(count, width)} like the ids, got {valid.shape}")
        first, sizes = valid.argmax(axis=1), valid.sum(axis=1)
        columns = np.arange(width)
        run = (columns >= first[:, None]) & (columns < (first + sizes)[:, None])
        if (valid != run).any():
            raise InvalidInput("the mask must mark one run of tokens per row: padding left or right, no holes")
    elif lengths is not None:
        sizes = np.asarray(lengths).reshape(-1)
        if len(sizes) != count or sizes.dtype.kind not in "iu" or sizes.max() > width:
            raise InvalidInput(f"lengths must be {count} whole numbers of at most {width}, got {sizes.tolist()}")
    if sizes.min() < 1:
        raise InvalidInput(f"every row needs at least one token, got rows of {sizes.tolist()} tokens")
    kind = np.dtype(np.int64) if ids.ndim == 2 else ids.dtype
    tokens = [row[at : at + size].astype(kind) for row, at, size in zip(ids, first, sizes, strict=True)]
    return Rows(tokens, first.tolist(), width)


def output_slots(group: GroupPlan, rows: Rows) -> NDArray[np.int32]:
    """int32 [B, T]: the slot that holds the output of each column of the input; :data:`PAD_SLOT` for padding."""
    columns = rows.columns()
    padding = columns == rows.width
    known = np.where(padding, 0, columns)
    blocks = np.take_along_axis(group.block_tables, known // group.block_size, axis=1)
    return np.where(padding, PAD_SLOT, blocks * group.block_size + known % group.block_size).astype(np.int32)
