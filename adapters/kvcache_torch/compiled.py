"""The decode step as one compiled graph, where the machine can compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["CompiledDecode", "compiler_works"]


class CompiledDecode:
    """A model's forward pass over one new token per row; compiled at its first use with one row, and once more at
    its first use with several, for any number of rows.

    Args:
        forward: ids [B, 1] -> output, as called inside a step.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._one = torch.compile(forward, dynamic=False)
        self._many = torch.compile(forward, dynamic=True)

    def __call__(self, tokens: Tensor) -> Any:
        """The output, [B, 1, ...]."""
        return (self._one if tokens.shape[0] == 1 else self._many)(tokens)


@cache
def compiler_works() -> str:
    """Why ``torch.compile`` cannot be used here, or an empty string: tried on one addition."""
    try:
        torch.compile(_add_one)(torch.zeros(1))
    except Exception as error:  # what is missing shows only as whatever the compiler raises: no cc, no headers, ...
        return str(error).partition("\n")[0]
    return ""


def _add_one(x: Tensor) -> Tensor:
    return x + 1
