"""What one token leaves behind in each layer, and how many bytes that is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvcache_core.errors import InvalidInput, InvalidType

__all__ = [
    "DTYPE_BYTES",
    "MODEL_DTYPES",
    "SCALED_DTYPES",
    "STATE_WINDOW",
    "ArraySpec",
    "BlockLayout",
    "LayerSpec",
    "PackedArray",
    "check_dtype",
    "scales_of",
]

MODEL_DTYPES = ("float64", "float32", "float16", "bfloat16")
"""What a model may compute in."""

DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3": 1, "int8": 1}
"""Bytes per element of each stored dtype."""

SCALED_DTYPES = ("float8_e4m3", "int8")
"""Dtypes that are stored with one float32 scale per token and head."""

_BITS = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "float8_e4m3": "<u1", "int8": "<i1"}
"""Little-endian numpy dtypes; float types that numpy lacks as unsigned integers."""

_KINDS = ("attention", "state", "output")

STATE_WINDOW = 2
"""A state layer's window: a token needs what the token before it left behind, so it sees that token's block."""


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One named array of a layer; an entry (a token's, or a state) has shape [heads, size].

    Args:
        name: the array's name, for example ``"k"`` or ``"v"``.
        heads: H, heads stored per entry.
        size: D, elements per head.
        dtype: element type, or None for the layout's.
    """

    name: str
    heads: int
    size: int
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.heads < 1 or self.size < 1:
            raise InvalidInput(
                f"array {self.name!r} needs heads >= 1 and size >= 1, got heads={self.heads}, size={self.size}"
            )
        if self.dtype is not None:
            check_dtype(self.dtype)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one layer stores per token, or per block: the state behind the block's last token.

    Args:
        arrays: the named arrays. K and V may differ in head size; a latent-attention layer has one array.
        window: None for full causal attention; w for a sliding window: a token sees itself and the w - 1
            tokens before it.
        kind: ``"attention"``; ``"state"`` for a layer whose past is one state of fixed size, whatever the number of
            tokens; or ``"output"`` for the stored result of the whole model.

    Example:
        >>> LayerSpec.attention(heads=3, head_size=64).elements_per_token
        384
        >>> LayerSpec.latent(size=576).elements_per_token
        576
        >>> LayerSpec.state(rows=3, size=64).elements_per_token
        0
    """

    arrays: tuple[ArraySpec, ...]
    window: int | None = None
    kind: str = "attention"

    def __post_init__(self) -> None:
        names = [array.name for array in self.arrays]
        if not names or len(set(names)) != len(names):
            raise InvalidInput(f"a layer needs one or more arrays with different names, got {names}")
        if self.window is not None and self.window < 1:
            raise InvalidInput(f"window must be at least 1 token, got {self.window}; use None for full attention")
        if self.kind not in _KINDS:
            raise InvalidInput(f"layer kind must be one of {_KINDS}, got {self.kind!r}")
        if self.kind == "state" and self.window != STATE_WINDOW:
            raise InvalidInput(f"a state layer has window={STATE_WINDOW}, got {self.window}; use LayerSpec.state")

    @classmethod
    def attention(
        cls, heads: int, head_size: int, v_head_size: int | None = None, *, window: int | None = None
    ) -> LayerSpec:
        """K and V of one attention layer; ``heads`` counts the K/V heads, unrepeated."""
        value = ArraySpec("v", heads, head_size if v_head_size is None else v_head_size)
        return cls((ArraySpec("k", heads, head_size), value), window=window)

    @classmethod
    def latent(cls, size: int, *, window: int | None = None) -> LayerSpec:
        """The single compressed array of a latent-attention layer."""
        return cls((ArraySpec("latent", 1, size),), window=window)

    @classmethod
    def state(cls, rows: int, size: int, dtype: str | None = None) -> LayerSpec:
        """A state [rows, size] behind the last token, like a causal convolution's last inputs.

        A block holds one: the state behind the block's last token. So a match ends where a state is (at a block's end,
        or where an unfinished block ends now), and a sequence is truncated to a block's end only.
        """
        return cls((ArraySpec("state", rows, size, dtype),), window=STATE_WINDOW, kind="state")

    @classmethod
    def output(cls, size: int, dtype: str | None = None) -> LayerSpec:
        """The model's own result per token, kept so that a cached prefix can be answered whole."""
        return cls((ArraySpec("output", 1, size, dtype),), kind="output")

    @property
    def elements_per_token(self) -> int:
        """Elements stored per token, all arrays; a state layer stores none."""
        return 0 if self.kind == "state" else sum(array.heads * array.size for array in self.arrays)


@dataclass(frozen=True, slots=True)
class PackedArray:
    """Where one array lies in a packed block: the block's content as bytes, in one order for every store.

    Attributes:
        layer: its layer.
        name: its name.
        dtype: its element type.
        shape: (entries, H, D), the last one fastest; entries is the block size, or 1 for a state.
        offset: its first byte in the packed block.
        bits: the little-endian numpy dtype of its elements, or of their bits where numpy has no such type.
    """

    layer: int
    name: str
    dtype: str
    shape: tuple[int, int, int]
    offset: int
    bits: str

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.shape[0] * self.shape[1] * self.shape[2] * int(self.bits[-1])


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """The shape of a block: every layer's arrays for ``block_size`` tokens.

    Args:
        layers: one spec per layer, in order.
        block_size: tokens per block.
        dtype: stored element type: float64, float32, float16, bfloat16, float8_e4m3 or int8. An array "k" of the last
            two has its scales beside it, as an array "k_scale" of float32, one number per token and head.

    Raises:
        InvalidInput: no layers, a block size below 1, or an array that has the name of another one's scales.
        InvalidType: an unknown dtype.

    Example:
        >>> layout = BlockLayout([LayerSpec.attention(3, 64)] * 30, block_size=16)
        >>> layout.bytes_per_token, layout.bytes_per_block
        (46080, 737280)
        >>> BlockLayout(layout.layers, dtype="int8").bytes_per_token
        12240
    """

    layers: tuple[LayerSpec, ...]
    block_size: int = 16
    dtype: str = "float32"
    groups: tuple[tuple[str, int | None], ...] = field(init=False, compare=False)
    """(kind, window) of each layer group: layers with equal kind and window share one block table. Attention
    comes before states and states before stored outputs, full attention before windows."""
    digest: bytes = field(init=False, compare=False, repr=False)
    """16 bytes that differ for layouts whose blocks must not be mixed."""
    _packed: tuple[tuple[PackedArray, ...], ...] = field(init=False, compare=False, repr=False)
    """Per group; made once, as it is asked for at each eviction."""

    def __init__(self, layers: Sequence[LayerSpec], block_size: int = 16, dtype: str = "float32") -> None:
        if not layers:
            raise InvalidInput("a layout needs at least one layer, got none")
        if block_size < 1:
            raise InvalidInput(f"block_size must be at least 1 token, got {block_size}")
        check_dtype(dtype)
        object.__setattr__(self, "layers", tuple(layers))
        object.__setattr__(self, "block_size", block_size)
        object.__setattr__(self, "dtype", dtype)
        distinct = {(layer.kind, layer.window) for layer in layers}
        ordered = sorted(distinct, key=lambda group: (_KINDS.index(group[0]), group[1] is not None, group[1] or 0))
        object.__setattr__(self, "groups", tuple(ordered))
        for layer in range(len(layers)):
            names = [array.name for array in self.stored(layer)]
            if len(set(names)) != len(names):
                raise InvalidInput(f"layer {layer} has an array with the name of another one's scales: {names}")
        object.__setattr__(self, "digest", self._digest())
        object.__setattr__(self, "_packed", tuple(map(self._pack, range(len(self.groups)))))

    def group_of(self, layer: int) -> int:
        """Index in :attr:`groups` of the layer's group."""
        spec = self.layers[layer]
        return self.groups.index((spec.kind, spec.window))

    def array_dtype(self, array: ArraySpec) -> str:
        """The dtype that ``array`` is stored in."""
        return array.dtype or self.dtype

    def stored(self, layer: int) -> tuple[ArraySpec, ...]:
        """What a store keeps of a layer: its arrays, and behind each one that has scales these."""
        found: list[ArraySpec] = []
        for array in self.layers[layer].arrays:
            found.append(array)
            if self.array_dtype(array) in SCALED_DTYPES:
                found.append(ArraySpec(scales_of(array.name), array.heads, 1, "float32"))
        return tuple(found)

    def layer_bytes_per_token(self, layer: int) -> int:
        """Bytes one token takes in one layer; a state layer takes bytes per block only."""
        return 0 if self.layers[layer].kind == "state" else self._entry_bytes(layer)

    def entries_per_block(self, layer: int) -> int:
        """How many entries [H, D] a block has in each array of a layer: one per token, or one state."""
        return 1 if self.layers[layer].kind == "state" else self.block_size

    def _entry_bytes(self, layer: int) -> int:
        return sum(a.heads * a.size * DTYPE_BYTES[self.array_dtype(a)] for a in self.stored(layer))

    def packed(self, group: int) -> tuple[PackedArray, ...]:
        """The arrays of a layer group in a packed block, in the order of layers and of each layer's arrays."""
        return self._packed[group]

    def _pack(self, group: int) -> tuple[PackedArray, ...]:
        arrays: list[PackedArray] = []
        offset = 0
        for layer in range(len(self.layers)):
            if self.group_of(layer) != group:
                continue
            for array in self.stored(layer):
                dtype = self.array_dtype(array)
                shape = (self.entries_per_block(layer), array.heads, array.size)
                packed = PackedArray(layer, array.name, dtype, shape, offset, _BITS[dtype])
                arrays.append(packed)
                offset += packed.nbytes
        return tuple(arrays)

    def packed_bytes(self, group: int) -> int:
        """Bytes of a packed block of a layer group."""
        last = self.packed(group)[-1]
        return last.offset + last.nbytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token takes, all layers; states, which are kept per block, apart."""
        return sum(self.layer_bytes_per_token(index) for index in range(len(self.layers)))

    @property
    def bytes_per_block(self) -> int:
        """Bytes one block takes, all layers."""
        return sum(self._entry_bytes(layer) * self.entries_per_block(layer) for layer in range(len(self.layers)))

    def _digest(self) -> bytes:
        parts = [f"kvcache-layout-1;{self.block_size};{self.dtype}"]
        for layer in self.layers:
            arrays = ",".join(f"{a.name!r}:{a.heads}x{a.size}:{self.array_dtype(a)}" for a in layer.arrays)
            parts.append(f"{layer.kind};{layer.window};{arrays}")
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).digest()


def scales_of(name: str) -> str:
    """The name of the array that holds another one's scales."""
    return f"{name}_scale"


def check_dtype(dtype: str) -> str:
    """``dtype`` if it can be stored.

    Raises:
        InvalidType: it cannot.
    """
    if dtype not in DTYPE_BYTES:
        raise InvalidType(f"dtype must be one of {sorted(DTYPE_BYTES)}, got {dtype!r}")
    return dtype
