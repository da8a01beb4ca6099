"""A sample of the weights' content."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache_core import InvalidInput
from kvcache_core.weights import ContentSample, check_verify, digest_of


def sample_of(*arrays, looks=64):
    return ContentSample([a.reshape(-1) for a in arrays], [a.shape[-1] if a.ndim > 1 else 1 for a in arrays], looks)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4), st.data())
def test_small_weights_every_element_is_seen(shapes, data):
    arrays = [np.zeros(shape, data.draw(st.sampled_from(["f4", "f8", "f2", "i8"]))) for shape in shapes]
    sample = sample_of(*arrays)
    assert not sample.changed()
    changed = data.draw(st.sampled_from(arrays))
    changed.reshape(-1)[data.draw(st.integers(0, changed.size - 1))] = 1
    assert sample.changed()
    assert not sample.changed()


@pytest.fixture
def large():
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype("f4") for shape in ((3000, 64), (64, 3000), (5000,), (7,), ())]


@pytest.mark.parametrize("at", range(5))
def test_large_weights_a_whole_array_is_seen_at_once(large, at):
    sample = sample_of(*large)
    for _ in range(70):
        assert not sample.changed()
    large[at] *= 1.5
    assert sample.changed()
    assert not any(sample.changed() for _ in range(70))


@given(st.integers(0, 2999), st.integers(0, 200), st.sampled_from([1, 16, 64]))
def test_large_weights_a_row_is_seen_within_so_many_looks(row, before, looks):
    array = np.zeros((3000, 64), "f4")
    sample = sample_of(array, looks=looks)
    for _ in range(before):
        assert not sample.changed()
    array[row] = 1
    assert any(sample.changed() for _ in range(looks))
    assert not any(sample.changed() for _ in range(looks))


def test_nan_is_equal_to_itself_by_bits():
    array = np.full(10, np.nan, "f4")
    assert not sample_of(array).changed()


def test_a_digest_is_of_every_byte_and_of_shape_and_dtype():
    array = np.zeros((30, 7), "f4")
    before = digest_of([array])
    assert digest_of([array.copy()]) == before
    assert len({before, digest_of([array.T]), digest_of([array.view("i4")]), digest_of([array, array])}) == 4
    array[17, 3] = 1e-30
    assert digest_of([array]) != before


def test_verify_is_one_of_three():
    assert check_verify("full") == "full"
    with pytest.raises(InvalidInput, match="verify must be one of"):
        check_verify("always")


@given(
    st.lists(st.tuples(st.sampled_from(["f2", "f4", "f8", "c16", "?"]), st.integers(0, 3)), min_size=1, max_size=4),
    st.data(),
)
def test_memory_of_any_dtype_and_alignment_is_read_in_place(kinds, data):
    arrays = [np.zeros(40_000 * np.dtype(kind).itemsize + 16, "u1")[at : at - 16].view(kind) for kind, at in kinds]
    arrays = [array[:: data.draw(st.sampled_from([1, 2, -1]))] if array.itemsize < 9 else array for array in arrays]
    sample = sample_of(*arrays)
    assert not any(sample.changed() for _ in range(65))
    changed = data.draw(st.integers(0, len(arrays) - 1))
    arrays[changed][:] = 1
    assert sample.changed()
    assert not any(sample.changed() for _ in range(65))
