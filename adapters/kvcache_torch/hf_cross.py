"""Encoder-decoder models: what the decoder attends to besides its own tokens, computed once per encoder output."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from kvcache_torch.hf_step import StepCache

__all__ = ["CrossStates", "Source", "digests_of"]

_SOURCES_AT_MOST = 64
"""Encoder outputs whose K and V are kept, the least recently used go first."""


@dataclass(frozen=True)
class Source:
    """What the rows of one call attend to.

    Attributes:
        hidden: [B, S, ...], the encoder's output.
        mask: [B, S] or None.
        digests: one per row, of its part of both: the key of its K and V, and a part of the key of its tokens.
    """

    hidden: Tensor
    mask: Tensor | None
    digests: tuple[bytes, ...]

    def rows(self, at: Sequence[int]) -> Source:
        """The source of some rows."""
        if list(at) == list(range(len(self.digests))):
            return self
        index = torch.as_tensor(list(at), device=self.hidden.device)
        mask = None if self.mask is None else self.mask[index]
        return Source(self.hidden[index], mask, tuple(self.digests[row] for row in at))


def digests_of(hidden: Tensor, mask: Tensor | None) -> tuple[bytes, ...]:
    """A digest of each row's content."""
    found = []
    masks = [None] * len(hidden) if mask is None else list(mask.detach().cpu())
    for row, there in zip(hidden.detach().cpu().contiguous(), masks, strict=True):
        digest = hashlib.blake2b(repr((tuple(row.shape), row.dtype)).encode(), digest_size=16)
        digest.update(row.view(torch.uint8).numpy().tobytes())
        if there is not None and not bool((there != 0).all()):
            digest.update(b"mask" + (there != 0).numpy().tobytes())
        found.append(digest.digest())
    return tuple(found)


class CrossStates:
    """K and V of encoder outputs, by namespace and digest."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[bytes, bytes], list[tuple[Tensor, Tensor]]] = OrderedDict()
        self._batch: tuple[Any, EncoderDecoderCache] | None = None
        self._lock = threading.Lock()
        self.computed = 0
        """Rows whose K and V were computed."""

    def view(self, own: StepCache, source: Source, namespace: bytes) -> EncoderDecoderCache:
        """What the decoder gets as its cache: its own step, and K and V of the source where they are kept."""
        key = (namespace, source.digests)
        with self._lock:
            if self._batch is not None and self._batch[0] == key:
                return EncoderDecoderCache(own, self._batch[1].cross_attention_cache)
            rows = [self._kept.get((namespace, digest)) for digest in source.digests]
            for digest, row in zip(source.digests, rows, strict=True):
                if row is not None:
                    self._kept.move_to_end((namespace, digest))
        cross = DynamicCache()
        if all(row is not None for row in rows):
            for layer, states in enumerate(zip(*rows, strict=True)):  # type: ignore[arg-type]
                cross.update(_together([k for k, _ in states]), _together([v for _, v in states]), layer)
        return EncoderDecoderCache(own, cross)

    def keep(self, view: EncoderDecoderCache, source: Source, namespace: bytes) -> None:
        """After a step: keep what the decoder has computed."""
        key = (namespace, source.digests)
        with self._lock:
            if self._batch is None or self._batch[0] != key:
                self._batch = (key, view)
                self._keep_rows(view, source, namespace)

    def _keep_rows(self, view: EncoderDecoderCache, source: Source, namespace: bytes) -> None:
        for row, digest in enumerate(source.digests):
            if (namespace, digest) in self._kept:
                continue
            self.computed += 1
            layers = view.cross_attention_cache.layers
            self._kept[namespace, digest] = [(layer.keys[row].clone(), layer.values[row].clone()) for layer in layers]
            while len(self._kept) > _SOURCES_AT_MOST:
                self._kept.popitem(last=False)


def _together(rows: list[Tensor]) -> Tensor:
    """[B, H, S, D]; a view for a single row."""
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)
