"""The steps of a cache: planned, then committed or rolled back; or one token appended without a plan."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from collections.abc import Sequence as _Sequence
from dataclasses import replace
from operator import gt

from kvcache_core.errors import CacheFull, InvalidInput, StaleSequence, StepError
from kvcache_core.inputs import MAX_TOKEN, checked_extras, token_array
from kvcache_core.match import first_visible_block
from kvcache_core.plan import Reservation, StepPlan
from kvcache_core.sequence import Sequence
from kvcache_core.sequences import OpenSequences
from kvcache_core.types import TokenIds

__all__ = ["PlannedSteps"]


class PlannedSteps(OpenSequences):
    """A step is a transaction: everything is checked and taken before anything is written."""

    def plan(
        self,
        seqs: _Sequence[Sequence],
        token_ids: _Sequence[TokenIds] | None = None,
        *,
        extra_keys: _Sequence[Mapping[int, bytes]] | None = None,
    ) -> StepPlan:
        """Reserve a step: row b appends ``token_ids[b]`` (one or more tokens) to ``seqs[b]``.

        Args:
            seqs: the rows.
            token_ids: one or more new tokens per row; without, what of each sequence's prompt it does not hold yet.
            extra_keys: per row, {number of the new token: bytes}, as :meth:`open` takes them for a prompt.

        Raises:
            CacheFull: not enough blocks; nothing was changed.
            InvalidInput: no rows, a row without tokens, or a sequence that stands in the batch twice.
            SequenceClosed, StepError: a sequence is closed, or already in a step.
        """
        if token_ids is None:
            tokens = [_rest_of_prompt(seq) for seq in seqs]
        else:
            tokens = [token_array(ids, f"row {row}") for row, ids in enumerate(token_ids)]
        if not seqs or len(seqs) != len(tokens):
            raise InvalidInput(
                f"a step needs one list of new tokens per sequence, at least one; got {len(seqs)} sequences "
                f"and {len(tokens)} lists"
            )
        if len({id(seq) for seq in seqs}) != len(seqs):
            raise InvalidInput("a sequence stands in the step twice; fork it to continue it in two ways")
        extras = None if extra_keys is None else [checked_extras(keys) for keys in extra_keys]
        if extras is not None and len(extras) != len(seqs):
            raise InvalidInput(f"extra_keys must be one mapping per row, got {len(extras)} for {len(seqs)} rows")
        with self._lock:
            for seq in seqs:
                self._check_mine(seq)
                seq.check_usable("step")
                if seq.namespace != self.namespace:
                    raise StaleSequence(
                        f"cannot step {seq!r}: the weights changed since it was opened, so its past is of another "
                        "model; close it and open a new one"
                    )
            used = len(seqs[0].tables)
            if any(len(seq.tables) != used for seq in seqs):
                raise InvalidInput("a step cannot mix sequences opened with outputs and without")
            self._settle()
            pairs = list(zip(seqs, tokens, strict=True))
            try:
                rows = self._room.reserve(pairs)
            except CacheFull:
                # What sequences reserved ahead and have not used yet is the next thing to give.
                if not self._room.fits_unreserved(pairs, self._open.values()):
                    raise
                self._room.return_reserved(self._open.values())
                rows = self._room.reserve(pairs)
            for row, keys in zip(rows, extras or (), strict=False):
                row.extra_keys = {row.start + at: key for at, key in keys.items()}
            return StepPlan(rows, self._kinds[:used], self.block_size)

    def commit(
        self, plan: StepPlan, tokens: _Sequence[TokenIds] | None = None, *, unwritten: _Sequence[int] = ()
    ) -> None:
        """The step's arrays are written: append its tokens, publish full blocks, drop what windows passed.

        Args:
            plan: the step.
            tokens: each row's new tokens, where they were not known when the step was planned because a graph
                chose several by itself: at least one per row, at most as many as planned. Room that they do not
                need stays reserved for their sequence.
            unwritten: per layer group, so many leading blocks of each row's table have not been written: a window has
                passed them. They are not published.

        Raises:
            InvalidInput: ``tokens`` is not as many as that (or fewer than planned, with state layers), or a block that
                is still visible is said to be unwritten; nothing was changed and the step is still open.
            StepError: the plan was committed or rolled back before.

        Example:
            >>> from kvcache_core import BlockCache
            >>> core = BlockCache(num_blocks=64, block_size=4)
            >>> seq = core.open([1, 2])
            >>> core.commit(core.plan([seq], [[1, 2, 0, 0, 0]]), [[1, 2, 7]])
            >>> seq.tokens
            [1, 2, 7]
        """
        rows = plan.rows if tokens is None else _with_tokens(plan, tokens)
        pairs = zip(rows, plan.rows, strict=True)
        if self._has_states and any(len(row.tokens) != len(own.tokens) for row, own in pairs):
            raise InvalidInput("a step with state layers is committed as planned: its states are behind all its tokens")
        with self._lock:
            skipped = self._unwritten(rows, unwritten) if any(unwritten) else []
            self._finish(plan, "commit")
            for row in rows:
                self._moves.commit(row)
            for number, block in skipped:
                if self._index.node(number, block):
                    self.groups[number].pool.unmark_findable(block)
                    self._index.detach(number, block)

    def _unwritten(self, rows: _Sequence[Reservation], counts: _Sequence[int]) -> list[tuple[int, int]]:
        """(layer group, block) of the plan's new blocks that hold nothing."""
        found: list[tuple[int, int]] = []
        for row in rows:
            seq, end = row.seq, row.seq.length + len(row.tokens)
            for number, count in enumerate(counts):
                if count > first_visible_block(end, self.groups[number].window, self.block_size):
                    raise InvalidInput(f"layer group {number} can still see some of its {count} unwritten blocks")
                table = seq.tables[number][seq.length // self.block_size : count]
                found += [(number, block) for block in table if block]
        return found

    def rollback(self, plan: StepPlan) -> None:
        """Undo :meth:`plan`: every sequence is as it was, every reserved block is back.

        Raises:
            StepError: the plan was committed or rolled back before.
        """
        with self._lock:
            for row in reversed(self._finish(plan, "roll back")):
                self._room.rollback(row)

    def append(self, seqs: Sequence | _Sequence[Sequence], tokens: int | _Sequence[int]) -> None:
        """Add one token to a sequence, or one to each of several: the same as planning and committing that step.

        For who needs the bookkeeping alone (a simulator, a scheduler). A row that stays in its block costs a
        fraction of a step, and a row that does not is planned and committed.

        Args:
            seqs: a sequence, or a list of them.
            tokens: its token id, or one for each.

        Raises:
            CacheFull, InvalidInput, InvalidType, SequenceClosed, StepError: as :meth:`plan`; nothing was changed.

        Example:
            >>> from kvcache_core import BlockCache
            >>> core = BlockCache(num_blocks=64, block_size=4)
            >>> seq = core.open([1, 2])
            >>> core.commit(core.plan([seq], [[1, 2]]))
            >>> core.append(seq, 3)
            >>> core.append([seq], [4])
            >>> seq.tokens
            [1, 2, 3, 4]
        """
        lock = self._lock
        lock.acquire()  # with `try` half the time of `with`, which would be a quarter of a call
        try:
            if not isinstance(seqs, Sequence):
                self._append_all(seqs, tokens)  # type: ignore[arg-type]
            elif not (type(tokens) is int and 0 <= tokens <= MAX_TOKEN):
                self.commit(self.plan([seqs], [[tokens]]))  # type: ignore[list-item]
            # Whatever forbids a step also takes the sequence's room.
            elif seqs.room and seqs._cache is self and seqs.namespace == self.namespace:
                self._moves.append_in_room(seqs, tokens)
            elif self._can_step(seqs) and self._moves.prepare((seqs,)):
                self._moves.append(seqs, tokens)
            else:
                self.commit(self.plan([seqs], [[tokens]]))
        finally:
            lock.release()

    def _append_all(self, seqs: _Sequence[Sequence], tokens: _Sequence[int]) -> None:
        ids, namespace = token_array(tokens, "append"), self.namespace
        usable = len(seqs) == len(ids) == len(set(seqs))
        others = [seq for seq in seqs if not (seq.room and seq._cache is self and seq.namespace == namespace)]
        # As in a step, every row has its block before one lets go of any, which another would take.
        if not usable or (others and not (all(map(self._can_step, others)) and self._moves.prepare(others))):
            self.commit(self.plan(seqs, [[token] for token in ids]))
            return
        self._moves.append_all(seqs, ids)

    def _settle(self) -> None:
        """Between two steps, who shares the limit may move memory."""
        limit = self._room.limit()
        if limit is not None:
            limit.settle()

    def _finish(self, plan: StepPlan, verb: str) -> _Sequence[Reservation]:
        if plan.finished:
            raise StepError(f"cannot {verb} this plan: it was committed or rolled back before")
        self._check_mine(plan.rows[0].seq)
        plan.finished = True
        return plan.rows

    def _can_step(self, seq: Sequence) -> bool:
        return seq._cache is self and not seq.closed and not seq.in_step and seq.namespace == self.namespace


def _rest_of_prompt(seq: Sequence) -> array[int]:
    rest = seq.prompt[seq.length :]
    if not rest:
        raise InvalidInput(f"{seq!r} holds its whole prompt: a step of it needs new tokens")
    return rest


def _with_tokens(plan: StepPlan, tokens: _Sequence[TokenIds]) -> list[Reservation]:
    """The plan's rows with the tokens that they came to have."""
    ids = [token_array(row, f"row {number}") for number, row in enumerate(tokens)]
    found, planned = [len(row) for row in ids], [len(row.tokens) for row in plan.rows]
    if len(found) != len(planned) or any(map(gt, found, planned)):
        raise InvalidInput(f"the rows of this step may have at most {planned} new tokens, got {found}")
    return [replace(row, tokens=own) for row, own in zip(plan.rows, ids, strict=True)]
