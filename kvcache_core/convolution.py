"""Causal convolution in numpy, its left context in a state layer: the reference for both adapters."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.errors import InvalidInput
from kvcache_core.plan import StepPlan
from kvcache_core.store import NumpyStore

__all__ = ["causal_conv1d", "context_rows", "with_context"]

_Array = NDArray[Any]


def context_rows(kernel: int, dilation: int) -> int:
    """How many earlier inputs a causal convolution sees: (K - 1) * dilation, the rows of its state.

    Raises:
        InvalidInput: a kernel below 2, which sees none, or a dilation below 1.

    Example:
        >>> context_rows(3, 2)
        4
    """
    if kernel < 2 or dilation < 1:
        raise InvalidInput(
            f"a causal convolution needs a kernel of at least 2 and a dilation of at least 1, got {kernel} and "
            f"{dilation}; a kernel of 1 sees no past: use a linear layer"
        )
    return (kernel - 1) * dilation


def causal_conv1d(x: _Array, weight: _Array, bias: _Array | None = None, *, dilation: int = 1) -> _Array:
    """Convolution over inputs that stand behind their context.

    Args:
        x: [B, R + T, C], from :func:`with_context`, or with R zeros before a sequence's start.
        weight: [K, C, E], R = (K - 1) * dilation; ``weight[-1]`` is for a token itself.
        bias: [E], or None.
        dilation: distance between the inputs that one output sees.

    Returns:
        [B, T, E].

    Example:
        >>> x = np.array([0.0, 0.0, 1.0, 2.0, 3.0]).reshape(1, 5, 1)
        >>> causal_conv1d(x, np.ones((3, 1, 1)))[0, :, 0].tolist()
        [1.0, 3.0, 6.0]
    """
    count = x.shape[1] - context_rows(len(weight), dilation)
    result: _Array = sum(x[:, at * dilation : at * dilation + count] @ tap for at, tap in enumerate(weight))
    return result if bias is None else result + bias


def with_context(x: _Array, rows: int, layer: int, store: NumpyStore, plan: StepPlan) -> _Array:
    """A step's inputs behind the layer's state, the last ``rows`` inputs before them; and the new states stored.

    Args:
        x: [B, T, C] for the plan's rows, padded on the right.
        rows: R, how many earlier inputs the layer sees.
        layer: the layer's number in the layout.
        store: where the state lies.
        plan: the step.

    Returns:
        [B, R + T, C]: zeros before a sequence's start.
    """
    group = plan.groups[store.layout.group_of(layer)]
    past = store.read(layer, "state", group.state_reads)
    past = np.where((group.state_reads > 0)[:, None, None], past, 0).astype(x.dtype)
    joined = np.concatenate([past, x], axis=1)
    states = np.stack([joined[row, end : end + rows] for row, end, _ in group.state_writes])
    store.write(layer, "state", group.state_writes[:, 2], states)
    return joined
