"""A `FrontendCache` over the numpy store and the reference decoder: generation without any framework."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.attention import cached_attention
from kvcache_core.binding import ModelSpec
from kvcache_core.decoder import CacheDecoder, RecomputeDecoder
from kvcache_core.frontend import FrontendCache
from kvcache_core.layout import BlockLayout
from kvcache_core.plan import StepPlan
from kvcache_core.sampling import log_softmax
from kvcache_core.store import NumpyStore
from tests.reference_decoder import DecoderConfig, InjectedFault, NumpyOps, forward, make_weights, run_uncached


class NumpyModel:
    """The reference decoder with random weights."""

    def __init__(self, config: DecoderConfig) -> None:
        self.config = config
        self.weights = make_weights(config)

    def logits(self, tokens: Sequence[int]) -> NDArray[Any]:
        """[T, V] without a cache."""
        return run_uncached(self.config, self.weights, tokens, self.config.numpy_dtype)

    def greedy(self, prompt: Sequence[int], count: int, eos_ids: Sequence[int] = ()) -> list[int]:
        """Plain greedy decoding."""
        new: list[int] = []
        while len(new) < count and not (new and new[-1] in eos_ids):
            new.append(int(self.logits([*prompt, *new])[-1].argmax()))
        return new


class NumpyCache(FrontendCache):
    """Counts its steps.

    Attributes:
        steps: (rows, T) of each step so far.
        fail_at: number of the step that raises, or None.
    """

    def __init__(self, config: DecoderConfig, num_blocks: int, **options: Any) -> None:
        super().__init__(num_blocks, block_size=config.block_size, **options)
        self.steps: list[tuple[int, int]] = []
        self.fail_at: int | None = None
        self.attach(NumpyModel(config), outputs="last", identity="numpy")
        for array in self.store.arrays.values():
            array.fill(np.nan)  # whoever reads a slot that no token was written to gets NaN

    def _dtype_name(self, dtype: Any) -> str:
        return str(dtype)

    def _describe(self, model: NumpyModel) -> ModelSpec:
        config = model.config
        layers = config.layout().layers
        return ModelSpec(layers, config.dtype, (config.vocab,), config.dtype, config.vocab)

    def _new_store(self, layout: BlockLayout, num_blocks: int) -> NumpyStore:
        return NumpyStore(layout, num_blocks)

    def _fingerprint(self, model: NumpyModel) -> bytes:
        return b"numpy"

    def _install(self, model: NumpyModel) -> None: ...

    def _uninstall(self, model: NumpyModel) -> None: ...

    def _active(self) -> Any:
        return None

    def _set_active(self, cache: Any) -> None: ...

    def _run_step(self, plan: StepPlan) -> NDArray[Any]:
        logits = self._run_all(plan)
        return logits[np.arange(len(logits)), plan.counts - 1]

    def _run_all(self, plan: StepPlan) -> NDArray[Any]:
        config = self.model.config

        def attention(layer: int, q: Any, k: Any, v: Any) -> Any:
            heads_first = [array.swapaxes(1, 2) for array in (q, k, v)]
            result = cached_attention(*heads_first, layer, self.store, plan, scale=config.scale, softcap=config.softcap)
            return result.swapaxes(1, 2)

        self.steps.append(plan.tokens.shape)
        self.store.apply_copies(plan)
        logits = forward(
            NumpyOps(config.numpy_dtype), config, self.model.weights, plan.tokens, plan.positions, attention
        )
        if len(self.steps) - 1 == self.fail_at:
            raise InjectedFault(0)
        return logits

    def check_at_rest(self) -> None:
        """Nothing is open, and the bookkeeping is consistent."""
        self.core.check_valid()
        stats = self.stats()
        assert (stats.live_blocks, stats.open_sequences) == (0, 0)


def decoders(config: DecoderConfig, num_blocks: int) -> tuple[CacheDecoder, RecomputeDecoder]:
    """The same model over a cache and without one."""
    cache = NumpyCache(config, num_blocks)
    model = cache.model

    def last(rows: list[list[int]]) -> NDArray[Any]:
        return np.stack([model.logits(row)[-1] for row in rows])

    def scores(rows: list[list[int]], targets: Sequence[Sequence[int]]) -> list[Any]:
        found = [model.logits(row)[len(row) - len(behind) :] for row, behind in zip(rows, targets, strict=True)]
        return [
            (log_softmax(logits)[np.arange(len(behind)), behind], logits.argmax(-1))
            for logits, behind in zip(found, targets, strict=True)
        ]

    decoder = CacheDecoder(cache)
    decoder.cache = cache  # for tests that look at it
    return decoder, RecomputeDecoder(last, scores)
