"""Files of weights: what is written is read, and what is damaged is refused."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache_core.errors import BlockRefused, InvalidInput
from kvcache_core.weightfile import WeightFile, write_weights

DTYPES = {"float32": np.int32, "float16": np.int16, "bfloat16": np.int16, "float64": np.int64, "uint8": np.int8}
tensors = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
    max_size=5,
)


@given(tensors, st.integers(0, 2**32 - 1))
def test_what_is_written_is_read(tmp_path_factory, wanted, seed):
    path = tmp_path_factory.mktemp("weights") / "one.safetensors"
    random = np.random.default_rng(seed)
    arrays = {
        name: (dtype, random.integers(-100, 100, shape).astype(DTYPES[dtype]))
        for name, (dtype, shape) in wanted.items()
    }
    write_weights(path, arrays)
    file = WeightFile(path)
    assert set(file.entries) == set(arrays)
    for name, (dtype, values) in arrays.items():
        found = file.bits(name)
        assert (file.entries[name].dtype, found.shape) == (dtype, values.shape)
        np.testing.assert_array_equal(found, values)
        del found
        file.prefetch(name)
        file.forget(name)
        np.testing.assert_array_equal(file.bits(name), values)


def test_the_safetensors_package_reads_it(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_weights(tmp_path / "ours", {"a": ("float32", values)})
    np.testing.assert_array_equal(numpy.load_file(tmp_path / "ours")["a"], values)
    numpy.save_file({"b": values}, tmp_path / "theirs")
    np.testing.assert_array_equal(WeightFile(tmp_path / "theirs").bits("b").view(np.float32), values)


def written(path, header: object, body: bytes = b"\0" * 16) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def entry(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "damaged header"),
        (b"[]", "damaged header"),
        (b"\xff\xff", "damaged header"),
        ({"a": 3}, "damaged header"),
        ({"a": {"dtype": "F32"}}, "damaged header"),
        (entry("F33"), "unknown dtype"),
        (entry(offsets=(0, 20)), "reaches beyond"),
        (entry(offsets=(-4, 12)), "reaches beyond"),
        (entry(offsets=(12, 0)), "reaches beyond"),
        (entry(shape=(5,)), "does not fit"),
        (entry(shape=(-4,)), "does not fit"),
        (entry(shape=("x",)), "damaged header"),
        (entry(offsets=(0, 1, 2)), "damaged header"),
        (entry(offsets="ab"), "damaged header"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, header, message):
    written(tmp_path / "file", header)
    with pytest.raises(BlockRefused, match=message):
        WeightFile(tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 8, b"\x10" + b"\0" * 7 + b"{}"])
def test_what_is_no_such_file_is_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(BlockRefused, match="no safetensors file"):
        WeightFile(tmp_path / "file")


def test_every_cut_is_refused(tmp_path):
    write_weights(tmp_path / "whole", {"a": ("float32", np.zeros(4, np.float32))})
    content = (tmp_path / "whole").read_bytes()
    for length in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(BlockRefused):
            WeightFile(tmp_path / "cut")


def test_a_file_that_somebody_writes_to_is_refused(tmp_path):
    path = tmp_path / "file"
    write_weights(path, {"a": ("float32", np.zeros(4, np.float32))})
    file = WeightFile(path)
    file.bits("a")
    with path.open("r+b") as other:
        other.seek(-1, os.SEEK_END)
        other.write(b"\1")
    os.utime(path, ns=(1, 1))
    with pytest.raises(BlockRefused, match="was changed since it was opened"):
        file.bits("a")


def test_a_file_that_is_replaced_stays_what_it_was(tmp_path):
    path = tmp_path / "file"
    write_weights(path, {"a": ("float32", np.zeros(4, np.float32))})
    file = WeightFile(path)
    write_weights(path, {"a": ("float32", np.ones(4, np.float32))})
    assert not file.bits("a").any()
    assert WeightFile(path).identity != file.identity


def test_errors_leave_nothing_behind(tmp_path):
    with pytest.raises(InvalidInput, match="dtype complex64"):
        write_weights(tmp_path / "file", {"a": ("complex64", np.zeros(4))})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        WeightFile(tmp_path / "file")
