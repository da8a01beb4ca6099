"""The block cache against a naive model: token lists and prefixes, no blocks.

The model keeps what each sequence should hold, and two sets of token runs: what has ever been committed (nothing
else may be found) and what must still be found while nothing was evicted. They differ only by tokens that were
truncated away, which their sequence may overwrite, and by tails that a step is writing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvcache_core import (
    BlockCache,
    BlockLayout,
    CacheFull,
    InvalidInput,
    LayerSpec,
    SequenceClosed,
    StepError,
)
from tests.strategies import common_head, prompts, snapshot

Letter = tuple[int, bytes | None]
"""A token and the extra key at its position: what a prefix is compared by."""

which = st.integers(0, 20)
salts = st.sampled_from([b"", b"", b"", b"tenant"])
extras = st.one_of(
    st.just({}),
    st.just({}),
    st.just({}),
    st.dictionaries(st.integers(0, 8), st.sampled_from([b"a", b"b"]), max_size=2),
)


@dataclass
class Row:
    """One sequence as the model sees it."""

    seq: Any
    tokens: list[int]
    salt: bytes
    extras: dict[int, bytes]
    outputs: bool
    reserved: int = 0
    pending: int = 0
    """Tokens of a step that is neither committed nor rolled back."""
    cut: bool = False
    """Truncated inside its last block, and not stepped since: the next step may overwrite the rest of it."""

    @property
    def letters(self) -> tuple[Letter, ...]:
        return tuple((token, self.extras.get(at)) for at, token in enumerate(self.tokens))

    @property
    def family(self) -> tuple[bytes, bool]:
        return self.salt, self.outputs


@dataclass
class Pending:
    plan: Any
    rows: list[Row]
    tokens: list[list[int]]


class CacheMachine(RuleBasedStateMachine):
    """Variants set the layers and the pool size."""

    windows: tuple[int | None, ...] = (None,)
    states = False
    outputs = False
    pool_sizes = (5, 20)
    met: Counter[str]

    @initialize(data=st.data())
    def make(self, data: Any) -> None:
        self.size = data.draw(st.integers(1, 5), "block size")
        low, high = self.pool_sizes
        layers = [LayerSpec.attention(1, 1, window=window) for window in self.windows]
        layers += [LayerSpec.state(1, 1)] * self.states + [LayerSpec.output(1)] * self.outputs
        layout = BlockLayout(layers, self.size)
        self.core = BlockCache(data.draw(st.integers(low, high), "blocks"), layout=layout)
        self.rows: list[Row] = []
        self.pending: list[Pending] = []
        self.closed: list[Any] = []
        self.ever: list[tuple[bytes, bool, tuple[Letter, ...]]] = []
        self.kept: list[tuple[bytes, bool, tuple[Letter, ...]]] = []
        self.exact = True
        self.held: dict[int, tuple[Letter, ...]] = {}
        """Per block of the state group: what its state is behind."""

    @property
    def full(self) -> bool:
        """Whether every token that was computed can be used, however it was met."""
        return not self.states and all(window is None for window in self.windows)

    # ---- the model's answers ---------------------------------------------------------------------------

    def _longest(self, runs: Any, salt: bytes, outputs: bool, letters: tuple[Letter, ...]) -> int:
        return max(
            (
                common_head(run, letters)
                for its_salt, stored, run in runs
                if its_salt == salt and (stored or not outputs)
            ),
            default=0,
        )

    def _must_find(self) -> list[tuple[bytes, bool, tuple[Letter, ...]]]:
        """What is cached for certain: kept runs, and what open sequences hold and are not writing."""
        runs = [(salt, stored, self._without_running(salt, run)) for salt, stored, run in self.kept]
        for row in self.rows:
            length = len(row.tokens) - (len(row.tokens) % self.size if row.pending else 0)
            runs.append((*row.family, row.letters[:length]))
        return runs

    def _without_running(self, salt: bytes, run: tuple[Letter, ...]) -> tuple[Letter, ...]:
        """``run`` without its last, unfinished block if a step is writing into that."""
        start = len(run) // self.size * self.size
        busy = any(row.pending and self._shares_tail(row, salt, run) for row in self.rows)
        return run[:start] if busy else run

    def _shares_tail(self, row: Row, salt: bytes, run: tuple[Letter, ...]) -> bool:
        """Whether the row and the run have their last, unfinished block in common."""
        common = common_head(row.letters, run)
        return (
            row.salt == salt
            and common == min(len(run), len(row.tokens))
            and common % self.size > 0
            and len(run) // self.size == len(row.tokens) // self.size
        )

    def _keep_full_blocks(self, row: Row) -> None:
        self.kept.append((*row.family, row.letters[: len(row.tokens) // self.size * self.size]))

    def _check_exactness(self) -> None:
        if self.core.stats().evicted_blocks:
            self.exact = False

    def _ahead(self, rows: list[Row]) -> int:
        """Blocks that rows may have reserved beyond their tokens."""
        held = [-(-(len(row.tokens) + row.pending) // self.size) for row in rows]
        return sum(max(0, -(-row.reserved // self.size) - blocks) for row, blocks in zip(rows, held, strict=True))

    def _live_bound(self) -> int:
        """Blocks that the open sequences need at most, in a full-attention group, nothing reserved ahead."""
        full = set()
        tails = 0
        for row in self.rows:
            for end in range(self.size, len(row.tokens) + 1, self.size):
                full.add((row.salt, row.letters[:end]))
            tails += len(row.tokens) % self.size > 0
        steps = sum(
            self._new_blocks(row, row.pending) + (len(row.tokens) % self.size > 0) for row in self.rows if row.pending
        )
        return len(full) + tails + steps

    def _new_blocks(self, row: Row, count: int) -> int:
        return -(-(len(row.tokens) + count) // self.size) - -(-len(row.tokens) // self.size)

    # ---- rules -----------------------------------------------------------------------------------------

    asked = {  # noqa: RUF012
        "prompt": prompts(),
        "base": which,
        "head": st.integers(0, 30),
        "salt": salts,
        "extra": extras,
        "ahead": st.sampled_from([0, 0, 7]),
        "outputs": st.booleans(),
    }

    @rule(**asked)
    def open(self, prompt, base, head, salt, extra, ahead, outputs) -> None:
        if self.ever and head:
            past = self.ever[base % len(self.ever)]
            prompt = [token for token, _ in past[2]][:head] + prompt
            extra = {at: key for at, (_, key) in enumerate(past[2][:head]) if key} if base % 4 else extra
            salt = past[0] if base % 3 else salt
        outputs = outputs and self.outputs
        self._check_exactness()
        letters = tuple((token, extra.get(at)) for at, token in enumerate(prompt))
        most = min(self._longest(self.ever, salt, outputs, letters), len(prompt) - 1)
        least = min(self._longest(self._must_find(), salt, outputs, letters), len(prompt) - 1)
        if not outputs:
            assert self.core.cached_length(prompt, salt, extra_keys=extra) <= most
        self.prompt = prompt
        seq = self.core.open(prompt, salt, extra_keys=extra, max_new_tokens=ahead, outputs=outputs)
        assert seq.length == seq.num_cached <= most
        if self.exact and self.full:
            assert seq.num_cached >= least
            self.met["exact match"] += least == most > 0
            self.met["match inside a block"] += least % self.size > 0
        if self.exact and self.states and not any(self.windows):
            assert seq.num_cached >= least // self.size * self.size
            self.met["exact match"] += least >= self.size
            self.met["match inside a block"] += seq.num_cached % self.size > 0
        self.met["match"] += seq.num_cached > 0
        self.rows.append(Row(seq, prompt[: seq.num_cached], salt, extra, outputs, len(prompt) + ahead if ahead else 0))

    @rule(**asked, close=st.booleans())
    def compute(self, close, **asked) -> None:
        """A whole request: open, compute, and often close."""
        before = len(self.rows)
        CacheMachine.open(self, **asked)
        row = self.rows[before]
        planned = self._plan_rows([row], [self.prompt[row.seq.num_cached :]])
        if planned:
            self._commit(planned)
        if close:
            self._close(row)

    def _choose(self, picks: list[int], lists: list[list[int]]) -> tuple[list[Row], list[list[int]]]:
        idle = [row for row in self.rows if not row.pending]
        rows: list[Row] = []
        for pick in picks:
            row = idle[pick % len(idle)]
            if row not in rows and (not rows or row.outputs == rows[0].outputs):
                rows.append(row)
        return rows, lists[: len(rows)]

    def _plan(self, picks: list[int], lists: list[list[int]]) -> Pending | None:
        return self._plan_rows(*self._choose(picks, lists))

    def _plan_rows(self, rows: list[Row], tokens: list[list[int]]) -> Pending | None:
        # A running step keeps what it reserved ahead.
        need = self._live_bound() + self._ahead([row for row in self.rows if row.pending])
        for row, ids in zip(rows, tokens, strict=True):
            need += self._new_blocks(row, len(ids))
        # Rows that share an unfinished block each get a copy before the shared one is let go.
        tails = Counter(
            (row.salt, row.letters[: len(row.tokens) // self.size * self.size])
            for row in rows
            if len(row.tokens) % self.size
        )
        need += sum(count > 1 for count in tails.values())
        before = snapshot(self.core)
        try:
            plan = self.core.plan([row.seq for row in rows], tokens)
        except CacheFull as full:
            self.met["CacheFull"] += 1
            assert snapshot(self.core) == before
            assert full.needed > full.available
            assert str(full.needed) in str(full) and str(self.core.num_blocks) in str(full)
            if self.full:
                assert need > self.core.num_blocks, (need, full)
            return None
        for row, ids in zip(rows, tokens, strict=True):
            row.pending = len(ids)
        assert plan.counts.tolist() == [len(ids) for ids in tokens]
        assert plan.starts.tolist() == [len(row.tokens) for row in rows]
        assert all((group.copies > 0).all() for group in plan.groups)
        if self.states:
            self._move_states(plan, rows, tokens)
        return Pending(plan, rows, tokens)

    def _move_states(self, plan: Any, rows: list[Row], tokens: list[list[int]]) -> None:
        """What a model does: read each row's state, write the new ones. Nobody else's may change, come what may."""
        group = plan.groups[[group.kind for group in self.core.groups].index("state")]
        assert not len(group.copies)
        for row, block in zip(rows, group.state_reads.tolist(), strict=True):
            assert self.held[block] == row.letters if row.tokens else block == 0
        written = group.state_writes[:, 2].tolist()
        assert len(set(written)) == len(written) and not {0, *group.state_reads.tolist()} & set(written)
        for number, end, block in group.state_writes.tolist():
            row = rows[number]
            after = row.tokens + tokens[number][:end]
            self.held[block] = tuple((token, row.extras.get(at)) for at, token in enumerate(after))
        self.met["state moved"] += group.state_reads.any()

    def _commit(self, step: Pending) -> None:
        self.core.commit(step.plan)
        for row, ids in zip(step.rows, step.tokens, strict=True):
            row.pending = 0
            row.cut = False
            row.tokens = row.tokens + ids
            self.ever.append((*row.family, row.letters))
            self._keep_full_blocks(row)
        self.met["copy"] += len(step.plan.copies) > 0

    rows_of_a_step = {  # noqa: RUF012
        "picks": st.lists(which, min_size=1, max_size=4),
        "lists": st.lists(prompts(max_size=6), min_size=4, max_size=4),
    }

    @precondition(lambda self: any(not row.pending for row in self.rows))
    @rule(**rows_of_a_step)
    def step(self, picks, lists) -> None:
        planned = self._plan(picks, lists)
        if planned:
            self._commit(planned)

    @precondition(lambda self: any(not row.pending for row in self.rows))
    @rule(**rows_of_a_step)
    def step_and_roll_back(self, picks, lists) -> None:
        self._check_exactness()
        live = self.core.stats().live_blocks
        planned = self._plan(picks, lists)
        if planned:
            self.core.rollback(planned.plan)
            for row in planned.rows:
                row.pending = 0
            reserved = any(row.reserved for row in self.rows)
            assert self.core.stats().live_blocks == live or reserved
            self.met["rollback"] += 1
            with pytest.raises(StepError):
                self.core.commit(planned.plan)

    @precondition(lambda self: any(not row.pending for row in self.rows) and len(self.pending) < 2)
    @rule(**rows_of_a_step)
    def start_step(self, picks, lists) -> None:
        planned = self._plan(picks, lists)
        if planned:
            self.pending.append(planned)

    @precondition(lambda self: self.pending)
    @rule(pick=which, commit=st.booleans())
    def finish_step(self, pick, commit) -> None:
        step = self.pending.pop(pick % len(self.pending))
        if commit:
            self._commit(step)
            return
        self.core.rollback(step.plan)
        for row in step.rows:
            row.pending = 0

    @precondition(lambda self: self.rows)
    @rule(pick=which)
    def fork(self, pick) -> None:
        row = self.rows[pick % len(self.rows)]
        if row.pending:
            with pytest.raises(StepError):
                row.seq.fork()
            return
        live = self.core.stats().live_blocks
        child = row.seq.fork()
        assert self.core.stats().live_blocks == live
        self.rows.append(Row(child, list(row.tokens), row.salt, row.extras, row.outputs, row.reserved, cut=row.cut))

    @precondition(lambda self: self.rows)
    @rule(pick=which, drop=st.integers(0, 9))
    def truncate(self, pick, drop) -> None:
        row = self.rows[pick % len(self.rows)]
        length = max(0, len(row.tokens) - drop)
        before = snapshot(self.core)
        if row.pending:
            with pytest.raises(StepError):
                row.seq.truncate(length)
            assert snapshot(self.core) == before
            return
        try:
            row.seq.truncate(length)
        except InvalidInput as error:
            assert not self.full, error
            assert snapshot(self.core) == before
            self.met["truncate refused"] += 1
            return
        row.tokens = row.tokens[:length]
        row.cut = length % self.size > 0
        if drop and row.cut:
            self.kept = [
                (salt, stored, run[:length] if self._shares_tail(row, salt, run) else run)
                for salt, stored, run in self.kept
            ]
        self.met["truncate"] += drop > 0

    @precondition(lambda self: self.rows)
    @rule(pick=which)
    def close(self, pick) -> None:
        row = self.rows[pick % len(self.rows)]
        if row.pending:
            with pytest.raises(StepError):
                row.seq.close()
            return
        self._close(row)

    def _close(self, row: Row) -> None:
        self.rows.remove(row)
        row.seq.close()
        shortest = min(
            (len(o.tokens) for o in self.rows if o.cut and self._shares_tail(o, row.salt, row.letters)),
            default=len(row.tokens),
        )
        self.kept.append((*row.family, row.letters[: max(shortest, len(row.tokens) // self.size * self.size)]))
        self.closed.append(row.seq)

    @precondition(lambda self: self.closed)
    @rule(pick=which)
    def use_after_close(self, pick) -> None:
        seq = self.closed[pick % len(self.closed)]
        before = snapshot(self.core)
        for use in (
            seq.close,
            seq.fork,
            lambda: seq.truncate(0),
            lambda: self.core.plan([seq], [[1]]),
            lambda: seq.tokens,
        ):
            with pytest.raises(SequenceClosed, match=str(seq.id)):
                use()
        assert snapshot(self.core) == before

    @rule(blocks=st.integers(-2, 20), too_small=st.sampled_from([False, False, True]))
    def resize(self, blocks, too_small) -> None:
        blocks = max(1, blocks + self.pool_sizes[0] // 2)
        live = max(group.pool.num_live for group in self.core.groups)
        if too_small and live > 1:
            blocks = live - 1
        before = snapshot(self.core)
        stats = self.core.stats()
        try:
            resized = self.core.resize(blocks)
        except StepError:
            assert self.pending and snapshot(self.core) == before
        except CacheFull as full:
            assert snapshot(self.core) == before
            assert full.needed > blocks == full.available
            if self.full:
                assert self._live_bound() > blocks
            self.met["resize refused"] += 1
        else:
            for group, result in zip(self.core.groups, resized, strict=True):
                if group.kind == "state":
                    self.held |= {new: self.held[old] for old, new in result.moves.items() if old in self.held}
            assert self.core.num_blocks == blocks
            assert not stats.evicted_blocks or not self.exact or self.core.stats().evicted_blocks
            self.met["resize"] += 1

    @rule()
    def clear(self) -> None:
        self.core.clear()
        assert self.core.stats().cached_blocks == 0
        self.kept = []
        self.exact = self.exact and not self.states  # a row holds its last state alone
        for row in self.rows:
            self._keep_full_blocks(row)

    @invariant()
    def valid(self) -> None:
        if not hasattr(self, "core"):
            return
        self.core.check_valid()
        stats = self.core.stats()
        assert stats.live_blocks + stats.cached_blocks + stats.free_blocks == stats.num_blocks
        assert stats.open_sequences == len(self.rows)
        assert stats.num_blocks == self.core.num_blocks * len(self.core.groups)
        for row in self.rows:
            assert row.seq.tokens == row.tokens
            assert row.seq.length == len(row.seq) == len(row.tokens)
            assert row.seq.num_cached <= row.seq.length
        self.met["eviction"] += stats.evicted_blocks > 0
        self._check_live(stats)

    def _check_live(self, stats: Any) -> None:
        ahead = self._ahead(self.rows)
        for group in self.core.groups:
            if group.kind == "output":
                continue
            live = group.pool.num_live
            if group.window is None:
                assert live <= self._live_bound() + ahead
            else:
                assert live <= ahead + sum(self._window_blocks(row, group.window) for row in self.rows)

    def _window_blocks(self, row: Row, window: int) -> int:
        """Blocks from the first that the next token sees, one more for a copy, and those of a running step."""
        first = max(0, len(row.tokens) - window + 1) // self.size
        held = -(-len(row.tokens) // self.size) - min(first, len(row.tokens) // self.size)
        return held + (self._new_blocks(row, row.pending) + 1 if row.pending else 0)

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        for step in self.pending:
            self.core.rollback(step.plan)
        for row in self.rows:
            row.seq.close()
        stats = self.core.stats()
        assert stats.live_blocks == stats.open_sequences == 0
        self.core.clear()
        self.core.check_valid()
        assert self.core.stats().free_blocks == stats.num_blocks
        assert len(self.core._index) == 0, "nodes are left over in the prefix index"


VARIANTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "full, a pool too large to evict": (
        {"pool_sizes": (400, 400)},
        ("exact match", "match inside a block", "copy", "truncate", "rollback"),
    ),
    "full, a small pool": ({}, ("match", "copy", "CacheFull", "eviction", "resize")),
    "window": ({"windows": (4,)}, ("match", "copy", "eviction", "truncate")),
    "mixed": ({"windows": (None, 3, 7)}, ("match", "copy", "CacheFull", "eviction", "truncate")),
    "outputs": ({"outputs": True, "pool_sizes": (8, 200)}, ("match", "copy", "exact match")),
    "states": ({"states": True}, ("match", "state moved", "CacheFull", "eviction", "truncate", "truncate refused")),
    "states, a pool too large to evict": (
        {"states": True, "pool_sizes": (400, 400)},
        ("exact match", "match inside a block", "copy", "state moved", "rollback"),
    ),
    "states alone": ({"windows": (), "states": True}, ("match", "state moved", "eviction", "truncate")),
    "states with windows and outputs": (
        {"windows": (None, 5), "states": True, "outputs": True},
        ("match", "copy", "state moved"),
    ),
    "mixed with outputs": ({"windows": (None, 5), "outputs": True}, ("match", "copy", "eviction")),
}


def _run(name: str, examples: int, steps: int) -> None:
    options, interesting = VARIANTS[name]
    met: Counter[str] = Counter()
    machine = type("Machine", (CacheMachine,), {**options, "met": met})
    missing = list(interesting)
    for _ in range(4):
        # Draws differ: a run may miss something that the next one meets.
        run_state_machine_as_test(
            machine, settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None)
        )
        missing = [what for what in interesting if not met[what]]
        if not missing:
            break
    assert not missing, f"never met: {missing}; met {dict(met)}"


@pytest.mark.parametrize("name", VARIANTS)
def test_model(name):
    _run(name, examples=30, steps=30)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_model_at_length(name):
    _run(name, examples=600, steps=80)
