"""Which rows of transformers' ``generate`` have ended: what it feeds them from then on is padding."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import StoppingCriteriaList

from kvcache_torch.attached import AttachedForward
from kvcache_torch.hf_rows import Columns

__all__ = ["AttachedCriteria", "without_ended"]

_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class _Ended:
    """What the stopping criteria said last.

    Attributes:
        ids: int64 [B, C], the tokens they were asked about.
        at: int64 [B], the number of columns with which each row ended.
    """

    ids: NDArray[np.int64]
    at: NDArray[np.int64]


class _Local(threading.local):
    ended: _Ended | None = None


_local = _Local()


class _Watched(StoppingCriteriaList):  # type: ignore[misc]
    """Stopping criteria whose answers are noted: end tokens, stop strings, time, a caller's own.

    Without an end token among them ``generate`` pads no row: each goes on with its own tokens until all have ended.
    """

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Which rows are done, bool [B]; at which column each was done first is noted."""
        done = super().__call__(input_ids, scores, **kwargs)
        if not any(hasattr(criterion, "eos_token_id") for criterion in self):
            return done
        ids = input_ids.detach().cpu().numpy()
        before, at = _local.ended, np.full(len(ids), _NEVER)
        if before is not None and np.array_equal(before.ids, ids[:, : before.ids.shape[1]]):
            at = before.at
        now = done.detach().cpu().numpy() & (at == _NEVER)
        at = np.where(now, ids.shape[1], at)
        # Behind the last row's end nothing is fed any more: a call with these ids is somebody's own.
        _local.ended = None if (at != _NEVER).all() else _Ended(ids, at)
        return done


class AttachedCriteria(AttachedForward):
    """Stands in for a model's ``_get_stopping_criteria``: where ``generate`` puts all criteria of a call together."""

    name = "_get_stopping_criteria"

    @classmethod
    def listen(cls, model: Any) -> None:
        """Note from now on which rows have ended, if the model generates at all."""
        if hasattr(model, cls.name):
            cls.install(model, _watch)

    @classmethod
    def stop(cls, model: Any) -> None:
        """Undo :meth:`listen`."""
        if cls.name in vars(model):
            cls.uninstall(model)


def _watch(original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Watched:
    _local.ended = None
    return _Watched(original(*args, **kwargs))


def without_ended(columns: Columns, past_valid: NDArray[np.bool_]) -> Columns:
    """The columns of a call with padding where ``generate``, on this thread, feeds rows that have ended.

    Args:
        columns: the call.
        past_valid: [B, C] of the earlier columns.
    """
    ended, past = _local.ended, columns.ids.shape[1] - columns.width
    if ended is None or not past:
        return columns  # padding goes to rows that go on; what begins anew may be somebody's own call
    if not (ended.at < columns.ids.shape[1]).any() or not np.array_equal(ended.ids, columns.ids):
        return columns
    valid = columns.valid & (np.arange(columns.ids.shape[1]) < ended.at[:, None])
    if not valid[:, -columns.width :].any():
        return columns  # no generate goes on when all rows have ended: this is somebody's own call
    return replace(columns, valid=valid, same_past=bool((valid[:, :past] == past_valid[:, :past]).all()))
