"""Replaying a trace of requests, through the block cache and through a list in order of use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kvcache_core import BlockCache

__all__ = ["NaiveLru", "Replay", "Request", "prompt_tokens"]

_OWN = 2**30
"""Token ids from here on are a request's own: no other request has them."""


@dataclass(frozen=True)
class Request:
    """One request: ids of its prompt's blocks (equal ids: equal content up to there), and how much it generates."""

    ids: tuple[int, ...]
    new_tokens: int


class NaiveLru:
    """The rule and nothing else: a dictionary of block ids, least recently used first.

    A request finds the leading ids that are there, gives up the least recently used others for what it lacks, and
    then counts as the last use of all of its blocks, its tail before its head.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.cached: OrderedDict[object, None] = OrderedDict()
        self.hit_blocks = self.evicted = 0

    def serve(self, number: int, request: Request, block_size: int) -> None:
        """Serve request ``number``."""
        blocks: list[object] = list(request.ids)
        hits = 0
        while hits < len(blocks) and blocks[hits] in self.cached:
            hits += 1
        self.hit_blocks += hits
        blocks += [(number, at) for at in range(-(-request.new_tokens // block_size))]
        for block in blocks[:hits]:
            del self.cached[block]
        if len(blocks) <= self.num_blocks:
            surplus = len(self.cached) + len(blocks) - self.num_blocks
            for _ in range(surplus):
                self.cached.popitem(last=False)
                self.evicted += 1
        else:
            blocks = blocks[:hits]
        for block in reversed(blocks):
            self.cached[block] = None


class Replay:
    """The same through a :class:`BlockCache`: open, one step for the prompt and one for the answer, close."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.core = BlockCache(num_blocks, block_size)

    def serve(self, number: int, request: Request, block_size: int) -> None:
        """Serve request ``number``."""
        prompt = prompt_tokens(request.ids, block_size)
        # The first token of the answer is the request's own, so the whole prompt can be found next time.
        own = np.full(request.new_tokens, _OWN + number, np.int32)
        seq = self.core.open(np.append(prompt, own[:1]))
        rest = np.append(prompt[seq.num_cached :], own)
        if -(-(seq.length + len(rest)) // block_size) <= self.core.num_blocks:
            self.core.commit(self.core.plan([seq], [rest]))
        self.core.close(seq)

    @property
    def hit_blocks(self) -> int:
        """Blocks found so far."""
        return self.core.stats().hit_tokens // self.core.block_size


def prompt_tokens(ids: Iterable[int], block_size: int) -> np.ndarray:
    """Each id's own ``block_size`` token ids, one after the other."""
    return (np.array(list(ids), np.int32)[:, None] * block_size + np.arange(block_size, dtype=np.int32)).ravel()
