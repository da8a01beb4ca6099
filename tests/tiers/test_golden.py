"""The golden files, read by nothing but docs/reference/block-format.md: every byte of them is accounted for."""

from __future__ import annotations

import hmac
import json
import zlib
from dataclasses import dataclass
from hashlib import blake2b, sha256
from typing import Any

import numpy as np
import pytest

import kvcache_keras.store
import kvcache_torch.store
from kvcache_core import BlockLayout, LayerSpec
from kvcache_core.keys import chain_keys, root_key
from kvcache_core.opentiers import tier_key
from kvcache_core.store import NumpyStore
from kvcache_core.tier_file import FileTier, write_saved
from tests.tiers.test_blockformat import GOLDEN, KEY, LAYOUT, payload

SECRET = b"golden secret"


class Bytes:
    """Bytes that are taken one field after another."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        found = self.data[self.at : self.at + size]
        assert len(found) == size, "it ends early"
        self.at += size
        return found

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")


@dataclass
class Value:
    flags: int
    kind: int
    group: int
    layout: bytes
    weights: bytes
    salt: bytes
    key: bytes
    time: int
    arrays: list[tuple[int, str, str, tuple[int, ...]]]
    payload: bytes


def checksum(data: bytes, secret: bytes) -> bytes:
    return hmac.digest(secret, data, sha256) if secret else zlib.crc32(data).to_bytes(4, "little") + bytes(28)


def parse(data: bytes, secret: bytes) -> Value:
    value = Bytes(data)
    assert value.take(8) == b"KVBLOCK\0"
    assert value.number(2) == 1, "format version"
    flags, header, size = value.number(2), value.number(4), value.number(8)
    assert flags == bool(secret)
    assert header % 8 == 0
    kind, group, count = value.number(2), value.number(2), value.number(4)
    layout, weights, salt, key = (value.take(16) for _ in range(4))
    time = value.number(8)
    assert value.at == 104
    arrays = []
    for _ in range(count):
        layer, dimensions, dtype, name = (value.number(width) for width in (4, 1, 1, 2))
        shape = tuple(value.number(4) for _ in range(dimensions))
        arrays.append((layer, value.take(dtype).decode(), value.take(name).decode(), shape))
    assert not any(value.take(header - value.at)), "zero bytes up to h"
    content = value.take(size)
    assert value.take(32) == checksum(data[: header + size], secret)
    assert value.at == len(data), "nothing behind it"
    return Value(flags, kind, group, layout, weights, salt, key, time, arrays, content)


def salt_digest(salt: bytes) -> bytes:
    return blake2b(salt, digest_size=16, person=b"kvcache-salt").digest()


@pytest.mark.parametrize(("name", "secret"), [("block-v1.bin", b""), ("block-v1-signed.bin", SECRET)])
def test_a_block(name, secret):
    assert parse((GOLDEN / name).read_bytes(), secret) == Value(
        flags=bool(secret),
        kind=1,
        group=0,
        layout=LAYOUT.digest,
        weights=b"w" * 16,
        salt=salt_digest(b"tenant"),
        key=KEY,
        time=1_700_000_000,
        arrays=[(0, "bfloat16", "k", (4, 2, 4)), (0, "bfloat16", "v", (4, 2, 3))],
        payload=payload(),
    )


@pytest.mark.parametrize(("name", "secret"), [("entry-v1.bin", b""), ("entry-v1-signed.bin", SECRET)])
def test_an_activation(name, secret):
    value = parse((GOLDEN / name).read_bytes(), secret)
    assert (value.kind, value.group, value.weights, value.salt) == (2, 0, b"w" * 16, salt_digest(b"tenant"))
    assert value.arrays == [(0, "float32", "", (2, 3)), (1, "bool", "", (2,))]
    assert value.payload == np.arange(6, dtype="<f4").tobytes() + b"\1\0"


SETTINGS = {"size": 40, "block_size": 4, "dtype": "bfloat16", "layout": LAYOUT.digest.hex(), "weights": "77" * 16}


@pytest.mark.parametrize("secret", [b"", SECRET], ids=["plain", "signed"])
def test_a_saved_cache(tmp_path, secret):
    name = "saved-v1-signed.bin" if secret else "saved-v1.bin"
    sources = ("block-v1-signed.bin", "entry-v1-signed.bin") if secret else ("block-v1.bin", "entry-v1.bin")
    first, second = ((GOLDEN / source).read_bytes() for source in sources)
    keys = [tier_key("block", 0, KEY), tier_key("entry", 0, KEY)]
    items = list(zip(keys, (first, second), strict=True))
    write_saved(tmp_path / "saved", SETTINGS, [items[:1], items[1:]], secret=secret)
    data = (GOLDEN / name).read_bytes()
    assert (tmp_path / "saved").read_bytes() == data
    tier = FileTier(GOLDEN / name, secret)
    assert tier.settings == SETTINGS
    assert tier.get_many(keys) == [first, second]
    tier.close()

    end = Bytes(data[-48:])
    offset, size = end.number(8), end.number(8)
    index = Bytes(data[offset : offset + size])
    assert data[:8] == b"KVSAVED1"
    assert end.take(32) == checksum(data[:8] + index.data, secret)
    assert offset + size + 48 == len(data)
    assert json.loads(index.take(index.number(4))) == SETTINGS
    found = []
    while index.at < size:
        length, at, nbytes = index.number(2), index.number(8), index.number(8)
        found.append((index.take(length), data[at : at + nbytes]))
    assert found == items
    assert offset == 8 + len(first) + len(second), "the values, and nothing between them"


def test_keys():
    """A chain over a namespace, a salt, token ids and extra keys."""

    def field(data: bytes) -> bytes:
        return len(data).to_bytes(8, "little") + data

    def digest(data: bytes) -> bytes:
        return blake2b(data, digest_size=16).digest()

    root = digest(b"kvcache-root-1" + field((4).to_bytes(4, "little")) + field(b"namespace") + field(b"tenant"))
    tokens = np.arange(8, dtype="<i4").tobytes()
    first = digest(root + tokens[:16])
    second = digest(first + tokens[16:] + b"X" + (1).to_bytes(4, "little") + field(b"image"))
    assert chain_keys(root_key(4, b"namespace", b"tenant"), tokens, 4, {5: b"image"}) == [first, second]
    assert tier_key("block", 3, second) == bytes([1, 1, 3]) + second
    assert tier_key("entry", 0, second) == bytes([1, 2, 0]) + second


STORES: list[Any] = [NumpyStore, kvcache_torch.store.TensorStore, kvcache_keras.store.TensorStore]


@pytest.mark.parametrize("kind", STORES, ids=["numpy", "torch", "keras"])
def test_a_payload(kind):
    """Layer after layer, array after array, each [block_size, H, D] with the last axis fastest, in every store."""
    layout = BlockLayout([LayerSpec.attention(2, 3, 2), LayerSpec.attention(2, 3, 2)], 4)
    shapes = {"k": (4, 2, 3), "v": (4, 2, 2)}
    values = {
        (layer, name): (100 * layer + 50 * (name == "v") + np.arange(np.prod(shapes[name]))).astype("<f4")
        for layer in range(2)
        for name in "kv"
    }
    store = kind(layout, 3)
    store.import_blocks(0, [2], np.frombuffer(b"".join(map(bytes, values.values())), np.uint8)[None])
    for (layer, name), expected in values.items():
        found = np.asarray(store.read(layer, name, np.arange(8, 12)))
        assert (found == expected.reshape(shapes[name])).all()
    assert store.export_blocks(0, [2]).tobytes() == b"".join(map(bytes, values.values()))
