"""Running a model without a cache, and what is made of its logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcache_torch.driver import logits_of

__all__ = ["most_likely", "recompute", "recompute_scores", "target_scores", "widened"]


def widened(logits: Tensor) -> Tensor:
    """Half precision as float32: numpy has no bfloat16."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def most_likely(logits: Tensor) -> NDArray[np.int64]:
    """Index of the largest logit, the first of equal ones: [..., V] -> int64 [...]."""
    if logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.float64):
        found: NDArray[np.int64] = logits.detach().numpy().argmax(axis=-1)  # ten times as fast as PyTorch's
        return found
    return logits.argmax(dim=-1).cpu().numpy()


def target_scores(logits: Tensor, targets: Tensor) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Log-probabilities [..., T] of targets under logits [..., T, V], and the most likely tokens."""
    found = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1).double()
    return (found - logits.logsumexp(dim=-1).double()).cpu().numpy(), most_likely(logits)


def recompute(forward: Callable[..., Any], device: torch.device, rows: list[list[int]]) -> np.ndarray[Any, Any]:
    """Run a model over ragged rows without a cache; logits [B, V] behind each row's last token."""
    output = _run(forward, device, rows)
    last = torch.tensor([len(row) - 1 for row in rows], device=output.device)
    return widened(output[torch.arange(len(rows), device=output.device), last]).cpu().numpy()


def recompute_scores(
    forward: Callable[..., Any], device: torch.device, rows: list[list[int]], targets: Sequence[Sequence[int]]
) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Per row, log-probabilities of the targets behind its last tokens and the most likely tokens, without a cache."""
    output, found = _run(forward, device, rows), []
    for logits, row, behind in zip(output, rows, targets, strict=True):
        wanted = torch.tensor(behind, device=output.device)
        found.append(target_scores(widened(logits[len(row) - len(behind) : len(row)]), wanted))
    return found


def _run(forward: Callable[..., Any], device: torch.device, rows: list[list[int]]) -> Tensor:
    """A model's whole output [B, T, ...] over rows padded on the right."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for at, row in enumerate(rows):
        tokens[at, : len(row)] = torch.tensor(row)
    with torch.no_grad():
        return logits_of(forward(tokens.to(device)))
