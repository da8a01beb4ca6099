"""Nested values come apart and together again."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache_core import InvalidType
from kvcache_core.tree import flatten


class T:
    """Stands for a tensor."""


Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Record:
    first: object
    second: object = None


leaf = st.builds(T) | st.none() | st.booleans() | st.integers() | st.text(max_size=3)
nested = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2) | st.integers(), inner, max_size=3),
        st.builds(Pair, inner, inner),
        st.builds(Record, inner, inner),
    ),
    max_leaves=8,
)


def is_tensor(value):
    return isinstance(value, T)


@given(nested)
def test_apart_and_together_again(value):
    leaves, tree = flatten(value, is_tensor)
    again = tree.rebuild(leaves)
    assert again == value
    assert type(again) is type(value)
    assert flatten(again, is_tensor)[1].encode() == tree.encode()


@given(nested, nested)
def test_shapes_are_equal_exactly_when_their_encodings_are(one, two):
    first, second = flatten(one, is_tensor)[1], flatten(two, is_tensor)[1]
    same = first == second and repr(first) == repr(second)  # True == 1
    assert (first.encode() == second.encode()) == same


def test_ordered_and_foreign_mappings():
    ordered = OrderedDict(b=T(), a=1)
    leaves, tree = flatten(ordered, is_tensor)
    assert type(tree.rebuild(leaves)) is OrderedDict and list(tree.rebuild(leaves)) == ["b", "a"]
    tensor = T()
    assert flatten(UserDict(x=tensor), is_tensor)[1].rebuild([tensor]) == {"x": tensor}


@pytest.mark.parametrize("value", [(n for n in ()), object(), {object(): 1}, lambda: 0])
def test_what_cannot_be_hashed_is_named(value):
    with pytest.raises(InvalidType):
        flatten([1, value], is_tensor)
