"""``with cache: y = model(x)``: rows in, full outputs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kvcache_core.errors import InvalidInput, InvalidType
from kvcache_core.frontend import Call
from kvcache_torch.replay import with_replayed_gradient
from kvcache_torch.store import TensorStore

__all__ = ["Rows", "assemble", "reason_to_bypass", "rows_of", "with_gradient_of", "with_recomputed_gradient"]


@dataclass(frozen=True)
class Rows:
    """The rows of an input [B, T] or [B, T, F]: each row's tokens (or frames) and the column its first stands in."""

    tokens: list[NDArray[Any]]
    first: list[int]
    width: int

    @property
    def is_full(self) -> bool:
        """Whether no row is padded."""
        return all(len(row) == self.width for row in self.tokens)

    def outside(self, original: Callable[..., Any], x: Tensor) -> Tensor:
        """The model without the cache, [B, T, ...]; as with it, padding changes nothing and its output is zero."""
        if self.is_full:
            output: Tensor = original(x)
            return output
        aligned = torch.zeros_like(x)
        for at, row in enumerate(self.tokens):
            aligned[at, : len(row)] = torch.from_numpy(row)
        output = original(aligned)
        columns = np.arange(self.width)[None] - np.array(self.first)[:, None]
        there = (columns >= 0) & (columns < np.array([len(row) for row in self.tokens])[:, None])
        index = torch.from_numpy(np.where(there, columns, 0)).to(x.device)
        placed = output[torch.arange(len(index), device=x.device)[:, None], index]
        kept = torch.from_numpy(there).to(x.device)
        return placed * kept.reshape(*kept.shape, *[1] * (placed.dim() - 2)).to(placed.dtype)

    def last_of(self, output: Tensor) -> Tensor:
        """Each row's last output, [B, 1, ...]."""
        last = torch.tensor([first + len(row) - 1 for first, row in zip(self.first, self.tokens, strict=True)])
        return output[torch.arange(len(last)), last.to(output.device)].unsqueeze(1)


def rows_of(x: Any, lengths: Any, mask: Any, frames: int | None = None) -> Rows:
    """Check an input and split it into rows.

    Args:
        x: integer ids [B, T], or frames [B, T, F].
        lengths: [B], tokens per row, padded on the right; or None.
        mask: [B, T], nonzero where there is a token, padded on either side; or None.
        frames: F, if the model takes frames.

    Raises:
        InvalidInput, InvalidType: no integer ids [B, T] (or frames), an empty row, or a mask with holes.
    """
    _check_frames(x, frames) if frames else _check_ids(x)
    ids = (x.detach().float() if x.dtype in (torch.bfloat16, torch.float16) else x.detach()).cpu().numpy()
    count, width = ids.shape[:2]
    if mask is not None:
        valid = np.asarray(torch.as_tensor(mask).detach().cpu()) != 0
        if valid.shape != (count, width):
            raise InvalidInput(f"the mask must be [B, T] = {(count, width)} like the ids, got {valid.shape}")
        first, sizes = valid.argmax(axis=1), valid.sum(axis=1)
        if any(not valid[row, at : at + size].all() for row, (at, size) in enumerate(zip(first, sizes, strict=True))):
            raise InvalidInput("the mask must mark one run of tokens per row: padding left or right, no holes")
    elif lengths is not None:
        sizes = np.asarray(torch.as_tensor(lengths).detach().cpu()).reshape(-1)
        first = np.zeros_like(sizes)
        if len(sizes) != count or sizes.max() > width:
            raise InvalidInput(f"lengths must be {count} numbers of at most {width} tokens, got {sizes.tolist()}")
    else:
        first, sizes = np.zeros(count, int), np.full(count, width)
    if sizes.min() < 1:
        raise InvalidInput(f"every row needs at least one token, got rows of {sizes.tolist()}")
    tokens = [ids[row, at : at + size] for row, (at, size) in enumerate(zip(first, sizes, strict=True))]
    return Rows(tokens, first.tolist(), width)


def _check_ids(x: Any) -> None:
    if not isinstance(x, Tensor):
        raise InvalidType(f"token ids must be a tensor [B, T], got {type(x).__name__}")
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise InvalidType(f"token ids must be integers, got {x.dtype}")
    if x.dim() != 2 or not x.shape[0] or not x.shape[1]:
        raise InvalidInput(f"token ids must be [B, T] with at least one row and one token, got {tuple(x.shape)}")


def _check_frames(x: Any, size: int) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise InvalidType(f"frames must be a tensor [B, T, {size}] of floating-point numbers, got {_kind(x)}")
    if x.dim() != 3 or not x.shape[0] or not x.shape[1] or x.shape[2] != size:
        raise InvalidInput(f"frames must be [B, T, {size}] with at least one row and one frame, got {tuple(x.shape)}")


def _kind(x: Any) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def assemble(store: TensorStore, layer: int, call: Call, rows: Rows, new: Tensor) -> Tensor:
    """Store the new outputs and return all of them, [B, T, ...]; zero where the input is padded.

    Args:
        store: holds the outputs of cached tokens in ``layer``.
        layer: the output layer.
        call: the step.
        rows: where the rows stand in the input.
        new: [B, Tnew, ...], outputs of the step's tokens.
    """
    plan = call.plan
    group = plan.groups[store.layout.group_of(layer)]
    store.write(layer, "output", group.slots.reshape(-1), new.reshape(-1, 1, new[0, 0].numel()))
    if rows.is_full and not plan.starts.any():
        return new
    size = store.layout.block_size
    result = new.new_zeros(len(rows.tokens), rows.width, *new.shape[2:])
    for row, at in enumerate(rows.first):
        start, count = int(plan.starts[row]), int(plan.counts[row])
        if start:
            known = np.arange(start)
            slots = group.block_tables[row, known // size].astype(np.int64) * size + known % size
            stored = store.read(layer, "output", slots)
            result[row, at : at + start] = stored.reshape(start, *new.shape[2:])
        result[row, at + start : at + start + count] = new[row, :count]
    return result


def with_recomputed_gradient(cache: Any, original: Callable[..., Any], x: Tensor, rows: Rows, result: Tensor) -> Tensor:
    """Let a cached result take part in autograd: backward runs the model once more, as outside."""

    def forward() -> Tensor:
        output = rows.outside(original, x)
        return rows.last_of(output) if cache.outputs == "last" else output

    return with_gradient_of(forward, cache.model, [x], result)


def with_gradient_of(
    forward: Callable[[], Tensor], model: nn.Module, inputs: Sequence[Tensor], result: Tensor
) -> Tensor:
    """``result``, whose backward pass runs ``forward``, which computes the same from ``inputs`` without the cache."""
    return with_replayed_gradient(lambda: [forward()], model, inputs, [result])[0]


def reason_to_bypass(model: nn.Module) -> str | None:
    """Why a call must be computed as outside, or None."""
    if not model.training:
        return None
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in model.parameters()):
        return "the model is being trained; call model.eval() or use torch.no_grad() to use the cache"
    random = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    if any(isinstance(module, random) and module.training for module in model.modules()):
        return "the model is in training mode with dropout or batch statistics; call model.eval() to use the cache"
    return None
