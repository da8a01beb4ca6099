"""Whether a sample's result is its own: which parts of a batch show it, and what counts as rounding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache_core.mixing import Proofs, moved, part_tolerance, parts_of


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60))
def test_parts_share_no_sample_and_each_leaves_some_out(samples):
    keys = [bytes([sample]) for sample in samples]
    parts = parts_of(keys)
    assert bool(parts) == (len(set(samples)) > 1)
    seen = [{samples[row] for row in rows} for rows in parts]
    assert not seen or not seen[0] & seen[1]
    assert all(2 <= len(rows) <= (5 if len(set(samples)) >= 16 else 3) for rows in parts)


def test_rows_of_a_part_have_other_neighbours_than_in_the_batch():
    for count in range(3, 40):
        for rows in parts_of([bytes([row]) for row in range(count)]):
            assert all(after - before != 1 for before, after in itertools.pairwise(rows))


MOVES = {
    "flip": lambda x: x[::-1],
    "roll": lambda x: x[1:] + x[:1],
    "roll back": lambda x: x[-1:] + x[:-1],
    "halves": lambda x: x[len(x) // 2 :] + x[: len(x) // 2],
    "pairs": lambda x: [x[min(at ^ 1, len(x) - 1)] for at in range(len(x))],
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_module_that_gives_results_to_other_samples_shows(move):
    for count in range(2, 40):
        whole, parts = move(list(range(count))), parts_of([bytes([row]) for row in range(count)])
        assert any([whole[row] for row in rows] != move(rows) for rows in parts)


def test_rounding_is_told_from_another_result():
    whole = np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32)
    assert moved(whole, whole) == 0.0
    assert 0 < moved(whole, whole * np.float32(1 + 1e-6)) < part_tolerance(["float32"])
    assert moved(whole, whole - whole.mean(0)) > part_tolerance(["bfloat16", "float32"])
    assert moved(whole.astype(int), whole.astype(int) + 1) == 1.0


def test_what_is_masked_is_no_measure():
    whole = np.full((2, 40), -1e9)
    whole[:, :3] = 1.0
    part = whole.copy()
    part[0, 0] = 1.1
    assert moved(whole, part) > part_tolerance(["float32"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_number_is_equal_to_itself_only(value):
    whole, part = np.ones((2, 3)), np.ones((2, 3))
    whole[1, 1] = value
    assert moved(whole, whole.copy()) == 0.0
    assert moved(whole, part) == moved(part, whole) == np.inf


def test_the_coarsest_dtype_counts():
    assert part_tolerance(["float64", "bfloat16", "int64"]) == part_tolerance(["bfloat16"])
    assert part_tolerance(["complex128"]) == part_tolerance(["float64"]) < part_tolerance([])
    assert part_tolerance([]) == part_tolerance(["float32"])


def test_what_is_remembered_is_limited():
    proofs = Proofs()
    for number in range(5000):
        proofs.settle(number, "" if number % 2 else "mixed")
    assert 4999 in proofs and proofs.refusal(4998) == "mixed"
    assert sum(number in proofs or proofs.refusal(number) is not None for number in range(5000)) <= 1024
