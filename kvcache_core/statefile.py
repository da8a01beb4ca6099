"""A sequence's state in a file: safetensors, with a header that says whose it is. Nothing in it is executable.

The file format is safetensors (https://github.com/huggingface/safetensors): eight bytes of header length, a JSON
header, the tensors' bytes. Written and read here with bounds checks, so that no package is needed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.errors import BlockRefused

__all__ = ["SavedState", "read_state", "write_state"]

_FORMAT = "kvcache-sequence-1"
_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "int8": "I8",
    "float8_e4m3": "F8_E4M3",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_MAX_HEADER = 64 << 20


@dataclass(frozen=True)
class SavedState:
    """What a state file holds.

    Attributes:
        tokens: int32 [S].
        arrays: {(layer, name): (dtype name, bits [S - first, H, D])}; of a state layer, the last state, [1, H, D].
        first: per layer group, the first position stored: a window has dropped those before; a state is the last's.
        layout: 16-byte layout digest.
        weights: 16-byte portable identity.
        salt: 16-byte digest of the salt.
        extra_keys: {position: bytes}.
    """

    tokens: NDArray[np.int32]
    arrays: Mapping[tuple[int, str], tuple[str, NDArray[Any]]]
    first: tuple[int, ...]
    layout: bytes
    weights: bytes
    salt: bytes
    extra_keys: Mapping[int, bytes] = field(default_factory=dict)


def write_state(path: str | os.PathLike[str], state: SavedState, secret: bytes = b"") -> None:
    """Write a state file; whoever looks sees the whole file or none.

    Raises:
        OSError: it cannot be written.
    """
    parts: dict[str, tuple[str, NDArray[Any]]] = {"tokens": ("int32", state.tokens)}
    for (layer, name), (dtype, values) in state.arrays.items():
        parts[f"layers.{layer}.{name}"] = (dtype, values)
    meta = {
        "format": _FORMAT,
        "layout": state.layout.hex(),
        "weights": state.weights.hex(),
        "salt": state.salt.hex(),
        "first": json.dumps(state.first),
        "extra_keys": json.dumps({str(position): value.hex() for position, value in state.extra_keys.items()}),
    }
    header: dict[str, Any] = {}
    at = 0
    contiguous = {name: (dtype, np.ascontiguousarray(values)) for name, (dtype, values) in parts.items()}
    for name, (dtype, values) in contiguous.items():
        header[name] = {"dtype": _NAMES[dtype], "shape": list(values.shape), "data_offsets": [at, at + values.nbytes]}
        at += values.nbytes
    data = [values.reshape(-1).view(np.uint8).data for _, values in contiguous.values()]
    meta["checksum"] = _checksum(header, meta, data, secret)
    text = json.dumps({"__metadata__": meta, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target = Path(path)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for part in data:
                file.write(part)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def read_state(path: str | os.PathLike[str], secret: bytes = b"") -> SavedState:
    """Read a state file.

    Raises:
        BlockRefused: it is damaged, no such file, of another version, or signed with another secret.
        OSError: it cannot be read.
    """
    content = memoryview(Path(path).read_bytes())
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > min(_MAX_HEADER, len(content) - 8):
        raise BlockRefused("size", f"{path} is no state file, or cut short")
    try:
        header = json.loads(bytes(content[8 : 8 + size]))
        meta = header.pop("__metadata__")
        if meta["format"] != _FORMAT:
            raise BlockRefused("foreign", f"{path} has the format {meta['format']!r}, known is {_FORMAT!r}")
        body = content[8 + size :]
        parts = {name: _part(name, entry, body) for name, entry in header.items()}
        if sum(values.nbytes for _, values in parts.values()) != len(body):
            raise BlockRefused("size", f"{path} has bytes that belong to no tensor")
        found = meta.pop("checksum")
        expected = _checksum(
            header, meta, [values.reshape(-1).view(np.uint8).data for _, values in parts.values()], secret
        )
        if not hmac.compare_digest(found.encode(), expected.encode()):
            raise BlockRefused("checksum", f"{path} is damaged, or signed with another secret")
        tokens = parts.pop("tokens")[1]
        return SavedState(
            tokens,
            {_place(name): part for name, part in parts.items()},
            tuple(json.loads(meta["first"])),
            bytes.fromhex(meta["layout"]),
            bytes.fromhex(meta["weights"]),
            bytes.fromhex(meta["salt"]),
            {int(position): bytes.fromhex(value) for position, value in json.loads(meta["extra_keys"]).items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, BlockRefused):
            raise
        raise BlockRefused("size", f"{path} has a damaged header ({type(error).__name__}: {error})") from None


def _part(name: str, entry: dict[str, Any], body: memoryview) -> tuple[str, NDArray[Any]]:
    dtype = _DTYPES[entry["dtype"]]
    start, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    if not 0 <= start <= end <= len(body) or min(shape, default=0) < 0:
        raise BlockRefused("size", f"tensor {name!r} reaches beyond the file")
    bits = "<i4" if dtype == "int32" else f"<u{_width(dtype)}"
    return dtype, np.frombuffer(body[start:end], bits).reshape(shape)


def _width(dtype: str) -> int:
    digits = "".join(letter for letter in dtype.split("_", maxsplit=1)[0] if letter.isdigit())
    return int(digits) // 8


def _place(name: str) -> tuple[int, str]:
    layers, layer, array = name.split(".", 2)
    if layers != "layers":
        raise BlockRefused("foreign", f"tensor {name!r} is unknown")
    return int(layer), array


def _checksum(header: dict[str, Any], meta: dict[str, str], data: list[memoryview], secret: bytes) -> str:
    """SHA-256 over header and tensors, or HMAC-SHA-256 with a secret."""
    digest = hmac.new(secret, digestmod=hashlib.sha256) if secret else hashlib.sha256()
    digest.update(json.dumps([meta, header], sort_keys=True, separators=(",", ":")).encode())
    for part in data:
        digest.update(part)
    return digest.hexdigest()
