"""What an attached module is shown to be, by running it: that each sample's result is its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from numpy.typing import NDArray

from kvcache_core.mixing import Proofs, mixed, moved, part_tolerance, parts_of, raising
from kvcache_core.samples import Samples
from kvcache_core.tree import flatten

__all__ = ["Proving"]

Numbers = tuple[str, NDArray[Any]]


class Proving(ABC):
    """What an adapter does with tensors, and the proof that a module computes each sample by itself."""

    def __init__(self, check_in_parts: bool | None) -> None:
        self.proofs = Proofs()
        self._check_in_parts = check_in_parts

    def is_checked(self) -> bool:
        """Whether a first batch is computed in parts, too."""
        return self.may_mix() if self._check_in_parts is None else self._check_in_parts

    @abstractmethod
    def may_mix(self) -> bool:
        """Whether a layer is known to take time in front, or to compute with the statistics of the batch."""

    @abstractmethod
    def is_tensor(self, value: Any) -> bool:
        """Whether a leaf is a tensor of the framework."""

    @abstractmethod
    def numbers(self, tensor: Any) -> Numbers:
        """A tensor's dtype by name, and a copy of its values [B, ...] in numpy's dtypes; complex ones as pairs."""

    @abstractmethod
    def precisions(self) -> Iterable[str]:
        """Names of the dtypes that the module computes in, besides those of its inputs and outputs."""

    @abstractmethod
    def take(self, tensor: Any, rows: Sequence[int]) -> Any:
        """Rows of a tensor."""

    @abstractmethod
    def compute(self, original: Callable[..., Any], args: Any, kwargs: Any, leaves: Sequence[Any]) -> tuple[Any, str]:
        """Run the module on inputs whose tensors are ``leaves``.

        Returns:
            Its output, and why it must not be kept, or "".
        """

    def prove(self, original: Callable[..., Any], samples: Samples, output: Any) -> str | None:
        """Run the module on parts of a batch whose whole output is known, and compare.

        Returns:
            Why its samples may not be kept; "" if nothing speaks against it; None if the batch cannot show it.
        """
        parts = parts_of(samples.keys)
        if not parts:
            return None
        leaves, tree = flatten(output, self.is_tensor)
        whole = [self.numbers(leaf) for leaf in leaves]
        inputs = [leaf for leaf, mine in zip(samples.leaves, samples.is_split, strict=True) if mine]
        dtypes = {self.numbers(leaf[:0])[0] for leaf in inputs}
        for rows in parts:
            alone = f"{len(set(rows))} of {samples.count} samples alone"
            some = samples.subset(self.take, rows)
            args, kwargs = samples.tree.rebuild(some)
            try:
                part, problem = self.compute(original, args, kwargs, some)
                found, shape = flatten(part, self.is_tensor)
            except Exception as error:  # whatever a module raises that needs the other samples
                return mixed(f"{alone} {raising(error)}")
            if problem:
                return problem
            if shape != tree:
                return mixed(f"for {alone}, the output has another structure")
            if why := self.why_mixed(whole, [self.numbers(leaf) for leaf in found], rows, dtypes):
                return why
        return ""

    def together(self, original: Callable[..., Any], samples: Samples, count: int, error: Exception) -> tuple[Any, str]:
        """All samples' output where the module raised for ``count`` of them, and why it is left out from now on.

        Raises:
            Exception: it raises for all of them, too. So it does without the cache: nothing speaks against the module.
        """
        args, kwargs = samples.tree.rebuild(samples.leaves)
        output, _ = self.compute(original, args, kwargs, samples.leaves)
        reason = mixed(f"{count} of {samples.count} samples alone {raising(error)}")
        self.proofs.settle(samples.way, reason)
        return output, reason

    def why_mixed(
        self, whole: Sequence[Numbers], part: Sequence[Numbers], rows: Sequence[int], dtypes: Iterable[str]
    ) -> str:
        """Why the output ``part`` of the samples ``rows`` alone is not that of the ``whole`` batch; "" if it is.

        Args:
            whole, part: each output's tensors as :meth:`numbers` gives them.
            rows: the samples.
            dtypes: those of the inputs.
        """
        coarsest = {*self.precisions(), *dtypes}
        for number, ((name, values), (other, again)) in enumerate(zip(whole, part, strict=True)):
            expected, alone = values[rows], f"for {len(set(rows))} of {len(values)} samples alone, output {number}"
            if (other, again.shape) != (name, expected.shape):
                return mixed(f"{alone} is {other} {again.shape}, not {name} {expected.shape}")
            tolerance, distance = part_tolerance({name, *coarsest}), moved(expected, again)
            if distance > tolerance:
                return mixed(
                    f"{alone} of one differs by {distance:.2g} of its size, by rounding {tolerance:.2g} at most"
                )
        return ""
