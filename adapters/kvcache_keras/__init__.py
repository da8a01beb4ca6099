"""K/V cache for Keras models on TensorFlow: ``with cache: model(x)`` gives the same answer, faster."""

from kvcache_keras import _backend as _backend
from kvcache_keras.attention import attention, causal_conv1d, positions, select_outputs
from kvcache_keras.cache import KVCache
from kvcache_keras.generate import generate, score, stream
from kvcache_keras.layers import CachedAttention, PositionIds
from kvcache_keras.parameters import ParameterCache, empty_weights
from kvcache_keras.store import TensorStore

__all__ = [
    "CachedAttention",
    "KVCache",
    "ParameterCache",
    "PositionIds",
    "TensorStore",
    "attention",
    "causal_conv1d",
    "empty_weights",
    "generate",
    "positions",
    "score",
    "select_outputs",
    "stream",
]
