"""A safetensors file of weights: mapped into memory, read tensor by tensor, and written.

The file format is safetensors (https://github.com/huggingface/safetensors): eight bytes of header length, a JSON
header, the tensors' bytes. It has no checksum: what is checked is that every tensor lies inside the file, fits its
shape, and that the file stays as it was when it was opened.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.errors import BlockRefused, InvalidInput

__all__ = ["TensorEntry", "WeightFile", "write_weights"]

_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
_NAMES = {dtype: name for name, (dtype, _) in _DTYPES.items()}
_MAX_HEADER = 100 << 20


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies in its file.

    Attributes:
        dtype: its name, such as ``"float32"``.
        shape: its dimensions.
        start: offset of its first byte in the file.
        nbytes: its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def size(self) -> int:
        """Its elements."""
        count = 1
        for dimension in self.shape:
            count *= dimension
        return count


class WeightFile:
    """A safetensors file, mapped.

    Args:
        path: the file.

    Raises:
        BlockRefused: it is no safetensors file, or damaged.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            self._file = os.dup(file.fileno())
            try:
                size = os.fstat(self._file).st_size
                if size < 8:
                    raise BlockRefused("size", f"{path} is no safetensors file: it has {size} bytes")
                # Private and never written to: only so that an array over it counts as writable.
                self._map = mmap.mmap(self._file, 0, access=mmap.ACCESS_COPY)
                header = self._header(size)
                self.entries: Mapping[str, TensorEntry] = self._entries(header, size)
            except BaseException:
                os.close(self._file)
                raise
        self._mark = self._now()
        digest = blake2b(header, digest_size=16)
        digest.update(repr(self._mark).encode())
        self.identity = digest.digest()

    def _header(self, size: int) -> bytes:
        length = int.from_bytes(self._map[:8], "little")
        if length > min(_MAX_HEADER, size - 8):
            raise BlockRefused("size", f"{self.path} is no safetensors file, or cut short")
        return self._map[8 : 8 + length]

    def _entries(self, header: bytes, size: int) -> dict[str, TensorEntry]:
        start = 8 + len(header)
        try:
            said = json.loads(header)
            said.pop("__metadata__", None)
            return {name: self._entry(name, entry, start, size) for name, entry in said.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, BlockRefused):
                raise
            raise BlockRefused("size", f"{self.path} has a damaged header ({type(error).__name__}: {error})") from None

    def _entry(self, name: str, said: Mapping[str, Any], start: int, size: int) -> TensorEntry:
        if said["dtype"] not in _DTYPES:
            raise BlockRefused("foreign", f"{self.path}: tensor {name!r} has the unknown dtype {said['dtype']!r}")
        dtype, width = _DTYPES[said["dtype"]]
        shape = tuple(int(dimension) for dimension in said["shape"])
        begin, end = said["data_offsets"]
        entry = TensorEntry(dtype, shape, start + begin, end - begin)
        if not 0 <= begin <= end <= size - start or min(shape, default=0) < 0 or entry.size * width != entry.nbytes:
            raise BlockRefused(
                "size", f"{self.path}: tensor {name!r} reaches beyond the file or does not fit its shape"
            )
        return entry

    def bits(self, name: str) -> NDArray[Any]:
        """A tensor's bits as integers of its own width, in its shape: a view of the mapping, to be copied at once.

        Raises:
            BlockRefused: somebody wrote to the file since it was opened.
        """
        if self._now() != self._mark:
            raise BlockRefused("foreign", f"{self.path} was changed since it was opened; detach, and open it again")
        entry = self.entries[name]
        width = entry.nbytes // entry.size if entry.size else 1
        raw = np.frombuffer(self._map, np.uint8, entry.nbytes, entry.start)
        if entry.start % width:
            raw = raw.copy()  # integers may not straddle their own width
        return raw.view(f"<i{width}").reshape(entry.shape)

    def forget(self, name: str) -> None:
        """Give the pages of a tensor back to the system."""
        self._advise(name, "MADV_DONTNEED")

    def prefetch(self, name: str) -> None:
        """Have the system read a tensor ahead."""
        self._advise(name, "MADV_WILLNEED")

    def close(self) -> None:
        """Let go of the file; views of it must be gone."""
        if self._file >= 0:
            self._map.close()
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0 and hasattr(self, "_mark"):
            os.close(self._file)

    def _advise(self, name: str, advice: str) -> None:
        entry, page = self.entries[name], mmap.PAGESIZE
        start = entry.start // page * page
        if entry.nbytes and hasattr(mmap, advice):
            self._map.madvise(getattr(mmap, advice), start, entry.start + entry.nbytes - start)

    def _now(self) -> tuple[int, ...]:
        found = os.fstat(self._file)
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def write_weights(path: str | os.PathLike[str], tensors: Mapping[str, tuple[str, NDArray[Any]]]) -> None:
    """Write a safetensors file; whoever looks sees the whole file or none.

    Args:
        path: the file.
        tensors: {name: (dtype name, elements or their bits)}.

    Raises:
        InvalidInput: a dtype that the format does not know.
        OSError: it cannot be written.
    """
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, values) in tensors.items():
        if dtype not in _NAMES:
            raise InvalidInput(f"tensor {name!r} has dtype {dtype}; a safetensors file knows {sorted(_NAMES)}")
        header[name] = {"dtype": _NAMES[dtype], "shape": list(values.shape), "data_offsets": [at, at + values.nbytes]}
        at += values.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target = Path(path)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, values in tensors.values():
                file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
