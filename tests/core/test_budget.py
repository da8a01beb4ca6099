"""One limit in bytes for K/V blocks and activations: never exceeded; the least recently used goes, of either kind."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvcache_core import BlockCache, BlockLayout, CacheFull, InvalidInput, LayerSpec
from kvcache_core.budget import Budget, first_blocks
from kvcache_core.entries import EntryCache
from kvcache_core.sharing import UseClock
from kvcache_core.store import NumpyStore
from tests.no_memory import no_memory

SIZE = 4
LAYOUT = BlockLayout([LayerSpec.attention(1, 2)], SIZE)
WINDOWS = BlockLayout([LayerSpec.attention(1, 2), LayerSpec.attention(1, 2, window=6), LayerSpec.state(1, 3)], SIZE)
BLOCK = LAYOUT.bytes_per_block
PART = 4
"""Blocks of a part in a cache of 64."""


class Both:
    """K/V blocks and entries under one limit, as a cache has them.

    A block holds the tokens that its prompt's number makes; an entry is named by its number.
    """

    def __init__(self, memory: int = 65 * BLOCK, layout: BlockLayout = LAYOUT) -> None:
        clock = UseClock()
        self.entries = EntryCache(memory=memory, clock=clock)
        self.store = NumpyStore(layout, first_blocks(memory, self.entries, layout))
        self.core = BlockCache(self.store.num_blocks, layout=layout, clock=clock)
        self.budget = Budget(memory, self.entries, self.core, self.store)

    def open(self, number: int, blocks: int):
        """A sequence of full blocks, computed as far as they are not cached."""
        tokens = [number * 100 + at for at in range(blocks * SIZE)] + [7]
        seq = self.core.open(tokens)
        try:
            self.write(seq, tokens[seq.num_cached : -1])
        except CacheFull:
            seq.close()
            raise
        return seq

    def write(self, seq, tokens) -> None:
        """A step whose K is the token."""
        if not tokens:
            return
        plan = self.core.plan([seq], [tokens])
        self.store.apply_copies(plan)
        for layer, spec in enumerate(self.store.layout.layers):
            if spec.kind == "attention":
                slots = plan.groups[self.store.layout.group_of(layer)].slots[0]
                self.store.write(layer, "k", slots, np.repeat(plan.tokens[0], 2).reshape(-1, 1, 2).astype(np.float32))
        self.core.commit(plan)

    def read(self, seq) -> None:
        """What a sequence holds lies where its tables say."""
        blocks = np.array(seq.tables[0]).repeat(SIZE)[: seq.length]
        found = self.store.read(0, "k", blocks * SIZE + np.arange(seq.length) % SIZE)
        assert found[:, 0, 0].tolist() == seq.tokens

    def use(self, *numbers: int, size: int = BLOCK) -> int:
        """Look entries up and keep what is missing; returns how many were computed."""
        lookup = self.entries.look_up([str(number).encode() for number in numbers])
        self.entries.keep(lookup, lookup.compute, [size] * len(lookup.compute))
        return len(lookup.compute)

    def check(self) -> None:
        """The promise."""
        assert self.store.nbytes + self.entries.bytes <= self.budget.memory
        self.budget.check_valid()
        self.entries.check_valid()
        self.core.check_valid()


@pytest.fixture
def both():
    both = Both()
    yield both
    both.check()


# ---- one kind alone ----------------------------------------------------------------------------


def test_kv_alone_has_all_of_it_and_never_moves(both):
    assert both.core.num_blocks == 64
    for number in range(20):
        both.open(number, 7).close()
    assert both.budget.moves == 0
    assert both.core.num_blocks == 64
    assert both.core.stats().evicted_blocks == 20 * 7 - 64


def test_kv_begins_with_what_activations_do_not_hold():
    entries = EntryCache(memory=65 * BLOCK)
    entries.keep(entries.look_up([b"a"]), ["a"], [20 * BLOCK])
    assert first_blocks(65 * BLOCK, entries, LAYOUT) == 44
    assert entries.memory == 20 * BLOCK


def test_kv_begins_with_a_part_at_least():
    entries = EntryCache(memory=65 * BLOCK)
    entries.keep(entries.look_up([b"old", b"new"]), "on", [40 * BLOCK, 25 * BLOCK])
    assert first_blocks(65 * BLOCK, entries, LAYOUT) == PART
    assert b"old" not in entries
    assert b"new" in entries


def test_a_larger_entry_than_can_have_room_evicts_none_while_memory_cannot_move(both):
    for number in range(4):
        both.open(number, 16).close()
    with no_memory(both.store):
        both.use(1, 2)
        assert both.budget.failed_moves == 1
    assert both.core.num_blocks == 64
    for number in range(80):
        both.open(number % 4, 16).close()
    both.use(3, 4)
    assert both.budget.moves == 1
    room = both.entries.memory
    with no_memory(both.store):
        both.use(5, size=room + 1)
        both.use(6, size=room + 1)
    assert both.budget.failed_moves == 2


def test_no_block_fits():
    with pytest.raises(InvalidInput, match="holds no block"):
        first_blocks(BLOCK, EntryCache(memory=BLOCK), LAYOUT)


# ---- one kind is short -------------------------------------------------------------------------


def test_entries_take_what_blocks_do_not_use_without_evicting(both):
    both.open(1, 20).close()
    both.use(*range(20))
    assert len(both.entries) == 20
    assert both.core.stats().evicted_blocks == 0
    assert both.core.cached_length([100 + at for at in range(80)] + [7]) == 80
    assert both.budget.moves == 1, "one for the whole call"


def test_old_blocks_go_before_newer_entries(both):
    both.open(1, 60).close()
    both.use(*range(100))
    assert both.core.num_blocks == 2 * PART, "one part more of old content stays behind"
    assert len(both.entries) == 64 - 2 * PART


def test_old_entries_go_before_newer_blocks():
    both = Both()
    both.use(*range(60))
    for number in range(3):
        both.open(number, 20).close()
    both.check()
    # One more part of old content stays behind, and the room below a part.
    assert len(both.entries) <= 2 * PART
    assert both.core.stats().evicted_blocks <= 2 * PART


def test_a_step_that_needs_it_takes_newer_entries_too(both):
    both.use(*range(40))
    seq = both.open(1, 24)
    both.use(*range(40))  # now every entry is newer than the sequence's blocks, which are in use
    both.write(seq, list(range(40 * SIZE)))
    both.read(seq)
    assert seq.length == 64 * SIZE
    with pytest.raises(CacheFull):
        both.write(seq, [1])
    assert (both.core.num_blocks, len(both.entries)) == (64, 0)
    seq.close()


def test_a_large_step_evicts_its_own_before_newer_entries(both):
    both.use(*range(12))
    both.open(1, 22).close()
    both.use(*range(12, 42))
    both.open(2, 20).close()
    assert both.entries.evicted_entries > 0, "the old ones"
    assert all(str(number).encode() in both.entries for number in range(12, 42))
    assert both.core.cached_length([200 + at for at in range(80)] + [7]) == 80


def test_a_large_step_takes_no_more_entries_than_are_older_than_its_own_victims(both):
    both.open(1, 8).close()
    both.use(*range(40))
    both.open(2, 16).close()
    assert (both.core.num_blocks, both.core.stats().cached_blocks) == (24, 24)
    evicted = both.entries.evicted_entries
    both.open(3, 16).close()
    assert both.core.cached_length([100 + at for at in range(32)] + [7]) == 0, "older than every entry"
    assert both.entries.evicted_entries - evicted == 8
    assert both.core.cached_length([200 + at for at in range(64)] + [7]) == 64, "newer than every entry"


def test_too_much_is_cache_full_and_no_entry_goes(both):
    both.use(*range(40))
    with pytest.raises(CacheFull):
        both.open(1, 65)
    assert len(both.entries) == 40


def test_the_most_blocks_are_those_that_both_could_be():
    both = Both()
    assert both.core.most_blocks == 64
    both.use(*range(40))
    assert both.core.num_blocks < 30
    assert both.core.most_blocks == 64


def test_an_entry_larger_than_what_is_left_takes_blocks_that_nobody_holds(both):
    seq = both.open(1, 10)
    both.use(1, size=50 * BLOCK)
    assert b"1" in both.entries
    both.use(2, size=55 * BLOCK)
    assert b"2" not in both.entries, "ten blocks are held"
    both.read(seq)
    seq.close()


def test_nothing_moves_during_a_step(both):
    both.open(1, 50).close()
    seq = both.core.open([1, 2])
    plan = both.core.plan([seq], [[1, 2]])
    both.use(*range(30))
    assert both.budget.moves == 0
    assert len(both.entries) == 0, "there was no room"
    both.core.commit(plan)
    both.use(*range(30))
    assert both.budget.moves > 0
    seq.close()


def test_entries_that_come_during_steps_have_room_from_the_next_step_on(both):
    both.open(1, 60).close()
    seq = both.core.open([1, 2, 3])
    for token in (1, 2, 3):
        plan = both.core.plan([seq], [[token]])
        both.use(*range(6))
        both.core.commit(plan)
    assert both.budget.moves == 1
    assert len(both.entries) == 6
    seq.close()


def test_what_entries_lacked_is_forgotten_once_there_is_room(both):
    both.use(*range(30))
    seq = both.core.open([1, 2])
    plan = both.core.plan([seq], [[1]])
    both.use(50, 51, 52, 53)
    both.core.commit(plan)
    both.entries.clear()
    moves, blocks = both.budget.moves, both.core.num_blocks
    both.core.commit(both.core.plan([seq], [[2]]))
    assert (both.budget.moves, both.core.num_blocks) == (moves, blocks)
    seq.close()


def test_nothing_moves_while_another_thread_reads(both):
    both.open(1, 60).close()
    moves = []

    def use():
        both.use(1)
        moves.append(both.budget.moves)

    def in_thread():
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()

    with both.core.reading():
        in_thread()
        use()
    in_thread()
    assert moves == [0, 0, 1]
    assert b"1" in both.entries


def test_a_reader_may_make_the_pool_larger_itself(both):
    both.use(*range(60))
    with both.core.reading():
        both.open(1, 30).close()
    assert both.core.num_blocks >= 30


# ---- how often ---------------------------------------------------------------------------------


def test_taking_turns_moves_nothing_once_each_has_its_share(both):
    """Both kinds compute something new in turn, and the memory is full: each evicts its own."""
    for number in range(200):
        both.open(number, 1).close()
        both.use(number)
    moves = both.budget.moves
    for number in range(200, 600):
        both.open(number, 1).close()
        both.use(number)
    assert both.budget.moves == moves


def test_moves_are_few_even_if_the_kinds_crowd_each_other_out(both):
    """Phases in which one kind alone computes enough to fill everything."""
    filled = 0
    for phase in range(12):
        for number in range(50):
            if phase % 2:
                both.use(1000 * phase + number)
            else:
                both.open(1000 * phase + number, 1).close()
            filled += 1
    assert 0 < both.budget.moves <= filled / PART


# ---- another limit -----------------------------------------------------------------------------


def test_a_smaller_limit_gives_up_the_least_recently_used_of_both(both):
    both.open(1, 10).close()
    both.use(*range(10))
    both.open(2, 10).close()
    both.use(*range(10, 20))
    both.budget.resize(31 * BLOCK)
    both.check()
    assert both.core.cached_length([100 + at for at in range(40)] + [7]) == 0
    assert both.core.cached_length([200 + at for at in range(40)] + [7]) == 40
    assert all(str(number).encode() in both.entries for number in range(10, 20))
    both.budget.resize(65 * BLOCK)
    both.check()
    assert both.core.num_blocks == 64 - both.entries.bytes // BLOCK


def test_a_limit_below_what_is_held_changes_nothing(both):
    seq = both.open(1, 20)
    both.use(*range(10))
    for memory, error in ((20 * BLOCK, CacheFull), (BLOCK, InvalidInput)):
        with pytest.raises(error):
            both.budget.resize(memory)
        both.check()
    assert len(both.entries) == 10
    assert both.budget.memory == 65 * BLOCK
    both.read(seq)
    seq.close()


def test_no_cycle_keeps_the_arrays_in_memory():
    both = Both()
    both.use(*range(10))
    both.open(1, 5).close()
    gc.disable()
    try:
        gone = weakref.ref(both.store)
        del both
        assert gone() is None
    finally:
        gc.enable()


def test_without_its_budget_each_kind_keeps_its_share():
    both = Both()
    both.use(*range(10))
    del both.budget
    both.open(1, 40).close()
    both.use(*range(100))
    assert both.store.nbytes + both.entries.bytes <= 65 * BLOCK
    assert both.core.most_blocks == both.core.num_blocks


# ---- any history, against one dictionary -------------------------------------------------------


class Naive:
    """One dictionary {name: (bytes, last use)} over both kinds; names are those of blocks and of entries."""

    def __init__(self) -> None:
        self.content: dict[object, tuple[int, int]] = {}
        self.now = 0

    def use(self, names, size: int) -> None:
        """One use of all the names."""
        self.now += 1
        self.content.update((name, (size, self.now)) for name in names)

    def forget(self, gone) -> list[tuple[object, int]]:
        """(name, last use) of what is gone now."""
        return [(name, self.content.pop(name)[1]) for name in gone]

    def older(self, time: int, kind: type) -> int:
        """Bytes of the content of a kind that was last used before ``time``."""
        return sum(size for name, (size, used) in self.content.items() if isinstance(name, kind) and used < time)


class AnyHistory(RuleBasedStateMachine):
    """Whatever is done: the bytes keep to the limit, what is held is not lost, and what goes is the oldest but for two
    parts of the other kind (none was left that a whole part of it was older).
    """

    layout = LAYOUT

    def __init__(self) -> None:
        super().__init__()
        self.both = Both(layout=self.layout)
        self.naive = Naive()
        self.held: dict[object, object] = {}
        self.count = 0

    def _part(self) -> int:
        layout = self.both.store.layout
        return max(1, (self.both.budget.memory // layout.bytes_per_block - 1) // 16) * layout.bytes_per_block

    def _notice(self, *, strict: bool = True) -> None:
        """What is gone was older than what stays, as far as promised."""
        findable = {one.key for one in self.both.core.findable_blocks()}
        entries = {entry.key.decode() for entry in self.both.entries.contents()}
        gone = [name for name in self.naive.content if name not in (findable if isinstance(name, bytes) else entries)]
        if not strict:
            self.naive.forget(gone)
            return
        for name, used in self.naive.forget(gone):
            event("a block goes" if isinstance(name, bytes) else "an entry goes")
            other = str if isinstance(name, bytes) else bytes
            assert self.naive.older(used, other) < 2 * self._part() + 2 * self.both.store.layout.bytes_per_block

    @rule(number=st.integers(1, 30), blocks=st.integers(1, 12), close=st.booleans())
    def prompt(self, number, blocks, close):
        held_before = len(self.both.core._open)
        try:
            seq = self.both.open(number, blocks)
        except CacheFull:
            assert held_before
            self._notice(strict=False)
            return
        keys = seq.prompt_keys[:blocks]
        if close:
            seq.close()
            self.naive.use(keys, BLOCK)
        else:
            self.held[seq] = keys
        for keys_held in self.held.values():
            for key in keys_held:
                self.naive.content.pop(key, None)  # in use: nothing that could go
        # To make room for what is in use, newer content goes too.
        self._notice(strict=close and not self.held)

    @rule(at=st.integers(0, 9))
    def close(self, at):
        if not self.held:
            return
        seq = list(self.held)[at % len(self.held)]
        self.both.read(seq)
        keys = self.held.pop(seq)
        seq.close()
        others = {key for keys in self.held.values() for key in keys}
        self.naive.use([key for key in keys if key not in others], BLOCK)

    @rule(numbers=st.lists(st.integers(0, 40), min_size=1, max_size=8, unique=True), blocks=st.integers(1, 3))
    def entries(self, numbers, blocks):
        before = set(self.naive.content)
        for number in numbers:
            name = f"{number}-{blocks}"
            lookup = self.both.entries.look_up([name.encode()])
            assert (not lookup.compute) == (name in before), "found if and only if it was kept and did not go"
            self.both.entries.keep(lookup, [number] * len(lookup.compute), [blocks * BLOCK] * len(lookup.compute))
            if name.encode() in self.both.entries:
                self.naive.use([name], blocks * BLOCK)
            self._notice()
            before = set(self.naive.content)

    @rule(blocks=st.sampled_from([20, 40, 65, 90]))
    def another_limit(self, blocks):
        try:
            self.both.budget.resize(blocks * BLOCK)
        except CacheFull:
            assert self.held
        self._notice(strict=False)

    @invariant()
    def the_limit_holds(self):
        self.both.check()

    def teardown(self) -> None:
        for seq in self.held:
            self.both.read(seq)


AnyHistory.TestCase.settings = settings(stateful_step_count=30)
TestAnyHistory = AnyHistory.TestCase


class WithWindows(RuleBasedStateMachine):
    """The same limit, where layer groups let go of blocks at times of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = 65 * WINDOWS.bytes_per_block
        self.both = Both(self.memory, WINDOWS)

    @rule(number=st.integers(1, 30), blocks=st.integers(1, 12))
    def prompt(self, number, blocks):
        self.both.open(number, blocks).close()

    @rule(number=st.integers(0, 60), blocks=st.integers(1, 6))
    def entry(self, number, blocks):
        self.both.use(number * 10 + blocks, size=blocks * WINDOWS.bytes_per_block)

    @invariant()
    def the_limit_holds(self):
        self.both.check()


WithWindows.TestCase.settings = settings(stateful_step_count=20)
TestWithWindows = WithWindows.TestCase
