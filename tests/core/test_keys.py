"""Keys: 128 bits, and no two inputs with the same encoding."""

from __future__ import annotations

import struct
from array import array

from hypothesis import given
from hypothesis import strategies as st

from kvcache_core.keys import KEY_BYTES, block_key, extras_bytes, root_key

ROOT = root_key(16, b"ns", b"salt")
fields = st.binary(max_size=40)


def test_keys_have_at_least_128_bits():
    assert KEY_BYTES * 8 >= 128
    assert len(ROOT) == len(block_key(ROOT, b"\0" * 64)) == KEY_BYTES


@given(st.tuples(st.integers(1, 64), fields, fields), st.tuples(st.integers(1, 64), fields, fields))
def test_roots_are_equal_only_for_equal_fields(one, two):
    assert (root_key(*one) == root_key(*two)) == (one == two)


@given(fields, fields)
def test_moving_bytes_between_namespace_and_salt_gives_another_root(namespace, salt):
    whole = namespace + salt
    roots = {root_key(4, whole[:cut], whole[cut:]) for cut in range(len(whole) + 1)}
    assert len(roots) == len(whole) + 1


@given(fields, fields)
def test_a_field_that_contains_an_encoded_field_is_another_root(namespace, salt):
    forged = namespace + struct.pack("<Q", len(salt)) + salt
    assert root_key(4, forged, b"") != root_key(4, namespace, salt)
    assert root_key(4, b"", forged) != root_key(4, namespace, salt)


def test_block_size_is_part_of_the_root():
    assert root_key(4, b"", b"") != root_key(8, b"", b"")


tokens = st.lists(st.integers(0, 2**31 - 1), min_size=4, max_size=4)
extra_maps = st.dictionaries(st.integers(0, 3), fields, max_size=4)


@given(tokens, extra_maps, tokens, extra_maps)
def test_block_keys_are_equal_only_for_equal_content(left, left_extras, right, right_extras):
    keys = [
        block_key(ROOT, array("i", ids).tobytes(), extras_bytes(extras))
        for ids, extras in ((left, left_extras), (right, right_extras))
    ]
    assert (keys[0] == keys[1]) == ((left, left_extras) == (right, right_extras))


@given(extra_maps, extra_maps)
def test_extras_have_one_encoding_and_no_two_share_it(left, right):
    assert extras_bytes(left) == extras_bytes(dict(reversed(list(left.items()))))
    assert (extras_bytes(left) == extras_bytes(right)) == (left == right)


def test_extra_bytes_cannot_imitate_further_entries():
    forged = extras_bytes({0: b"a" + extras_bytes({1: b"b"})})
    assert forged != extras_bytes({0: b"a", 1: b"b"})


@given(tokens, tokens)
def test_the_chain_depends_on_the_order_of_blocks(first, second):
    def chain(*blocks):
        key = ROOT
        for ids in blocks:
            key = block_key(key, array("i", ids).tobytes())
        return key

    assert (chain(first, second) == chain(second, first)) == (first == second)
    assert chain(first) != chain(first, second)
