"""One contract for every store: the bytes that were written are the bytes that are read, wherever they moved to."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as arrays_of

import kvcache_keras
import kvcache_torch
from kvcache_core import ArraySpec, BlockCache, BlockLayout, InvalidInput, LayerSpec, OutOfMemory
from kvcache_core.budget import compact_blocks
from kvcache_core.layout import DTYPE_BYTES, SCALED_DTYPES
from kvcache_core.quantization import decode, encode
from kvcache_core.store import NumpyStore
from tests.no_memory import no_memory

STORES = {"numpy": NumpyStore, "torch": kvcache_torch.TensorStore, "keras": kvcache_keras.TensorStore}
BLOCK = 4
SIGNED = st.sampled_from([-1, 1])
FINITE = st.integers(-300, 300).map(lambda n: n / 16) | st.builds(
    lambda size, sign: size * sign, st.floats(2.0**-60, 2.0**90, width=32), SIGNED
)

LAYOUTS = {
    "plain": BlockLayout([LayerSpec.attention(2, 8)] * 2, BLOCK),
    "k and v differ": BlockLayout([LayerSpec.attention(2, 8, 3)], BLOCK),
    "latent": BlockLayout([LayerSpec.latent(5)] * 2, BLOCK),
    "outputs": BlockLayout([LayerSpec.attention(1, 4), LayerSpec.output(11)], BLOCK),
    "outputs of another dtype": BlockLayout([LayerSpec.attention(1, 4), LayerSpec.output(6, "float64")], BLOCK),
    "two groups": BlockLayout([LayerSpec.attention(2, 4), LayerSpec.attention(1, 6, window=5)], BLOCK),
    **{dtype: BlockLayout([LayerSpec.attention(2, 3, 5)] * 2, BLOCK, dtype) for dtype in DTYPE_BYTES},
    "int8 with outputs and a window": BlockLayout(
        [LayerSpec.attention(2, 4), LayerSpec.attention(1, 6, window=5), LayerSpec.output(5, "float32")], BLOCK, "int8"
    ),
}


@pytest.fixture(params=list(STORES))
def make(request: pytest.FixtureRequest) -> Any:
    return STORES[request.param]


@pytest.fixture(params=list(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> BlockLayout:
    return LAYOUTS[request.param]


def arrays(layout: BlockLayout) -> list[tuple[int, ArraySpec]]:
    return [(layer, array) for layer, spec in enumerate(layout.layers) for array in spec.arrays]


def values(layout: BlockLayout, array: ArraySpec, count: int, seed: int = 0) -> np.ndarray:
    """[N, H, D] that the array's dtype holds: what the reference makes of random numbers; see `drawn`."""
    dtype = layout.array_dtype(array)
    return decode(*encode(drawn(array, count, seed), dtype), dtype)


def drawn(array: ArraySpec, count: int, seed: int = 0) -> np.ndarray:
    """[N, H, D] random float32 numbers."""
    return np.random.default_rng(seed).standard_normal((count, array.heads, array.size)).astype(np.float32)


def read(store: Any, layer: int, name: str, slots: Any) -> np.ndarray:
    found = store.read(layer, name, np.asarray(slots))
    if hasattr(found, "is_contiguous"):  # torch has no numpy bfloat16
        return found.double().numpy()
    return np.asarray(found).astype(np.float64)


# ---- single operations ------------------------------------------------------------------------------------------


def test_reads_what_was_written(make, layout):
    store = make(layout, 6)
    slots = np.array([5, 27, 6, 14])
    for layer, array in arrays(layout):
        new = values(layout, array, 4, layer)
        store.write(layer, array.name, slots, new)
        np.testing.assert_array_equal(read(store, layer, array.name, slots), new)
        np.testing.assert_array_equal(read(store, layer, array.name, slots[::-1]), new[::-1])


def test_writing_touches_only_its_slots(make, layout):
    store = make(layout, 6)
    for layer, array in arrays(layout):
        store.write(layer, array.name, np.arange(4, 28), values(layout, array, 24, 1))
        before = read(store, layer, array.name, np.arange(28))
        store.write(layer, array.name, np.array([9, 20]), values(layout, array, 2, 2))
        after = read(store, layer, array.name, np.arange(28))
        changed = np.flatnonzero((before != after).any(axis=(1, 2)))
        assert changed.tolist() == [9, 20]


def test_a_new_store_reads_zeros(make, layout):
    store = make(layout, 3)
    for layer, array in arrays(layout):
        assert not read(store, layer, array.name, np.arange(4 * BLOCK)).any()


def test_the_null_block_is_there_and_takes_writes(make, layout):
    store = make(layout, 1)
    for layer, array in arrays(layout):
        # Padding tokens all write into slot 0, several at once.
        store.write(layer, array.name, np.array([0, 0, 4]), values(layout, array, 3))
        np.testing.assert_array_equal(read(store, layer, array.name, [4]), values(layout, array, 3)[2:])


def test_writing_nothing_is_no_error(make, layout):
    store = make(layout, 2)
    layer, array = arrays(layout)[0]
    store.write(layer, array.name, np.array([], np.int64), values(layout, array, 0))
    assert read(store, layer, array.name, np.array([], np.int64)).shape == (0, array.heads, array.size)


@pytest.mark.parametrize("shape", [(3, 2, 8), (2, 1, 8), (2, 2, 7), (2, 16)])
def test_wrong_shapes_raise_and_change_nothing(make, shape):
    store = make(LAYOUTS["plain"], 3)
    with pytest.raises(InvalidInput, match=r"layer 1 array 'v' stores \[N, H, D\] = \(2, 2, 8\), got"):
        store.write(1, "v", np.array([4, 5]), np.ones(shape, np.float32))
    assert not read(store, 1, "v", np.arange(16)).any()


def test_unknown_layers_and_names_raise(make):
    store = make(LAYOUTS["latent"], 3)
    for layer, name in ((0, "k"), (7, "latent")):
        with pytest.raises(KeyError):
            store.read(layer, name, np.array([4]))


def test_bytes(make, layout):
    store = make(layout, 5)
    for layer, array in arrays(layout):
        store.write(layer, array.name, np.array([4]), values(layout, array, 1))
    assert store.nbytes == 6 * layout.bytes_per_block


def test_copy_blocks_copies_one_group(make):
    layout = LAYOUTS["two groups"]
    store = make(layout, 6)
    for layer, array in arrays(layout):
        store.write(layer, array.name, np.arange(28), values(layout, array, 28, layer))
    store.copy_blocks(1, np.array([[2, 5], [3, 6]]))
    store.copy_blocks(0, np.zeros((0, 2), np.int64))
    for layer, array in arrays(layout):
        expected = values(layout, array, 28, layer)
        if layout.group_of(layer) == 1:
            expected[20:24], expected[24:28] = expected[8:12].copy(), expected[12:16].copy()
        np.testing.assert_array_equal(read(store, layer, array.name, np.arange(28)), expected)


def test_copies_read_before_they_write(make):
    layout = LAYOUTS["plain"]
    store = make(layout, 3)
    for layer, array in arrays(layout):
        store.write(layer, array.name, np.arange(16), values(layout, array, 16))
    store.copy_blocks(0, np.array([[1, 2], [2, 3]]))
    for layer, array in arrays(layout):
        old = values(layout, array, 16)
        np.testing.assert_array_equal(read(store, layer, array.name, np.arange(8, 16)), old[4:12])


@pytest.mark.parametrize("name", list(STORES))
@given(order=st.permutations(range(1, 7)))
@settings(max_examples=15)
def test_blocks_change_places_as_a_compaction_asks(name, order):
    """Also in circles: every block is read before any is overwritten."""
    layout = LAYOUTS["two groups"]
    store = STORES[name](layout, 6)
    for layer, array in arrays(layout):
        store.write(layer, array.name, np.arange(28), values(layout, array, 28, layer))
    pairs = np.array([(old, new) for old, new in zip(range(1, 7), order, strict=True) if old != new])
    for group in range(2):
        store.copy_blocks(group, pairs.reshape(-1, 2))
    for layer, array in arrays(layout):
        old = values(layout, array, 28, layer).reshape(7, BLOCK, array.heads, array.size)
        expected = old.copy()
        expected[list(order)] = old[1:]
        found = read(store, layer, array.name, np.arange(28)).reshape(expected.shape)
        np.testing.assert_array_equal(found, expected)


# ---- blocks as bytes ----------------------------------------------------------------------------------------------


def test_export_and_import(make, layout):
    one, other = make(layout, 4), make(layout, 9)
    for layer, array in arrays(layout):
        one.write(layer, array.name, np.arange(8, 12), values(layout, array, 4, layer))
    for group in range(len(layout.groups)):
        content = one.export_block(group, 2)
        assert all(layout.group_of(layer) == group for layer, _ in content)
        other.import_block(group, 8, content)
    for layer, array in arrays(layout):
        found = read(other, layer, array.name, np.arange(40))
        np.testing.assert_array_equal(found[32:36], values(layout, array, 4, layer))
        found[32:36] = 0
        assert not found.any()


def test_an_exported_block_is_a_copy(make):
    layout = LAYOUTS["plain"]
    store = make(layout, 3)
    content = store.export_block(0, 1)
    for layer, array in arrays(layout):
        store.write(layer, array.name, np.arange(4, 8), values(layout, array, 4))
    assert not any(one.any() for one in content.values())


def test_a_block_is_imported_from_memory_that_cannot_be_written(make):
    """What a file or a network hands over: read-only bytes."""
    layout = LAYOUTS["plain"]
    one, other = make(layout, 3), make(layout, 3)
    for layer, array in arrays(layout):
        one.write(layer, array.name, np.arange(4, 8), values(layout, array, 4))
    content = {
        key: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)
        for key, array in one.export_block(0, 1).items()
    }
    other.import_block(0, 2, content)
    for layer, array in arrays(layout):
        np.testing.assert_array_equal(read(other, layer, array.name, np.arange(8, 12)), values(layout, array, 4))


def test_every_store_exports_the_same_bytes(layout):
    blocks = []
    for make in STORES.values():
        store = make(layout, 4)
        for layer, array in arrays(layout):
            store.write(layer, array.name, np.arange(4, 8), values(layout, array, 4, layer))
        blocks.append([store.export_block(group, 1) for group in range(len(layout.groups))])
    _equal_bytes(blocks)


@pytest.mark.parametrize("source", list(STORES))
@pytest.mark.parametrize("target", list(STORES))
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3", "int8"])
def test_a_block_moves_between_frameworks(source, target, dtype):
    layout = LAYOUTS[dtype]
    one, other = STORES[source](layout, 3), STORES[target](layout, 3)
    for layer, array in arrays(layout):
        one.write(layer, array.name, np.arange(4, 8), drawn(array, 4, layer))
    other.import_block(0, 3, one.export_block(0, 1))
    for layer, array in arrays(layout):
        np.testing.assert_array_equal(
            read(other, layer, array.name, np.arange(12, 16)), values(layout, array, 4, layer)
        )


# ---- stored dtypes ------------------------------------------------------------------------------------------------

rows = arrays_of(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 7)), elements=FINITE)


@pytest.mark.parametrize("name", list(STORES))
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3", "int8"])
@given(new=rows)
@settings(max_examples=40, deadline=None)
def test_what_is_read_is_what_the_reference_makes_of_it(name, dtype, new):
    """Bit for bit in every store, halves and subnormal numbers included."""
    count, heads, size = new.shape
    store = STORES[name](BlockLayout([LayerSpec.latent(1), LayerSpec.attention(heads, size)], 8, dtype), 1)
    store.write(1, "k", np.arange(8, 8 + count), new)
    bits, scales = encode(new, dtype)
    np.testing.assert_array_equal(read(store, 1, "k", np.arange(8, 8 + count)), decode(bits, scales, dtype))
    content = store.export_block(0, 1)
    assert content[1, "k"][:count].tobytes() == bits.tobytes()
    if scales is not None:
        assert content[1, "k_scale"].dtype == np.float32
        assert content[1, "k_scale"].shape == (8, heads, 1)
        assert content[1, "k_scale"][:count].tobytes() == scales.tobytes()


@pytest.mark.parametrize("name", list(STORES))
@pytest.mark.parametrize("dtype", SCALED_DTYPES)
def test_infinities_and_nan_are_read_as_nan_and_touch_no_other_token(name, dtype):
    store = STORES[name](BlockLayout([LayerSpec.attention(2, 3)], 4, dtype), 1)
    new = np.ones((3, 2, 3), np.float32)
    new[0, 0, 1], new[2, 1, 0] = np.inf, np.nan
    with np.errstate(invalid="ignore"):
        store.write(0, "v", np.arange(4, 7), new)
        found = read(store, 0, "v", np.arange(4, 7))
    assert np.isnan(found[0, 0, 1]) and np.isnan(found[2, 1, 0])
    np.testing.assert_array_equal(found[1], 1)
    np.testing.assert_array_equal(found[0, 1], 1)
    np.testing.assert_array_equal(found[2, 0], 1)


def test_scales_must_not_have_the_name_of_another_array():
    spec = LayerSpec((ArraySpec("k", 1, 2), ArraySpec("k_scale", 1, 1, "float32")))
    with pytest.raises(InvalidInput, match="name of another one's scales"):
        BlockLayout([spec], 4, "int8")
    store = NumpyStore(BlockLayout([spec], 4), 1)  # no scales, no clash
    store.write(0, "k", np.array([4]), np.ones((1, 1, 2)))
    assert store.read(0, "k", np.array([4])).tolist() == [[[1.0, 1.0]]]


# ---- many blocks as bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", list(LAYOUTS))
def test_packed_blocks_are_the_same_bytes_from_every_store_into_every_store(which):
    layout = LAYOUTS[which]
    for group in range(len(layout.groups)):
        exported = []
        for make in STORES.values():
            store = make(layout, 9)
            for layer, array in arrays(layout):
                store.write(layer, array.name, np.arange(4, 40), values(layout, array, 36, layer))
            packed = store.export_blocks(group, [7, 2, 3])
            assert packed.shape == (3, layout.packed_bytes(group))
            assert packed.dtype == np.uint8
            exported.append(packed)
            memory = np.full((3, packed.shape[1]), 99, np.uint8)
            assert store.export_blocks(group, [7, 2, 3], memory) is memory
            assert np.array_equal(memory, packed)
            assert np.array_equal(store.export_blocks(group, [2, 3, 4, 7])[[3, 0, 1]], packed)
            assert store.export_blocks(group, []).shape == (0, packed.shape[1])
            packed.flags.writeable = False
            for make_other in STORES.values():
                other = make_other(layout, 5)
                other.import_blocks(group, [5, 1, 4], packed)
                for at, block in enumerate((5, 1, 4)):
                    _equal_bytes([[store.export_block(group, (7, 2, 3)[at])], [other.export_block(group, block)]])
                assert not other.export_blocks(group, [2, 3]).any()
        assert all(np.array_equal(exported[0], other) for other in exported)


def test_a_packed_block_holds_its_arrays_one_after_another():
    layout = BlockLayout([LayerSpec.attention(2, 8, 3), LayerSpec.attention(1, 4, window=9)], BLOCK)
    store = NumpyStore(layout, 3)
    for layer, array in arrays(layout):
        store.write(layer, array.name, np.arange(8, 12), values(layout, array, 4, layer))
    k, v = (values(layout, array, 4, 0) for array in layout.layers[0].arrays)
    assert store.export_blocks(0, [2])[0].tobytes() == k.tobytes() + v.tobytes()


@pytest.mark.parametrize("name", list(STORES))
def test_packed_blocks_survive_a_resize(name):
    layout = LAYOUTS["two groups"]
    store = STORES[name](layout, 6)
    for layer, array in arrays(layout):
        store.write(layer, array.name, np.arange(28), values(layout, array, 28, layer))
    before = store.export_blocks(1, [2, 3])
    store.resize(4, [{}, {}])
    assert np.array_equal(store.export_blocks(1, [2, 3]), before)
    store.import_blocks(1, [4, 1], before)
    assert np.array_equal(store.export_blocks(1, [1, 4, 2]), before[[1, 0, 0]])


@pytest.mark.parametrize("name", list(STORES))
@pytest.mark.parametrize("size", [5, 9])
def test_a_resize_that_knows_the_last_block_in_use_keeps_all_up_to_it(name, size):
    layout = LAYOUTS["two groups"]
    store = STORES[name](layout, 6)
    for layer, array in arrays(layout):
        store.write(layer, array.name, np.arange(28), values(layout, array, 28, layer))
    before = [store.export_blocks(group, [1, 2, 3, 6]) for group in (0, 1)]
    store.resize(size, [{}, {6: 4}], last=2)
    assert np.array_equal(store.export_blocks(0, [1, 2]), before[0][:2])
    assert np.array_equal(store.export_blocks(1, [1, 2, 4]), before[1][[0, 1, 3]])
    assert not store.export_blocks(0, [3, size]).any()


@pytest.mark.parametrize("size", [3, 9])
def test_an_allocation_that_fails_changes_nothing(make, size):
    layout = LAYOUTS["int8 with outputs and a window"]
    groups, store = range(len(layout.groups)), make(layout, 6)
    for layer, array in arrays(layout):
        store.write(layer, array.name, np.arange(28), values(layout, array, 28, layer))
    before, nbytes = [store.export_blocks(group, range(7)) for group in groups], store.nbytes
    count = sum(len(layout.stored(layer)) for layer in range(3))
    for at in range(count):
        with no_memory(store, at), pytest.raises(OutOfMemory, match=f"no memory for {size} blocks"):
            store.resize(size, [{} for _ in groups])
        assert (store.num_blocks, store.nbytes) == (6, nbytes)
        for group in groups:
            assert np.array_equal(store.export_blocks(group, range(7)), before[group])
    with no_memory(store, count):
        store.resize(size, [{} for _ in groups])
    assert store.num_blocks == size


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_a_compaction_moves_the_content_or_without_memory_nothing(make, error):
    layout = LAYOUTS["int8 with outputs and a window"]
    core, store = BlockCache(20, layout=layout), make(layout, 20)
    for layer, array in arrays(layout):
        store.write(layer, array.name, np.arange(84), values(layout, array, 84, layer))
    seqs = [core.open([row]) for row in range(2)]
    for token in range(4):
        for row, seq in enumerate(seqs):
            core.commit(core.plan([seq], [[4 * row + token] * BLOCK]))

    def content() -> list[np.ndarray]:
        """What each sequence sees of each group."""
        places = [(group, [block for block in seq.tables[group] if block]) for seq in seqs for group in range(2)]
        return [store.export_blocks(group, blocks) for group, blocks in places]

    before, tables = content(), [seq.tables.copy() for seq in seqs]
    for at in range(2):
        found = [store.export_blocks(group, [1]) for group in range(at)]
        no_memory_at = mock.patch.object(store, "export_blocks", side_effect=[*found, error])
        with no_memory_at, pytest.raises(OutOfMemory, match="nothing was changed"):
            compact_blocks(core, store)
        assert [seq.tables for seq in seqs] == tables
        assert all(map(np.array_equal, content(), before))
    assert compact_blocks(core, store) > 0
    assert [seq.tables for seq in seqs] != tables
    assert all(map(np.array_equal, content(), before))
    core.check_valid()


@pytest.mark.parametrize("name", ["numpy", "torch", "keras"])
def test_a_size_that_no_machine_has_is_refused(name):
    layout = LAYOUTS["plain"]
    store = STORES[name](layout, 2)
    store.write(0, "k", np.arange(4), values(layout, layout.layers[0].arrays[0], 4))
    with pytest.raises(OutOfMemory, match="beside those of the 2 blocks"):
        store.resize(2**44, [{}])
    assert store.num_blocks == 2


def _equal_bytes(blocks: list[list[dict[Any, np.ndarray]]]) -> None:
    first = blocks[0]
    for other in blocks[1:]:
        for one, two in zip(first, other, strict=True):
            assert one.keys() == two.keys()
            for key, array in one.items():
                assert array.dtype == two[key].dtype
                assert array.shape == two[key].shape
                assert np.ascontiguousarray(array).tobytes() == np.ascontiguousarray(two[key]).tobytes()


# ---- any sequence of operations, against a dictionary ----------------------------------------------------------


class Naive:
    """{(layer, name, block): [block_size, H, D]}; a missing block is zeros."""

    def __init__(self, layout: BlockLayout, num_blocks: int) -> None:
        self.layout, self.num_blocks = layout, num_blocks
        self.blocks: dict[tuple[int, str, int], np.ndarray] = {}

    def block(self, layer: int, array: ArraySpec, block: int) -> np.ndarray:
        zeros = np.zeros((BLOCK, array.heads, array.size))
        return self.blocks.setdefault((layer, array.name, block), zeros)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.lists(st.integers(0, 200), min_size=1, max_size=6), st.integers(0, 99)),
        st.tuples(st.just("copy"), st.lists(st.integers(0, 50), min_size=4, max_size=4, unique=True)),
        st.tuples(st.just("move"), st.integers(0, 50), st.integers(0, 50)),
        st.tuples(st.just("resize"), st.integers(4, 9), st.permutations(range(1, 5))),
    ),
    max_size=8,
)


@pytest.mark.parametrize("name", list(STORES))
@pytest.mark.parametrize("which", ["k and v differ", "two groups", "outputs", "int8"])
@given(operations=operations)
@settings(max_examples=15)
def test_any_sequence_of_operations(name, which, operations):
    layout = LAYOUTS[which]
    store, naive = STORES[name](layout, 6), Naive(layout, 6)
    for operation, *arguments in operations:
        globals()[f"_{operation}"](store, naive, *arguments)
    assert store.num_blocks == naive.num_blocks
    slots = np.arange((naive.num_blocks + 1) * BLOCK)
    for layer, array in arrays(layout):
        expected = np.concatenate([naive.block(layer, array, block) for block in range(naive.num_blocks + 1)])
        np.testing.assert_array_equal(read(store, layer, array.name, slots), expected)


def _write(store: Any, naive: Naive, slots: list[int], seed: int) -> None:
    capacity = (naive.num_blocks + 1) * BLOCK
    slots = sorted({slot % capacity for slot in slots})
    for layer, array in arrays(naive.layout):
        new = values(naive.layout, array, len(slots), seed + layer)
        store.write(layer, array.name, np.array(slots), new)
        for slot, one in zip(slots, new, strict=True):
            naive.block(layer, array, slot // BLOCK)[slot % BLOCK] = one


def _copy(store: Any, naive: Naive, blocks: list[int]) -> None:
    ids = list(dict.fromkeys(1 + block % naive.num_blocks for block in blocks))
    pairs = np.array(list(zip(ids[::2], ids[1::2], strict=False))).reshape(-1, 2)
    for group in range(len(naive.layout.groups)):
        store.copy_blocks(group, pairs)
    for layer, array in arrays(naive.layout):
        for source, target in pairs:
            naive.blocks[layer, array.name, int(target)] = naive.block(layer, array, int(source)).copy()


def _move(store: Any, naive: Naive, source: int, target: int) -> None:
    source, target = 1 + source % naive.num_blocks, 1 + target % naive.num_blocks
    for group in range(len(naive.layout.groups)):
        store.import_block(group, target, store.export_block(group, source))
    for layer, array in arrays(naive.layout):
        naive.blocks[layer, array.name, target] = naive.block(layer, array, source).copy()


def _resize(store: Any, naive: Naive, size: int, order: list[int]) -> None:
    """Shrinking moves blocks from beyond the new end into the lowest; what they replace is given up."""
    beyond = range(size + 1, naive.num_blocks + 1)
    moves = [dict(zip(beyond, order, strict=False)) for _ in naive.layout.groups]
    store.resize(size, moves)
    for layer, array in arrays(naive.layout):
        for source, target in moves[naive.layout.group_of(layer)].items():
            naive.blocks[layer, array.name, target] = naive.block(layer, array, source).copy()
        for block in range(size + 1, naive.num_blocks + 1):
            naive.blocks.pop((layer, array.name, block), None)
    naive.num_blocks = size


# ---- state layers: one entry per block, block ids in the place of slots ------------------------------------------

STATES = BlockLayout([LayerSpec.attention(2, 4), LayerSpec.state(4, 5), LayerSpec.state(2, 7, "float64")], BLOCK)


def _with_states(make: Any, seed: int = 0) -> tuple[Any, dict[int, np.ndarray]]:
    store, content = make(STATES, 6), {}
    for layer in (1, 2):
        content[layer] = values(STATES, STATES.layers[layer].arrays[0], 7, seed + layer)
        store.write(layer, "state", np.arange(7), content[layer])
    return store, content


def test_a_block_has_one_state_per_layer(make):
    store, content = _with_states(make)
    for layer, expected in content.items():
        np.testing.assert_array_equal(read(store, layer, "state", [6, 1, 3]), expected[[6, 1, 3]])
    store.write(0, "k", np.arange(4, 8), values(STATES, STATES.layers[0].arrays[0], 4))
    store.write(0, "v", np.arange(4, 8), values(STATES, STATES.layers[0].arrays[1], 4))
    assert store.nbytes == 7 * STATES.bytes_per_block == 7 * (4 * BLOCK * 16 + 4 * 20 + 8 * 14)


def test_states_are_copied_and_keep_their_place_through_a_resize(make):
    store, content = _with_states(make)
    store.copy_blocks(1, np.array([[2, 5], [5, 2]]))
    store.copy_blocks(0, np.array([[1, 3]]))
    store.resize(4, [{}, {6: 1}])
    for layer, old in content.items():
        np.testing.assert_array_equal(read(store, layer, "state", [1, 2, 3, 4]), old[[6, 5, 3, 4]])


@pytest.mark.parametrize("target", list(STORES))
def test_states_are_the_same_bytes_in_every_store(make, target):
    store, content = _with_states(make)
    packed = store.export_blocks(1, [4, 2])
    expected = [content[1][block].tobytes() + content[2][block].tobytes() for block in (4, 2)]
    assert [one.tobytes() for one in packed] == expected
    other = STORES[target](STATES, 3)
    other.import_blocks(1, [1, 3], packed)
    other.import_block(1, 2, store.export_block(1, 6))
    for layer, old in content.items():
        np.testing.assert_array_equal(read(other, layer, "state", [1, 3, 2]), old[[4, 2, 6]])
