"""One step on tensors: write the new K and V, attend over cached and new tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvcache_core.errors import InvalidInput, InvalidType
from kvcache_core.layout import LayerSpec
from kvcache_core.plan import GroupPlan, StepPlan
from kvcache_torch.kernels import attend_all, attend_extents, attend_masked, plain_attention
from kvcache_torch.store import TensorStore, dtype_name

__all__ = ["Recorder", "Step"]

_VIEWS_AT_MOST = 8
"""With more extents than this their K/V are copied together first."""


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
        device = store.device
        self.positions = torch.from_numpy(plan.positions).to(device)
        self.last_index = torch.from_numpy(plan.counts - 1).to(device)
        self._slots = [torch.from_numpy(group.slots.reshape(-1)).to(device) for group in plan.groups]
        self._groups = [store.layout.group_of(layer) for layer in range(len(store.layout.layers))]
        self._used: set[int] = set()
        # Per (group, row), made by the first layer and the same for all others.
        self._masks: dict[tuple[int, int], Tensor] = {}
        self._indices: dict[tuple[int, int], Tensor] = {}
        # Plain ints, once per step: reading numpy scalars in every layer would cost more than the write.
        self._counts: list[int] = plan.counts.tolist()
        self._starts: list[int] = plan.starts.tolist()
        self._runs = [_run(group) for group in plan.groups]
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
        self._check(q, k, v, layer, window)
        number = self._groups[layer]
        batched_keys, batched_values = self.store.batched(layer)
        run = self._runs[number]
        if run is not None:
            # One row into adjacent slots.
            batched_keys[:, :, run] = k
            batched_values[:, :, run] = v
            extents = self.plan.groups[number].extents[0]
            if q.shape[2] == 1 == len(extents) and softcap is None and batched_keys.dtype == self.dtype:
                at, size, _ = extents[0]
                end = at + size
                return attend_all(q, batched_keys[:, :, at:end], batched_values[:, :, at:end], scale)
        keys, values = batched_keys[0], batched_values[0]
        if run is None:
            self._write(keys, k, number)
            self._write(values, v, number)
        rows = [self._row(q, k, v, keys, values, number, row, scale, softcap) for row in range(q.shape[0])]
        if len(rows) == 1 and rows[0].shape[1] == q.shape[2]:
            return rows[0].unsqueeze(0)
        result = v.new_zeros(*q.shape[:3], v.shape[3])
        for row, own in enumerate(rows):
            result[row, :, : own.shape[1]] = own
        return result

    def _write(self, array: Tensor, new: Tensor, number: int) -> None:
        """Put [B, H, T, D] into the slots of the step."""
        rows, heads, count, size = new.shape
        flat = new.transpose(0, 1).reshape(heads, rows * count, size)
        array.index_copy_(1, self._slots[number], flat.to(array.dtype))

    def _row(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        number: int,
        row: int,
        scale: float | None,
        softcap: float | None,
    ) -> Tensor:
        """One row's result [Hq, count, Dv]."""
        group = self.plan.groups[number]
        count, start = self._counts[row], self._starts[row]
        extents = group.extents[row]
        query = q[row, :, :count]
        visible_all = group.window is None or start + count <= group.window
        if softcap is None and count == 1:
            if len(extents) > _VIEWS_AT_MOST:
                return attend_extents(query, [self._gather(keys, values, number, row)], scale)
            views = [self._cast(keys[:, at : at + size], values[:, at : at + size]) for at, size, _ in extents]
            return attend_extents(query, views, scale)
        if not start and visible_all and softcap is None:
            return plain_attention(
                query[None], k[row : row + 1, :, :count], v[row : row + 1, :, :count], None, scale, None
            )[0]
        seen_k, seen_v = self._gather(keys, values, number, row)
        return attend_masked(query[None], seen_k[None], seen_v[None], self._mask(number, row), scale, softcap)[0]

    def _mask(self, number: int, row: int) -> Tensor:
        """What each new token of the row sees of its extents: bool [count, S]."""
        mask = self._masks.get((number, row))
        if mask is None:
            group, count = self.plan.groups[number], self._counts[row]
            first = group.extents[row][0][2]
            where = torch.arange(first, self._starts[row] + count, device=self.positions.device)
            mine = self.positions[row, :count, None]
            mask = where <= mine
            if group.window is not None:
                mask = mask & (where > mine - group.window)
            self._masks[number, row] = mask
        return mask

    def _gather(self, keys: Tensor, values: Tensor, number: int, row: int) -> tuple[Tensor, Tensor]:
        """K and V of the row's extents: a view if there is one extent, else a copy."""
        extents = self.plan.groups[number].extents[row]
        if len(extents) == 1:
            at, size, _ = extents[0]
            return self._cast(keys[:, at : at + size], values[:, at : at + size])
        index = self._indices.get((number, row))
        if index is None:
            slots = np.concatenate([np.arange(at, at + size) for at, size, _ in extents])
            index = self._indices[number, row] = torch.from_numpy(slots).to(keys.device)
        return self._cast(keys.index_select(1, index), values.index_select(1, index))

    def _cast(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stored values in the model's dtype; nothing to do unless another dtype was chosen for storage."""
        if keys.dtype == self.dtype:
            return keys, values
        return keys.to(self.dtype), values.to(self.dtype)

    def _check(self, q: Tensor, k: Tensor, v: Tensor, layer: int, window: int | None) -> None:
        layers, dtype = self.store.layout.layers, self.dtype
        if 0 <= layer < len(layers) and layer not in self._used:
            spec = layers[layer]
            first = spec.arrays[0]
            shape = (*self.positions.shape[:1], first.heads, *self.positions.shape[1:])
            if (
                k.shape == (*shape, first.size)
                and v.shape == (*shape, spec.arrays[-1].size)
                and q.dtype == k.dtype == v.dtype == dtype
                and window == spec.window
                and k.device == self.store.device
                and q.shape[0] == k.shape[0]
                and q.shape[2:] == k.shape[2:]
                and not q.shape[1] % k.shape[1]
                and spec.kind == "attention"
            ):
                self._used.add(layer)
                return
        self._explain(q, k, v, layer, window)

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


class Recorder:
    """Runs in place of a step while a model is described: notes what each layer would store."""

    def __init__(self, device: torch.device) -> None:
        self.positions = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.last_index = torch.zeros(1, dtype=torch.int64, device=device)
        self.layers: dict[int, LayerSpec] = {}
        self.dtype: torch.dtype | None = None

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
        """Plain attention; the layer's shape is noted."""
        check_query(q, k, layer)
        if layer in self.layers:
            raise InvalidInput(f"layer {layer} was used twice in one step: give each attention call its own layer=")
        if self.dtype is not None and k.dtype != self.dtype:
            raise InvalidType(f"all layers must have one K/V dtype, got {self.dtype} and {k.dtype} in layer {layer}")
        self.dtype = k.dtype
        self.layers[layer] = LayerSpec.attention(k.shape[1], k.shape[3], v.shape[3], window=window)
        return plain_attention(q, k, v, window, scale, softcap)

    def specs(self) -> tuple[LayerSpec, ...]:
        """The layers in order.

        Raises:
            InvalidInput: no attention call was seen, or the layer numbers have gaps.
        """
        if not self.layers:
            raise InvalidInput(
                "the model made no call of kvcache_torch.attention: build its attention layers from it to cache them"
            )
        if sorted(self.layers) != list(range(len(self.layers))):
            raise InvalidInput(f"layer numbers must be 0 .. L - 1 without gaps, got {sorted(self.layers)}")
        return tuple(self.layers[layer] for layer in range(len(self.layers)))

    def kv_dtype(self) -> str:
        """The layers' dtype as the core names it."""
        return dtype_name(self.dtype if self.dtype is not None else torch.float32)


def check_query(q: Tensor, k: Tensor, layer: int) -> None:
    """Check the query against K."""
    if q.dim() != 4 or k.dim() != 4:
        raise InvalidInput(f"q, k, v of layer {layer} must be [B, H, T, D], got q {tuple(q.shape)}, k {tuple(k.shape)}")
    same = q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:]
    if not same or q.shape[1] % k.shape[1]:
        raise InvalidInput(
            f"q of layer {layer} must be [B, Hq, T, D] like k, Hq a multiple of its K/V heads; got q "
            f"{tuple(q.shape)}, k {tuple(k.shape)}"
        )


def _run(group: GroupPlan) -> slice | None:
    """The slots of a single row as one slice, if they are adjacent and not padded."""
    slots = group.slots
    if len(slots) > 1:
        return None
    first, last = int(slots[0, 0]), int(slots[0, -1])
    # The ends alone do not tell: a block from elsewhere may stand in between.
    if last - first != slots.shape[1] - 1 or (np.diff(slots[0]) != 1).any():
        return None
    return slice(first, last + 1)
