"""Keys of samples: everything a sample's result depends on is in its key, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from kvcache_core.samples import sample_keys

X = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
IDS = np.array([[1, 2], [3, 4], [1, 2], [5, 6]], np.int32)
MASK = np.ones((2, 2), np.bool_)


def keys(prefix=b"p", split=(X, IDS), shared=(MASK,)):
    return sample_keys(prefix, split, shared, 4)


def test_a_key_does_not_depend_on_the_other_samples():
    order = [2, 0, 3, 1]
    assert sample_keys(b"p", [X[order], IDS[order]], [MASK], 4) == [keys()[at] for at in order]
    assert sample_keys(b"p", [X[1:2], IDS[1:2]], [MASK], 1) == keys()[1:2]
    assert len(set(keys())) == 4


@pytest.mark.parametrize(
    "other",
    [
        {"prefix": b"q"},
        {"shared": ()},
        {"shared": (~MASK,)},
        {"shared": (MASK.reshape(4),)},
        {"split": (IDS, X)},
        {"split": (X.view(np.int32), IDS)},
        {"split": (X.reshape(4, 3, 2), IDS)},
        {"split": (np.concatenate([X.reshape(4, 6), IDS.view(np.float32)], 1),)},
        {"split": (X, IDS, np.zeros((4, 0), np.float32))},
    ],
)
def test_what_all_samples_share_is_in_every_key(other):
    assert not set(keys()) & set(keys(**other))


def test_one_bit_of_one_row_changes_one_key():
    changed = IDS.copy()
    changed[2, 1] ^= 1
    assert [one == two for one, two in zip(keys(), keys(split=(X, changed)), strict=True)] == [True, True, False, True]


def test_memory_order_does_not_matter_and_empty_rows_are_equal():
    assert keys(split=(np.asfortranarray(X), IDS[:, ::-1].copy()[:, ::-1])) == keys()
    assert len(set(sample_keys(b"p", [np.zeros((3, 0))], [], 3))) == 1
    assert len(set(sample_keys(b"p", [np.array([1, 2, 1])], [], 3))) == 2
