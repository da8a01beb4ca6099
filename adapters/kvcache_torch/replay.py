"""A served call that takes part in autograd: backward runs the module once more, as it was when it was called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvcache_core.errors import UsageError

__all__ = ["with_replayed_gradient"]


def with_replayed_gradient(
    forward: Callable[[], Sequence[Tensor]], module: nn.Module, inputs: Sequence[Tensor], results: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """``results`` with the gradients that ``forward()`` of ``module`` on ``inputs`` gives to the module's parameters.

    Raises:
        UsageError: in the backward pass: an input was changed in place in between.
    """
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    call = _Call(module, inputs)
    replayed: tuple[Tensor, ...] = _Replayed.apply(forward, call, len(results), *results, *weights)
    return replayed


class _Call:
    """How a module was called: which parts were in training mode, under which autocast, and the inputs' versions."""

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor]) -> None:
        self._training = [(part, part.training) for part in module.modules()]
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in ("cpu", "cuda")
        ]
        self._inputs = [(tensor, tensor._version) for tensor in inputs if not tensor.is_inference()]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Where the module computes what it computed then, with gradients."""
        if any(tensor._version != version for tensor, version in self._inputs):
            raise UsageError(
                "backward runs the module once more, and needs its inputs as they were: one was changed in place since "
                "the call; change a clone of it, or call backward before"
            )
        now = [part.training for part, _ in self._training]
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            for kind, dtype, enabled in self._autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled))
            try:
                for part, training in self._training:
                    part.training = training
                yield
            finally:
                for (part, _), training in zip(self._training, now, strict=True):
                    part.training = training


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, outputs: Callable[[], Sequence[Tensor]], call: _Call, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """The results as they are; what a gradient needs is kept."""
        ctx.outputs, ctx.call, ctx.count = outputs, call, count
        ctx.save_for_backward(*tensors[count:])
        results = tuple(tensor.view_as(tensor) for tensor in tensors[:count])
        ctx.mark_non_differentiable(*(result for result in results if not _has_gradient(result.dtype)))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # type: ignore[override]
        """Run the module again with gradients, and differentiate that."""
        create_graph = torch.is_grad_enabled()  # a gradient of this gradient is wanted
        with ctx.call.again():
            outputs = ctx.outputs()
        wanted = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
        found = torch.autograd.grad(
            [output for output, _ in wanted],
            ctx.saved_tensors,
            [grad for _, grad in wanted],
            allow_unused=True,
            create_graph=create_graph,
        )
        return None, None, None, *[None] * ctx.count, *found


def _has_gradient(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex
