"""The portable identity of weights: what it must not depend on, and what it must notice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache_core.identity import named_identity, weights_identity


def arrays(seed: int, dtype: str = "float32") -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape).astype(dtype) for shape in ((3, 4), (5,), (2, 3, 4), (40_000,))]


def identity(values: list[np.ndarray]) -> bytes:
    return weights_identity([(str(one.dtype), one) for one in values])


@given(seed=st.integers(0, 99), order=st.permutations(range(4)), axis=st.integers(0, 1), at=st.integers(0, 2))
def test_names_order_axes_and_fusion_do_not_matter(seed, order, axis, at):
    parts = arrays(seed)
    other = [parts[number] for number in order]
    other = [one.transpose() if one.ndim > 1 else one[::-1] for one in other]
    split = np.split(parts[0], [at], axis=axis)
    fused = np.concatenate([parts[1], parts[2].ravel()])
    assert identity(other) == identity(parts)
    assert identity([*split, fused, parts[3]]) == identity(parts)


@given(seed=st.integers(0, 99), which=st.integers(0, 3), bit=st.integers(0, 31), at=st.integers(0, 10**6))
def test_one_changed_bit_of_one_element_shows(seed, which, bit, at):
    parts = arrays(seed)
    before = identity(parts)
    bits = parts[which].reshape(-1).view(np.uint32)
    bits[at % len(bits)] ^= np.uint32(1 << bit)
    assert identity(parts) != before


def test_another_dtype_another_count_another_name():
    parts = arrays(0)
    found = {
        identity(parts),
        identity([one.astype("float16") for one in parts]),
        identity([one.astype("float64") for one in parts]),
        identity([*parts, np.zeros(1, np.float32)]),
        weights_identity([("bfloat16", one.astype("float16")) for one in parts]),
        named_identity("model@1"),
        named_identity("model@2"),
        weights_identity([]),
    }
    assert len(found) == 8
    assert all(len(one) == 16 for one in found)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_bits_stand_for_elements(dtype):
    values = arrays(1, dtype)[3]
    bits = values.view(f"i{values.itemsize}")
    assert weights_identity([(dtype, bits)]) == weights_identity([(dtype, values)])


def test_the_identity_is_fixed_for_good():
    """Keys in stores that outlive the process hang on it."""
    assert weights_identity([("float32", np.arange(6, dtype=np.float32))]).hex() == "33ee17086532f0802c3e251ef892947c"
