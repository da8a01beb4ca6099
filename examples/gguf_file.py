"""Read a GGUF model file: its metadata, and its tensors as float32 arrays.

`gguf.GGUFReader` makes an array object for every string of the vocabulary, which takes six seconds on a
49,152-word one. The header is a plain list of typed values, so it is read here directly (0.1 s); the file's
numeric formats stay the business of `gguf.dequantize`.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class _Header:
    """A cursor over the header's little-endian values."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        size = self.scalar("Q")
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            item, count = self.scalar("I"), self.scalar("Q")
            return [self.value(item) for _ in range(count)]
        return self.scalar(SCALARS[kind])


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata, and every tensor by its GGUF name: float32, rows first (a linear layer is [out, in])."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if data[:4] != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file: it starts with {data[:4]!r}, not b'GGUF'")
    header = _Header(data)
    header.at = 4
    version, num_tensors, num_values = header.scalar("I"), header.scalar("Q"), header.scalar("Q")
    if version not in (2, 3):
        raise ValueError(f"{path} is GGUF version {version}; versions 2 and 3 (little-endian) can be read")
    metadata = {}
    for _ in range(num_values):
        name = header.string()
        metadata[name] = header.value(header.scalar("I"))
    return metadata, dict(_tensors(header, num_tensors, metadata.get("general.alignment", 32)))


def _tensors(header: _Header, count: int, alignment: int) -> Iterator[tuple[str, np.ndarray]]:
    infos = []
    for _ in range(count):
        name = header.string()
        dims = [header.scalar("Q") for _ in range(header.scalar("I"))]
        infos.append((name, dims[::-1], header.scalar("I"), header.scalar("Q")))
    start = -(-header.at // alignment) * alignment
    with ThreadPoolExecutor(2) as threads:  # numpy lets go of the interpreter lock in the large loops
        yield from threads.map(lambda info: _dequantise(header.data, start, *info), infos)


def _dequantise(data: mmap.mmap, start: int, name: str, shape: list[int], kind: int, offset: int) -> Any:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    row_bytes = shape[-1] // block * block_bytes
    rows = int(np.prod(shape[:-1]))
    raw = np.frombuffer(data, np.uint8, rows * row_bytes, start + offset).reshape(rows, row_bytes)
    values = dequantize(raw, GGMLQuantizationType(kind))
    return name, np.ascontiguousarray(values, np.float32).reshape(shape)
