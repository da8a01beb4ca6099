"""`append` is a planned and committed step of one token per row, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from kvcache_core import BlockCache, BlockLayout, CacheFull, InvalidInput, InvalidType, KVCacheError, LayerSpec
from tests.strategies import compute, layouts, prompts, snapshot

actions = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "append", "append", "one", "fork", "truncate", "open", "close"]),
        st.integers(0, 9),
        st.lists(st.integers(0, 2), min_size=4, max_size=4),
    ),
    max_size=40,
)


def _act(core, rows, action, *, by_append):
    kind, pick, ids = action
    if kind == "open" or not rows:
        prompt = [*ids[:3], *ids]
        rows.append(core.open(prompt, max_new_tokens=pick))
        core.commit(core.plan([rows[-1]], [prompt[rows[-1].num_cached :]]))
    elif kind == "fork":
        rows.append(rows[pick % len(rows)].fork())
    elif kind == "truncate":
        seq = rows[pick % len(rows)]
        seq.truncate(max(0, seq.length - ids[0] - 1))
    elif kind == "close":
        rows.pop(pick % len(rows)).close()
    else:
        chosen = [rows[pick % len(rows)]] if kind == "one" else rows[: 1 + pick % 4]
        tokens = ids[: len(chosen)]
        if not by_append:
            core.commit(core.plan(chosen, [[token] for token in tokens]))
        elif kind == "one":
            core.append(chosen[0], tokens[0])
        else:
            core.append(chosen, tokens)


def _try(core, rows, action, **how):
    before = snapshot(core)
    try:
        _act(core, rows, action, **how)
    except KVCacheError as error:
        if action[0] != "open":
            after = snapshot(core)
            assert after == before
        return type(error)
    return None


def _seen(core, rows):
    """What can be told from outside, without block ids: two orders of the same steps may take other blocks."""
    return [(seq.tokens, seq.num_cached, list(seq.dropped)) for seq in rows], core.stats()


@given(layouts(outputs=False), st.sampled_from([9, 300]), actions)
def test_append_is_plan_and_commit(layout, num_blocks, history):
    ours, other = BlockCache(num_blocks, layout=layout), BlockCache(num_blocks, layout=layout)
    rows: list = []
    other_rows: list = []
    for action in history:
        failed = _try(ours, rows, action, by_append=True)
        assert failed == _try(other, other_rows, action, by_append=False)
        event(f"{action[0]} {failed.__name__ if failed else 'done'}")
        assert _seen(ours, rows) == _seen(other, other_rows)
        ours.check_valid()


def test_a_window_lets_go_only_when_every_row_has_its_block():
    layout = BlockLayout([LayerSpec.attention(1, 2, window=1)], block_size=1)
    ours, other = BlockCache(9, layout=layout), BlockCache(9, layout=layout)
    rows: list = []
    other_rows: list = []
    kinds = [("open", 0), *[("append", 0)] * 5, ("fork", 0), ("one", 1), ("append", 1)]
    for kind, pick in kinds:
        action = (kind, pick, [0, 0, 0, 0])
        assert _try(ours, rows, action, by_append=True) is _try(other, other_rows, action, by_append=False) is None
        assert _seen(ours, rows) == _seen(other, other_rows)


@given(st.lists(prompts(max_size=12), min_size=1, max_size=5), st.integers(1, 5))
def test_appended_tokens_are_found_at_once(lists, size):
    core = BlockCache(400, size)
    for tokens in lists:
        seq = core.open(tokens)
        for token in tokens[seq.num_cached :]:
            core.append(seq, token)
            assert core.cached_length([*seq.tokens, 9]) == seq.length
        assert seq.tokens == tokens
    core.check_valid()


def test_a_row_without_room_leaves_the_others_as_they_were():
    core = BlockCache(2, 2)
    rows = [compute(core, [1]), compute(core, [2, 2])]
    before = snapshot(core)
    with pytest.raises(CacheFull):
        core.append(rows, [5, 6])
    assert snapshot(core) == before
    core.append(rows[0], 5)
    assert rows[0].tokens == [1, 5]


@pytest.mark.parametrize(
    ("tokens", "error"),
    [
        *((-1, InvalidInput), (2**31, InvalidInput), (1.5, InvalidType), (True, InvalidType)),
        *(("x", KVCacheError), (None, KVCacheError)),
    ],
)
def test_bad_tokens_change_nothing(tokens, error):
    core = BlockCache(8, 4)
    seq, other = compute(core, [1, 2]), compute(core, [3])
    for call in (lambda: core.append(seq, tokens), lambda: core.append([other, seq], [1, tokens])):
        before = snapshot(core)
        with pytest.raises(error):
            call()
        assert snapshot(core) == before


def test_bad_rows_are_refused_as_plan_refuses_them():
    core = BlockCache(8, 4)
    seq, other = compute(core, [1, 2]), compute(core, [3])
    with pytest.raises(InvalidInput, match="twice"):
        core.append([seq, seq], [1, 2])
    with pytest.raises(InvalidInput, match="2 sequences and 1 lists"):
        core.append([seq, other], [1])
    with pytest.raises(InvalidInput, match="another cache"):
        BlockCache(8, 4).append(seq, 1)
    plan = core.plan([seq], [[7]])
    with pytest.raises(KVCacheError, match="in a step"):
        core.append(seq, 1)
    core.rollback(plan)
    seq.close()
    with pytest.raises(KVCacheError, match="closed"):
        core.append([other, seq], [1, 1])
    assert other.tokens == [3]
