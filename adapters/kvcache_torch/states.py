"""Layers whose past is one state of fixed size: a step's inputs behind their context."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvcache_core.errors import InvalidInput, InvalidType
from kvcache_core.layout import LayerSpec
from kvcache_core.plan import GroupPlan

__all__ = ["StateStep", "check_context", "note_context"]


class StateStep:
    """What the state layers have in common in a step; made once, before the first layer."""

    def __init__(self, group: GroupPlan, device: torch.device) -> None:
        self._reads = torch.from_numpy(group.state_reads).to(device, torch.int64)
        starts = torch.from_numpy(group.state_reads == 0).to(device)
        self._starts = starts[:, None, None] if bool((group.state_reads == 0).any()) else None
        rows, ends, blocks = torch.from_numpy(group.state_writes).to(device, torch.int64).unbind(1)
        self._rows, self._ends, self._blocks = rows[:, None], ends[:, None], blocks

    def with_context(self, x: Tensor, states: Tensor) -> Tensor:
        """[B, C, T] behind the rows' states: [B, C, R + T]; the new states go into ``states`` [R, blocks, C]."""
        past = states.index_select(1, self._reads).permute(1, 2, 0).to(x.dtype)
        if self._starts is not None:
            past = past.masked_fill(self._starts, 0)
        joined = torch.cat((past, x), dim=2)
        index = self._ends + torch.arange(states.shape[0], device=x.device)
        new = joined[self._rows, :, index]  # [N, R, C]
        states.index_copy_(1, self._blocks, new.transpose(0, 1).to(states.dtype))
        return joined


def check_context(x: Tensor, rows: int, layer: int, spec: LayerSpec | None, step: tuple[int, int]) -> None:
    """Raise unless inputs [B, C, T] and their context are as when the model was first run.

    Args:
        x: the inputs.
        rows: R, how many earlier inputs the layer sees.
        layer: its number.
        spec: what the layout says of the layer; None if it has no such layer.
        step: (B, T).
    """
    if spec is None or spec.kind != "state":
        raise InvalidInput(
            f"layer {layer} was no convolution when the model was first run; give each layer its own layer="
        )
    expected = (step[0], spec.arrays[0].size, step[1])
    if tuple(x.shape) != expected or rows != spec.arrays[0].heads:
        raise InvalidInput(
            f"the convolution of layer {layer} must see {spec.arrays[0].heads} inputs before [B, C, T] = {expected} in "
            f"this step, got {rows} before {tuple(x.shape)}"
        )


def note_context(x: Tensor, rows: int, layer: int, name_of: Callable[[torch.dtype], str]) -> LayerSpec:
    """What a convolution over inputs [B, C, T] stores, in the model's own dtype whatever K and V are stored in."""
    if x.dim() != 3:
        raise InvalidInput(f"x of layer {layer} must be [B, C, T], got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise InvalidType(f"x of layer {layer} must be of a floating-point dtype, got {x.dtype}")
    return LayerSpec.state(rows, x.shape[1], name_of(x.dtype))
