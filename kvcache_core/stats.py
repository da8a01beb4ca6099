"""Counters of a cache, as one immutable value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

__all__ = ["CacheStats"]


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What a cache holds and has done. Read as attributes or by name: ``stats.hit_tokens``, ``stats["hit_tokens"]``.

    Attributes:
        hit_tokens: prompt tokens found when sequences were opened.
        miss_tokens: prompt tokens that had to be computed.
        evicted_blocks: cached blocks whose content was given up for room.
        live_blocks: blocks held by open sequences (all layer groups together).
        cached_blocks: blocks nobody holds whose content can still be found.
        free_blocks: blocks without content.
        num_blocks: capacity in blocks, the sum of the three above.
        block_size: tokens per block.
        open_sequences: sequences that are open now.
        bytes: bytes the store has allocated, and those of activations; 0 for bookkeeping alone.
        bytes_per_block: bytes of one block, all layers; 0 if no layout is known yet.
        bypassed_calls: model calls inside ``with cache:`` that were computed as outside.
        bypassed_tokens: tokens of those calls.
        saved_output_tokens: tokens whose stored output was returned instead of computed.
        demoted_blocks: evicted blocks that went to a lower tier.
        dropped_blocks: evicted blocks that could not, because too many were waiting to be written.
        prefetched_blocks: of the promoted ones, those that were read while other prompts were computed.
        promoted_blocks: blocks that came back from a lower tier.
        promoted_tokens: their tokens; part of ``hit_tokens``.
        hit_entries: samples whose activation was found, or computed for an equal sample of the same call.
        miss_entries: samples that had to be computed.
        evicted_entries: activations given up for room.
        refused_entries: activations that were computed and not kept, because of ``admit=`` or for lack of room.
        entries: activations that can be found now.
        entry_bytes: their bytes; part of ``bytes``.
        memory_moves: how often memory moved between K/V blocks and activations.
        failed_memory_moves: how often it could not, because there was no memory for the new arrays.
        seconds_saved: what the hits would have taken to compute, estimated from the misses.
        seconds_spent: what hashing, looking up and copying activations took.
        bypass_reasons: {why: calls} of ``bypassed_calls``.
        advice: which size pays for activations, where it was asked for.
    """

    hit_tokens: int = 0
    miss_tokens: int = 0
    evicted_blocks: int = 0
    live_blocks: int = 0
    cached_blocks: int = 0
    free_blocks: int = 0
    num_blocks: int = 0
    block_size: int = 0
    open_sequences: int = 0
    bytes: int = 0
    bytes_per_block: int = 0
    bypassed_calls: int = 0
    bypassed_tokens: int = 0
    saved_output_tokens: int = 0
    demoted_blocks: int = 0
    dropped_blocks: int = 0
    prefetched_blocks: int = 0
    promoted_blocks: int = 0
    promoted_tokens: int = 0
    hit_entries: int = 0
    miss_entries: int = 0
    evicted_entries: int = 0
    refused_entries: int = 0
    entries: int = 0
    entry_bytes: int = 0
    memory_moves: int = 0
    failed_memory_moves: int = 0
    seconds_saved: float = 0.0
    seconds_spent: float = 0.0
    bypass_reasons: Mapping[str, int] = field(default_factory=dict)
    advice: str = ""

    @property
    def hit_ratio(self) -> float:
        """Hit tokens over all prompt tokens; 0.0 before the first prompt."""
        total = self.hit_tokens + self.miss_tokens
        return self.hit_tokens / total if total else 0.0

    @property
    def entry_hit_ratio(self) -> float:
        """Hit samples over all samples; 0.0 before the first."""
        total = self.hit_entries + self.miss_entries
        return self.hit_entries / total if total else 0.0

    def __str__(self) -> str:
        """One line per counter that is not zero.

        Example:
            >>> print(CacheStats(hit_tokens=3, seconds_saved=0.5, advice="4 entries; that is the size that pays"))
            hit_tokens: 3
            seconds_saved: 0.500
            advice: 4 entries; that is the size that pays
        """
        said = ((name, getattr(self, name)) for name in self)
        return "\n".join(
            f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}" for name, value in said if value
        )

    def __getitem__(self, name: str) -> Any:
        """A counter by its name, as in a dictionary."""
        if name not in asdict(self):
            raise KeyError(f"no counter {name!r}; there are {', '.join(self)}")
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        """The counters' names."""
        return (each.name for each in fields(self))

    def keys(self) -> list[str]:
        """The counters' names, so that ``dict(stats)`` works."""
        return list(self)
