"""Activations over tiers: evicted results come back, another process finds them, and nothing else does."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from torch import nn

import kvcache_keras
import kvcache_torch
from kvcache_core import KVCacheWarning, UsageError
from kvcache_core.blockformat import read_header
from kvcache_core.tiers import RamTier

computed: list[int] = []


def coarse(values: Any, unit: float) -> Any:
    """Multiples of ``unit``, small ones: products and sums of them are exact in any order, in bfloat16 factors too.

    A row's float32 result may depend on how many rows are computed with it, and of a batch that is found in part only
    the rest is computed. Of such values it does not, so all that is found can be compared bit by bit.
    """
    return np.round(np.asarray(values) / unit).astype(np.float32) * np.float32(unit)


def draw(seed: int) -> np.ndarray[Any, Any]:
    """A batch of four samples [4, 3]."""
    return coarse(np.random.default_rng(seed).standard_normal((4, 3)), 2**-4)


@dataclasses.dataclass
class Result:
    hidden: torch.Tensor
    extra: dict[str, Any]


class Trunk(nn.Module):
    """A module with structured output in many dtypes, which counts the samples that it computes."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 4)
        with torch.no_grad():
            for parameter in self.linear.parameters():
                parameter.copy_(torch.from_numpy(coarse(parameter, 2**-6)))
        self.factor = factor

    def forward(self, x: torch.Tensor) -> Result:
        computed.append(len(x))
        h = self.linear(x) * self.factor
        extra = {"positive": h > 0, "wide": h.double(), "half": h.bfloat16(), "sum": h.sum(-1).long(), "note": "a"}
        return Result(h, extra)


class Layer(keras.layers.Layer):
    """The same in Keras."""

    def __init__(self, factor: float = 2.0, **options: Any) -> None:
        super().__init__(**options)
        self.factor = factor
        self.dense = keras.layers.Dense(4, kernel_initializer=keras.initializers.RandomNormal(seed=1))
        self.dense.build((None, 3))
        self.dense.kernel.assign(coarse(self.dense.kernel, 2**-6))

    def call(self, x: Any) -> Any:
        tf.numpy_function(lambda rows: computed.append(int(rows)) or np.int64(0), [tf.shape(x)[0]], tf.int64)
        h = self.dense(x) * self.factor
        return {"hidden": h, "positive": h > 0, "half": tf.cast(h, tf.bfloat16), "wide": tf.cast(h, tf.float64)}


class Torch:
    KVCache = kvcache_torch.KVCache

    @staticmethod
    def module(factor: float = 2.0) -> Any:
        return Trunk(factor).eval()

    @staticmethod
    def batch(seed: int) -> Any:
        return torch.from_numpy(draw(seed))

    @staticmethod
    def flat(result: Any) -> list[Any]:
        return [result.hidden, *(value for value in result.extra.values() if isinstance(value, torch.Tensor))]

    @staticmethod
    def equal(one: Any, other: Any) -> bool:
        return one.dtype == other.dtype and torch.equal(one, other)

    @staticmethod
    def change(module: Any) -> None:
        with torch.no_grad():
            module.linear.bias.flatten()[0].add_(1)


class Keras:
    KVCache = kvcache_keras.KVCache

    @staticmethod
    def module(factor: float = 2.0) -> Any:
        return Layer(factor)

    @staticmethod
    def batch(seed: int) -> Any:
        return tf.constant(draw(seed))

    @staticmethod
    def flat(result: Any) -> list[Any]:
        return [result[name] for name in sorted(result)]

    @staticmethod
    def equal(one: Any, other: Any) -> bool:
        return one.dtype == other.dtype and bool(tf.reduce_all(one == other))

    @staticmethod
    def change(module: Any) -> None:
        module.dense.bias.assign_add([1.0, 0.0, 0.0, 0.0])


BOTH = pytest.mark.parametrize("kit", [Torch, Keras], ids=["torch", "keras"])


def same(kit: Any, found: Any, expected: Any) -> bool:
    assert type(found) is type(expected)
    return all(kit.equal(one, other) for one, other in zip(kit.flat(found), kit.flat(expected), strict=True))


def run(kit: Any, cache: Any, module: Any, seed: int, within: bool = True) -> int:
    """Call the module through the cache, compare with a call outside; returns the samples computed."""
    expected = module(kit.batch(seed))
    computed.clear()
    with torch.no_grad(), cache:
        found = module(kit.batch(seed))
    assert same(kit, found, expected)
    cache.sites.entries.check_valid()
    return sum(computed)


def attached(kit: Any, tiers: Any, factor: float = 2.0, identity: str | None = None, **options: Any) -> Any:
    module = kit.module(factor)
    cache = kit.KVCache(6, tiers=tiers, promote="always", **options)
    return cache, cache.attach(module, kind="activation", identity=identity)


@BOTH
def test_evicted_results_come_back(kit):
    cache, module = attached(kit, ["ram:1MiB"])
    for seed in range(3):
        assert run(kit, cache, module, seed) == 4
        assert cache.flush(5)
    assert cache.stats().evicted_entries == 6
    assert [run(kit, cache, module, seed) for seed in range(3)] == [0, 0, 0]
    assert cache.tier_stats()[0].hits > 4
    assert cache.close()


@BOTH
def test_another_process_finds_them_once_it_knows_the_structure(kit, tmp_path):
    url = f"disk:{tmp_path}?max=8MiB&sync=off"
    cache, module = attached(kit, [url])
    for seed in range(3):
        run(kit, cache, module, seed)
    assert cache.close()
    other, again = attached(kit, ["ram:1MiB", url])
    assert run(kit, other, again, 7) == 4  # its first call is computed whole
    assert [run(kit, other, again, seed) for seed in range(3)] == [0, 0, 0]
    assert other.stats().hit_entries == 12
    assert other.close()


ANOTHER = """
import sys
from tests.tiers.test_activations import Keras, Torch, attached, run
for kit, url in ((Torch, sys.argv[1]), (Keras, sys.argv[2])):
    cache, module = attached(kit, [url])
    print([run(kit, cache, module, seed) for seed in (7, 0, 1, 2)], cache.stats().hit_entries)
    run(kit, cache, module, 3)
    assert cache.close()
"""


def test_a_real_process_finds_them_and_is_found(tmp_path):
    """Nothing in a key is this process's own: neither hashes of Python nor identities of objects."""
    urls = [f"disk:{tmp_path / kit.__name__}?max=8MiB&sync=off" for kit in (Torch, Keras)]
    for kit, url in zip((Torch, Keras), urls, strict=True):
        cache, module = attached(kit, [url])
        for seed in range(3):
            assert run(kit, cache, module, seed) == 4
        assert cache.close()
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "adapters")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ANOTHER, *urls],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["[4, 0, 0, 0] 12"] * 2, done.stderr
    for kit, url in zip((Torch, Keras), urls, strict=True):
        cache, module = attached(kit, [url])
        assert [run(kit, cache, module, seed) for seed in (7, 3)] == [4, 0]
        assert cache.close()


@BOTH
def test_written_through_before_they_are_evicted(kit, tmp_path):
    url = f"disk:{tmp_path}?max=8MiB&sync=off"
    cache, module = attached(kit, [url], write_through=True)
    other, again = attached(kit, [url])
    run(kit, cache, module, 0)
    assert cache.flush(5)
    assert cache.stats().evicted_entries == 0
    run(kit, other, again, 1)
    assert run(kit, other, again, 0) == 0
    assert cache.close()
    assert other.close()


@BOTH
def test_a_saved_cache_has_them_too(kit, tmp_path):
    cache, module = attached(kit, ["ram:1MiB"])
    for seed in range(3):
        run(kit, cache, module, seed)
    assert cache.save(tmp_path / "cache") == 12
    again = kit.module()
    other = kit.KVCache.load(tmp_path / "cache", promote="always")
    other.attach(again, kind="activation")
    assert other.sites.entries.size == 6
    run(kit, other, again, 7)
    assert [run(kit, other, again, seed) for seed in range(3)] == [0, 0, 0]
    alone = kit.KVCache(6)
    alone.attach(kit.module(), kind="activation")
    with pytest.raises(UsageError, match="saved from a cache with tiers"):
        alone.save(tmp_path / "cache")


@BOTH
def test_other_weights_salts_and_attributes_never_meet(kit):
    tier = RamTier(1 << 20)
    cache, module = attached(kit, [tier])
    for seed in range(3):
        run(kit, cache, module, seed)
        cache.flush(5)
    for change in ("weights", "factor", "salt", "invalidate", None):
        other, again = attached(kit, [tier], 3.0 if change == "factor" else 2.0, salt=b"x" if change == "salt" else b"")
        if change == "weights":
            kit.change(again)
        if change == "invalidate":
            other.invalidate()
        run(kit, other, again, 7)
        assert run(kit, other, again, 0) == (4 if change else 0)
        other._tiers.queue.close(0)


@BOTH
def test_weights_that_change_are_noticed_and_those_before_are_found_again(kit):
    cache, module = attached(kit, ["ram:1MiB"])
    for seed in range(3):
        run(kit, cache, module, seed)
        cache.flush(5)
    kit.change(module)
    assert run(kit, cache, module, 0) == 4
    cache.close()


@BOTH
def test_results_can_be_named_by_hand(kit):
    tier = RamTier(1 << 20)
    found = []
    for identity in ("trunk@1", "trunk@1", "trunk@2"):
        cache, module = attached(kit, [tier], identity=identity)
        found.append([run(kit, cache, module, seed) for seed in (7, 0, 1)])
        for seed in (8, 9):  # evict them
            run(kit, cache, module, seed)
        cache.flush(5)
        cache._tiers.queue.close(0)
    assert found == [[4, 4, 4], [4, 0, 0], [4, 4, 4]]


def test_a_module_of_which_nothing_can_be_said_stays_in_the_process():
    tier = RamTier(1 << 20)
    cache, module = attached(Torch, [tier])
    module.shape = lambda h: h
    with pytest.warns(KVCacheWarning, match=r"results of Trunk stay out of the tiers: .* name it, attach\(module, id"):
        run(Torch, cache, module, 0)
    for seed in range(3):
        run(Torch, cache, module, seed)
    cache.flush(5)
    assert list(tier.items()) == []
    hooked, again = attached(Torch, [tier])
    again.linear.register_forward_hook(lambda *_: None)
    with pytest.warns(KVCacheWarning, match="it has hooks"):
        run(Torch, hooked, again, 0)


@BOTH
def test_damaged_values_are_misses(kit):
    tier = RamTier(1 << 20)
    cache, module = attached(kit, [tier])
    for seed in range(3):
        run(kit, cache, module, seed)
        cache.flush(5)
    for item in list(tier.items()):
        value = bytearray(tier.get_many([item.key])[0] or b"")
        header = read_header(value)
        assert (header.kind, header.group) == ("entry", 0)
        value[item.nbytes // 2] ^= 1
        tier.put_many([(item.key, bytes(value))])
    with pytest.warns(KVCacheWarning, match="does not verify"):
        assert run(kit, cache, module, 0) > 0
    cache.close()


@BOTH
@pytest.mark.parametrize("theirs", ["", "guess"], ids=["unsigned", "signed with another secret"])
def test_a_writer_without_the_secret_cannot_poison(kit, monkeypatch, theirs):
    tier = RamTier(1 << 20)
    monkeypatch.setenv("KVCACHE_SECRET", theirs)
    outsider, module = attached(kit, [tier])
    for seed in range(3):
        run(kit, outsider, module, seed)
        outsider.flush(5)
    monkeypatch.setenv("KVCACHE_SECRET", "secret")
    insider, again = attached(kit, [tier])
    run(kit, insider, again, 7)
    with pytest.warns(KVCacheWarning, match="does not verify"):
        assert run(kit, insider, again, 0) == 4
    assert insider.tier_stats()[0].refused == 4
    for seed in (8, 9, 10):  # evict them: now they are written again, signed
        run(kit, insider, again, seed)
        insider.flush(5)
    assert run(kit, insider, again, 0) == 0
    for cache in (outsider, insider):
        cache.close()


@BOTH
@pytest.mark.parametrize("secret", ["", "shared by all tenants"], ids=["unsigned", "signed"])
def test_results_under_anothers_key_return_nothing(kit, monkeypatch, secret):
    """Whoever knows the format can work out another tenant's keys, and put results of its own there."""
    monkeypatch.setenv("KVCACHE_SECRET", secret)
    stores = {b"attacker": RamTier(1 << 20), b"victim": RamTier(1 << 20)}
    for salt, tier in stores.items():
        cache, module = attached(kit, [tier], salt=salt)
        run(kit, cache, module, 0)
        for seed in (1, 2):
            run(kit, cache, module, seed)
        cache.flush(5)
        cache._tiers.queue.close(0)
    own = [
        tier_value for item in stores[b"attacker"].items() for tier_value in stores[b"attacker"].get_many([item.key])
    ]
    poisoned = RamTier(1 << 20)
    poisoned.put_many([(item.key, value) for item, value in zip(stores[b"victim"].items(), own, strict=True)])
    victim, module = attached(kit, [poisoned], salt=b"victim")
    run(kit, victim, module, 7)
    with pytest.warns(KVCacheWarning, match="does not verify"):
        assert run(kit, victim, module, 0) == 4
    assert victim.stats().hit_entries == 0
    victim.close()


@BOTH
def test_a_tier_that_costs_more_than_computing_is_left_out(kit):
    """What computing costs is measured, and shown; what loading costs is told here."""
    tier = RamTier(1 << 20)
    module = kit.module()
    cache = kit.KVCache(6, tiers=[tier])
    cache.attach(module, kind="activation")
    for seed in range(3):
        run(kit, cache, module, seed)
        assert cache.flush(5)
    for _ in range(50):
        cache._tiers.costs.loaded(0, 1, 1e9)
    before = cache.tier_stats()[0]
    hits, skipped = before.hits, before.skipped
    assert run(kit, cache, module, 0) == 4
    after = cache.tier_stats()[0]
    assert (after.hits, after.skipped) == (hits, skipped + 1)
    assert 0 < after.recompute_seconds_per_mib < after.seconds_per_mib
    cache.flush(5)
    for _ in range(200):
        cache._tiers.costs.loaded(0, 1 << 40, 1e-9)
    assert run(kit, cache, module, 1) == 0
    cache.close()


def test_a_graph_and_eager_calls_share_results():
    cache, module = attached(Keras, ["ram:1MiB"])

    @tf.function
    def graph(x):
        return module(x)

    expected = [module(Keras.batch(seed)) for seed in range(3)]
    with cache:
        for seed in range(3):
            assert same(Keras, graph(Keras.batch(seed)), expected[seed])
            assert cache.flush(5)
        computed.clear()
        for seed in range(3):
            assert same(Keras, graph(Keras.batch(seed)), expected[seed])
            assert same(Keras, module(Keras.batch(seed)), expected[seed])
    assert sum(computed) in (0, 4)  # the first eager call of a structure is computed whole
    cache.close()
