"""Bad input: each has its error, with the rule and the numbers, and leaves everything as it was."""

from __future__ import annotations

import numpy as np
import pytest

import kvcache_core
from kvcache_core import (
    BlockCache,
    BlockError,
    CacheFull,
    InvalidInput,
    InvalidType,
    KVCacheError,
    SequenceClosed,
    StepError,
)
from tests.strategies import compute, snapshot, step


@pytest.fixture
def core():
    """A cache with something of everything: shared blocks, cached blocks, a reservation, an open step."""
    core = BlockCache(24, 4)
    compute(core, [1, 2, 3, 4, 5, 6, 7]).close()
    seq = compute(core, [1, 2, 3, 4, 5, 9], max_new_tokens=6)
    seq.fork()
    return core


@pytest.fixture
def seq(core):
    return compute(core, [7, 7, 7, 7, 7, 7])


def _refused(core, error, words, call, *args, **kwargs):
    before = snapshot(core)
    with pytest.raises(error, match=words) as caught:
        call(*args, **kwargs)
    assert isinstance(caught.value, KVCacheError)
    assert snapshot(core) == before
    core.check_valid()
    return caught.value


BAD_PROMPTS = [
    ([], InvalidInput, "at least one token, got none"),
    ((), InvalidInput, "at least one token"),
    (np.zeros(0, np.int64), InvalidInput, "at least one token"),
    ([1, -1], InvalidInput, "outside 0 .. 2147483647: -1"),
    ([2**31], InvalidInput, "outside 0 .. 2147483647: 2147483648"),
    ([*range(99), 2**31], InvalidInput, "outside 0 .. 2147483647: 2147483648"),
    ([*range(99), -7], InvalidInput, "outside 0 .. 2147483647: -7"),
    ([1, 2**32], InvalidInput, "outside 0 .. 2147483647: 4294967296"),
    ([-(2**40)], InvalidInput, "outside 0 .. 2147483647"),
    (np.array([3, 2**31]), InvalidInput, "2147483648"),
    (np.array([3, 5 - 2**32]), InvalidInput, "-4294967291"),
    (np.array([2**63], np.uint64), InvalidInput, "9223372036854775808"),
    ([1.0, 2.0], InvalidType, r"must be integers, got \[1.0, 2.0\]"),
    (["a"], InvalidType, "must be integers"),
    ([None], InvalidType, "must be integers"),
    ([[1, 2]], InvalidType, "must be integers"),
    (np.array([1.0]), InvalidType, "float64"),
    (np.array([True]), InvalidType, "bool"),
    ([True, False, True], InvalidType, "must be integers, got True at 0"),
    ([7, False], InvalidType, "must be integers, got False at 1"),
    ((*range(100), True), InvalidType, "must be integers, got True at 100"),
    (np.zeros((1, 3), np.int64), InvalidInput, r"one dimension, got shape \(1, 3\)"),
    (np.int64(3), InvalidInput, r"one dimension, got shape \(\)"),
    (7, InvalidInput, "one dimension"),
    ("text", InvalidInput, "one dimension"),
    (None, InvalidInput, "one dimension"),
]


@pytest.mark.parametrize(("tokens", "error", "words"), BAD_PROMPTS)
def test_bad_prompts(core, tokens, error, words):
    _refused(core, error, words, core.open, tokens)
    _refused(core, error, words, core.cached_length, tokens)


@pytest.mark.parametrize(("tokens", "error", "words"), BAD_PROMPTS)
def test_bad_rows_of_a_step_name_the_row(core, seq, tokens, error, words):
    other = compute(core, [8, 8])
    _refused(core, error, f"row 1.*{words}", core.plan, [seq, other], [[1], tokens])


@pytest.mark.parametrize("tokens", [[3, 4], (3, 4), np.array([3, 4], np.uint8), np.array([3, 4]), range(3, 5)])
def test_integers_of_every_kind_are_good(tokens):
    core = BlockCache(4, 4)
    seq = core.open(tokens)
    core.commit(core.plan([seq], [tokens]))
    assert seq.tokens == [3, 4]


def test_value_and_type_errors_are_also_the_built_in_ones():
    assert issubclass(InvalidInput, ValueError)
    assert issubclass(InvalidType, TypeError)
    assert issubclass(SequenceClosed, RuntimeError)
    for name in kvcache_core.errors.__all__:
        error = getattr(kvcache_core.errors, name)
        assert issubclass(error, KVCacheError) or issubclass(error, Warning)


def test_the_rest_of_a_prompt_needs_no_list(core):
    prompt = list(range(20, 31))
    for cached in (0, 10):
        seq = core.open(prompt)
        assert seq.num_cached == cached
        plan = core.plan([seq])
        assert plan.tokens.tolist() == [prompt[cached:]]
        core.commit(plan)
        assert seq.tokens == prompt
        with pytest.raises(InvalidInput, match="holds its whole prompt"):
            core.plan([seq])
        seq.close()
    core.check_valid()


@pytest.mark.parametrize("size", [0, -3, 1.5, "10", True, None])
def test_bad_sizes(core, size):
    with pytest.raises(InvalidInput, match=f"at least 1; got {size!r}"):
        BlockCache(size)
    _refused(core, InvalidInput, f"at least 1; got {size!r}", core.resize, size)
    with pytest.raises(InvalidInput, match=f"block_size .* got {size!r}"):
        BlockCache(4, size)


@pytest.mark.parametrize("count", [-1, 1.5, "3", None])
def test_bad_reservations(core, count):
    _refused(core, InvalidInput, "max_new_tokens must be", core.open, [1, 2], max_new_tokens=count)


def test_a_step_needs_rows_and_one_list_each(core, seq):
    _refused(core, InvalidInput, "got 0 sequences and 0 lists", core.plan, [], [])
    _refused(core, InvalidInput, "got 1 sequences and 2 lists", core.plan, [seq], [[1], [2]])
    _refused(core, InvalidInput, "got 2 sequences and 1 lists", core.plan, [seq, seq], [[1]])
    _refused(core, InvalidInput, "stands in the step twice", core.plan, [seq, seq], [[1], [2]])


def test_sequences_with_and_without_outputs_do_not_mix():
    layers = [kvcache_core.LayerSpec.attention(1, 1), kvcache_core.LayerSpec.output(1)]
    core = BlockCache(8, layout=kvcache_core.BlockLayout(layers, 4))
    rows = [core.open([1]), core.open([2], outputs=True)]
    _refused(core, InvalidInput, "outputs and without", core.plan, rows, [[1], [2]])


def test_a_sequence_of_another_cache_is_refused(core, seq):
    other = BlockCache(8, 4)
    stranger = compute(other, [1, 2])
    plan = other.plan([stranger], [[3]])
    for call, args in (
        (core.plan, ([seq, stranger], [[1], [2]])),
        (core.fork, (stranger,)),
        (core.truncate, (stranger, 0)),
        (core.close, (stranger,)),
        (core.tokens_of, (stranger,)),
        (core.commit, (plan,)),
        (core.rollback, (plan,)),
    ):
        _refused(core, InvalidInput, "belongs to another cache", call, *args)
    other.commit(plan)
    assert stranger.tokens == [1, 2, 3]


def test_a_closed_sequence_is_named_and_refused(core, seq):
    seq.close()
    for verb, call, args in (
        ("close", core.close, (seq,)),
        ("step", core.plan, ([seq], [[1]])),
        ("fork", core.fork, (seq,)),
        ("truncate", core.truncate, (seq, 1)),
    ):
        _refused(core, SequenceClosed, f"cannot {verb} sequence {seq.id}: it is closed", call, *args)
    _refused(core, SequenceClosed, "closed", lambda: seq.tokens)
    _refused(core, SequenceClosed, "closed", seq.close)


def test_a_sequence_in_a_step_is_refused_until_the_step_ends(core, seq):
    plan = core.plan([seq], [[1, 2]])
    for verb, call, args in (
        ("close", core.close, (seq,)),
        ("step", core.plan, ([seq], [[1]])),
        ("fork", core.fork, (seq,)),
        ("truncate", core.truncate, (seq, 1)),
    ):
        _refused(core, StepError, f"cannot {verb} sequence {seq.id}: it is in a step", call, *args)
    _refused(core, StepError, "cannot resize during a step", core.resize, 20)
    core.commit(plan)
    seq.close()


@pytest.mark.parametrize("first", ["commit", "rollback"])
@pytest.mark.parametrize("second", ["commit", "rollback"])
def test_a_step_ends_once(core, seq, first, second):
    plan = core.plan([seq], [[1, 2, 3, 4, 5]])
    getattr(core, first)(plan)
    _refused(core, StepError, "committed or rolled back before", getattr(core, second), plan)


@pytest.mark.parametrize("length", [-1, 7, 100])
def test_truncate_beyond_the_sequence_has_the_numbers(core, seq, length):
    _refused(core, InvalidInput, f"0 .. 6 .*got {length}", seq.truncate, length)


@pytest.mark.parametrize("length", [2.5, "1", None])
def test_truncate_needs_a_whole_number(core, seq, length):
    _refused(core, InvalidType, "whole number", seq.truncate, length)


def test_out_of_room_has_the_numbers_in_message_and_attributes(core, seq):
    stats = core.stats()
    tokens = list(range(200))
    full = _refused(core, CacheFull, "more blocks", core.plan, [seq], [tokens])
    needed = -(-(seq.length + 200) // 4) - 2
    available = stats.free_blocks + stats.cached_blocks
    assert (full.needed, full.available, full.capacity) == (needed, available, 24)
    for part in (
        f"needs {needed} more blocks",
        f"{stats.free_blocks} free",
        f"{stats.cached_blocks} evictable",
        "of 24",
    ):
        assert part in str(full)
    assert f"{stats.live_blocks} are held" in str(full)


def test_out_of_room_in_one_row_leaves_the_other_rows_alone(core, seq):
    other = compute(core, [8, 8, 8])
    _refused(core, CacheFull, "more blocks", core.plan, [other, seq], [[1, 2], list(range(200))])
    step(core, other, [1, 2])
    assert other.tokens == [8, 8, 8, 1, 2]


def test_out_of_room_keeps_what_others_have_reserved_ahead():
    core = BlockCache(8, 1)
    ahead = compute(core, [1], max_new_tokens=3)
    assert core.stats().live_blocks == 4
    _refused(core, CacheFull, "more blocks", core.plan, [core.open([5])], [list(range(8))])
    # What fits once the reservation is given back does get it.
    step(core, core.open([5]), list(range(7)))
    assert ahead.tokens == [1]
    core.check_valid()


def test_shrinking_below_the_live_blocks_has_the_numbers(core, seq):
    held = core._room.held(core._open.values())
    full = _refused(core, CacheFull, "cannot shrink to 1 blocks", core.resize, 1)
    assert full.needed >= held and full.available == 1 and full.capacity == 24


def test_the_pool_of_a_cache_refuses_a_double_release(core, seq):
    pool = core.groups[0].pool
    block = seq.tables[0][-1]
    _refused(core, BlockError, f"block {block} was released more often", pool.release, [block, block])
    _refused(core, BlockError, "block 99 is unknown", pool.retain, [99])


def test_unknown_counters_name_the_known_ones(core):
    with pytest.raises(KeyError, match="hit_tokens"):
        core.stats()["hits"]
