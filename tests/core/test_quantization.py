"""Stored dtypes: how far a value may move, and that the reference is what the formats' definitions say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvcache_core.layout import DTYPE_BYTES, MODEL_DTYPES, SCALED_DTYPES
from kvcache_core.quantization import decode, encode, is_exact

ml_dtypes = pytest.importorskip("ml_dtypes")  # comes with TensorFlow

NUMBERS = st.floats(-1e4, 1e4, width=32) | st.integers(-2000, 2000).map(lambda n: n / 64)
LEAST = 448 * float(np.finfo(np.float32).tiny)
"""A row of smaller numbers is stored as zeros."""
ROWS = arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=NUMBERS)


@given(ROWS)
def test_int8_is_off_by_half_a_step_at_most(values: np.ndarray) -> None:
    found = decode(*encode(values, "int8"), "int8")
    step = np.abs(values).max(axis=-1, keepdims=True) / 127
    assert (np.abs(found - values) <= step * 0.50001 + LEAST).all()


@given(ROWS)
def test_float8_is_off_by_a_sixteenth_of_itself_at_most(values: np.ndarray) -> None:
    found = decode(*encode(values, "float8_e4m3"), "float8_e4m3")
    smallest = np.abs(values).max(axis=-1, keepdims=True) / 448 * 2.0**-10  # half a subnormal step
    assert (np.abs(found - values) <= np.maximum(np.abs(values) / 16, smallest) * 1.00001 + LEAST).all()


@pytest.mark.parametrize("dtype", SCALED_DTYPES)
@given(values=ROWS)
def test_what_was_stored_once_stays_what_it_is(dtype: str, values: np.ndarray) -> None:
    """Elements do not move again; the scale may, by its last bit."""
    bits, scales = encode(values, dtype)
    again, new_scales = encode(decode(bits, scales, dtype), dtype)
    large = (scales > 1e-30).all(axis=-1)
    np.testing.assert_array_equal(again[large], bits[large])
    np.testing.assert_allclose(new_scales, scales, rtol=2e-7)


@given(arrays(np.float32, 20, elements=st.floats(width=32)))
def test_bfloat16_is_that_of_ml_dtypes(values: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        expected = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(decode(*encode(values, "bfloat16"), "bfloat16"), expected)


@given(arrays(np.float32, 20, elements=NUMBERS))
def test_float8_is_that_of_ml_dtypes(values: np.ndarray) -> None:
    values = np.append(values, 448).clip(-448, 448).astype(np.float32)  # the largest number is there: the scale is 1
    bits, scales = encode(values, "float8_e4m3")
    assert scales.tolist() == [1]
    assert bits.tobytes() == values.astype(ml_dtypes.float8_e4m3fn).tobytes()


def test_which_dtypes_lose_nothing() -> None:
    exact = {(stored, model) for stored in DTYPE_BYTES for model in MODEL_DTYPES if is_exact(stored, model)}
    assert exact == {
        *((dtype, dtype) for dtype in MODEL_DTYPES),
        *(("float32", half) for half in ("float16", "bfloat16")),
        *(("float64", narrow) for narrow in ("float32", "float16", "bfloat16")),
    }
