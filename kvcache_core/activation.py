"""One module whose results are kept per sample: keys, hits and misses, and whether that pays.

An adapter subclasses :class:`ActivationSite` and supplies what touches tensors; nothing here knows a framework.
"""

from __future__ import annotations

import struct
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from kvcache_core.blockformat import salt_digest
from kvcache_core.entries import EntryCache
from kvcache_core.entryformat import EntryForm
from kvcache_core.entrylookup import EntryLookup
from kvcache_core.errors import InvalidInput, InvalidType
from kvcache_core.proving import Proving
from kvcache_core.samples import Samples, sample_keys
from kvcache_core.tree import Tree, flatten
from kvcache_core.worth import Worth

__all__ = ["NUMBER_IN_OUTPUT", "ActivationSite", "Bypassed", "RowFormat"]

OVERWRITES = "the module writes an output over the one before it"
NUMBER_IN_OUTPUT = "the output holds a plain number, which may belong to the batch and not to a sample"

RowFormat = tuple[Callable[[Any], tuple[str, NDArray[Any]]], Callable[[str, NDArray[Any]], Any]]
"""(a row of a result as dtype name and bits of its elements; the reverse)."""


class Bypassed(Exception):
    """A call must be computed as outside.

    Attributes:
        reason: why.
        output: the call's result where it is known already, else None.
        expected: nothing that the caller needs to be told.
    """

    def __init__(self, reason: str, output: Any = None, *, expected: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.output = output
        self.expected = expected


class ActivationSite(Proving):
    """One attached module.

    Args:
        entries: where results are kept.
        module: the module.
        worth: counts what the cache saves and costs.
        shared: names of keyword arguments whose tensors belong to all samples though their first dimension
            happens to be the batch's.
        side_effects: the module does more than compute its output: it is called each time.
        check_in_parts: whether the first batch is computed in parts, too; None: where :meth:`may_mix` says so.
    """

    def __init__(
        self,
        entries: EntryCache,
        module: Any,
        worth: Worth,
        *,
        shared: Sequence[str],
        side_effects: bool,
        check_in_parts: bool | None,
    ) -> None:
        super().__init__(check_in_parts)
        self.entries = entries
        self.module = module
        self.shared = frozenset(shared)
        self.side_effects = side_effects
        self.options = (self.shared, side_effects, check_in_parts)
        self.worth = worth
        self._refusals: dict[bytes, str] = {}
        self._proven: dict[bytes, Tree] = {}

    # ---- what an adapter supplies --------------------------------------------------------------

    @abstractmethod
    def array(self, tensor: Any) -> NDArray[Any]:
        """A tensor's bits as numpy, in any dtype of the same width; raises InvalidType where there is none."""

    @abstractmethod
    def copies(self, tensor: Any) -> list[tuple[Any, int]]:
        """Each row as a tensor of its own that nobody else can change, and its bytes."""

    @abstractmethod
    def stack(self, rows: Sequence[Any]) -> Any:
        """Rows as one new tensor."""

    @abstractmethod
    def mode(self) -> bytes:
        """Bytes that stand for how the module computes now: training or not, precision."""

    @abstractmethod
    def namespace(self) -> bytes:
        """Bytes that stand for the weights and the module."""

    @abstractmethod
    def portable(self) -> tuple[bytes, bytes] | None:
        """What stands, in any process, for the module with its weights (16 bytes), and the salt; None if that cannot be
        said of the module.
        """

    @abstractmethod
    def row_format(self) -> RowFormat:
        """How a row of a result becomes bits and a row again, by functions that do not keep the module alive."""

    # ---- a call --------------------------------------------------------------------------------

    def serve(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """``module(*args, **kwargs)``; samples that are there are not computed.

        Raises:
            Bypassed: the call must be computed as outside; nothing was kept.
        """
        start = time.perf_counter()
        mode = self.mode()
        samples = self._samples(args, kwargs, mode)
        lookup = self.entries.look_up(samples.keys, self.form(self._proven.get(mode)))
        # Until one whole batch was seen to be computed cleanly, nothing is left out of it. One sample alone does not
        # show whether it is computed by itself.
        trusted = mode in self._proven if samples.count == 1 else samples.way in self.proofs
        if not lookup.compute and (trusted or samples.count == 1):
            result = self._assemble(lookup, ())
            self.worth.called(samples.count, 0.0, time.perf_counter() - start)
            if self.worth.wants_measure:
                self._measure(original, args, kwargs, samples)
            return result
        whole = not trusted or len(lookup.compute) == samples.count
        rows = range(samples.count) if whole else lookup.compute
        leaves = samples.leaves if whole else samples.subset(self.take, lookup.compute)
        args, kwargs = samples.tree.rebuild(leaves)
        before = time.perf_counter()
        try:
            output, problem = self.compute(original, args, kwargs, leaves)
        except Exception as error:  # whatever a module raises
            if whole:
                raise
            output, reason = self.together(original, samples, len(rows), error)
            raise Bypassed(reason, output) from error
        after = time.perf_counter()
        payloads = problem or self._split_output(output, len(rows))
        if isinstance(payloads, str):
            self._refusals[mode] = payloads
            raise Bypassed(payloads, output if whole else None)
        proving = 0.0
        if samples.count > 1 and not trusted:
            if not self._is_shown(original, samples, output, payloads):
                return output
            proving = time.perf_counter() - after
            self.worth.proved(proving)
        self._proven[mode] = payloads[0][0]
        if whole:
            payloads = [payloads[sample] for sample in lookup.compute]
        sizes = [size for _, _, size in payloads]
        self.entries.keep(lookup, [payload[:2] for payload in payloads], sizes, self.form(self._proven[mode]))
        result = output if whole else self._assemble(lookup, payloads)
        spent = before - start + time.perf_counter() - after - proving
        if whole:  # such a call saves nothing
            self.worth.measured(samples.count, after - before)
            self.worth.called(0, 0.0, spent)
        else:
            self.worth.called(samples.count, after - before, spent)
        return result

    def _is_shown(
        self,
        original: Callable[..., Any],
        samples: Samples,
        output: Any,
        payloads: Sequence[tuple[Tree, list[Any], int]],
    ) -> bool:
        """Whether a whole batch's results may be kept; False if that batch cannot show it.

        Raises:
            Bypassed: they are not each sample's own.
        """
        if not self.is_checked():
            self.proofs.settle(samples.way, "")
            return True
        reason = self.prove(original, samples, output)
        if reason is None:
            return False
        copies = [self.stack(column) for column in zip(*(rows for _, rows, _ in payloads), strict=True)]
        leaves = flatten(output, self.is_tensor)[0]
        pairs = [(self.numbers(one)[1], self.numbers(two)[1]) for one, two in zip(leaves, copies, strict=True)]
        if any(one.dtype != object and one.tobytes() != two.tobytes() for one, two in pairs):  # objects are strings
            output, reason = payloads[0][0].rebuild(copies), OVERWRITES
        self.proofs.settle(samples.way, reason)
        if reason:
            raise Bypassed(reason, output)
        return True

    def form(self, tree: Tree | None) -> EntryForm | None:
        """What a result of structure ``tree`` looks like in a tier; None if there is no tier, or it stays out of them.

        The structure is not in a tier: until the module was run once, ``tree`` is None and nothing comes up.
        """
        portable = None if tree is None or self.entries.below is None else self.portable()
        if tree is None or portable is None:
            return None
        weights, salt = portable
        return EntryForm(tree, weights, salt_digest(salt), *self.row_format(), self.worth)

    def _measure(self, original: Callable[..., Any], args: Any, kwargs: Any, samples: Samples) -> None:
        """Time the module without the cache, so that a decision does not rest on its first run alone."""
        before = time.perf_counter()
        self.compute(original, args, kwargs, samples.leaves)
        self.worth.measured(samples.count, time.perf_counter() - before)

    def _samples(self, args: Any, kwargs: Any, mode: bytes) -> Samples:
        """The inputs, split; raises Bypassed where they cannot be."""
        if self.side_effects:
            raise Bypassed("the module was attached with side_effects=True", expected=True)
        if mode in self._refusals:
            raise Bypassed(self._refusals[mode])
        try:
            leaves, tree = flatten((args, kwargs), self.is_tensor)
            arrays = [self.array(leaf) for leaf in leaves]
            is_split, count = self._which_split(args, kwargs, [leaf.shape for leaf in leaves])
        except InvalidType as error:
            raise Bypassed(f"an input cannot be hashed: {error}") from error
        if not count:
            raise Bypassed("the input has no samples: no tensor with a first dimension of at least 1", expected=True)
        way = self.way(tree, is_split, [leaf.dtype for leaf in leaves], arrays, mode)
        if refusal := self.proofs.refusal(way):
            raise Bypassed(refusal)
        return Samples(count, tree, leaves, is_split, self.keys(way, is_split, arrays), way)

    def way(
        self, tree: Tree, is_split: Sequence[bool], dtypes: Sequence[Any], arrays: Sequence[NDArray[Any]], mode: bytes
    ) -> tuple[bytes, ...]:
        """How the module is called: all that a key is made of but the inputs' contents and sizes, and the weights."""
        names = ",".join(str(getattr(dtype, "name", dtype)) for dtype in dtypes)  # numpy's and TensorFlow's are alike
        return mode, bytes(is_split), names.encode(), tree.encode(), bytes(array.ndim for array in arrays)

    def keys(self, way: tuple[bytes, ...], is_split: Sequence[bool], arrays: Sequence[NDArray[Any]]) -> list[bytes]:
        """One key per sample of the inputs' arrays.

        Raises:
            InvalidInput: arrays that should have a row per sample have different numbers of rows.
        """
        split = [array for array, mine in zip(arrays, is_split, strict=True) if mine]
        whole = [array for array, mine in zip(arrays, is_split, strict=True) if not mine]
        counts = [len(array) for array in split]
        if len(set(counts)) > 1:
            raise InvalidInput(
                f"every split input needs a row per sample, got {counts} rows; name the others in shared="
            )
        prefix = b"".join(struct.pack("<Q", len(field)) + field for field in (self.namespace(), *way))
        return sample_keys(prefix, split, whole, counts[0])

    def _which_split(self, args: Any, kwargs: Any, shapes: Sequence[Any]) -> tuple[list[bool], int]:
        """Per tensor, whether its rows are the samples'; and how many samples there are."""
        declared = [False] * len(flatten(args, self.is_tensor)[0])
        for name, value in kwargs.items():
            declared += [name in self.shared] * len(flatten(value, self.is_tensor)[0])
        pairs = list(zip(shapes, declared, strict=True))
        count = next((shape[0] for shape, shared in pairs if len(shape) and not shared), 0)
        return [len(shape) > 0 and shape[0] == count and not shared for shape, shared in pairs], count

    def _split_output(self, output: Any, count: int) -> list[tuple[Tree, list[Any], int]] | str:
        """(structure, rows, bytes) per computed sample, or why there is no such thing."""
        try:
            leaves, tree = flatten(output, self.is_tensor)
        except InvalidType as error:
            return f"the output cannot be kept per sample: {error}"
        if tree.has_number():
            return NUMBER_IN_OUTPUT
        shapes = [tuple(leaf.shape) for leaf in leaves]
        if not shapes or any(not shape or shape[0] != count for shape in shapes):
            return f"the output has no row per sample (for {count} samples its shapes are {shapes})"
        columns = [self.copies(leaf) for leaf in leaves]
        return [(tree, [row for row, _ in rows], sum(size for _, size in rows)) for rows in zip(*columns, strict=True)]

    def _assemble(self, lookup: EntryLookup, computed: Sequence[Any]) -> Any:
        """The whole result from what was found and what was computed, in the samples' order."""
        payloads = [
            computed[lookup.sources[sample]] if sample in lookup.sources else found
            for sample, found in enumerate(lookup.found)
        ]
        tree: Tree = payloads[0][0]
        rows = list(zip(*(payload[1] for payload in payloads), strict=True))
        if any(payload[0] is not tree and payload[0] != tree for payload in payloads) or any(
            row.shape != column[0].shape for column in rows for row in column
        ):
            raise Bypassed("the output's structure or shape depends on the other samples of its batch")
        return tree.rebuild([self.stack(column) for column in rows])
