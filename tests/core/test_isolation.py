"""Nothing is found across namespaces, salts, layouts or extra keys."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache_core import BlockCache, BlockLayout, InvalidInput, InvalidType, LayerSpec, StepError
from kvcache_core.errors import StaleSequence
from kvcache_core.keys import KEY_BYTES
from tests.strategies import compute, prompts, snapshot, step

PROMPT = list(range(20, 31))


@pytest.fixture
def core():
    return BlockCache(64, 4)


@pytest.mark.parametrize("running", [True, False])
def test_another_salt_finds_nothing_not_even_one_token(core, running):
    seq = compute(core, PROMPT, b"a")
    if not running:
        seq.close()
    for salt in (b"", b"b", b"a\0", b"aa", b"A"):
        assert core.open(PROMPT, salt).num_cached == 0
        assert core.cached_length(PROMPT, salt) == 0
    assert core.open(PROMPT, b"a").num_cached == len(PROMPT) - 1


def test_a_changed_namespace_finds_nothing_and_the_old_one_is_found_again(core):
    compute(core, PROMPT).close()
    core.namespace = b"new weights"
    assert core.cached_length(PROMPT) == 0
    seq = compute(core, PROMPT)
    assert seq.num_cached == 0
    core.namespace = b""
    assert core.cached_length(PROMPT) == len(PROMPT) - 1
    core.check_valid()


def test_a_sequence_of_old_weights_cannot_be_stepped(core):
    seq = compute(core, PROMPT)
    core.namespace = b"new weights"
    before = snapshot(core)
    with pytest.raises(StaleSequence, match="weights changed"):
        core.plan([seq], [[1]])
    assert snapshot(core) == before
    assert issubclass(StaleSequence, StepError)
    seq.close()
    core.check_valid()


def test_a_step_that_began_before_the_weights_changed_is_published_for_the_old_ones(core):
    seq = core.open(PROMPT)
    plan = core.plan([seq], [PROMPT])
    core.namespace = b"new weights"
    core.commit(plan)
    assert core.cached_length(PROMPT) == 0
    core.namespace = b""
    assert core.cached_length(PROMPT) == len(PROMPT) - 1


@given(st.binary(max_size=6), st.binary(max_size=6), prompts(max_size=9))
def test_concatenations_of_namespace_and_salt_do_not_meet(namespace, salt, prompt):
    whole = namespace + salt
    core = BlockCache(64, 2, namespace=namespace)
    compute(core, prompt, salt)
    for cut in range(len(whole) + 1):
        core.namespace = whole[:cut]
        expected = len(prompt) - 1 if whole[:cut] == namespace else 0
        assert core.cached_length(prompt, whole[cut:]) == expected


def test_layouts_do_not_meet_when_their_digest_is_the_namespace():
    layouts = [BlockLayout([LayerSpec.attention(h, d)], 4) for h, d in ((1, 4), (2, 2), (4, 1))]
    core = BlockCache(64, 4)
    for layout in layouts:
        core.namespace = layout.digest
        assert compute(core, PROMPT).num_cached == 0


def test_extra_keys_enter_the_chain_at_their_position(core):
    image = {5: b"digest of an image"}
    compute(core, PROMPT, extra_keys=image).close()
    assert core.cached_length(PROMPT, extra_keys=image) == len(PROMPT) - 1
    # The tokens before the image do not depend on it.
    assert core.cached_length(PROMPT) == 5
    assert core.cached_length(PROMPT, extra_keys={5: b"another image"}) == 5
    assert core.cached_length(PROMPT, extra_keys={**image, 2: b"x"}) == 2
    assert core.cached_length(PROMPT, extra_keys={**image, 7: b"x"}) == 7
    assert core.cached_length(PROMPT, extra_keys={6: image[5]}) == 5
    assert core.cached_length(PROMPT, extra_keys={**image, 9: b""}) == 9


def test_an_extra_key_changes_everything_behind_its_block(core):
    compute(core, PROMPT, extra_keys={0: b"lora-1"}).close()
    assert core.cached_length(PROMPT, extra_keys={0: b"lora-2"}) == 0
    assert core.cached_length(PROMPT) == 0
    compute(core, PROMPT, extra_keys={0: b"lora-2"}).close()
    assert core.cached_length(PROMPT, extra_keys={0: b"lora-1"}) == len(PROMPT) - 1
    core.check_valid()


def test_extra_keys_cannot_be_forged_from_one_another(core):
    """Every split of the same bytes over two positions, and one inside the other's value, is a key of its own."""
    value = b"abcd"
    variants = [{0: value[:cut], 1: value[cut:]} for cut in range(5)]
    variants += [{0: value}, {1: value}, {}, {0: b"", 1: b""}, {0: b""}]
    for number, extras in enumerate(variants):
        assert compute(core, [1, 2, 3, 4, 5], extra_keys=extras).num_cached in (0, 1), number
    found = [core.cached_length([1, 2, 3, 4, 5], extra_keys=extras) for extras in variants]
    assert found == [4] * len(variants)
    keys = [seq.prompt_keys[0] for seq in core._open.values()]
    assert len(set(keys)) == len(variants)


def test_a_fork_and_generated_tokens_keep_salt_and_extra_keys(core):
    seq = compute(core, PROMPT[:6], b"a", extra_keys={2: b"x", 9: b"y"})
    child = seq.fork()
    step(core, child, [1, 2, 3, 4, 5])
    tokens = child.tokens
    assert core.cached_length([*tokens, 0]) == 0
    assert core.cached_length([*tokens, 0], b"a") == 2
    assert core.cached_length([*tokens, 0], b"a", extra_keys={2: b"x"}) == 9
    assert core.cached_length([*tokens, 0], b"a", extra_keys={2: b"x", 9: b"y"}) == len(tokens)


def test_no_key_of_one_tenant_is_a_key_of_another(core):
    keys = [core.open(PROMPT, bytes([salt])).prompt_keys for salt in range(8)]
    assert all(len(key) == KEY_BYTES for chain in keys for key in chain)
    assert len(set(itertools.chain(*keys))) == sum(len(chain) for chain in keys) == 8 * (len(PROMPT) // 4)


def test_a_root_without_users_leaves_nothing_behind(core):
    for salt in range(50):
        core.open(PROMPT, bytes([salt])).close()
        core.cached_length(PROMPT, bytes([salt, salt]))
    assert len(core._index) == 0
    core.check_valid()


@pytest.mark.parametrize("salt", ["text", None, 7])
def test_a_salt_that_is_not_bytes_is_refused(core, salt):
    with pytest.raises(InvalidType, match="salt must be bytes"):
        core.open(PROMPT, salt)
    with pytest.raises(InvalidType, match="salt must be bytes"):
        core.cached_length(PROMPT, salt)
    core.check_valid()


@pytest.mark.parametrize("extras", [{-1: b"x"}, {0: "x"}, {"0": b"x"}, {1.0: b"x"}])
def test_bad_extra_keys_are_refused(core, extras):
    with pytest.raises(InvalidInput, match="extra_keys must map positions"):
        core.open(PROMPT, extra_keys=extras)
    assert core.stats().open_sequences == 0
