"""The steps of a PyTorch model: a plan goes in, the model runs over it, numpy arrays come out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcache_core.frontend import FrontendCache
from kvcache_core.plan import StepPlan
from kvcache_torch.context import local
from kvcache_torch.driver import Driver, evaluating, float_dtype
from kvcache_torch.recompute import most_likely, target_scores, widened
from kvcache_torch.step import Step
from kvcache_torch.store import torch_dtype

__all__ = ["ModelSteps"]


class ModelSteps(FrontendCache):
    """The half of :class:`~kvcache_torch.KVCache` that runs the attached model."""

    _driver: Driver

    def _run(self, plan: StepPlan, *, last_only: bool) -> Tensor:
        """The model over a plan's new tokens: [B, T, ...], or [B, 1, ...] if only the last is wanted."""
        store = self.store
        step = Step(plan, store, torch_dtype(self.spec.dtype))
        local.begin(step, last_only)
        try:
            output = self._driver.run(self._input(plan), step)
        finally:
            local.end()
        if last_only and output.shape[1] != 1:
            rows = torch.arange(output.shape[0], device=output.device)
            output = output[rows, step.last_index].unsqueeze(1)
        return output

    def _input(self, plan: StepPlan) -> Tensor:
        """What the model is run on: token ids [B, T], or frames [B, T, F]."""
        if plan.frames is None:
            return torch.from_numpy(plan.tokens).to(self.store.device)
        return torch.from_numpy(plan.frames).to(self.store.device, float_dtype(self.model))

    def _run_step(self, plan: StepPlan) -> np.ndarray[Any, Any]:
        return widened(self._last_logits(plan)).cpu().numpy()

    def _run_greedy(self, plan: StepPlan) -> np.ndarray[Any, Any]:
        return most_likely(self._last_logits(plan))

    def _run_all(self, plan: StepPlan) -> np.ndarray[Any, Any]:
        return widened(self._all_logits(plan)).cpu().numpy()

    def _run_greedy_all(self, plan: StepPlan) -> np.ndarray[Any, Any]:
        return most_likely(self._all_logits(plan))

    def _run_top(self, plan: StepPlan, count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        logits = widened(self._last_logits(plan))
        best, tokens = logits.topk(min(count, logits.shape[-1]), dim=-1)
        return (best.double() - logits.logsumexp(dim=-1, keepdim=True).double()).cpu().numpy(), tokens.cpu().numpy()

    def _run_scores(
        self, plan: StepPlan, targets: np.ndarray[Any, Any]
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        logits = widened(self._all_logits(plan))
        return target_scores(logits, torch.from_numpy(targets).to(logits.device))

    def _all_logits(self, plan: StepPlan) -> Tensor:
        """[B, T, V] behind every new token."""
        with evaluating(self.model), torch.no_grad():
            return self._run(plan, last_only=False)

    def _last_logits(self, plan: StepPlan) -> Tensor:
        """[B, V] behind each row's last token."""
        with evaluating(self.model), torch.no_grad():
            return self._run(plan, last_only=True)[:, 0]
