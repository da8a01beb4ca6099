"""What the host does for a layer whose results are kept per sample, while a graph of the user's own runs."""

from __future__ import annotations

import itertools
import time
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.activation import ActivationSite, Bypassed
from kvcache_core.entryformat import EntryForm, Payload
from kvcache_core.entrylookup import EntryLookup
from kvcache_core.mixing import parts_of
from kvcache_core.tree import Tree
from kvcache_keras.context import local

__all__ = ["GraphSite", "Traced"]

_PENDING_AT_MOST = 256
"""Looked-up calls whose graph never came back (it raised) are forgotten beyond this number."""
_PAST = -1
"""The number of a call that goes past the cache."""


@dataclass(slots=True)
class Traced:
    """A call of the layer as a graph has it: traced once, run many times.

    Attributes:
        tree: the structure of its inputs.
        split: per input, whether its rows are the samples'.
        dtypes: per input.
        mode: what layers were switched to.
        output: the structure of its output.
        ways: how the module is called, by the inputs' numbers of dimensions.
    """

    tree: Tree
    split: Sequence[bool]
    dtypes: Sequence[Any]
    mode: bytes
    output: Tree
    ways: dict[tuple[int, ...], tuple[bytes, ...]] = field(default_factory=dict)

    def way(self, site: ActivationSite, arrays: Sequence[NDArray[Any]]) -> tuple[bytes, ...]:
        """How the module is called with these inputs."""
        ranks = tuple([array.ndim for array in arrays])
        way = self.ways.get(ranks)
        if way is None:
            way = self.ways[ranks] = site.way(self.tree, self.split, self.dtypes, arrays, self.mode)
        return way


@dataclass(slots=True)
class _Pending:
    """A call of a graph that was looked up and now computes.

    Attributes:
        traced: the graph's call.
        lookup: what was found.
        form: of its output.
        spent, since: looking up took so many seconds, and ended then.
        way: how the module is called.
        parts: samples whose results are yet to be computed without the others, to see that they are the same.
        whole: the output of all, which they are compared with.
        computing: seconds it took.
    """

    traced: Traced
    lookup: EntryLookup
    form: EntryForm | None
    spent: float
    since: float
    way: tuple[bytes, ...]
    parts: list[list[int]]
    whole: list[Any] = field(default_factory=list)
    computing: float = 0.0


class GraphSite(ActivationSite):
    """The host calls of a graph: :meth:`begin`, then :meth:`finish` each time the graph has computed samples."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pending: OrderedDict[int, _Pending] = OrderedDict()
        self._numbers = itertools.count(1)

    @abstractmethod
    def bypass(self, reason: str, *, warn: bool = True) -> None:
        """Count a call that goes past the cache."""

    def begin(
        self, traced: Traced, arrays: Sequence[NDArray[Any]], weights: bytes
    ) -> tuple[int, list[int], list[NDArray[Any]] | None]:
        """Look up the samples of a graph's call that found these weights.

        Returns:
            The call's number, the samples to compute, and the whole result [B, ...] if there are none.
        """
        start = time.perf_counter()
        count = next(len(array) for array, mine in zip(arrays, traced.split, strict=True) if mine)
        past = _PAST, list(range(count)), None
        if self.worth.skip:
            self.worth.skip -= 1
            self.worth.skipped += 1
            return past
        if not count:
            return past
        way = traced.way(self, arrays)
        if refusal := self.proofs.refusal(way):
            self.bypass(refusal)
            return past
        local.samples, local.mode = weights, traced.mode  # of this thread: graphs may run side by side
        try:
            keys, form = self.keys(way, traced.split, arrays), self.form(traced.output)
        finally:
            local.samples = None
        shown = count == 1 or way in self.proofs or not self.is_checked()
        parts = [] if shown else parts_of(keys)
        if not shown and (not parts or self._is_proving(way)):
            return past
        lookup = self.entries.look_up(keys, form)
        if shown and not lookup.compute and not self.worth.wants_measure:
            return self._found(lookup, start) or past
        number, now = next(self._numbers), time.perf_counter()
        self.pending[number] = _Pending(traced, lookup, form, now - start, now, way, parts)
        while len(self.pending) > _PENDING_AT_MOST:
            self.pending.popitem(last=False)
        return number, (lookup.compute if shown else []) or past[1], None

    def finish(self, number: int, outputs: Sequence[Any]) -> tuple[int, list[int], list[Any]]:
        """Keep what a graph computed, its arrays [computed, ...].

        Returns:
            The call's number, the samples to compute next, and the whole result [B, ...] if there are none.
        """
        if number == _PAST:
            return _PAST, [], list(outputs)
        start, call = time.perf_counter(), self.pending[number]
        try:
            if call.parts:
                rows = self._next_part(call, outputs, start)
                if rows:
                    return number, rows, list(outputs)
                outputs = call.whole
                self.worth.proved(time.perf_counter() - call.since - call.computing)
                start = time.perf_counter()
            else:
                call.computing = start - call.since
            del self.pending[number]
            result = self._kept(call, outputs)
        except Bypassed as bypassed:
            self.pending.pop(number, None)
            self.bypass(bypassed.reason)
            rows = [] if bypassed.output else list(range(len(call.lookup.keys)))
            return _PAST, rows, bypassed.output or list(outputs)
        self._count(call, call.spent + time.perf_counter() - start)
        return 0, [], result

    def _found(self, lookup: EntryLookup, start: float) -> tuple[int, list[int], list[Any]] | None:
        """The whole result where everything was found."""
        try:
            result = _stacked([rows for _, rows in lookup.found])
        except Bypassed as bypassed:
            self.bypass(bypassed.reason)
            return None
        self.worth.called(len(lookup.keys), 0.0, time.perf_counter() - start)
        return 0, [], result

    def _is_proving(self, way: tuple[bytes, ...]) -> bool:
        """Whether parts of another call are being computed, or its graph raised then and never came back."""
        if not any(call.way == way and call.whole for call in list(self.pending.values())):
            return False
        self.bypass("its first batch is still being computed in parts, or raised there", warn=False)
        return True

    def _next_part(self, call: _Pending, outputs: Sequence[Any], now: float) -> list[int]:
        """The samples to compute next: as many as the whole batch has, of which the module is known not to raise.

        Raises:
            Bypassed: the results are not each sample's own.
        """
        reason = ""
        if not call.whole:
            call.whole, call.computing = list(outputs), now - call.since
            self._check_rows(outputs, len(call.lookup.keys))
        else:
            rows = _repeated(call.parts.pop(0), call)
            whole, part = ([self.numbers(array) for array in arrays] for arrays in (call.whole, outputs))
            dtypes = [dtype.name for dtype, mine in zip(call.traced.dtypes, call.traced.split, strict=True) if mine]
            reason = self.why_mixed(whole, part, rows, dtypes)
        if not reason and call.parts:
            return _repeated(call.parts[0], call)
        self.proofs.settle(call.way, reason)
        if reason:
            raise Bypassed(reason, call.whole)
        return []

    def _count(self, call: _Pending, spent: float) -> None:
        count, computed = len(call.lookup.keys), len(call.lookup.compute)
        is_whole = computed in (0, count) or bool(call.whole)  # if only to see how long that takes
        if is_whole:
            self.worth.measured(count, call.computing)
        saving = computed < count and not call.whole
        self.worth.called(count if saving else 0, call.computing if saving and computed else 0.0, spent)

    def _kept(self, call: _Pending, outputs: Sequence[Any]) -> list[Any]:
        """Keep the arrays [computed, ...]; the whole result [B, ...].

        Raises:
            Bypassed: they have no row per sample, or rows of different shapes.
        """
        lookup = call.lookup
        count = len(lookup.keys)
        is_whole = bool(call.whole) or not lookup.compute
        self._check_rows(outputs, count if is_whole else len(lookup.compute))
        if not lookup.compute:
            return list(outputs)
        kept = [output[lookup.compute] for output in outputs] if is_whole else outputs
        columns = [[np.array(row) for row in output] for output in kept]  # a view would keep its whole batch in memory
        computed: list[Payload] = [(call.traced.output, rows) for rows in zip(*columns, strict=True)]
        size = sum(output.nbytes for output in kept) // len(computed)
        self.entries.keep(lookup, computed, [size] * len(computed), call.form)
        if is_whole or len(computed) == count:
            return list(outputs)
        return _stacked(
            [
                (computed[lookup.sources[sample]] if sample in lookup.sources else found)[1]
                for sample, found in enumerate(lookup.found)
            ]
        )

    def _check_rows(self, outputs: Sequence[Any], count: int) -> None:
        """Raise Bypassed unless every array has so many rows."""
        shapes = [output.shape for output in outputs]
        if any(not shape or shape[0] != count for shape in shapes):
            raise Bypassed(f"the output has no row per sample (for {count} samples its shapes are {shapes})")


def _repeated(rows: Sequence[int], call: _Pending) -> list[int]:
    return np.resize(rows, len(call.lookup.keys)).tolist()


def _stacked(samples: Sequence[Sequence[Any]]) -> list[Any]:
    """The rows of each sample as arrays [B, ...]."""
    stacked = []
    for column in zip(*samples, strict=True):
        shape = column[0].shape
        if any(row.shape != shape for row in column):
            raise Bypassed("the output's structure or shape depends on the other samples of its batch")
        # A row without dimensions is a number: it cannot be joined, and np.array takes three times as long.
        stacked.append(np.concatenate(column).reshape(len(column), *shape) if shape else np.array(column))
    return stacked
