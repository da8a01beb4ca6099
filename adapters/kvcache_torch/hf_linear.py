"""Linear layers of other people's models at the speed of memory, inside calls that a cache serves."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from kvcache_torch.linear import linear

__all__ = ["FastLinear"]


class _Local(threading.local):
    """Whether this thread is in a call that a cache serves."""

    fast: bool = False


_local = _Local()


class FastLinear:
    """Sends a model's plain linear layers through :func:`kvcache_torch.linear` for the time of a call.

    A layer's ``forward`` is replaced in its instance's dictionary while a thread is inside and taken back behind it, so
    that nothing of it stays in the model. A thread that runs the model outside meanwhile gets the layer's own. Layers
    of a derived class, and layers whose ``forward`` somebody else has replaced, are left alone.

    Args:
        modules: the modules among which the linear layers are.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        layers = {id(module): module for module in modules if type(module) is nn.Linear}.values()
        self._layers = [(vars(layer), partial(_forward, layer)) for layer in layers]

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """For the time of a call in this thread."""
        for own, forward in self._layers:
            own.setdefault("forward", forward)
        before, _local.fast = _local.fast, True
        try:
            yield
        finally:
            _local.fast = before
            for own, forward in self._layers:
                if own.get("forward") is forward:
                    own.pop("forward", None)


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    """``nn.Linear.forward``; no tensors that know better themselves, like quantised weights, take the fast way."""
    weights = layer._parameters
    weight = weights.get("weight")
    if torch.compiler.is_compiling() or not _local.fast or type(x) is not Tensor or not x.numel():
        return nn.Linear.forward(layer, x)
    if type(weight) is not nn.Parameter or "bias" not in weights:
        return nn.Linear.forward(layer, x)
    return linear(x, weight, weights["bias"])
