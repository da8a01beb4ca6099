"""What every tier must do, as one check: for the library's own tiers and for yours."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from kvcache_core.errors import InvalidType
from kvcache_core.tiers import Tier

__all__ = ["check_tier"]


def check_tier(make: Callable[[], Tier], *, value_bytes: int = 5000, seed: int = 0) -> None:
    """Check a tier of your own.

    Args:
        make: makes an empty tier with room for 200 values; called several times, the tiers are closed.
        value_bytes: size of the values to try, besides small ones.
        seed: of the random values.

    Raises:
        AssertionError: it says which rule is broken.
        InvalidType: ``make`` is no function, or what it makes is no tier.

    Example:
        >>> from kvcache_core.tiers import RamTier
        >>> check_tier(lambda: RamTier(2_000_000))
    """
    if not callable(make):
        raise InvalidType(f"check_tier needs a function that makes a tier, lambda: MyTier(...); got {make!r}")
    for rule in (_round_trip, _overwrite, _listing, _reading_inside_a_lease, _threads, _closing):
        tier = make()
        if not isinstance(tier, Tier):
            raise InvalidType(f"a tier is a subclass of kvcache_core.tiers.Tier; make gave {tier!r}")
        try:
            rule(tier, np.random.default_rng(seed), value_bytes)
        finally:
            tier.close()


def _expect(true: bool, rule: str, found: Any = "") -> None:
    if not true:
        raise AssertionError(f"a tier must {rule}{f'; found {found!r}' if found != '' else ''}")


def _pairs(random: np.random.Generator, count: int, size: int) -> list[tuple[bytes, bytes]]:
    sizes = [0, 1, 7, size, size]
    return [
        (random.bytes(int(random.integers(1, 40))) + b"%d" % at, random.bytes(sizes[at % 5])) for at in range(count)
    ]


def _read(tier: Tier, keys: Iterable[bytes]) -> list[bytes | None]:
    keys = list(keys)
    found = tier.get_many(keys)
    _expect(isinstance(found, list), "return a list from get_many", found)
    _expect(len(found) == len(keys), "return as many values as there are keys, None for what it has not", len(found))
    return [None if value is None else bytes(value) for value in found]


def _round_trip(tier: Tier, random: np.random.Generator, size: int) -> None:
    pairs = _pairs(random, 50, size)
    _expect(_read(tier, [key for key, _ in pairs]) == [None] * 50, "be empty when it is new")
    _expect(_read(tier, []) == [], "answer an empty question with an empty list")
    dropped = tier.put_many([(key, memoryview(bytearray(value))) for key, value in pairs])
    _expect(isinstance(dropped, list), "return a list from put_many: what it dropped for room, [] for nothing", dropped)
    _expect(dropped == [], "drop nothing while there is room", len(dropped))
    tier.put_many([])
    tier.flush()
    keys = [key for key, _ in pairs]
    random.shuffle(keys)
    asked = [key for pair in zip(keys, [key + b"x" for key in keys], strict=True) for key in pair]
    expected = [dict(pairs).get(key) for key in asked]
    _expect(_read(tier, asked) == expected, "return each value under its own key, and None where there is none")
    _expect(_read(tier, [*asked, *asked]) == [*expected, *expected], "answer a key that is asked for twice twice")
    peeked = [tier.peek(key) for key in (keys[0], keys[0] + b"x")]
    found = [None if value is None else bytes(value) for value in peeked]
    _expect(found == [dict(pairs)[keys[0]], None], "show the same value to who only looks (peek)")
    _expect(all(not tier.contains(key + b"x") for key in keys), "not claim what it never saw")
    if tier.nbytes() is not None:
        _expect((tier.nbytes() or 0) >= sum(len(value) for _, value in pairs), "count the bytes it holds")


def _overwrite(tier: Tier, random: np.random.Generator, size: int) -> None:
    first = random.bytes(size)
    tier.put_many([(b"a", first), (b"b", b"other")])
    tier.put_many([(b"a", b"short"), (b"c", first)])
    _expect(_read(tier, [b"a", b"b", b"c"]) == [b"short", b"other", first], "replace a value and no other")
    tier.put_many([(b"a", b"one"), (b"a", b"two")])
    _expect(_read(tier, [b"a"]) == [b"two"], "keep the later of two values put together")


def _listing(tier: Tier, random: np.random.Generator, size: int) -> None:
    pairs = _pairs(random, 12, size)
    tier.put_many(pairs)
    try:
        found = {item.key: (item.nbytes, bytes(item.head)) for item in tier.items(4)}
        expected = {key: (len(value), value[:4]) for key, value in pairs}
        _expect(found == expected, "list its keys, sizes and first bytes, if it lists")
        _expect(tier.delete_many([pairs[0][0], b"never there"]) == 1, "count what it deleted, if it deletes")
    except NotImplementedError:
        return
    rest = [None, *(value for _, value in pairs[1:])]
    _expect(_read(tier, [key for key, _ in pairs]) == rest, "delete what it was told to and nothing else")


def _reading_inside_a_lease(tier: Tier, random: np.random.Generator, size: int) -> None:
    pairs = _pairs(random, 10, size)
    tier.put_many(pairs)
    with tier.lease():
        first = tier.get_many([key for key, _ in pairs])
        tier.get_many([pairs[0][0], b"never there"])
        found = [bytes(value) for value in first if value is not None]
    _expect(found == [value for _, value in pairs], "keep values valid inside a lease")


def _threads(tier: Tier, random: np.random.Generator, size: int) -> None:
    """Eight threads write and read eight keys: a value is always one that was written under its key."""
    values = [bytes([at]) * size for at in range(8)]
    wrong: list[str] = []

    def work(number: int) -> None:
        draw = np.random.default_rng(number)
        try:
            for _ in range(20):
                at = int(draw.integers(8))
                tier.put_many([(b"key%d" % at, values[at])])
                for other, value in enumerate(_read(tier, [b"key%d" % key for key in range(8)])):
                    if value not in (None, values[other]):
                        wrong.append(f"key{other}")
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _expect(not wrong, "serve many threads", wrong[:3])


def _closing(tier: Tier, random: np.random.Generator, size: int) -> None:
    tier.put_many([(b"a", random.bytes(size))])
    tier.flush()
    tier.close()
    tier.close()
