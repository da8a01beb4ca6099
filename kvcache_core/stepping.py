"""The steps that a cache takes: one plan, one run of the model, one answer; each is a transaction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.errors import CacheFull, InvalidInput
from kvcache_core.plan import StepPlan
from kvcache_core.sampling import log_softmax, top
from kvcache_core.sequence import Sequence as CachedSequence
from kvcache_core.types import TokenIds

__all__ = ["PREFILL_CHUNK", "Stepping", "check_chunk", "check_count"]

PREFILL_CHUNK = 1024
"""Tokens of prompts in one step, over the whole batch: it bounds the memory of a step."""


def check_chunk(chunk: int | None) -> int | None:
    """A chunk size as given, None for no limit.

    Raises:
        InvalidInput: it is no whole number, at least 1.
    """
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, (int, np.integer)) or chunk < 1):
        raise InvalidInput(f"prefill_chunk must be a whole number of tokens, at least 1, or None; got {chunk!r}")
    return chunk


def check_count(count: int) -> None:
    """Raise InvalidInput unless it is a whole number of tokens, at least 1."""
    if not isinstance(count, (int, np.integer)) or count < 1:
        raise InvalidInput(f"count must be a whole number of greedy tokens, at least 1; got {count!r}")


class Stepping(ABC):
    """The half of :class:`~kvcache_core.frontend.FrontendCache` that steps sequences."""

    # ---- what an adapter supplies --------------------------------------------------------------

    @abstractmethod
    def _run_step(self, plan: StepPlan) -> Any:
        """Run the model over a plan; returns logits [B, V] behind each row's last token, as numpy."""

    @abstractmethod
    def _run_all(self, plan: StepPlan) -> Any:
        """As :meth:`_run_step`, for the logits behind every new token: [B, T, V]; padding holds no meaning."""

    # ---- what an adapter may supply ------------------------------------------------------------

    def _run_greedy(self, plan: StepPlan) -> NDArray[np.int64]:
        """As :meth:`_run_step`, for the index of the largest logit: int64 [B]; the first of equal ones."""
        chosen: NDArray[np.int64] = self._run_step(plan).argmax(axis=-1)
        return chosen

    def _run_greedy_all(self, plan: StepPlan) -> NDArray[np.int64]:
        """As :meth:`_run_all`, for the index of the largest logit: int64 [B, T]."""
        chosen: NDArray[np.int64] = self._run_all(plan).argmax(axis=-1)
        return chosen

    def _run_top(self, plan: StepPlan, count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """As :meth:`_run_step`, for the log-probabilities [B, count] and indices of the largest logits."""
        return top(self._run_step(plan), count)

    def _run_scores(self, plan: StepPlan, targets: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Log-probability of the target [B, T] behind each new token, float64, and the most likely token, int64."""
        logits = self._run_all(plan)
        scores = np.take_along_axis(log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        return scores, logits.argmax(axis=-1)

    def _weights_changed(self) -> bool:
        """Asked before every step, so it must be cheap: whether weights changed since :meth:`refresh`."""
        return False

    # ---- what the other half supplies ----------------------------------------------------------

    @abstractmethod
    def transaction(
        self, seqs: Sequence[CachedSequence], token_ids: Sequence[TokenIds]
    ) -> AbstractContextManager[StepPlan]:
        """Plan a step; commit it when the block ends, roll it back when the block raises."""

    @abstractmethod
    def refresh(self) -> None:
        """Notice changed weights."""

    @abstractmethod
    def check_vocabulary(self, token_ids: TokenIds) -> None:
        """Raise InvalidInput for ids that the model does not have."""

    # ---- steps ---------------------------------------------------------------------------------

    def step(
        self,
        seqs: Sequence[CachedSequence],
        token_ids: Sequence[TokenIds],
        *,
        prefill_chunk: int | None = None,
    ) -> Any:
        """Append tokens to each sequence and run the model on them.

        Args:
            seqs: the rows.
            token_ids: one or more new tokens per row; or frames [T, F] per row, for a model attached with ``frames=F``.
            prefill_chunk: compute long rows in several passes of so many tokens each, to bound the memory that
                the model's own tensors take.

        Returns:
            Logits [B, V] behind each row's last token, as a numpy array.

        Raises:
            CacheFull: no room; nothing was changed. Any error of the model leaves the cache as it was.
        """
        if check_chunk(prefill_chunk) is not None:
            return self._step_in_chunks(seqs, token_ids, int(prefill_chunk or 0))
        return self._step(seqs, token_ids, self._run_step)

    def _step_in_chunks(self, seqs: Sequence[CachedSequence], token_ids: Sequence[TokenIds], chunk: int) -> Any:
        """:meth:`step` in passes over at most ``chunk`` tokens per row; all of them or none."""
        longest = max(map(len, token_ids), default=0)
        width = max(1, chunk // max(1, len(seqs)))
        if longest <= width or len(seqs) != len(token_ids):
            return self._step(seqs, token_ids, self._run_step)
        # Forks hold what window and state layers let go of, so that an error can take the passes before it back.
        forks = [seq.fork() for seq in seqs]
        logits: list[Any] = [None] * len(seqs)
        try:
            for at in range(0, longest, width):
                rows = [row for row, ids in enumerate(token_ids) if len(ids) > at]
                parts = [token_ids[row][at : at + width] for row in rows]
                found = self._step([seqs[row] for row in rows], parts, self._run_step)
                for row, scores in zip(rows, found, strict=True):
                    logits[row] = scores
        except BaseException:
            for seq, fork in zip(seqs, forks, strict=True):
                seq.rewind(fork)
            raise
        finally:
            for fork in forks:
                fork.close()
        return np.stack(logits)

    def step_greedy(self, seqs: Sequence[CachedSequence], token_ids: Sequence[TokenIds]) -> NDArray[np.int64]:
        """As :meth:`step`, for the most likely next tokens alone: int64 [B]. Logits stay where they are."""
        chosen: NDArray[np.int64] = self._step(seqs, token_ids, self._run_greedy)
        return chosen

    def step_all(self, seqs: Sequence[CachedSequence], token_ids: Sequence[TokenIds]) -> list[NDArray[Any]]:
        """As :meth:`step`, for the logits behind each new token: per row [T, V]."""
        return _ragged(self._step(seqs, token_ids, self._run_all), token_ids)

    def step_greedy_all(self, seqs: Sequence[CachedSequence], token_ids: Sequence[TokenIds]) -> list[NDArray[np.int64]]:
        """As :meth:`step_greedy`, behind each new token: int64 [T] per row."""
        return _ragged(self._step(seqs, token_ids, self._run_greedy_all), token_ids)

    def step_top(
        self, seqs: Sequence[CachedSequence], token_ids: Sequence[TokenIds], count: int
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """As :meth:`step`, for the ``count`` most likely next tokens.

        Returns:
            Their natural log-probabilities, float64 [B, count], falling, and the tokens, int64 [B, count].
        """
        found: tuple[NDArray[np.float64], NDArray[np.int64]]
        found = self._step(seqs, token_ids, lambda plan: self._run_top(plan, count))
        return found

    def step_scores(
        self,
        seqs: Sequence[CachedSequence],
        token_ids: Sequence[TokenIds],
        targets: Sequence[Sequence[int]],
    ) -> list[tuple[NDArray[np.float64], NDArray[np.int64]]]:
        """Append tokens; how likely is what follows?

        Args:
            seqs: the rows.
            token_ids: one or more new tokens per row.
            targets: per row, the tokens that stand behind its last new tokens, at most as many as there are.

        Returns:
            Per row, each target's natural log-probability, float64, and the most likely token in its place, int64.
        """
        wanted = np.zeros((len(token_ids), max(map(len, token_ids), default=0)), np.int64)
        for row, (ids, behind) in enumerate(zip(token_ids, targets, strict=True)):
            self.check_vocabulary(behind)
            if not 0 < len(behind) <= len(ids):
                raise InvalidInput(
                    f"row {row} has {len(ids)} new tokens and {len(behind)} targets: give 1 .. {len(ids)}"
                )
            wanted[row, len(ids) - len(behind) : len(ids)] = behind
        scores, chosen = self._step(seqs, token_ids, lambda plan: self._run_scores(plan, wanted))
        return [
            (scores[row, len(ids) - len(behind) : len(ids)], chosen[row, len(ids) - len(behind) : len(ids)])
            for row, (ids, behind) in enumerate(zip(token_ids, targets, strict=True))
        ]

    def decode_greedy(
        self,
        seqs: Sequence[CachedSequence],
        token_ids: Sequence[TokenIds],
        count: int,
        eos_ids: Collection[int] = (),
    ) -> NDArray[np.int64]:
        """Append tokens to each sequence, then up to ``count`` - 1 further ones, each the most likely next.

        An adapter may override this to stay out of Python between the steps.

        Args:
            seqs: the rows.
            token_ids: one or more new tokens per row.
            count: greedy tokens wanted, 1 or more.
            eos_ids: stop behind the step in which any row chose one of these.

        Returns:
            int64 [B, n], 1 <= n <= count, the chosen tokens. As after :meth:`step`, the last one is not part
            of its sequence yet: every row has grown by its ``token_ids`` and n - 1 tokens.

        Raises:
            CacheFull: no room for the first step. Without room for a later one, n is smaller.
            InvalidInput: ``count`` is no whole number or less than 1.
            An error of the model in a later step leaves every row as it was before that step.
        """
        check_count(count)
        ends = list(eos_ids)
        chosen = [self.step_greedy(seqs, token_ids)]
        while len(chosen) < count and not np.isin(chosen[-1], ends).any():
            try:
                chosen.append(self.step_greedy(seqs, chosen[-1][:, None].tolist()))
            except CacheFull:
                break
        return np.stack(chosen, axis=1)

    def _step(
        self, seqs: Sequence[CachedSequence], token_ids: Sequence[TokenIds], run: Callable[[StepPlan], Any]
    ) -> Any:
        """One step as a transaction around ``run``."""
        if self._weights_changed():
            self.refresh()
        for ids in token_ids:
            self.check_vocabulary(ids)
        with self.transaction(seqs, token_ids) as plan:
            return run(plan)


def _ragged(values: NDArray[Any], token_ids: Sequence[TokenIds]) -> list[NDArray[Any]]:
    """[B, T, ...] without padding, row by row."""
    return [row[: len(ids)] for row, ids in zip(values, token_ids, strict=True)]
