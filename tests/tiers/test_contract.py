"""One contract for every tier, also those that the library does not ship."""

from __future__ import annotations

import itertools
from typing import Any

import fsspec
import pytest

from examples.fsspec_tier import FileSystemTier
from kvcache_core.testing import check_tier
from kvcache_core.tier_disk import DiskTier
from kvcache_core.tiers import RamTier, Tier, open_tier
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
        return found

    def put_many(self, items: Any):
        if self.fault == "drops":
            return [*super().put_many(items), *items[:1]]
        if self.fault == "mixes":
            return super().put_many([(key, items[0][1]) for key, _ in items])
        return super().put_many(items)

    def contains(self, key):
        return self.fault == "claims" or super().contains(key)

    def delete_many(self, keys):
        return super().delete_many([]) if self.fault == "keeps" else super().delete_many(keys)


@pytest.mark.parametrize("fault", ["order", "stale", "empty is none", "drops", "mixes", "claims", "keeps"])
def test_a_broken_tier_is_found(fault):
    with pytest.raises(AssertionError, match="a tier must"):
        check_tier(lambda: Faulty(fault))


def test_a_disk_tier_is_the_same_file_for_all_of_a_process(tmp_path):
    one, other = DiskTier(tmp_path, 1 << 21), DiskTier(tmp_path, 1 << 21)
    one.put_many([(b"a", b"1")])
    assert other.get_many([b"a"]) == [b"1"]
    one.close()
    assert other.get_many([b"a"]) == [b"1"]
    other.close()
