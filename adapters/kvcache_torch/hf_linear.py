"""Linear layers of other people's models at the speed of memory, inside calls that a cache serves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kvcache_torch.linear import linear

__all__ = ["fast_linear"]

_FEW = 32
"""Rows up to which reading the weights is what a linear layer takes its time for."""


class _FastLinear(TorchFunctionMode):
    """Sends ``F.linear`` over few rows to :func:`kvcache_torch.linear`; nothing in the model changes."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and _is_plain(*args):
            return linear(*args)
        return func(*args, **(kwargs or {}))


def fast_linear(tokens: int) -> AbstractContextManager[Any]:
    """For the time of a call over so many new tokens: its linear layers go through :func:`kvcache_torch.linear`."""
    return _FastLinear() if tokens <= _FEW and not torch.is_autocast_enabled("cpu") else contextlib.nullcontext()


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Few rows, and no tensors that know better themselves, like quantised weights."""
    return type(x) is Tensor and type(weight) in (Tensor, nn.Parameter) and 0 < x.numel() <= _FEW * x.shape[-1]
