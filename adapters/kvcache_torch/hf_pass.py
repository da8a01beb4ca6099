"""One call of a transformers model: open or continue its rows, compute what is missing, put the result together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvcache_core.plan import StepPlan
from kvcache_core.sequence import Sequence as CachedSequence
from kvcache_torch.hf import HFCache, Refused
from kvcache_torch.hf_cross import Source
from kvcache_torch.hf_rows import Columns, waves_of

__all__ = ["Pass"]


@dataclass(frozen=True)
class Part:
    """A step of the call and what it gave.

    Attributes:
        plan: the step.
        hidden: [R, Tnew, ...], the decoder's output for the step's tokens.
    """

    plan: StepPlan
    hidden: Tensor


class Pass:
    """One call.

    Args:
        driver: the attached model's driver.
        past: the rows' past; holds the rows' new state after :meth:`run`, and is as it was if that raises.
        columns: what the call was given.
        shifts: int64 [B], see :func:`kvcache_torch.hf_rows.shifts_of`.
        keep: outputs wanted, of each row's last tokens; 0 for all columns.
        source: what an encoder has given for the rows, or None.
    """

    def __init__(
        self,
        driver: Any,
        past: HFCache,
        columns: Columns,
        shifts: NDArray[np.int64],
        keep: int,
        source: Source | None,
    ) -> None:
        self.driver = driver
        self.cache = driver.cache
        self.past = past
        self.columns = columns
        self.shifts = shifts
        self.keep = keep
        self.source = source
        self.tokens = columns.new_tokens()
        self.found: dict[int, tuple[Part, int]] = {}
        """Per row: the part that computed it, and its row there."""

    def run(self) -> Tensor:
        """The decoder's output: [B, T, ...], or [B, keep, ...] behind each row's last tokens.

        Raises:
            CacheFull: no room; nothing was changed.
        """
        for row in self.tokens:
            self.cache.check_vocabulary(row)
        goes_on = len(self.past.rows) and self.columns.same_past
        with self.cache.core.reading():  # stored outputs are read where the plans of the steps say
            rows = self._go_on() if goes_on else self._open()
            self.past.replace(rows, self.columns.ids, self.columns.valid, self.shifts)
            self.past.sources = None if self.source is None else self.source.digests
            return self._last() if self.keep else self._all()

    # ---- computing -----------------------------------------------------------------------------

    def _go_on(self) -> list[CachedSequence]:
        """Append the new tokens to the rows there are."""
        self.cache.notice_weights()
        if self.source is not None and self.source.digests != self.past.sources:
            raise Refused("the encoder's output is another one than the rows began with")
        rows = self.past.rows
        there = [row for row, tokens in enumerate(self.tokens) if len(tokens)]
        lengths = [row.length for row in rows]
        try:
            for ats in self._together(there, rows):
                self._step(ats, [rows[at] for at in ats], [self.tokens[at] for at in ats])
        except BaseException:
            for row, length in zip(rows, lengths, strict=True):
                row.truncate(length)
            raise
        return list(rows)

    def _together(self, ats: Sequence[int], rows: Any) -> list[list[int]]:
        """Rows that one step may compute: all, but where a token's position is its column."""
        groups: dict[int, list[int]] = {}
        for at in ats:
            groups.setdefault(rows[at].length if self.driver.counts_columns else 0, []).append(at)
        return list(groups.values())

    def _open(self) -> list[CachedSequence]:
        """Start rows from what is cached; equal rows are computed once and forked."""
        self.cache.refresh()
        rows = self.columns.all_tokens()
        first: dict[tuple[bytes, bytes], int] = {}
        same = [first.setdefault((row.tobytes(), self._extra_key(at)), at) for at, row in enumerate(rows)]
        alone = sorted(set(same))
        core, salt = self.cache.core, self.cache.salt
        known = [core.cached_length(rows[at], salt, extra_keys=self._extras(at)) for at in alone]
        opened: dict[int, CachedSequence] = {}
        result: list[CachedSequence] = []
        try:
            for wave in waves_of([rows[at] for at in alone], known):
                ats = [alone[number] for number in wave]
                for at in ats:
                    opened[at] = self._open_row(rows[at], at)
                for some in self._together(ats, opened):
                    self._step(some, [opened[at] for at in some], [rows[at][opened[at].length :] for at in some])
            for at, source in enumerate(same):
                self.found[at] = self.found[source]
                result.append(opened[source] if at == source else opened[source].fork())
        except BaseException:
            for row in {id(row): row for row in [*opened.values(), *result]}.values():
                row.close()
            raise
        return result

    def _open_row(self, row: NDArray[np.int64], at: int) -> CachedSequence:
        """A sequence that has a cached head of the row, but none of the tokens whose output has to be computed."""
        outputs = not self.keep and self.cache.outputs == "all"
        needed = 1 if outputs else max(1, min(self.keep or len(row), len(self.tokens[at])))
        head = row[: len(row) - needed + 1]
        reserve = needed - 1 + self.past.max_new_tokens
        return self.cache.open_row(head, extra_keys=self._extras(at), max_new_tokens=reserve, outputs=outputs)

    def _extras(self, at: int) -> dict[int, bytes] | None:
        key = self._extra_key(at)
        return {0: key} if key else None

    def _extra_key(self, at: int) -> bytes:
        """What besides the ids shapes a row's state."""
        shift = int(self.shifts[at])
        key = b"positions from %d;" % shift if shift else b""
        if self.source is not None:
            key += b"source " + self.source.digests[at]
        return key

    def _step(self, ats: Sequence[int], seqs: Sequence[CachedSequence], tokens: Sequence[NDArray[np.int64]]) -> None:
        """One step over rows ``ats``."""
        source = None if self.source is None else self.source.rows(ats)
        with self.cache.transaction(seqs, tokens) as plan:
            hidden = self.driver.hidden(plan, self.shifts[list(ats)], source)
            self._store_outputs(plan, hidden)
        part = Part(plan, hidden)
        self.found.update((at, (part, number)) for number, at in enumerate(ats))

    def _store_outputs(self, plan: StepPlan, hidden: Tensor) -> None:
        """Keep the output of the step's tokens, if their rows keep outputs."""
        store = self.cache.store
        layer = len(store.layout.layers) - 1
        number = store.layout.group_of(layer)
        if store.layout.layers[layer].kind == "output" and number < len(plan.groups):
            slots = plan.groups[number].slots.reshape(-1)
            store.write(layer, "output", slots, hidden.reshape(len(slots), 1, -1))

    # ---- putting together ----------------------------------------------------------------------

    def _last(self) -> Tensor:
        """[B, keep, ...], aligned on the right."""
        part = self._whole_part()
        if part is not None and (part.plan.counts == part.plan.counts[0]).all() and part.hidden.shape[1] >= self.keep:
            return part.hidden[:, -self.keep :]
        some = next(iter(self.found.values()))[0].hidden
        result = some.new_zeros(len(self.tokens), self.keep, *some.shape[2:])
        for at, (part, number) in self.found.items():
            end = int(part.plan.counts[number])
            count = min(self.keep, end, len(self.tokens[at]))
            result[at, self.keep - count :] = part.hidden[number, end - count : end]
        return result

    def _all(self) -> Tensor:
        """[B, T, ...], zero where a column is padding."""
        valid = self.columns.valid[:, -self.columns.width :]
        part = self._whole_part()
        if part is not None and (part.plan.counts == self.columns.width).all() and valid.all():
            return part.hidden
        some = next(iter(self.found.values()))[0].hidden
        result = some.new_zeros(*valid.shape, *some.shape[2:])
        for at, (part, number) in self.found.items():
            columns = np.flatnonzero(valid[at])
            end = int(part.plan.counts[number])
            count = min(end, len(columns))
            result[at, columns[len(columns) - count :]] = part.hidden[number, end - count : end]
            if count < len(columns):
                result[at, columns[: len(columns) - count]] = self._stored(part.plan, number, len(columns) - count)
        return result

    def _stored(self, plan: StepPlan, number: int, count: int) -> Tensor:
        """The kept output of a row's first ``count`` tokens, [count, ...]."""
        store = self.cache.store
        layer = len(store.layout.layers) - 1
        tables = plan.groups[store.layout.group_of(layer)].block_tables
        size, known = store.layout.block_size, np.arange(count)
        slots = tables[number, known // size].astype(np.int64) * size + known % size
        stored = store.read(layer, "output", slots)
        return stored.reshape(count, *self.cache.spec.output_shape)

    def _whole_part(self) -> Part | None:
        """The part, if there is one and it has all rows in order."""
        parts = {id(part) for part, _ in self.found.values()}
        if len(parts) > 1 or len(self.found) != len(self.tokens):
            return None
        part = self.found[0][0]
        in_order = all(self.found[at][1] == at for at in range(len(self.tokens)))
        return part if in_order and len(part.hidden) == len(self.tokens) else None
