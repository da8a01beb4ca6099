"""Random decoders and random scripts over them: the one test of "cached equals recompute" for every framework.

A test suite for a framework writes a *backend* (four names) and gets the decoders, the actions and the checks::

    from hypothesis import given
    from tests.reference_decoder import Driver, decoder_configs, scripts

    @given(decoder_configs(), scripts())
    def test_cached_equals_recompute(config, script):
        driver = Driver(config, lambda weights: MyBackend(config, weights, script.num_blocks))
        driver.run(script)      # raises AssertionError: wrong numbers, lost state, invalid bookkeeping
        driver.report()         # hypothesis events; driver.counts says what the script really met

A backend has (see :class:`Backend`; :class:`NumpyBackend` is a whole one in 50 lines)::

    backend.core                                # the BlockCache whose sequences are stepped
    backend.step(seqs, token_lists, fail=None)  # plan, run, commit; logits [B, T, V] padded on the right, as
                                                # numpy, or [B, V] (behind each row's last token only).
                                                # When anything raises: roll back and let it out.
    backend.uncached(tokens)                    # the same model without the cache: [T, V] for one list of ids
    backend.resize(num_blocks)                  # core.resize and the store's part

``fail=layer`` asks for an exception inside the step: raise ``InjectedFault`` when layer ``layer`` has written
its K and V. A compiled model that cannot stop between layers raises it behind the model and before the commit.

The model is :func:`forward`, written once over a small ``ops`` object (see :class:`NumpyOps`) and the operators
``@ + * []``. A framework may run it with ops of its own, or build its own model from the same weights:

==================  =======================  ==============================================================
weight              shape                    use
==================  =======================  ==============================================================
``embed``           [V, W]                   token embedding
``learned``         [P, W]                   only for ``positions == "learned"``: added to the embedding
``layers.i.conv``   [K, W, W]                if ``convs[i] == (K, dilation)``: ``x + convolution(norm(x))``
``layers.i.q``      [W, Hq * D]              ``norm(x) @ q``; a head's D columns are adjacent
``layers.i.k``      [W, Hkv * D]             rotary: q and k are turned, halves [D/2, D/2] as in Llama
``layers.i.v``      [W, Hkv * Dv]
``layers.i.o``      [Hq * Dv, W]             ``x + attention @ o``
``layers.i.up``     [W, 2W]                  ``x + silu(norm(x) @ up) @ down``
``layers.i.down``   [2W, W]
``head``            [W, V]                   ``norm(x) @ head`` are the logits
==================  =======================  ==============================================================

``norm`` is RMS norm without weights, epsilon 1e-6. ``config.windows[i]`` is layer i's sliding window or None,
``config.scale`` and ``config.softcap`` go to the attention. Weights come in ``config.dtype``; for bfloat16 they
are float32 arrays whose values bfloat16 holds exactly. The n-th convolution has the layer number
``config.layers + n``: attention comes first.

The bound (invariant 1): over all outputs of a script, the error against a wide reference is no larger than
the uncached run's own error times 1.5 plus one ulp of the dtype at the magnitude of the outputs.
The reference is float64 or wider: numpy's longdouble. Where the bound is passed, the script is run again with the
hidden units permuted (same mathematics, other rounding), a dozen times, and the bound must hold between the means of
all draws (:func:`kvcache_core.testing_bound.over_draws` says why).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from hypothesis import event
from hypothesis import strategies as st

from kvcache_core import BlockCache, BlockLayout, CacheFull, InvalidInput, LayerSpec
from kvcache_core import Sequence as CachedSequence
from kvcache_core.attention import attend, cached_attention
from kvcache_core.convolution import causal_conv1d, context_rows, with_context
from kvcache_core.quantization import decode, encode
from kvcache_core.store import NumpyStore
from kvcache_core.testing_bound import Errors, over_draws

__all__ = [
    "Backend",
    "DecoderConfig",
    "Driver",
    "InjectedFault",
    "NumpyBackend",
    "NumpyOps",
    "Script",
    "decoder_configs",
    "forward",
    "make_weights",
    "scripts",
    "ulp",
]

Weights = Mapping[str, Any]
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
WIDER = bool(np.finfo(np.longdouble).eps < EPSILON["float64"])
FLOAT64_FALLBACK_ULPS = 256
"""Allowed between cached and uncached float64 where numpy has nothing wider to be the reference."""


class InjectedFault(RuntimeError):
    """Raised inside a step on purpose."""


# ---- the model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecoderConfig:
    """A small decoder; the weights follow from ``seed``."""

    windows: tuple[int | None, ...] = (None,)
    heads: int = 2
    kv_heads: int = 1
    head_size: int = 4
    v_head_size: int = 4
    width: int = 16
    vocab: int = 11
    max_positions: int = 96
    positions: str = "rotary"
    scale: float | None = None
    softcap: float | None = None
    dtype: str = "float32"
    block_size: int = 4
    seed: int = 0
    convs: tuple[tuple[int, int] | None, ...] = ()
    """Per layer (kernel, dilation) of the causal convolution in front of its attention."""

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """What numpy computes in; float32 stands in for bfloat16."""
        return np.dtype("float32" if self.dtype == "bfloat16" else self.dtype)

    def layout(self) -> BlockLayout:
        specs = [
            LayerSpec.attention(self.kv_heads, self.head_size, self.v_head_size, window=window)
            for window in self.windows
        ]
        specs += [LayerSpec.state(context_rows(*conv), self.width) for conv in self.convs if conv]
        return BlockLayout(specs, self.block_size, self.dtype)


def make_weights(config: DecoderConfig) -> dict[str, np.ndarray]:
    """The weights of ``config``, by name (see the top of the module)."""
    rng = np.random.default_rng(config.seed)
    width = config.width
    shapes = {"embed": (config.vocab, width)}
    if config.positions == "learned":
        shapes["learned"] = (config.max_positions, width)
    for layer in range(config.layers):
        shapes |= {
            f"layers.{layer}.q": (width, config.heads * config.head_size),
            f"layers.{layer}.k": (width, config.kv_heads * config.head_size),
            f"layers.{layer}.v": (width, config.kv_heads * config.v_head_size),
            f"layers.{layer}.o": (config.heads * config.v_head_size, width),
            f"layers.{layer}.up": (width, 2 * width),
            f"layers.{layer}.down": (2 * width, width),
        }
        if config.convs and config.convs[layer]:
            shapes[f"layers.{layer}.conv"] = (config.convs[layer][0], width, width)
    shapes["head"] = (width, config.vocab)
    weights = {}
    for name, shape in shapes.items():
        spread = 1.0 if name in ("embed", "learned") else 1.5 / np.sqrt(shape[0])
        values = (rng.standard_normal(shape) * spread).astype(config.numpy_dtype)
        weights[name] = _round_bfloat16(values) if config.dtype == "bfloat16" else values
    return weights


def _round_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32)
    even = (bits >> 16) & 1
    return ((bits + 0x7FFF + even) & np.uint32(0xFFFF0000)).astype(np.uint32).view(np.float32)


Attention = Callable[[int, Any, Any, Any], Any]
"""(layer, q [B, T, Hq, D], k [B, T, Hkv, D], v [B, T, Hkv, Dv]) -> [B, T, Hq, Dv]."""

Convolution = Callable[[int, Any, Any, int], Any]
"""(layer, x [B, T, W], weight [K, W, W], dilation) -> [B, T, W]."""


def forward(
    ops: Any,
    config: DecoderConfig,
    weights: Weights,
    tokens: Any,
    positions: Any,
    attention: Attention,
    convolution: Convolution | None = None,
) -> Any:
    """The decoder: logits [B, T, V] for tokens [B, T] at absolute positions [B, T]."""
    x = ops.take(weights["embed"], tokens)
    turn = None
    if config.positions == "learned":
        x = x + ops.take(weights["learned"], positions)
    else:
        turn = ops.rotary(positions, config.head_size)
    convolutions = 0
    for layer in range(config.layers):
        if convolution is not None and config.convs and config.convs[layer]:
            weight, dilation = weights[f"layers.{layer}.conv"], config.convs[layer][1]
            x = x + convolution(config.layers + convolutions, ops.norm(x), weight, dilation)
            convolutions += 1
        w = {name: weights[f"layers.{layer}.{name}"] for name in ("q", "k", "v", "o", "up", "down")}
        h = ops.norm(x)
        q = ops.split_heads(h @ w["q"], config.heads)
        k = ops.split_heads(h @ w["k"], config.kv_heads)
        v = ops.split_heads(h @ w["v"], config.kv_heads)
        if turn is not None:
            q, k = _rotate(ops, q, turn), _rotate(ops, k, turn)
        x = x + ops.merge_heads(attention(layer, q, k, v)) @ w["o"]
        x = x + ops.silu(ops.norm(x) @ w["up"]) @ w["down"]
    return ops.norm(x) @ weights["head"]


def _rotate(ops: Any, x: Any, turn: tuple[Any, Any]) -> Any:
    cos, sin = turn
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return ops.concat([a * cos - b * sin, b * cos + a * sin])


class NumpyOps:
    """What :func:`forward` needs of a framework."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)

    def take(self, table: Any, ids: Any) -> Any:
        """Rows of ``table`` [N, W] at ``ids`` [B, T]: [B, T, W]."""
        return table[ids]

    def norm(self, x: Any) -> Any:
        """RMS norm over the last axis, epsilon 1e-6, no weights."""
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.dtype.type(1e-6))

    def silu(self, x: Any) -> Any:
        return x / (1 + np.exp(-x))

    def rotary(self, positions: Any, size: int) -> tuple[Any, Any]:
        """(cos, sin), each [B, T, 1, size / 2], of position * 100 ** (-2i / size)."""
        frequencies = np.exp(np.arange(0, size, 2).astype(self.dtype) * self.dtype.type(-np.log(100.0) / size))
        angles = positions[:, :, None, None].astype(self.dtype) * frequencies
        return np.cos(angles), np.sin(angles)

    def split_heads(self, x: Any, heads: int) -> Any:
        """[B, T, H * D] -> [B, T, H, D]."""
        return x.reshape(*x.shape[:2], heads, -1)

    def merge_heads(self, x: Any) -> Any:
        """[B, T, H, D] -> [B, T, H * D]."""
        return x.reshape(*x.shape[:2], -1)

    def concat(self, parts: list[Any]) -> Any:
        """Along the last axis."""
        return np.concatenate(parts, axis=-1)


def run_uncached(
    config: DecoderConfig, weights: Weights, tokens: Sequence[int], dtype: Any, stored: str | None = None
) -> np.ndarray:
    """Logits [T, V] of a full computation in numpy, in any numpy dtype; K and V rounded to the dtype ``stored``."""
    cast = {name: np.asarray(value).astype(dtype) for name, value in weights.items()}
    positions = np.arange(len(tokens))[None]

    def attention(layer: int, q: Any, k: Any, v: Any) -> Any:
        rows = [array[0].swapaxes(0, 1) for array in (q, k, v)]
        if stored is not None:
            rows[1:] = [decode(*encode(one, stored), stored).astype(dtype) for one in rows[1:]]
        result = attend(
            *rows,
            positions[0],
            positions[0],
            window=config.windows[layer],
            scale=config.scale,
            softcap=config.softcap,
        )
        return result.swapaxes(0, 1)[None]

    def convolution(layer: int, x: Any, weight: Any, dilation: int) -> Any:
        before = np.zeros((1, context_rows(len(weight), dilation), x.shape[2]), x.dtype)
        return causal_conv1d(np.concatenate([before, x], axis=1), weight, dilation=dilation)

    return forward(NumpyOps(dtype), config, cast, np.asarray(tokens)[None], positions, attention, convolution)[0]


# ---- backends ----------------------------------------------------------------------------------------


class Backend(Protocol):
    """What a framework's test suite supplies."""

    core: BlockCache

    def step(self, seqs: list[CachedSequence], token_lists: list[list[int]], fail: int | None = None) -> np.ndarray:
        """Append tokens to each row: logits [B, T, V] padded on the right, or [B, V] behind the last tokens."""

    def uncached(self, tokens: list[int]) -> np.ndarray:
        """Logits [T, V] of the same model without the cache."""

    def resize(self, num_blocks: int) -> None:
        """Change the capacity of core and store."""


class NumpyBackend:
    """The reference: the core, a numpy store and numpy attention."""

    def __init__(self, config: DecoderConfig, weights: Weights, num_blocks: int, *, stored: str | None = None) -> None:
        self.config, self.weights = config, weights
        self.ops = NumpyOps(config.numpy_dtype)
        layout = config.layout()
        layout = BlockLayout(layout.layers, layout.block_size, stored or layout.dtype)
        self.core = BlockCache(num_blocks, layout=layout)
        self.store = NumpyStore(layout, num_blocks)
        for array in self.store.arrays.values():
            # Whoever reads a slot that no token was written to gets NaN: from scales where they are.
            array.fill(np.nan if array.dtype.kind == "f" else 127)

    def step(self, seqs: list[CachedSequence], token_lists: list[list[int]], fail: int | None = None) -> np.ndarray:
        plan = self.core.plan(seqs, token_lists)

        def attention(layer: int, q: Any, k: Any, v: Any) -> Any:
            heads_first = [array.swapaxes(1, 2) for array in (q, k, v)]
            result = cached_attention(
                *heads_first, layer, self.store, plan, scale=self.config.scale, softcap=self.config.softcap
            )
            if layer == fail:
                raise InjectedFault(layer)
            return result.swapaxes(1, 2)

        def convolution(layer: int, x: Any, weight: Any, dilation: int) -> Any:
            joined = with_context(x, context_rows(len(weight), dilation), layer, self.store, plan)
            return causal_conv1d(joined, weight, dilation=dilation)

        try:
            self.store.apply_copies(plan)
            logits = forward(self.ops, self.config, self.weights, plan.tokens, plan.positions, attention, convolution)
        except BaseException:
            self.core.rollback(plan)
            raise
        self.core.commit(plan)
        return logits

    def uncached(self, tokens: list[int]) -> np.ndarray:
        return run_uncached(self.config, self.weights, tokens, self.config.numpy_dtype)

    def resize(self, num_blocks: int) -> None:
        results = self.core.resize(num_blocks)
        self.store.resize(num_blocks, [result.moves for result in results])


# ---- scripts -----------------------------------------------------------------------------------------

MAX_LENGTH = 64
SALTS = (b"", b"tenant")


@dataclass(frozen=True)
class Script:
    """Actions on a pool of ``num_blocks``. Numbers in actions are taken modulo what is there when they run.

    Actions are tuples:
        ("open", base, head, tail, salt)      a prompt: ``head`` tokens of shared text ``base``, then ``tail``
        ("reopen", which, cut, tail)          the tokens of an earlier sequence without the last ``cut``, and ``tail``
        ("step", ((which, count, seed), ...)) a ragged batch: ``count`` tokens per row, the prompt's rest first
        ("fail", rows, layer)                 the same, with an exception inside
        ("fork", which), ("truncate", which, drop), ("close", which), ("resize", num_blocks), ("clear",)
    """

    num_blocks: int
    actions: tuple[tuple[Any, ...], ...]


def decoder_configs(
    *,
    dtypes: Sequence[str] = ("float32", "float64"),
    max_layers: int = 3,
    head_sizes: Sequence[int] = (4, 6, 8, 16, 32, 64),
    block_sizes: Sequence[int] = (1, 2, 3, 4, 5, 8),
    windows: bool = True,
    only_windows: bool = False,
    convs: bool = False,
) -> st.SearchStrategy[DecoderConfig]:
    """Random decoders: multi-head, grouped and multi-query; K and V of different size; all layer kinds."""

    @st.composite
    def configs(draw: Any) -> DecoderConfig:
        kv_heads = draw(st.sampled_from([1, 2, 3]))
        window = st.integers(1, 17)
        kinds = [window] if only_windows else [st.none(), window] if windows else [st.none()]
        layer_windows = draw(st.lists(st.one_of(*kinds), min_size=1, max_size=max_layers))
        return DecoderConfig(
            windows=tuple(layer_windows),
            heads=kv_heads * draw(st.sampled_from([1, 2, 3])),
            kv_heads=kv_heads,
            head_size=draw(st.sampled_from(head_sizes)),
            v_head_size=draw(st.sampled_from(head_sizes)),
            width=draw(st.sampled_from([8, 16, 24])),
            positions=draw(st.sampled_from(["rotary", "learned"])),
            scale=draw(st.sampled_from([None, None, None, 0.3])),
            softcap=draw(st.sampled_from([None, None, None, 2.0])),
            dtype=draw(st.sampled_from(list(dtypes))),
            block_size=draw(st.sampled_from(list(block_sizes))),
            seed=draw(st.integers(0, 2**31 - 1)),
            convs=tuple(draw(conv) for _ in layer_windows) if convs else (),
        )

    conv = st.one_of(st.none(), st.tuples(st.integers(2, 4), st.integers(1, 3)))

    return configs()


def scripts(*, max_actions: int = 30, max_rows: int = 4, min_blocks: int = 4, max_blocks: int = 24) -> Any:
    """Random scripts; the pool is often too small for them."""
    which = st.integers(0, 7)
    row = st.tuples(which, st.sampled_from([1, 1, 2, 3, 5, 9, 20, 50]), st.integers(0, 2**16))
    rows = st.lists(row, min_size=1, max_size=max_rows).map(tuple)
    tail = st.lists(st.integers(0, 10), min_size=1, max_size=6).map(tuple)
    sizes = st.integers(min_blocks, max_blocks)
    opened = st.tuples(st.just("open"), st.integers(0, 1), st.integers(0, 40), tail, st.sampled_from([0, 0, 0, 1]))
    stepped = st.tuples(st.just("step"), rows)
    reopened = st.tuples(st.just("reopen"), which, st.integers(0, 6), tail)
    closed = st.tuples(st.just("close"), which)
    rare = st.one_of(
        st.tuples(st.just("fork"), which),
        st.tuples(st.just("truncate"), which, st.integers(1, 12)),
        st.tuples(st.just("fail"), rows, st.integers(0, 3)),
        st.tuples(st.just("resize"), sizes),
    )
    rarer = st.one_of(rare, rare, rare, rare, st.tuples(st.just("clear")))
    action = st.one_of(opened, stepped, reopened, stepped, rare, stepped, closed, rarer)
    start = st.tuples(opened, stepped)
    actions = st.tuples(start, st.lists(action, min_size=8, max_size=max_actions))
    return st.builds(Script, sizes, actions.map(lambda parts: (*parts[0], *parts[1])))


@dataclass
class Running:
    """A sequence, what it should hold, and what of its prompt is still to be computed."""

    seq: CachedSequence
    tokens: list[int]
    rest: list[int]


@dataclass
class Record:
    """One row's output: ``logits`` [n, V] behind the tokens from position ``start`` on."""

    tokens: tuple[int, ...]
    start: int
    logits: np.ndarray


@dataclass
class Driver:
    """Runs a script on a backend, keeps a plain account of every sequence, and checks all of it.

    Attributes:
        make: a new backend for the model with these weights.
        weights: those of ``config``.
    """

    config: DecoderConfig
    make: Callable[[Weights], Backend]
    max_open: int = 6
    weights: Weights = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    running: list[Running] = field(default_factory=list)
    history: list[list[int]] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights = self.weights or make_weights(self.config)
        self.backend = self.make(self.weights)

    def run(self, script: Script) -> None:
        """Do every action, then compare every output with full computation."""
        self.play(script)
        if self.records:
            self.check_outputs(script)

    def play(self, script: Script) -> None:
        """Do every action; close what is open; nothing may stay live."""
        for action in script.actions:
            getattr(self, f"_{action[0]}")(*action[1:])
            self.counts[action[0]] += 1
            self.backend.core.check_valid()
            for one in self.running:
                assert one.seq.tokens == one.tokens, (action, one.seq.tokens, one.tokens)
        while self.running:
            self._close(0)
        self.backend.core.check_valid()
        stats = self.backend.core.stats()
        assert stats.live_blocks == 0 and stats.open_sequences == 0
        self.counts["hit_tokens"] += stats.hit_tokens
        self.counts["evicted_blocks"] += stats.evicted_blocks

    def report(self) -> None:
        """Tell hypothesis what the script met."""
        for name, count in self.counts.items():
            if count:
                event(name)

    # ---- actions ---------------------------------------------------------------------------------------

    def _text(self, base: int) -> list[int]:
        return np.random.default_rng(base).integers(0, self.config.vocab, MAX_LENGTH).tolist()

    def _start(self, prompt: list[int], salt: bytes) -> None:
        if len(self.running) >= self.max_open:
            self._close(0)
        prompt = prompt[:MAX_LENGTH]
        seq = self.backend.core.open(prompt, salt)
        assert 0 <= seq.num_cached < len(prompt) and seq.length == seq.num_cached
        self.counts["prefix hits"] += seq.num_cached > 0
        self.counts["partial hits"] += seq.num_cached % self.config.block_size > 0
        self.running.append(Running(seq, prompt[: seq.num_cached], prompt[seq.num_cached :]))

    def _open(self, base: int, head: int, tail: tuple[int, ...], salt: int) -> None:
        self._start(self._text(base)[:head] + [token % self.config.vocab for token in tail], SALTS[salt])

    def _reopen(self, which: int, cut: int, tail: tuple[int, ...]) -> None:
        past = self.history + [one.tokens for one in self.running]
        tokens = past[which % len(past)] if past else []
        kept = tokens[: max(0, len(tokens) - cut)]
        self._start([*kept, *(token % self.config.vocab for token in tail)], b"")

    def _rows(self, rows: tuple[tuple[int, int, int], ...]) -> list[tuple[Running, list[int]]]:
        """The distinct sequences the rows name, each with its next tokens."""
        chosen: dict[int, list[int]] = {}
        for which, count, seed in rows:
            if not self.running:
                break
            at = which % len(self.running)
            one = self.running[at]
            fresh = np.random.default_rng(seed).integers(0, self.config.vocab, count).tolist()
            tokens = one.rest[:count] or fresh[: MAX_LENGTH - len(one.tokens)]
            if tokens and at not in chosen:
                chosen[at] = tokens
        return [(self.running[at], tokens) for at, tokens in chosen.items()]

    def _step(self, rows: tuple[tuple[int, int, int], ...], fail: int | None = None) -> None:
        batch = self._rows(rows)
        if not batch:
            return
        before = self._snapshot()
        lists = [tokens for _, tokens in batch]
        try:
            logits = self.backend.step([one.seq for one, _ in batch], lists, fail)
        except CacheFull as full:
            assert full.needed > full.available, full
            assert self._snapshot(("live_blocks", "open_sequences")) == before
            self.counts["CacheFull"] += 1
            self._close(0)
            return
        except InjectedFault:
            assert fail is not None
            assert self._snapshot(("live_blocks", "open_sequences")) == before
            return
        assert fail is None, "the backend was asked to fail and did not"
        self.counts["ragged batches"] += len({len(tokens) for tokens in lists}) > 1
        self.counts["split prompts"] += any(len(tokens) < len(one.rest) for one, tokens in batch)
        for row, (one, tokens) in enumerate(batch):
            start = len(one.tokens)
            one.tokens = one.tokens + tokens
            one.rest = one.rest[len(tokens) :]
            rows_logits = np.asarray(logits[row])
            if rows_logits.ndim == 1:
                start, rows_logits = len(one.tokens) - 1, rows_logits[None]
            rows_logits = rows_logits[: len(one.tokens) - start]
            self.records.append(Record(tuple(one.tokens), start, rows_logits))

    def _fail(self, rows: tuple[tuple[int, int, int], ...], layer: int) -> None:
        self._step(rows, layer % self.config.layers)

    def _snapshot(self, names: tuple[str, ...] = ("live_blocks", "open_sequences")) -> Any:
        stats = self.backend.core.stats()
        return [getattr(stats, name) for name in names], [(one.seq.length, one.seq.tokens) for one in self.running]

    def _fork(self, which: int) -> None:
        if not self.running or len(self.running) >= self.max_open:
            return
        one = self.running[which % len(self.running)]
        self.running.append(Running(one.seq.fork(), list(one.tokens), list(one.rest)))

    def _truncate(self, which: int, drop: int) -> None:
        if not self.running:
            return
        one = self.running[which % len(self.running)]
        length = max(0, len(one.tokens) - drop)
        try:
            one.seq.truncate(length)
        except InvalidInput:
            # A window layer has dropped what would be visible again, and it is gone; or there is no state.
            assert any(window is not None for window in self.config.windows) or any(self.config.convs)
            self.counts["truncate refused"] += 1
            return
        self.counts["rolled back tokens"] += len(one.tokens) - length
        one.rest = one.tokens[length:] + one.rest if drop % 2 else []
        one.tokens = one.tokens[:length]

    def _close(self, which: int) -> None:
        if self.running:
            one = self.running.pop(which % len(self.running))
            self.history.append(one.tokens)
            one.seq.close()

    def _resize(self, num_blocks: int) -> None:
        before = self._snapshot()
        try:
            self.backend.resize(num_blocks)
        except CacheFull as full:
            assert full.needed > full.available == num_blocks
            self.counts["resize refused"] += 1
        assert self._snapshot() == before

    def _clear(self) -> None:
        before = self._snapshot()
        self.backend.core.clear()
        assert self._snapshot() == before
        assert self.backend.core.stats().cached_blocks == 0

    # ---- numbers ---------------------------------------------------------------------------------------

    def check_outputs(self, script: Script) -> None:
        """Invariant 1 over every output of the script."""
        first = self._errors()

        def permuted(number: int) -> Errors:
            again = Driver(self.config, self.make, self.max_open, _permuted(self.config, self.weights, number))
            again.play(script)
            return again._errors()

        judged, draws = over_draws(first, permuted)
        assert judged.holds, f"cached error above 1.5 x uncached + 1 ulp: {first}; over {draws} draws {judged}"
        self.counts["outputs compared"] += len(self.records)
        self.counts["bound passed in one draw"] += draws > 1

    def _errors(self) -> Errors:
        weights = make_weights(self.config)
        longest = _longest({record.tokens for record in self.records})
        mine = [np.asarray(self.backend.uncached(list(full))).astype(np.longdouble) for full in longest]
        wide = WIDER or self.config.dtype != "float64"
        exact = [run_uncached(self.config, weights, full, np.longdouble) for full in longest] if wide else mine
        magnitude = max(float(np.abs(one).max()) for one in exact)
        ulps = 1 if wide else FLOAT64_FALLBACK_ULPS
        own = max(_error(one, true) for one, true in zip(mine, exact, strict=True))
        return Errors(self._cached_error(longest, exact), own, ulps * ulp(self.config.dtype, magnitude))

    def _cached_error(self, longest: list[tuple[int, ...]], exact: list[np.ndarray]) -> float:
        errors = [
            _error(record.logits, true[record.start : len(record.tokens)])
            for full, true in zip(longest, exact, strict=True)
            for record in self.records
            if full[: len(record.tokens)] == record.tokens
        ]
        return float(np.max(errors))  # of numbers with a NaN: NaN


def _error(values: np.ndarray, exact: np.ndarray) -> float:
    assert values.shape == exact.shape, (values.shape, exact.shape)
    return float(np.abs(values.astype(np.longdouble) - exact).max())


def _permuted(config: DecoderConfig, weights: Weights, seed: int) -> dict[str, Any]:
    """The same model with its hidden units in another order: equal mathematics, other rounding."""
    order = np.random.default_rng(seed).permutation(config.width)
    rows = ("q", "k", "v", "up", "head")
    return {
        name: value[:, order][:, :, order]
        if name.endswith("conv")
        else value[order]
        if name.split(".")[-1] in rows
        else value[:, order]
        for name, value in weights.items()
    }


def _longest(runs: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The runs that are not the head of another one."""
    ordered = sorted(runs)
    return [run for run, after in zip(ordered, [*ordered[1:], ()], strict=True) if after[: len(run)] != run]


def ulp(dtype: str, magnitude: float) -> float:
    """Distance between neighbouring numbers of the dtype at ``magnitude``."""
    return float(2.0 ** np.floor(np.log2(max(magnitude, 1e-30)))) * EPSILON[dtype]
