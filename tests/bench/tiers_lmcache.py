"""Store and retrieve bandwidth of the RAM and disk tiers beside LMCache's local CPU and disk back ends.

It is no part of `make bench`: LMCache's requirements do not fit this project's environment, so it runs in its own,

    python -m venv lmcache-venv
    lmcache-venv/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    lmcache-venv/bin/pip install --no-deps lmcache==0.5.6
    lmcache-venv/bin/pip install "numpy<=2.2.6" "transformers>=5.4" prometheus_client==0.24.1 \\
        opentelemetry-api==1.40.0 opentelemetry-sdk==1.40.0 numba nvtx pyyaml msgspec psutil pyzmq aiofiles aiofile \\
        aiohttp httpx requests blake3 sortedcontainers cachetools py-cpuinfo safetensors redis fastapi uvicorn \\
        cryptography lmdb rich
    lmcache-venv/bin/python tests/bench/tiers_lmcache.py

The packages left out of LMCache's list are CUDA's and the cloud stores': these two back ends ask for none of them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from measure import Row, alternate, seconds  # noqa: E402

from kvcache_core import BlockLayout, LayerSpec  # noqa: E402
from kvcache_core.opentiers import tier_key  # noqa: E402
from kvcache_core.poolitems import block_codecs  # noqa: E402
from kvcache_core.tiers import RamTier, Tier, open_tier  # noqa: E402

LAYERS, HEADS, SIZE, TOKENS = 30, 3, 64, 4096  # a prompt's K/V in SmolLM2-135M
PEER = "LMCache"
UNCHECKED = "ours, no header or checksum"
BATCH_BYTES = 24 << 20


class Store(Protocol):
    """Where blocks are put and found again."""

    def store(self) -> None:
        """Put every block, until it can be found."""

    def retrieve(self) -> None:
        """Copy every block out again."""

    def clear(self) -> None:
        """Forget them."""


class Ours:
    """A tier with what a cache does around it: header and checksum when it writes, verified when it reads."""

    checked = True

    def __init__(self, tier: Tier, blocks: np.ndarray, found: np.ndarray, block_size: int) -> None:
        layout = BlockLayout([LayerSpec.attention(HEADS, SIZE)] * LAYERS, block_size)
        self.tier, self.blocks, self.found = tier, blocks, found
        self.codec = block_codecs(layout, bytes(16), b"", b"")[0]
        self.keys = [number.to_bytes(16, "little") for number in range(len(blocks))]
        self.tier_keys = [tier_key("block", 0, key) for key in self.keys]
        self.batch = max(1, BATCH_BYTES // blocks[0].nbytes)

    def store(self) -> None:
        for at in range(0, len(self.blocks), self.batch):
            part = slice(at, at + self.batch)
            values = [
                self.codec.encode(key, block.data, 0) if self.checked else bytes(block.data)
                for key, block in zip(self.keys[part], self.blocks[part], strict=True)
            ]
            self.tier.put_many(list(zip(self.tier_keys[part], values, strict=True)))

    def retrieve(self) -> None:
        with self.tier.lease():
            values = self.tier.get_many(self.tier_keys)
            for key, value, out in zip(self.keys, values, self.found, strict=True):
                if value is None:
                    raise AssertionError("a block is missing")
                out[:] = np.frombuffer(self.codec.decode(key, value) if self.checked else value, np.uint8)

    def clear(self) -> None:
        self.tier.delete_many(self.tier_keys)


class Unchecked(Ours):
    """The same tier without them: what the difference costs."""

    checked = False


class LMCache:
    """`LocalCPUBackend`, and with a folder `LocalDiskBackend`: memory objects are filled, and copied out of."""

    def __init__(self, blocks: np.ndarray, found: np.ndarray, block_size: int, folder: str | None = None) -> None:
        from lmcache.utils import CacheEngineKey
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.metadata import LMCacheMetadata
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
        from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend

        config = LMCacheEngineConfig.from_defaults(
            chunk_size=block_size,
            local_cpu=folder is None,
            max_local_cpu_size=1.0,
            local_disk=folder,
            max_local_disk_size=64.0,
        )
        shape = (LAYERS, 2, block_size, HEADS, SIZE)
        metadata = LMCacheMetadata("smol", 1, 1, 0, 0, torch.float32, shape, chunk_size=block_size)
        self.shape = metadata.get_shapes()[0]
        self.blocks = [torch.from_numpy(block).view(torch.float32).view(self.shape) for block in blocks]
        self.found = [torch.from_numpy(out).view(torch.float32).view(self.shape) for out in found]
        self.keys = [CacheEngineKey("smol", 1, 0, number, torch.float32) for number in range(len(blocks))]
        self.cpu = LocalCPUBackend(config, metadata, dst_device="cpu")
        self.loop = asyncio.new_event_loop()
        self.disk: Any = None
        if folder is not None:
            threading.Thread(target=self.loop.run_forever, daemon=True).start()
            self.disk = LocalDiskBackend(config, self.loop, self.cpu, dst_device="cpu", metadata=metadata)

    def store(self) -> None:
        backend = self.cpu if self.disk is None else self.disk
        for key, block in zip(self.keys, self.blocks, strict=True):
            memory = self.cpu.allocate(self.shape, torch.float32)
            memory.tensor.copy_(block)
            backend.submit_put_task(key, memory)
            memory.ref_count_down()
        while self.disk is not None and any(map(self.disk.exists_in_put_tasks, self.keys)):
            time.sleep(0.0005)

    def retrieve(self) -> None:
        if self.disk is None:
            memories = [self.cpu.get_blocking(key) for key in self.keys]
        else:
            memories = self.disk.batched_get_blocking(self.keys)
        for memory, out in zip(memories, self.found, strict=True):
            out.copy_(memory.tensor)
            memory.ref_count_down()

    def clear(self) -> None:
        backend = self.cpu if self.disk is None else self.disk
        for key in self.keys:
            backend.remove(key)

    def close(self) -> None:
        if self.disk is not None:
            self.disk.close()
            self.loop.call_soon_threadsafe(self.loop.stop)


def compare(case: str, stores: dict[str, Store], blocks: np.ndarray, found: np.ndarray, runs: int) -> list[Row]:
    """Both directions; what comes back is compared with what was put."""
    size = blocks.nbytes / 1e9

    def storing(store: Store) -> Callable[[], float]:
        def run() -> float:
            store.clear()
            return seconds(store.store) / size

        return run

    def retrieving(store: Store) -> Callable[[], float]:
        def run() -> float:
            store.clear()
            store.store()
            found[:] = 0
            took = seconds(store.retrieve) / size
            if not np.array_equal(found, blocks):
                raise AssertionError("other bytes came back")
            return took

        return run

    return [
        Row.of(f"{case}: {what}", "s per GB", alternate({who: way(one) for who, one in stores.items()}, runs, what))
        for what, way in (("store", storing), ("retrieve", retrieving))
    ]


def main(*, quick: bool = False) -> list[Row]:
    """Blocks of 16 tokens, our default, and of 256, LMCache's."""
    rows = []
    for block_size in (16, 256):
        shape = (TOKENS // block_size, LAYERS * 2 * block_size * HEADS * SIZE * 4)
        blocks = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
        found = np.empty_like(blocks)
        with tempfile.TemporaryDirectory() as here, tempfile.TemporaryDirectory() as there:
            disk = open_tier(f"disk:{here}?max=2GiB&sync=off")
            for name, tier, folder in (("RAM", RamTier(1 << 30), None), ("disk", disk, there)):
                peer = LMCache(blocks, found, block_size, folder)
                case = f"{name}, blocks of {block_size} tokens"
                stores: dict[str, Store] = {
                    "ours": Ours(tier, blocks, found, block_size),
                    UNCHECKED: Unchecked(tier, blocks, found, block_size),
                    PEER: peer,
                }
                rows += compare(case, stores, blocks, found, 3 if quick else 7)
                peer.close()
                tier.close()
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    for row in main(quick=parser.parse_args().quick):
        print(f"{row.case:34} ours {1 / row.ours.median:5.2f} GB/s")
        for name, peer in row.peers.items():
            ratio = row.ratios[name]
            print(
                f"{name:>34} {1 / peer.median:10.2f} GB/s; "
                f"ours takes {ratio.median:.2f} [{ratio.low:.2f}-{ratio.high:.2f}] of its time"
            )
