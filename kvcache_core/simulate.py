"""What a pool and tiers of given sizes would save on a recorded day: bookkeeping alone, no model and no bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvcache_core.cache import BlockCache
from kvcache_core.errors import CacheFull, InvalidInput
from kvcache_core.sequence import Sequence as CachedSequence
from kvcache_core.tiers import Item, RamTier
from kvcache_core.types import Evicted

__all__ = ["Simulation", "read_trace", "simulate"]

_KEY_BYTES = 16


@dataclass(frozen=True, slots=True)
class Simulation:
    """What a replay has counted, in blocks of the trace.

    Attributes:
        requests: prompts replayed.
        blocks: blocks of all prompts.
        from_pool: blocks found in the pool.
        from_tiers: blocks found in each tier.
        demoted: blocks that were evicted into the tiers.
    """

    requests: int
    blocks: int
    from_pool: int
    from_tiers: tuple[int, ...]
    demoted: int

    @property
    def saved(self) -> float:
        """Share of the blocks that need no computing."""
        return (self.from_pool + sum(self.from_tiers)) / self.blocks if self.blocks else 0.0


def read_trace(path: str | Path) -> list[list[int]]:
    """The prompts of a trace in Mooncake's form (FAST 2025): JSON lines whose ``hash_ids`` name equal prompt blocks.

    Raises:
        InvalidInput: a line is no JSON object with ``hash_ids``.
    """
    prompts = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            prompts.append([int(one) for one in json.loads(line)["hash_ids"]])
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInput(f"{path}, line {number}: no JSON object with hash_ids ({error})") from None
    return prompts


def simulate(prompts: Iterable[Sequence[int]], pool_blocks: int, tier_blocks: Sequence[int] = ()) -> Simulation:
    """Replay prompts one after another.

    Args:
        prompts: each the ids of its blocks, equal ids for equal content from the start of the prompt.
        pool_blocks: capacity of the pool.
        tier_blocks: capacity of each tier, from the top.

    Example:
        >>> simulate([[1, 2, 3], [4, 5, 6], [1, 2, 3]], pool_blocks=3).saved
        0.0
        >>> simulate([[1, 2, 3], [4, 5, 6], [1, 2, 3]], pool_blocks=3, tier_blocks=[10]).from_tiers
        (2,)
    """
    core = BlockCache(pool_blocks, block_size=1)
    tiers = [RamTier(count * (_KEY_BYTES + 1)) for count in tier_blocks]
    requests = blocks = from_pool = demoted = 0
    from_tiers = [0] * len(tiers)

    def demote(evicted: list[Evicted]) -> None:
        nonlocal demoted
        items: list[Item] = [(one.key, b"\0") for one in evicted if one.key is not None]
        demoted += len(items)
        for tier in tiers:
            items = tier.put_many(items)

    core.on_evict = demote if tiers else None
    for prompt in prompts:
        requests += 1
        blocks += len(prompt)
        # The last block of a prompt is never taken from a cache whole: its last token is computed.
        seq = core.open(list(prompt))
        from_pool += seq.num_cached
        try:
            for number, count in enumerate(_promote(core, seq, tiers)):
                from_tiers[number] += count
            core.commit(core.plan([seq], [list(prompt)[seq.num_cached :]]))
        except CacheFull:
            pass  # a prompt larger than the pool is computed and not kept
        finally:
            core.close(seq)
    return Simulation(requests, blocks, from_pool, tuple(from_tiers), demoted)


def _promote(core: BlockCache, seq: CachedSequence, tiers: Sequence[RamTier]) -> list[int]:
    """Take what follows the match from the tiers; returns the blocks from each."""
    counts = [0] * len(tiers)
    if not tiers:
        return counts
    start = seq.length
    found = []
    for key in seq.prompt_keys[start : len(seq.prompt) - 1]:
        number = next((at for at, tier in enumerate(tiers) if tier.contains(key)), None)
        if number is None:
            break
        tiers[number].get_many([key])
        found.append(number)
    if found:
        core.commit(core.plan([seq], [seq.prompt[start : start + len(found)]]))
        core.count_as_cached(seq)
        for number in found:
            counts[number] += 1
    return counts
