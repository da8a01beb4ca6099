"""One K/V cache for Keras and PyTorch models: the framework-free core.

Decides what is where: layout, positions, prefix sharing and LRU block eviction, in numpy alone. The adapters
``kvcache_torch`` and ``kvcache_keras`` keep the bytes in native tensors.
"""

from kvcache_core.admission import AfterSightings, Sampled
from kvcache_core.cache import BlockCache
from kvcache_core.errors import (
    BlockError,
    BlockRefused,
    CacheFull,
    InvalidInput,
    InvalidType,
    KVCacheError,
    KVCacheWarning,
    OutOfMemory,
    SequenceClosed,
    StaleSequence,
    StepError,
    TierError,
    UsageError,
)
from kvcache_core.layout import ArraySpec, BlockLayout, LayerSpec
from kvcache_core.plan import GroupPlan, StepPlan
from kvcache_core.sequence import Sequence
from kvcache_core.stats import CacheStats

__version__ = "0.1.0"

__all__ = [
    "AfterSightings",
    "ArraySpec",
    "BlockCache",
    "BlockError",
    "BlockLayout",
    "BlockRefused",
    "CacheFull",
    "CacheStats",
    "GroupPlan",
    "InvalidInput",
    "InvalidType",
    "KVCacheError",
    "KVCacheWarning",
    "LayerSpec",
    "OutOfMemory",
    "Sampled",
    "Sequence",
    "SequenceClosed",
    "StaleSequence",
    "StepError",
    "StepPlan",
    "TierError",
    "UsageError",
]
