"""Which computed results are worth a place in the cache."""

from __future__ import annotations

import random
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

from kvcache_core.errors import InvalidInput, InvalidType

__all__ = ["Admission", "AfterSightings", "AllAdmitted", "ChainAdmission", "Sampled", "admission"]


class Admission(Protocol):
    """A rule that is asked once for each result that was computed and could be kept."""

    def admit(self, key: bytes) -> bool:
        """Whether the result under ``key`` is kept."""
        ...


class AllAdmitted:
    """Keep every result: the default."""

    def admit(self, key: bytes) -> bool:
        """Always true."""
        return True

    def __repr__(self) -> str:
        return "AllAdmitted()"


class Sampled:
    """Keep a random share of the results.

    Each computation is drawn anew, so what comes again and again gets in sooner or later, and what comes once
    mostly stays out.

    Args:
        share: probability of keeping one, 0 < share <= 1.
        seed: for the same draws in every run.

    Raises:
        InvalidInput: a share outside that range.

    Example:
        >>> rule = Sampled(0.2, seed=0)
        >>> sum(rule.admit(b"key") for _ in range(1000))
        201
    """

    def __init__(self, share: float, *, seed: int | None = None) -> None:
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise InvalidInput(f"the share to keep must be more than 0 and at most 1, got {share!r}")
        self.share = float(share)
        self._random = random.Random(seed)

    def admit(self, key: bytes) -> bool:
        """True with probability ``share``."""
        return self._random.random() < self.share

    def __repr__(self) -> str:
        return f"Sampled({self.share})"


class AfterSightings:
    """Keep a result when it is computed for the n-th time: what is asked once never takes a place.

    Args:
        count: n; 1 keeps everything.
        remember: how many keys are counted at most; the least recently seen is forgotten first. (A key seen
            again behind so many others would not have stayed in the cache either.)

    Raises:
        InvalidInput: a number below 1.

    Example:
        >>> rule = AfterSightings(2)
        >>> rule.admit(b"a"), rule.admit(b"b"), rule.admit(b"a")
        (False, False, True)
    """

    def __init__(self, count: int, *, remember: int = 65536) -> None:
        for name, value in (("count", count), ("remember", remember)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidInput(f"{name} must be a whole number, at least 1; got {value!r}")
        self.count = count
        self.remember = remember
        self._seen: OrderedDict[bytes, int] = OrderedDict()
        self._lock = threading.Lock()

    def admit(self, key: bytes) -> bool:
        """True from the ``count``-th sighting on; a key that got in starts from zero when it is evicted."""
        with self._lock:
            seen = self._seen.pop(key, 0) + 1
            if seen >= self.count:
                return True
            self._seen[key] = seen
            if len(self._seen) > self.remember:
                self._seen.popitem(last=False)
            return False

    def __repr__(self) -> str:
        return f"AfterSightings({self.count})"


@dataclass(slots=True)
class _Decision:
    admitted: bool
    groups: set[int]
    continued: bool = False


class ChainAdmission:
    """A rule for blocks of tokens, which are worth something only together with the blocks before them.

    It is asked when a block is published, that is once for each time that it was computed; the layer groups of a block
    share the answer. With :class:`Sampled`, a block that continues another one takes over its answer: a prompt is drawn
    once, and so is each of several continuations. Whatever the rule, a block goes down with the first one behind it
    that does.

    Args:
        rule: asked with a block's chained key.
        remember: how many answers are kept.
    """

    def __init__(self, rule: Admission, *, remember: int = 65536) -> None:
        self.asks = not isinstance(rule, AllAdmitted)
        self._rule = rule
        self._remember = remember
        self._decided: OrderedDict[bytes, _Decision] = OrderedDict()
        self._lock = threading.Lock()

    def published(self, group: int, key: bytes, parent: bytes) -> bool:
        """Whether a block of layer group ``group``, computed just now, is worth writing."""
        if not self.asks:
            return True
        with self._lock:
            known = self._decided.get(key)
            if known is not None and group not in known.groups:
                known.groups.add(group)
                return known.admitted
            before = self._decided.get(parent)
            if isinstance(self._rule, Sampled) and before is not None and not before.continued:
                admitted = before.admitted
            else:
                admitted = self._rule.admit(key)
            if before is not None:
                before.continued = True
            self._put(key, _Decision(admitted, {group}))
            return admitted

    def evicted(self, key: bytes, parent: bytes) -> bool:
        """Whether a block that is given up is worth writing."""
        if not self.asks:
            return True
        with self._lock:
            known = self._decided.get(key)
            if known is None:
                known = self._put(key, _Decision(self._rule.admit(key), set()))
            before = self._decided.get(parent)
            if known.admitted and before is not None:
                before.admitted = True
            return known.admitted

    def _put(self, key: bytes, decision: _Decision) -> _Decision:
        self._decided.pop(key, None)
        self._decided[key] = decision
        if len(self._decided) > self._remember:
            self._decided.popitem(last=False)
        return decision


def admission(rule: Admission | str) -> Admission:
    """The rule that a caller means: ``"all"`` or an object with ``admit(key)``.

    Raises:
        InvalidType: anything else.
    """
    if rule == "all":
        return AllAdmitted()
    if isinstance(rule, str) or not callable(getattr(rule, "admit", None)):
        raise InvalidType(f"admit must be 'all', Sampled(share), AfterSightings(n) or have admit(key); got {rule!r}")
    return rule
