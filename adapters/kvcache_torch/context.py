"""Which cache and which step this thread is in."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvcache_torch.recorder import Recorder
    from kvcache_torch.step import Step

__all__ = ["autocast_mode", "local"]


class _Local(threading.local):
    """One thread's state. A compiled model reads only ``stepping``, ``last_only`` and the two tensors, so that
    a new step is no reason to compile again.
    """

    cache: Any = None
    """The cache whose ``with`` block the thread is in."""
    step: Step | Recorder | None = None
    """The step or recording under way."""
    stepping: bool = False
    """Whether ``step`` is set."""
    last_only: bool = False
    """Whether only each row's last output is wanted."""
    positions: Tensor | None = None
    """int64 [B, T]."""
    extras: Any = None
    """What the attached model is called with besides token ids."""
    last_index: Tensor | None = None
    """int64 [B], index of each row's last new token."""

    def begin(self, step: Any, last_only: bool = False) -> None:
        """Route ``attention`` and ``positions`` of this thread to ``step``."""
        self.step, self.stepping, self.last_only = step, True, last_only
        self.positions, self.last_index = step.positions, step.last_index

    def end(self) -> None:
        """Back to plain attention, positions from 0."""
        self.step, self.stepping, self.last_only = None, False, False
        self.positions = self.last_index = None


local = _Local()


def autocast_mode() -> bytes:
    """What this thread's autocast makes of a model's computations; empty outside."""
    dtypes = [(kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return f"autocast {dtypes}".encode() if dtypes else b""
