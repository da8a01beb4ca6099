"""Generating tokens with a Keras model, and scoring them, with or without a cache."""

from __future__ import annotations

from typing import Any

from kvcache_core.generating import Generating
from kvcache_core.recompute import RecomputeDecoder
from kvcache_keras.cache import KVCache
from kvcache_keras.context import local
from kvcache_keras.recompute import recompute_of, recompute_scores_of

__all__ = ["generate", "score", "stream"]


class _Generating(Generating):
    """For ``keras.Model``."""

    def _active_cache(self) -> KVCache | None:
        return local.cache

    def _without_cache(self, model: Any) -> RecomputeDecoder:
        return RecomputeDecoder(recompute_of(model), recompute_scores_of(model))


_functions = _Generating()
generate, stream, score = _functions.generate, _functions.stream, _functions.score
