"""The reference driver's backends with tiers below them, in both frameworks."""

from __future__ import annotations

from typing import Any

import kvcache_keras
import kvcache_torch
from tests.adapters.keras import models as keras_models
from tests.adapters.torch import models as torch_models
from tests.reference_decoder import DecoderConfig, Weights

__all__ = ["BACKENDS", "over", "plain", "tiered"]


class OpensThroughTiers:
    """A cache's bookkeeping as the driver sees it: opening a sequence looks into the tiers too."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def open(self, tokens: list[int], salt: bytes) -> Any:
        self._cache.salt = salt
        return self._cache._open(tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache.core, name)


class TieredTorch(torch_models.TorchBackend):
    def serve_with(self, cache: Any) -> None:
        """Put another cache in the place of the backend's own."""
        self.cache.detach()
        self.cache = cache
        self.cache.attach(self.model, outputs="last")
        self.core = OpensThroughTiers(self.cache)


BACKENDS = {"torch": TieredTorch, "keras": keras_models.KerasBackend}
CACHES = {"torch": kvcache_torch.KVCache, "keras": kvcache_keras.KVCache}


def plain(framework: str, config: DecoderConfig, weights: Weights, num_blocks: int) -> Any:
    """A backend of ``framework`` without tiers."""
    return BACKENDS[framework](config, weights, num_blocks)


def over(framework: str, config: DecoderConfig, weights: Weights, cache: Any) -> Any:
    """A backend of ``framework`` over a cache that has tiers."""
    backend = BACKENDS[framework](config, weights, 0, cache=cache)
    backend.core = OpensThroughTiers(cache)
    return backend


def tiered(framework: str, config: DecoderConfig, weights: Weights, num_blocks: int, tiers: Any, **options: Any) -> Any:
    """A backend of ``framework`` whose evicted blocks go to ``tiers``."""
    options = {"promote": "always", **options}
    cache = CACHES[framework](num_blocks, block_size=config.block_size, tiers=tiers, **options)
    return over(framework, config, weights, cache)
