"""Which tensors of a file are in memory: loaded on use, least recently used dropped first, under a limit in bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kvcache_core.errors import CacheFull
from kvcache_core.pool import BlockPool

__all__ = ["ParameterStats", "Residence", "UnitStats"]


@dataclass(slots=True)
class UnitStats:
    """What was found when a module was about to run.

    Attributes:
        hits: calls that found all of its weights in memory.
        misses: calls that read some or all of them.
        bytes_read: bytes read for it.
    """

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0

    @property
    def hit_ratio(self) -> float:
        """Hits over calls; 0.0 before the first call."""
        calls = self.hits + self.misses
        return self.hits / calls if calls else 0.0


@dataclass(frozen=True, slots=True)
class ParameterStats:
    """What a parameter cache holds and has done.

    Attributes:
        memory: the limit in bytes.
        bytes: bytes of weights in memory now.
        peak_bytes: the most there ever were.
        total_bytes: bytes of all weights.
        evicted: tensors that were dropped for room.
        units: {module name: its counters}.
    """

    memory: int
    bytes: int
    peak_bytes: int
    total_bytes: int
    evicted: int
    units: Mapping[str, UnitStats]

    def of(self, prefix: str) -> UnitStats:
        """The counters of a module and all modules inside it, added up."""
        total = UnitStats()
        for name, unit in self.units.items():
            if prefix in ("", name) or name.startswith(prefix + "."):
                total.hits += unit.hits
                total.misses += unit.misses
                total.bytes_read += unit.bytes_read
        return total

    @property
    def hits(self) -> int:
        """Module calls that read nothing."""
        return self.of("").hits

    @property
    def misses(self) -> int:
        """Module calls that read something."""
        return self.of("").misses

    @property
    def hit_ratio(self) -> float:
        """Hits over module calls."""
        return self.of("").hit_ratio

    @property
    def bytes_read(self) -> int:
        """Bytes read from the file."""
        return self.of("").bytes_read


@dataclass(slots=True)
class _Tensor:
    name: str
    nbytes: int
    block: int = 0


@dataclass(slots=True)
class _Unit:
    tensors: list[_Tensor]
    stats: UnitStats = field(default_factory=UnitStats)


class Residence:
    """The bookkeeping of a parameter cache: a tensor in memory is a block of a :class:`BlockPool`.

    A module that runs holds its tensors; what nobody holds is dropped, least recently used first, when room is needed.

    Invariants (:meth:`check_valid` asserts them):
        - a tensor is in memory exactly if it has a block, live while a module that uses it runs, else cached.
        - ``bytes`` is the sum of the sizes of the tensors in memory, and at most ``memory``.

    Args:
        memory: the limit in bytes.
        sizes: bytes of each tensor, by name.
        units: {module name: names of its tensors}.
        load: brings a tensor into memory.
        drop: gives its memory back.

    Example:
        >>> sizes = {"a": 6, "b": 6}
        >>> residence = Residence(8, sizes, {"one": ["a"], "two": ["b"]}, print, print)
        >>> residence.hold("one"), residence.let_go("one")
        a
        (False, None)
        >>> residence.hold("two")  # drops a
        a
        b
        False
    """

    def __init__(
        self,
        memory: int,
        sizes: Mapping[str, int],
        units: Mapping[str, Sequence[str]],
        load: Callable[[str], None],
        drop: Callable[[str], None],
    ) -> None:
        self.memory = memory
        self.bytes = self.peak_bytes = self.evicted = 0
        self._tensors = {name: _Tensor(name, nbytes) for name, nbytes in sizes.items()}
        self._units = {
            unit: _Unit([self._tensors[name] for name in dict.fromkeys(names)]) for unit, names in units.items()
        }
        self._pool = BlockPool(max(1, len(sizes)))
        self._at: dict[int, _Tensor] = {}
        self._load, self._drop = load, drop
        self._lock = threading.RLock()

    def hold(self, unit: str) -> bool:
        """Bring a module's tensors into memory and keep them there until :meth:`let_go`; whether all were.

        Raises:
            CacheFull: modules that are running hold too much; nothing is held for this one.
        """
        with self._lock:
            found = self._units[unit]
            held: list[int] = []
            try:
                for tensor in found.tensors:  # what is there first: it must not be dropped for what is not
                    if tensor.block:
                        self._pool.retain([tensor.block])
                        held.append(tensor.block)
                missing = [tensor for tensor in found.tensors if not tensor.block]
                self._make_room(sum(tensor.nbytes for tensor in missing), unit)
                for tensor in missing:
                    self._bring(tensor)
                    held.append(tensor.block)
                    found.stats.bytes_read += tensor.nbytes
            except BaseException:
                self._pool.release(held)
                raise
            found.stats.hits += not missing
            found.stats.misses += bool(missing)
            return not missing

    def let_go(self, unit: str) -> None:
        """The module has run."""
        with self._lock:
            self._pool.release([tensor.block for tensor in self._units[unit].tensors])

    def is_here(self, name: str) -> bool:
        """Whether a tensor is in memory."""
        return bool(self._tensors[name].block)

    def resize(self, memory: int) -> None:
        """Change the limit; what no longer fits is dropped.

        Raises:
            CacheFull: modules that are running hold more; nothing was changed.
        """
        with self._lock:
            held = sum(tensor.nbytes for block, tensor in self._at.items() if self._pool.refs(block))
            if held > memory:
                raise self._full(held, memory, "what is running")
            self.memory = memory
            self._make_room(0, "")

    def clear(self) -> None:
        """Drop whatever nobody holds."""
        with self._lock:
            for block in self._pool.drop_cached():
                self._forget(block)

    def stats(self) -> ParameterStats:
        """Counters and contents."""
        with self._lock:
            units = {name: UnitStats(*_fields(unit.stats)) for name, unit in self._units.items()}
            total = sum(tensor.nbytes for tensor in self._tensors.values())
            return ParameterStats(self.memory, self.bytes, self.peak_bytes, total, self.evicted, units)

    def check_valid(self) -> None:
        """Assert every invariant of the class docstring; for tests."""
        with self._lock:
            self._pool.check_valid()
            here = {tensor.name: tensor for tensor in self._tensors.values() if tensor.block}
            assert {tensor.name: tensor for tensor in self._at.values()} == here
            assert all(self._pool.is_findable(tensor.block) for tensor in here.values())
            assert self._pool.num_live + self._pool.num_cached == len(here)
            assert self.bytes == sum(tensor.nbytes for tensor in here.values()) <= self.memory

    def _bring(self, tensor: _Tensor) -> None:
        self._load(tensor.name)
        (tensor.block,), _ = self._pool.take(1)
        self._pool.mark_findable(tensor.block)
        self._at[tensor.block] = tensor
        self.bytes += tensor.nbytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def _make_room(self, nbytes: int, unit: str) -> None:
        while self.bytes + nbytes > self.memory:
            if not self._pool.num_cached:
                raise self._full(self.bytes + nbytes, self.memory, f"module {unit!r} and those around it")
            (block,) = self._pool.evict(1)
            self._forget(block)
            self.evicted += 1

    def _forget(self, block: int) -> None:
        tensor = self._at.pop(block)
        tensor.block = 0
        self.bytes -= tensor.nbytes
        self._drop(tensor.name)

    @staticmethod
    def _full(needed: int, memory: int, who: str) -> CacheFull:
        return CacheFull(
            f"{who} need {needed} bytes of weights at a time, the limit is {memory}; give more memory",
            needed=needed,
            available=memory,
            capacity=memory,
        )


def _fields(stats: UnitStats) -> tuple[int, int, int]:
    return stats.hits, stats.misses, stats.bytes_read
