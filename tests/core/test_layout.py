"""Layouts: bytes, groups, digests, bad values."""

from __future__ import annotations

import pytest
from hypothesis import given

from kvcache_core import ArraySpec, BlockCache, BlockLayout, InvalidInput, InvalidType, LayerSpec
from tests.strategies import layouts


def test_bytes_of_a_135m_llama():
    layout = BlockLayout([LayerSpec.attention(3, 64)] * 30)
    assert (layout.bytes_per_token, layout.bytes_per_block) == (46080, 737280)


def test_k_and_v_may_differ_and_a_latent_layer_has_one_array():
    assert LayerSpec.attention(2, 8, 5).elements_per_token == 2 * 8 + 2 * 5
    latent = LayerSpec.latent(576)
    assert [array.name for array in latent.arrays] == ["latent"]
    layout = BlockLayout([LayerSpec.attention(2, 8, 5), latent], 4, "float16")
    assert layout.layer_bytes_per_token(0) == 2 * 26
    assert layout.bytes_per_block == 4 * 2 * (26 + 576)


def test_an_array_may_have_its_own_dtype():
    layout = BlockLayout([LayerSpec.attention(1, 4), LayerSpec.output(10, "float32")], dtype="bfloat16")
    assert layout.bytes_per_token == 2 * 8 + 4 * 10
    assert layout.array_dtype(layout.layers[1].arrays[0]) == "float32"


def test_layers_with_equal_kind_and_window_share_a_group():
    layers = [LayerSpec.attention(1, 4, window=w) for w in (8, None, 8, 3)] + [LayerSpec.output(5)]
    layout = BlockLayout(layers)
    assert layout.groups == (("attention", None), ("attention", 3), ("attention", 8), ("output", None))
    assert [layout.group_of(layer) for layer in range(5)] == [2, 0, 2, 1, 3]


@given(layouts())
def test_every_layer_has_its_group_and_bytes_add_up(layout):
    for number, layer in enumerate(layout.layers):
        assert layout.groups[layout.group_of(number)] == (layer.kind, layer.window)
    assert layout.bytes_per_token == sum(4 * layer.elements_per_token for layer in layout.layers)
    assert len(BlockCache(2, layout=layout).groups) == len(layout.groups)


BASE = {"layers": [LayerSpec.attention(2, 8)], "block_size": 16, "dtype": "float32"}


@pytest.mark.parametrize(
    "change",
    [
        {"block_size": 8},
        {"dtype": "float16"},
        {"layers": [LayerSpec.attention(2, 8)] * 2},
        {"layers": [LayerSpec.attention(2, 8, window=4)]},
        {"layers": [LayerSpec.attention(4, 4)]},
        {"layers": [LayerSpec.attention(2, 4, 12)]},
        {"layers": [LayerSpec((ArraySpec("a", 2, 8), ArraySpec("v", 2, 8)))]},
        {"layers": [LayerSpec((ArraySpec("k", 2, 8), ArraySpec("v", 2, 8, "float64")))]},
        {"layers": [LayerSpec((ArraySpec("k", 2, 8), ArraySpec("v", 2, 8)), kind="output")]},
        {"layers": [LayerSpec((ArraySpec("k;v", 2, 8), ArraySpec("v", 2, 8)))]},
    ],
)
def test_digests_differ_for_whatever_must_not_be_mixed(change):
    assert BlockLayout(**{**BASE, **change}).digest != BlockLayout(**BASE).digest


def test_the_digest_is_a_stable_identity():
    assert BlockLayout(**BASE).digest == BlockLayout(**BASE).digest
    assert len(BlockLayout(**BASE).digest) == 16


def test_names_cannot_imitate_another_layout():
    one = BlockLayout([LayerSpec((ArraySpec("a:1x1:float32,b", 1, 1),))])
    two = BlockLayout([LayerSpec((ArraySpec("a", 1, 1), ArraySpec("b", 1, 1)))])
    assert one.digest != two.digest


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: BlockLayout([]), InvalidInput, "at least one layer"),
        (lambda: BlockLayout([LayerSpec.latent(4)], 0), InvalidInput, "block_size.*got 0"),
        (lambda: BlockLayout([LayerSpec.latent(4)], dtype="int4"), InvalidType, "float32.*int4"),
        (lambda: LayerSpec.attention(0, 4), InvalidInput, "heads=0, size=4"),
        (lambda: LayerSpec.attention(1, 0), InvalidInput, "heads=1, size=0"),
        (lambda: LayerSpec.attention(1, 4, window=0), InvalidInput, "window.*got 0"),
        (lambda: LayerSpec(()), InvalidInput, "one or more arrays"),
        (lambda: LayerSpec((ArraySpec("k", 1, 1), ArraySpec("k", 1, 1))), InvalidInput, "different names"),
        (lambda: LayerSpec((ArraySpec("k", 1, 1),), kind="mamba"), InvalidInput, "mamba"),
        (lambda: ArraySpec("k", 1, 1, "complex64"), InvalidType, "complex64"),
    ],
)
def test_bad_values_say_the_rule_and_what_was_there(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_the_layout_decides_the_cache_block_size():
    assert BlockCache(4, 16, layout=BlockLayout([LayerSpec.latent(2)], 5)).block_size == 5
