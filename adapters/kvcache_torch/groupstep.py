"""What the layers of one group have in common in a step: where they write and what they read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kvcache_core.extents import packed_extents, past_extents
from kvcache_core.plan import StepPlan
from kvcache_torch.native import DecodeReads, PrefillReads, active
from kvcache_torch.reading import Read, plan_reads

__all__ = ["GroupStep"]


class GroupStep:
    """What the layers of one group have in common in a step; made once, before the first layer."""

    def __init__(self, plan: StepPlan, number: int, device: torch.device) -> None:
        group = self.group = plan.groups[number]
        self.decodes = plan.width == 1
        # A window hides part of the past from a prompt's later tokens: then a mask is needed.
        self.sees_all = self.decodes or group.window is None or int(group.ends.max()) <= group.window
        self._device = device

    @cached_property
    def slots(self) -> Tensor:
        """Where the step writes: int64 [B * T]."""
        return torch.from_numpy(self.group.slots.reshape(-1)).to(self._device)

    @cached_property
    def run(self) -> slice | None:
        """The slots of a single row as one slice, if they are adjacent and not padded."""
        slots = self.group.slots
        if len(slots) > 1:
            return None
        first, last = int(slots[0, 0]), int(slots[0, -1])
        # The ends alone do not tell: a block from elsewhere may stand in between.
        if last - first != slots.shape[1] - 1 or (np.diff(slots[0]) != 1).any():
            return None
        return slice(first, last + 1)

    @cached_property
    def single(self) -> tuple[int, int] | None:
        """First slot and end of all that a decode step of one row reads, if it lies in one piece."""
        extents = self.group.extents
        if not self.decodes or len(extents) > 1 or len(extents[0]) > 1:
            return None
        slot, size, _ = extents[0][0]
        return slot, slot + size

    @cached_property
    def reads(self) -> list[Read]:
        """The attention calls over what is in the pool: for a prompt without its new tokens."""
        return plan_reads(self.group.extents if self.decodes else past_extents(self.group), self._device)

    @cached_property
    def native(self) -> DecodeReads | PrefillReads | None:
        """The same for the kernels in C, where they are in use."""
        kernels, group = active(), self.group
        if kernels is None:
            return None
        if self.decodes:
            return DecodeReads(kernels, group.extents, group.slots[:, 0].tolist())
        return PrefillReads(kernels, group.extents, group.slots, group.starts, group.ends - group.starts, group.window)

    @cached_property
    def converted(self) -> _Packed:
        """What is read where K and V are stored in another dtype: for a prompt without its new tokens."""
        return _Packed(self.group.extents if self.decodes else past_extents(self.group), self._device)

    @cached_property
    def converted_all(self) -> _Packed:
        """The same, always with the new tokens."""
        return self.converted if self.decodes else _Packed(self.group.extents, self._device)


class _Packed:
    """Slots that a step reads, to be converted into one tensor, and the attention calls over that."""

    def __init__(self, extents: Sequence[Sequence[tuple[int, int, int]]], device: torch.device) -> None:
        slots, self.extents = packed_extents(extents)
        adjacent = len(slots) > 0 and int(slots[-1] - slots[0]) == len(slots) - 1
        self.slots: Tensor | slice = torch.from_numpy(slots).to(device)
        if adjacent:
            self.slots = slice(int(slots[0]), int(slots[-1]) + 1)
        self.reads = plan_reads(self.extents, device)
