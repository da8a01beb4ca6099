"""One contract for every tier, also those that the library does not ship."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import fsspec
import pytest

from examples.fsspec_tier import FileSystemTier
from kvcache_core.errors import InvalidType
from kvcache_core.testing import check_tier
from kvcache_core.tier_disk import DiskTier
from kvcache_core.tiers import RamTier, Tier, open_tier
from tests.tiers.test_tiering import Cache, turns
from tests.tiers.test_valkey import cluster_of_three


def test_ram():
    check_tier(lambda: RamTier(10_000_000))


def test_disk(tmp_path):
    count = itertools.count()
    check_tier(lambda: open_tier(f"disk:{tmp_path / str(next(count))}?max=64MiB&sync=off"))


@pytest.mark.parametrize("split", ["", "&split=1kB"], ids=["whole", "in parts"])
def test_valkey(valkey_server, valkey_url, split):
    def make() -> Tier:
        with valkey_server.client() as client:
            client.flushall()
        return open_tier(valkey_url + split)

    check_tier(make)


def test_a_cluster():
    with cluster_of_three() as servers:
        clients = [server.client() for server in servers]

        def make() -> Tier:
            for client in clients:
                client.flushall()
            return open_tier(f"valkey://127.0.0.1:{servers[0].port}/0?timeout=5&split=3kB&cluster=on")

        check_tier(make)
        for client in clients:
            client.close()


@pytest.mark.parametrize("kind", ["memory", "local"])
def test_a_tier_of_somebody_else(tmp_path, kind):
    count = itertools.count()

    def make() -> Tier:
        root = f"/contract-{next(count)}" if kind == "memory" else str(tmp_path / str(next(count)))
        return FileSystemTier(fsspec.filesystem(kind), root)

    check_tier(make)


# The check can fail ----------------------------------------------------------------------------------------------


class Faulty(RamTier):
    def __init__(self, fault: str) -> None:
        super().__init__(10_000_000)
        self.fault = fault

    def get_many(self, keys):
        found = super().get_many(keys)
        if self.fault == "order":
            return sorted(found, key=lambda value: value is None)
        if self.fault == "stale" and found == [b"two"]:
            return [b"one"]
        if self.fault == "empty is none":
            return [value or None for value in found]
        if self.fault == "short":
            return [value for value in found if value is not None]
        if self.fault == "generator":
            return (value for value in found)
        return found

    def put_many(self, items: Any):
        if self.fault == "drops":
            return [*super().put_many(items), *items[:1]]
        if self.fault == "returns nothing":
            super().put_many(items)
            return None
        if self.fault == "mixes":
            return super().put_many([(key, items[0][1]) for key, _ in items])
        return super().put_many(items)

    def peek(self, key):
        return b"" if self.fault == "peeks" else super().peek(key)

    def contains(self, key):
        return self.fault == "claims" or super().contains(key)

    def delete_many(self, keys):
        return super().delete_many([]) if self.fault == "keeps" else super().delete_many(keys)


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        ("order", "return each value under its own key"),
        ("stale", "keep the later of two values"),
        ("empty is none", "return each value under its own key"),
        ("short", "return as many values as there are keys, None for what it has not; found 0"),
        ("generator", "return a list from get_many; found <generator"),
        ("drops", "drop nothing while there is room; found 1"),
        ("returns nothing", "return a list from put_many: what it dropped for room, .* for nothing; found None"),
        ("mixes", "return each value under its own key"),
        ("peeks", "show the same value to who only looks"),
        ("claims", "not claim what it never saw"),
        ("keeps", "count what it deleted"),
    ],
)
def test_a_broken_tier_is_found(fault, rule):
    with pytest.raises(AssertionError, match=f"^a tier must {rule}"):
        check_tier(lambda: Faulty(fault))


def test_what_is_no_tier():
    with pytest.raises(InvalidType, match="a function that makes a tier"):
        check_tier(RamTier(10_000_000))  # type: ignore[arg-type]
    with pytest.raises(InvalidType, match=r"a subclass of kvcache_core.tiers.Tier; make gave None"):
        check_tier(lambda: None)  # type: ignore[arg-type,return-value]


def test_the_tier_in_the_documentation(tmp_path, monkeypatch):
    """It passes, and a cache uses it: other processes find there what it has written."""
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "many-machines.md").read_text()
    code = re.search(r"## A tier of your own\n.*?```py\n(.*?)```", page, re.DOTALL)
    assert code
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code[1], names)
    names["test_my_tier"](tmp_path)
    tier = names["SqliteTier"](tmp_path / "kvcache.db")
    cache = Cache(6, ["ram:12kB", tier])
    assert turns(cache, 4) == [0, 0, 20, 20]
    assert cache.stack.close()
    again = Cache(6, [tier])
    assert turns(again, 2) == [20, 20]
    assert again.stack.close()


def test_the_example_is_short():
    path = Path(__file__).parents[2] / "examples" / "fsspec_tier.py"
    assert len(path.read_text().splitlines()) < 80


def test_a_disk_tier_is_the_same_file_for_all_of_a_process(tmp_path):
    one, other = DiskTier(tmp_path, 1 << 21), DiskTier(tmp_path, 1 << 21)
    one.put_many([(b"a", b"1")])
    assert other.get_many([b"a"]) == [b"1"]
    one.close()
    assert other.get_many([b"a"]) == [b"1"]
    other.close()
