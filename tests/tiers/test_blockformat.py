"""The block format: round trip, and whatever is not exactly what was asked for is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache_core import BlockLayout, InvalidInput, LayerSpec
from kvcache_core.blockformat import (
    ArrayEntry,
    BlockCodec,
    check_value,
    group_entries,
    read_header,
    salt_digest,
    secret_from_environment,
)
from kvcache_core.entryformat import EntryForm
from kvcache_core.errors import BlockRefused
from kvcache_core.tree import flatten
from kvcache_core.worth import Worth

GOLDEN = Path(__file__).parent / "golden"
LAYOUT = BlockLayout([LayerSpec.attention(2, 4, 3), LayerSpec.attention(1, 4, window=8)], 4, "bfloat16")
KEY = bytes(range(16))


def codec(layout: BlockLayout = LAYOUT, group: int = 0, salt: bytes = b"", **changes) -> BlockCodec:
    options = {"layout": layout.digest, "weights": b"w" * 16, "salt": salt_digest(salt), "group": group, **changes}
    return BlockCodec(group_entries(layout, group), layout.packed_bytes(group), **options)


def payload(layout: BlockLayout = LAYOUT, group: int = 0) -> bytes:
    return np.arange(layout.packed_bytes(group), dtype=np.uint8).tobytes()


layouts = st.builds(
    BlockLayout,
    st.lists(
        st.builds(LayerSpec.attention, st.integers(1, 3), st.integers(1, 9), st.none() | st.integers(1, 5)),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 5),
    st.sampled_from(["float64", "float32", "float16", "bfloat16"]),
)


@given(layout=layouts, key=st.binary(min_size=16, max_size=16), secret=st.binary(max_size=40), seed=st.integers(0, 99))
def test_round_trip(layout, key, secret, seed):
    content = np.random.default_rng(seed).bytes(layout.packed_bytes(0))
    made = codec(layout, secret=secret)
    value = made.encode(key, content, 1_700_000_000)
    assert len(value) == made.value_bytes
    assert bytes(made.decode(key, value)) == content
    assert bytes(codec(layout, secret=secret).decode(key, memoryview(bytearray(value)))) == content
    header = check_value(value, secret)
    assert (header.key, header.layout, header.created, header.signed) == (
        key,
        layout.digest,
        1_700_000_000,
        bool(secret),
    )
    assert header.arrays == group_entries(layout, 0)


def test_every_flipped_bit_is_refused():
    for secret in (b"", b"secret"):
        made = codec(secret=secret)
        value = made.encode(KEY, payload(), 5)
        for bit in range(8 * len(value)):
            damaged = bytearray(value)
            damaged[bit // 8] ^= 1 << bit % 8
            with pytest.raises(BlockRefused):
                made.decode(KEY, damaged)


def test_every_truncation_and_extension_is_refused():
    made = codec()
    value = made.encode(KEY, payload(), 5)
    for length in range(len(value)):
        for cut in (value[:length], value[length:], bytes(value) + value[:length] if length else b""):
            if len(cut) != len(value):
                with pytest.raises(BlockRefused):
                    made.decode(KEY, cut)
        with pytest.raises(BlockRefused):
            check_value(value[:length])


@pytest.mark.parametrize(
    "other",
    [
        codec(weights=b"x" * 16),
        codec(salt=b"another tenant"),
        codec(layout=BlockLayout(LAYOUT.layers, 4, "float16")),
        codec(group=1),
        codec(secret=b"secret"),
        codec(kind="entry"),
        BlockCodec(
            [ArrayEntry(0, "v", "bfloat16", (4, 2, 4)), ArrayEntry(0, "k", "bfloat16", (4, 2, 3))],
            LAYOUT.packed_bytes(0),
            layout=LAYOUT.digest,
            weights=b"w" * 16,
            salt=salt_digest(b""),
        ),
    ],
    ids=["weights", "salt", "dtype", "group", "signed", "kind", "arrays swapped"],
)
def test_a_foreign_header_is_refused(other):
    mine = codec()
    value = other.encode(KEY, bytes(other.payload_bytes), 5)
    check_value(value, b"secret")  # whole and undamaged
    with pytest.raises(BlockRefused) as refused:
        mine.decode(KEY, value)
    assert refused.value.reason in ("foreign", "size")


def test_a_block_under_another_key_is_refused():
    value = codec().encode(KEY, payload(), 5)
    with pytest.raises(BlockRefused, match="key"):
        codec().decode(bytes(16), value)


def test_a_block_signed_with_another_secret_is_refused():
    value = codec(secret=b"theirs").encode(KEY, payload(), 5)
    with pytest.raises(BlockRefused, match="checksum"):
        codec(secret=b"mine").decode(KEY, value)
    with pytest.raises(BlockRefused, match="KVCACHE_SECRET"):
        check_value(value)


def test_the_secret_comes_from_the_environment(monkeypatch):
    monkeypatch.delenv("KVCACHE_SECRET", raising=False)
    assert secret_from_environment() == b""
    monkeypatch.setenv("KVCACHE_SECRET", "pássword")
    assert secret_from_environment() == "pássword".encode()


def test_a_payload_of_the_wrong_size_is_an_error():
    with pytest.raises(InvalidInput, match="is needed, got 3"):
        codec().encode(KEY, b"abc", 5)


@pytest.mark.parametrize(
    ("name", "secret"), [("block-v1.bin", b""), ("block-v1-signed.bin", b"golden secret")], ids=["plain", "signed"]
)
def test_golden_files(name, secret):
    """What this version writes is what the first one wrote, byte for byte."""
    stored = (GOLDEN / name).read_bytes()
    assert codec(salt=b"tenant", secret=secret).encode(KEY, payload(), 1_700_000_000) == stored
    assert bytes(codec(salt=b"tenant", secret=secret).decode(KEY, stored)) == payload()


def entry_form() -> tuple[EntryForm, list[np.ndarray]]:
    """The form of a result {"h": float32 [2, 3], "mask": bool [2]}, and one such result's tensors."""
    rows = [np.arange(6, dtype=np.float32).reshape(2, 3), np.array([True, False])]
    tree = flatten({"h": rows[0], "mask": rows[1]}, lambda value: isinstance(value, np.ndarray))[1]
    form = EntryForm(
        tree,
        b"w" * 16,
        salt_digest(b"tenant"),
        lambda row: (row.dtype.name, row.view(f"u{row.itemsize}")),
        lambda name, bits: np.array(bits).view(name),
        Worth(auto=False),
    )
    return form, rows


@pytest.mark.parametrize("secret", [b"", b"golden secret"], ids=["plain", "signed"])
def test_golden_entries(secret):
    form, rows = entry_form()
    stored = (GOLDEN / ("entry-v1-signed.bin" if secret else "entry-v1.bin")).read_bytes()
    assert form.encode(KEY, (form.tree, rows), secret, 1_700_000_000) == stored
    tree, found = form.decode(KEY, secret, stored)
    assert tree == form.tree
    assert all(one.dtype == other.dtype and (one == other).all() for one, other in zip(found, rows, strict=True))
    assert form.content_key(KEY).hex() == "a2bfd245ae8fb3e3b9f81486fa1a9851"


def test_every_flipped_bit_and_truncation_of_an_entry_is_refused():
    form, _ = entry_form()
    value = (GOLDEN / "entry-v1.bin").read_bytes()
    for bit in range(8 * len(value)):
        damaged = bytearray(value)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BlockRefused):
            form.decode(KEY, b"", damaged)
    for length in range(len(value)):
        with pytest.raises(BlockRefused):
            form.decode(KEY, b"", value[:length])


def test_golden_bytes_by_hand():
    """The documented offsets, read without the library."""
    value = (GOLDEN / "block-v1.bin").read_bytes()
    assert value[:8] == b"KVBLOCK\0"
    number = lambda at, size: int.from_bytes(value[at : at + size], "little")  # noqa: E731
    assert (number(8, 2), number(10, 2)) == (1, 0)
    header, size = number(12, 4), number(16, 8)
    assert (number(24, 2), number(26, 2), number(28, 4)) == (1, 0, 2)
    assert value[32:48] == LAYOUT.digest
    assert value[48:64] == b"w" * 16
    assert value[64:80] == hashlib.blake2b(b"tenant", digest_size=16, person=b"kvcache-salt").digest()
    assert value[80:96] == KEY
    assert number(96, 8) == 1_700_000_000
    assert (number(104, 4), value[108], value[109], number(110, 2)) == (0, 3, 8, 1)
    assert [number(at, 4) for at in (112, 116, 120)] == [4, 2, 4]
    assert value[124:133] == b"bfloat16k"
    assert header % 8 == 0
    assert len(value) == header + size + 32


@given(data=st.binary(max_size=400))
def test_noise_is_refused_without_harm(data):
    _survives(data)


@given(prefix=st.integers(0, 200), data=st.binary(max_size=200))
def test_a_true_start_with_a_noisy_end_is_refused_without_harm(prefix, data):
    _survives((GOLDEN / "block-v1.bin").read_bytes()[:prefix] + data)


@pytest.mark.slow
def test_a_hundred_thousand_inputs():
    random = np.random.default_rng(0)
    true = (GOLDEN / "block-v1.bin").read_bytes()
    for _ in range(100_000):
        value = bytearray(true)
        for _ in range(int(random.integers(1, 6))):
            at = int(random.integers(len(value)))
            value[at : at + int(random.integers(3))] = random.bytes(int(random.integers(5)))
        _survives(bytes(value))


def _survives(value: bytes) -> None:
    true = (GOLDEN / "block-v1.bin").read_bytes()
    if value == true:
        return
    for read in (read_header, check_value, lambda one: codec(salt=b"tenant").decode(KEY, one)):
        try:
            found = read(value)
        except BlockRefused:
            continue
        assert read is read_header
        assert sum(len(entry.name) for entry in found.arrays) <= len(value)


@settings(max_examples=10)
@given(salts=st.lists(st.binary(max_size=8), min_size=2, max_size=5, unique=True))
def test_salts_have_digests_of_their_own(salts):
    assert len({salt_digest(salt) for salt in salts}) == len(salts)
