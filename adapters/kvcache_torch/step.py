"""One step on tensors: write the new K and V, attend over cached and new tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvcache_core.errors import InvalidInput, InvalidType
from kvcache_core.plan import StepPlan
from kvcache_torch.groupstep import GroupStep
from kvcache_torch.kernels import attend_all, attend_masked, attend_with_lse
from kvcache_torch.paged import PagedReads, choose
from kvcache_torch.reading import attend_reads
from kvcache_torch.recorder import check_query
from kvcache_torch.states import StateStep, check_context
from kvcache_torch.store import Call, TensorStore

__all__ = ["Step"]


class Step:
    """A plan on its way through the model's layers.

    Args:
        plan: the step.
        store: where K and V lie.
        dtype: the model's own K/V dtype.
    """

    def __init__(self, plan: StepPlan, store: TensorStore, dtype: torch.dtype) -> None:
        self.plan = plan
        self.store = store
        self.dtype = dtype
        self.converts = store.kv_dtype != dtype
        """Whether K and V are stored in another dtype than the model's."""
        device = store.device
        self.positions = torch.from_numpy(plan.positions).to(device)
        self.last_index = None if plan.width == 1 else torch.from_numpy(plan.counts - 1).to(device)
        """Each row's last new token, int64 [B]; None where there is one only."""
        self._groups = {
            number: GroupStep(plan, number, device) for number, group in enumerate(plan.groups) if group.kind != "state"
        }
        self._states = next((StateStep(group, device) for group in plan.groups if group.kind == "state"), None)
        self._used: set[int] = set()
        # Per (group, row), made by the first layer and the same for all others.
        self._masks: dict[tuple[int, int], Tensor] = {}
        self._indices: dict[tuple[int, int], Tensor] = {}
        self._paged_reads: dict[tuple[int, int, int, torch.dtype], PagedReads | None] = {}
        for number, group in enumerate(plan.groups):
            store.copy_blocks(number, group.copies)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int,
        window: int | None,
        scale: float | None,
        softcap: float | None,
    ) -> Tensor:
        """Attention of one layer, [B, Hq, T, D] -> [B, Hq, T, Dv]; padding rows hold no meaning.

        Raises:
            InvalidInput: an unknown or repeated layer, or shapes that are not the layer's.
            InvalidType: another dtype or device than the cache's.
        """
        call = self._check(q, k, v, layer, window)
        number = self.store.group_of(layer)
        group = self._groups[number]
        if self.converts:
            return self._attend_converted(q, k, v, layer, scale, softcap)
        keys, values = self.store.pair(layer)
        native = group.native
        if call.native is not type(native):
            call.serves = native is not None and native.serve(q, k, v, keys, values)
            call.native = type(native)
        if softcap is None and native is not None and call.serves:
            return native.attend(q, k, v, keys, values, scale)
        run = group.run
        if run is None:
            _write(keys, k, group.slots)
            _write(values, v, group.slots)
        else:
            # One row into adjacent slots.
            keys[:, run] = k[0]
            values[:, run] = v[0]
            if group.single is not None and softcap is None:
                at, end = group.single
                return attend_all(q, keys[None, :, at:end], values[None, :, at:end], scale)
        paged = self._paged(number, q, keys, values)
        if paged is not None:
            return paged.attend(q, keys, values, scale, softcap)
        if softcap is not None or not group.sees_all:
            return self._attend_masked(q, keys, values, number, group.group.extents, scale, softcap)
        if group.decodes:
            return attend_reads(group.reads, q, keys, values, scale)
        new = attend_with_lse(q, k, v, scale, causal=True)
        return attend_reads(group.reads, q, keys, values, scale, new)

    def _paged(self, number: int, q: Tensor, keys: Tensor, values: Tensor) -> PagedReads | None:
        """What reads the layer by block table, where a GPU has a kernel for it."""
        if q.device.type != "cuda":
            return None
        key = (number, q.shape[1], q.shape[3], q.dtype)
        if key not in self._paged_reads:
            self._paged_reads[key] = choose(self.plan, number, q, keys, values)
        return self._paged_reads[key]

    def _attend_converted(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float | None, softcap: float | None
    ) -> Tensor:
        """K and V are stored in another dtype: what the step sees is converted first.

        New tokens too are attended as they are stored, so that a result does not depend on what was cached before.
        """
        number = self.store.group_of(layer)
        group = self._groups[number]
        k, v = (self._stored(layer, name, new, group) for name, new in (("k", k), ("v", v)))
        is_masked = softcap is not None or not group.sees_all
        read = group.converted_all if is_masked else group.converted
        keys, values = (self.store.take(layer, name, read.slots, self.dtype) for name in "kv")
        if is_masked:
            return self._attend_masked(q, keys, values, number, read.extents, scale, softcap)
        if group.decodes:
            return attend_reads(read.reads, q, keys, values, scale)
        new = attend_with_lse(q, k, v, scale, causal=True)
        return attend_reads(read.reads, q, keys, values, scale, new)

    def _stored(self, layer: int, name: str, new: Tensor, group: GroupStep) -> Tensor:
        """Write [B, H, T, D]; returns it as it will be read."""
        rows, heads, count, size = new.shape
        flat = new.transpose(0, 1).reshape(heads, rows * count, size)
        return self.store.put(layer, name, group.slots, flat).view(heads, rows, count, size).transpose(0, 1)

    def with_context(self, x: Tensor, rows: int, layer: int) -> Tensor:
        """Inputs [B, C, T] of a convolution behind the ``rows`` inputs before them: [B, C, rows + T].

        Raises:
            InvalidInput: an unknown or repeated layer, or shapes that are not the layer's.
            InvalidType: another dtype or device than the cache's.
        """
        layers = self.store.layout.layers
        spec = layers[layer] if 0 <= layer < len(layers) else None
        check_context(x, rows, layer, spec, (self.positions.shape[0], self.positions.shape[1]))
        if layer in self._used:
            raise InvalidInput(f"layer {layer} was used twice in one step: give each layer its own layer=")
        states = self.store.array(layer, "state")
        if x.dtype != self.dtype or x.device != states.device:
            raise InvalidType(
                f"x of layer {layer} must be {self.dtype} on {states.device} as when the model was first run, got "
                f"{x.dtype} on {x.device}; make a new cache for another dtype or device"
            )
        self._used.add(layer)
        return self._states.with_context(x, states)  # type: ignore[union-attr]

    def _attend_masked(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        number: int,
        extents: Sequence[Sequence[tuple[int, int, int]]],
        scale: float | None,
        softcap: float | None,
    ) -> Tensor:
        """Row by row with a mask: for a score cap, and for prompts that a window cuts."""
        result = q.new_zeros(*q.shape[:3], values.shape[2])
        for row, count in enumerate(self.plan.counts.tolist()):
            seen_k, seen_v = self._gather(keys, values, number, row, extents[row])
            query, mask = q[row : row + 1, :, :count], self._mask(number, row)
            result[row, :, :count] = attend_masked(query, seen_k[None], seen_v[None], mask, scale, softcap)[0]
        return result

    def _mask(self, number: int, row: int) -> Tensor:
        """What each new token of the row sees of its extents: bool [count, S]."""
        mask = self._masks.get((number, row))
        if mask is None:
            group, count = self.plan.groups[number], int(self.plan.counts[row])
            first = group.extents[row][0][2]
            where = torch.arange(first, int(self.plan.starts[row]) + count, device=self.positions.device)
            mine = self.positions[row, :count, None]
            mask = where <= mine
            if group.window is not None:
                mask = mask & (where > mine - group.window)
            self._masks[number, row] = mask
        return mask

    def _gather(
        self, keys: Tensor, values: Tensor, number: int, row: int, extents: Sequence[tuple[int, int, int]]
    ) -> tuple[Tensor, Tensor]:
        """K and V of the row's extents: a view if there is one extent, else a copy."""
        if len(extents) == 1:
            at, size, _ = extents[0]
            return keys[:, at : at + size], values[:, at : at + size]
        index = self._indices.get((number, row))
        if index is None:
            slots = np.concatenate([np.arange(at, at + size) for at, size, _ in extents])
            index = self._indices[number, row] = torch.from_numpy(slots).to(keys.device)
        return keys.index_select(1, index), values.index_select(1, index)

    def _check(self, q: Tensor, k: Tensor, v: Tensor, layer: int, window: int | None) -> Call:
        """Raise unless the call is right; what is known of the layer's calls that look like it."""
        looks = (q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype)
        looks += (q.device, k.device, v.device, window, self.dtype, self.positions.shape)
        call = self.store.calls.get(layer)
        if call is None or call.looks != looks:
            if not self._is_right(q, k, v, layer, window):
                self._explain(q, k, v, layer, window)
            call = self.store.calls[layer] = Call(looks)
        if layer in self._used:
            self._explain(q, k, v, layer, window)
        self._used.add(layer)
        return call

    def _is_right(self, q: Tensor, k: Tensor, v: Tensor, layer: int, window: int | None) -> bool:
        layers, dtype = self.store.layout.layers, self.dtype
        if not 0 <= layer < len(layers):
            return False
        spec = layers[layer]
        first = spec.arrays[0]
        shape = (*self.positions.shape[:1], first.heads, *self.positions.shape[1:])
        return (
            k.shape == (*shape, first.size)
            and v.shape == (*shape, spec.arrays[-1].size)
            and q.dtype == k.dtype == v.dtype == dtype
            and window == spec.window
            and k.device == self.store.device
            and q.shape[0] == k.shape[0]
            and q.shape[2:] == k.shape[2:]
            and not q.shape[1] % k.shape[1]
            and spec.kind == "attention"
        )

    def _explain(self, q: Tensor, k: Tensor, v: Tensor, layer: int, window: int | None) -> None:
        """Raise the error that says which rule of :meth:`_check` was broken."""
        layers = self.store.layout.layers
        if not 0 <= layer < len(layers) or layers[layer].kind != "attention":
            count = sum(spec.kind == "attention" for spec in layers)
            raise InvalidInput(f"layer must be 0 .. {count - 1} for the attached model, got {layer}")
        if layer in self._used:
            raise InvalidInput(f"layer {layer} was used twice in one step: give each attention call its own layer=")
        spec = layers[layer]
        if window != spec.window:
            raise InvalidInput(f"layer {layer} was attached with window={spec.window}, got window={window}")
        rows, count = self.plan.positions.shape
        for name, tensor, array in zip("kv", (k, v), spec.arrays, strict=True):
            expected = (rows, array.heads, count, array.size)
            if tuple(tensor.shape) != expected:
                raise InvalidInput(
                    f"{name} of layer {layer} must be [B, H, T, D] = {expected} in this step, got {tuple(tensor.shape)}"
                )
        check_query(q, k, layer)
        if k.dtype != self.dtype or v.dtype != self.dtype or q.dtype != self.dtype:
            raise InvalidType(
                f"q, k, v of layer {layer} must be {self.dtype} as when the model was first run, got {q.dtype}, "
                f"{k.dtype}, {v.dtype}; make a new cache for another dtype"
            )
        if k.device != self.store.device:
            raise InvalidType(
                f"layer {layer} runs on {k.device}, the cache's tensors are on {self.store.device}; make a new "
                "cache after moving the model"
            )


def _write(array: Tensor, new: Tensor, slots: Tensor) -> None:
    """Put [B, H, T, D] into the step's slots [B * T] of a pool tensor [H, slots, D]."""
    rows, heads, count, size = new.shape
    flat = new.transpose(0, 1).reshape(heads, rows * count, size)
    array.index_copy_(1, slots, flat)
