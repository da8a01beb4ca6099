"""Generating tokens with a PyTorch model, and scoring them, with or without a cache."""

from __future__ import annotations

from torch import nn

from kvcache_core.generating import Generating
from kvcache_core.recompute import RecomputeDecoder
from kvcache_torch.attached import plain_forward
from kvcache_torch.cache import KVCache
from kvcache_torch.context import local
from kvcache_torch.driver import device_of
from kvcache_torch.recompute import recompute, recompute_scores

__all__ = ["generate", "score", "stream"]


class _Generating(Generating):
    """For ``torch.nn.Module``."""

    def _active_cache(self) -> KVCache | None:
        return local.cache

    def _without_cache(self, model: nn.Module) -> RecomputeDecoder:
        forward, device = plain_forward(model), device_of(model)
        return RecomputeDecoder(
            lambda rows: recompute(forward, device, rows),
            lambda rows, targets: recompute_scores(forward, device, rows, targets),
        )


_functions = _Generating()
generate, stream, score = _functions.generate, _functions.stream, _functions.score
