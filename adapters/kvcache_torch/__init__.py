"""K/V cache for PyTorch models: ``with cache: model(x)`` gives the same answer, faster."""

from kvcache_torch.attention import attention, causal_conv1d, positions, select_outputs
from kvcache_torch.cache import KVCache
from kvcache_torch.generate import generate, score, stream
from kvcache_torch.linear import linear
from kvcache_torch.parameters import ParameterCache
from kvcache_torch.store import TensorStore

__all__ = [
    "KVCache",
    "ParameterCache",
    "TensorStore",
    "attention",
    "causal_conv1d",
    "generate",
    "linear",
    "positions",
    "score",
    "select_outputs",
    "stream",
]
