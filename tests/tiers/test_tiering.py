"""The tier stack over the numpy store: what goes down, what comes up, and what must not."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterable
from itertools import count, pairwise
from typing import Any

import numpy as np
import pytest

from kvcache_core import BlockCache, BlockLayout, InvalidInput, InvalidType, KVCacheWarning, LayerSpec
from kvcache_core.admission import AfterSightings, ChainAdmission, Sampled
from kvcache_core.demotion import DemotionQueue, Pending
from kvcache_core.opentiers import tier_key
from kvcache_core.poolitems import block_codecs
from kvcache_core.store import NumpyStore
from kvcache_core.tiering import TierStack
from kvcache_core.tiers import Item, RamTier, Tier, open_tier

SIZE = 4
LAYOUT = BlockLayout([LayerSpec.attention(2, 4), LayerSpec.attention(1, 4, window=6)], SIZE)
WEIGHTS = b"w" * 16


class Cache:
    """A block cache whose "model" writes at each slot a value that follows from the tokens so far."""

    def __init__(
        self, num_blocks: int, tiers: Any, *, namespace: bytes = b"n", layout: Any = LAYOUT, **options: Any
    ) -> None:
        self.layout = layout
        self.core = BlockCache(num_blocks, layout=layout, namespace=namespace)
        self.store = NumpyStore(layout, num_blocks)
        self.stack = TierStack(tiers, **{"promote": "always", **options})
        self.stack.bind(self.core, self.store)
        self.served = 0
        self._told = (0, 0)

    def open(self, prompt: list[int], salt: bytes = b"") -> Any:
        seq = self.core.open(prompt, salt)
        self.stack.serve(self.layout, self.core.namespace, WEIGHTS, salt)
        self.stack.promote(seq)
        return seq

    def run(self, prompt: list[int], salt: bytes = b"") -> int:
        """Compute what is not cached, check every slot that the sequence can read, close; returns the tokens cached."""
        seq = self.open(prompt, salt)
        try:
            cached = seq.num_cached
            plan = self.core.plan([seq], [prompt[cached:]])
            self.store.apply_copies(plan)
            for layer in range(2):
                slots = plan.groups[layer].slots[0]
                for name, spec in zip("kv", self.layout.layers[layer].arrays, strict=True):
                    values = [content(prompt[: cached + at + 1], layer, name) for at in range(len(slots))]
                    wide = np.broadcast_to(np.array(values)[:, None, None], (len(slots), spec.heads, spec.size))
                    self.store.write(layer, name, slots, wide.astype(np.float32))
            self.core.commit(plan)
            self.check(seq, prompt)
        finally:
            self.core.close(seq)
        self.served += 1
        return cached

    def answered(self) -> tuple[int, int]:
        """Requests answered right since this was last asked, and how many of their tokens came from the tiers."""
        before, self._told = self._told, (self.served, self.stack.promoted_tokens)
        return self._told[0] - before[0], self._told[1] - before[1]

    def check(self, seq: Any, prompt: list[int]) -> None:
        for layer in range(2):
            for position in range(seq.dropped[layer] * SIZE, seq.length):
                slot = seq.tables[layer][position // SIZE] * SIZE + position % SIZE
                for name in ("k", "v"):
                    found = self.store.read(layer, name, np.array([slot]))
                    assert (found == np.float32(content(prompt[: position + 1], layer, name))).all()
        self.core.check_valid()


def content(tokens: list[int], layer: int, name: str) -> float:
    return float(hash((tuple(tokens), layer, name)) % 100_003)


def turns(cache: Cache, count: int = 6, first: int = 0) -> list[int]:
    """Two prompts that evict each other, in turn, each checked slot by slot; returns the tokens cached."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KVCacheWarning)
        found = []
        for turn in range(count):
            found.append(cache.run(prompt(first + turn % 2)))
            cache.stack.flush(5)
    return found


def prompt(seed: int, length: int = 21) -> list[int]:
    return np.random.default_rng(seed).integers(0, 1000, length).tolist()


# ---- down and up ------------------------------------------------------------------------------------------------


def test_what_was_evicted_comes_back():
    cache = Cache(6, [RamTier(1 << 20)])
    one, other = prompt(1), prompt(2)
    assert [cache.run(one), cache.run(other)] == [0, 0]
    assert cache.stack.flush(5)
    assert cache.run(one) == 20
    stats = cache.core.stats()
    assert (stats.hit_tokens, stats.miss_tokens) == (20, 43)
    assert cache.stack.promoted_tokens == 20
    assert cache.stack.stats[0].hits == 10
    cache.stack.close()


def test_what_waits_in_the_queue_is_found():
    held = threading.Event()

    class Slow(RamTier):
        def put_many(self, items):
            held.wait(10)
            return super().put_many(items)

    cache = Cache(6, [Slow(1 << 20)])
    cache.run(prompt(1))
    cache.run(prompt(2))
    assert cache.run(prompt(1)) == 20
    held.set()
    assert cache.stack.close(5)


def test_an_order_of_tiers_passes_down_what_is_dropped():
    sizes = [12_000, 1 << 20]
    tiers = [RamTier(size) for size in sizes]
    cache = Cache(6, tiers)
    prompts = [prompt(seed) for seed in range(6)]
    for one in prompts:
        cache.run(one)
        assert cache.stack.flush(5)
    assert tiers[0].nbytes() <= sizes[0]
    assert tiers[1].nbytes()
    assert [cache.run(one) for one in prompts] == [20] * 6
    assert cache.stack.stats[1].hits > 30
    cache.stack.close()


@pytest.mark.parametrize("admit", ["all", AfterSightings(2)], ids=["all", "after two sightings"])
def test_memory_to_disk_to_network(tmp_path, valkey_url, admit):
    """What the pool evicts goes to RAM, what is no longer room for there to disk, then to the server; all come back."""
    layout = BlockLayout([LayerSpec.attention(2, 512), LayerSpec.attention(1, 512, window=6)], SIZE)
    row = sum(layout.packed_bytes(group) for group in range(2))
    tiers = [f"ram:{6 * row}B", f"disk:{tmp_path}?max=1MiB&sync=off", valkey_url]
    cache = Cache(12, tiers, layout=layout, admit=admit)

    def run_all(seeds: Iterable[int] = range(12)) -> list[int]:
        found = []
        for seed in seeds:
            found.append(cache.run(prompt(seed)))
            assert cache.stack.flush(5)
        return found

    assert run_all() == [0] * 12
    held = [sum(item.nbytes for item in tier.items()) for tier in cache.stack.tiers]
    assert held == [0] * 3 if admit != "all" else all(held)
    if admit != "all":
        assert cache.stack.refused_blocks > 80
        assert run_all() == [0] * 12, "their second sighting"
    assert run_all(reversed(range(12))) == [20] * 12, "the last ones are in RAM, those before on disk"
    ram, disk, _ = cache.stack.tiers
    assert (ram.nbytes() or 0) <= 6 * row
    assert (disk.nbytes() or 0) <= 1 << 20
    assert all(stats.hits for stats in cache.stack.stats)
    assert cache.answered() == (24 if admit == "all" else 36, 12 * 20 - 32), "some were in the pool"
    assert cache.stack.dropped_blocks == 0
    cache.stack.close()


def test_a_longer_prompt_continues_a_promoted_one():
    cache = Cache(8, [RamTier(1 << 20)])
    cache.run(prompt(1, 20))
    cache.run(prompt(2, 28))
    cache.stack.flush(5)
    assert cache.run([*prompt(1, 20), 7, 8, 9]) == 20
    cache.stack.close()


def test_a_match_that_ends_inside_a_block_is_continued_too():
    cache = Cache(10, [RamTier(1 << 20)])
    one = prompt(1)
    cache.run(one)
    cache.run(prompt(2, 37))  # evicts all of it
    cache.stack.flush(5)
    cache.run([*one[:2], 999])  # two of its tokens are in the pool again, as a tail
    assert cache.run(one) == 20
    cache.stack.close()


def test_no_room_is_no_error():
    cache = Cache(6, [RamTier(1 << 20)])
    cache.run(prompt(1))
    cache.run(prompt(2))
    cache.stack.flush(5)
    held = cache.open(prompt(3))
    cache.core.commit(cache.core.plan([held], [prompt(3)]))
    seq = cache.open(prompt(1))
    assert seq.num_cached == 0
    cache.core.check_valid()
    cache.stack.close()


# ---- never another's --------------------------------------------------------------------------------------------


def test_salts_and_namespaces_never_meet():
    tier = RamTier(1 << 20)
    first = Cache(6, [tier])
    first.run(prompt(1), b"alice")
    first.run(prompt(2), b"alice")
    first.stack.flush(5)
    assert len(list(tier.items())) > 0
    assert Cache(6, [tier]).run(prompt(1), b"bob") == 0
    assert Cache(6, [tier]).run(prompt(1)) == 0
    assert Cache(6, [tier], namespace=b"other weights").run(prompt(1), b"alice") == 0
    assert Cache(6, [tier]).run(prompt(1), b"alice") == 20


def keys_of(cache: Cache, tokens: list[int], salt: bytes) -> list[tuple[int, bytes, bytes]]:
    """(layer group, chained key, key in a tier) of a prompt's blocks: for anybody to work out who knows the salt."""
    seq = cache.core.open(tokens, salt)
    found = [(group, key, tier_key("block", group, key)) for key in seq.prompt_keys for group in range(2)]
    cache.core.close(seq)
    return found


@pytest.mark.parametrize("secret", [b"", b"shared by all tenants"], ids=["unsigned", "signed"])
def test_a_block_under_anothers_key_returns_nothing(secret):
    """Values moved under the keys that another tenant will ask for do not verify: they say whose they are."""
    tier = RamTier(1 << 20)
    attacker = Cache(6, [tier], secret=secret)
    attacker.run(prompt(1), b"attacker")
    attacker.run(prompt(2), b"attacker")
    attacker.stack.flush(5)
    stolen = {item.key: tier.get_many([item.key])[0] for item in tier.items()}
    own = [stolen[key] for _, _, key in keys_of(attacker, prompt(1), b"attacker")]
    victim = Cache(6, [tier], secret=secret)
    wanted = [key for _, _, key in keys_of(victim, prompt(1), b"victim")]
    tier.put_many(list(zip(wanted, own, strict=True)))  # of the same tokens, each in its place
    with pytest.warns(KVCacheWarning, match="does not verify"):
        assert victim.run(prompt(1), b"victim") == 0
    assert victim.stack.stats[0].refused == len(wanted)
    for cache in (attacker, victim):
        cache.stack.close()


@pytest.mark.parametrize("guess", [b"", b"guess"], ids=["unsigned", "signed with another secret"])
def test_a_forged_block_returns_nothing_where_there_is_a_secret(guess):
    """Whoever knows format, salt and tokens can make every byte of a header, and a key; not the HMAC."""
    tier = RamTier(1 << 20)
    victim = Cache(6, [tier], secret=b"secret")
    codecs = block_codecs(LAYOUT, WEIGHTS, b"victim", guess)
    for group, own, key in keys_of(victim, prompt(1), b"victim"):
        tier.put_many([(key, codecs[group].encode(own, bytes(codecs[group].payload_bytes), 5))])
    with pytest.warns(KVCacheWarning, match="does not verify"):
        assert victim.run(prompt(1), b"victim") == 0
    assert victim.stack.stats[0].refused == 10
    open_to_all = Cache(6, [tier], secret=guess)
    with pytest.raises(AssertionError):  # they are well made: what is missing is the secret alone
        open_to_all.run(prompt(1), b"victim")
    for cache in (victim, open_to_all):
        cache.stack.close()


def test_a_miss_does_not_depend_on_what_others_have_stored():
    """The same questions to the tier, key by key, and as many of them: so a miss takes as long."""

    class Watched(RamTier):
        def __init__(self) -> None:
            super().__init__(1 << 20)
            self.asked: list[Any] = []

        def get_many(self, keys):
            self.asked.append(list(keys))
            return super().get_many(keys)

        def contains(self, key):
            self.asked.append(key)
            return super().contains(key)

    asked = []
    for others in ([], [(b"another tenant", 1)], [(b"another tenant", seed) for seed in range(1, 9)]):
        tier = Watched()
        for salt, seed in others:
            writer = Cache(6, [tier])
            writer.run(prompt(seed), salt)
            writer.run(prompt(99), salt)
            assert writer.stack.flush(5)
            writer.stack.close()
        assert bool(list(tier.items())) == bool(others)
        tier.asked = []
        mine = Cache(6, [tier])
        assert mine.run(prompt(1), b"mine") == 0
        asked.append(tier.asked)
        mine.stack.close()
    assert asked[0]
    assert asked[1:] == asked[:1] * 2


def test_a_writer_without_the_secret_cannot_poison():
    tier = RamTier(1 << 20)
    outsider = Cache(6, [tier], secret=b"")
    outsider.run(prompt(1))
    outsider.run(prompt(2))
    outsider.stack.flush(5)
    insider = Cache(6, [tier], secret=b"s")
    with pytest.warns(KVCacheWarning, match="does not verify"):
        assert insider.run(prompt(1)) == 0
    assert insider.stack.stats[0].refused == 10
    insider.run(prompt(2))  # evicts the first one: now it is written again, signed
    insider.stack.flush(5)
    assert insider.run(prompt(1)) == 20
    for one in (outsider, insider):
        one.stack.close()


@pytest.mark.parametrize("damage", ["flip", "cut", "noise", "empty", "swap"])
def test_damaged_and_foreign_values_are_misses(damage):
    tier = RamTier(1 << 20)
    cache = Cache(6, [tier])
    cache.run(prompt(1))
    cache.run(prompt(2))
    cache.stack.flush(5)
    items = [(item.key, bytes(tier.get_many([item.key])[0] or b"")) for item in tier.items()]
    spoil = {
        "flip": lambda value: value[:300] + bytes([value[300] ^ 1]) + value[301:],
        "cut": lambda value: value[:-1],
        "noise": lambda value: np.random.default_rng(0).bytes(len(value)),
        "empty": lambda value: b"",
        "swap": lambda value: items[0][1],
    }[damage]
    tier.put_many([(key, spoil(value)) for key, value in items])
    with pytest.warns(KVCacheWarning, match="does not verify"):
        assert cache.run(prompt(1)) == 0
    assert cache.run(prompt(2)) in (0, 20)  # said once: a second warning would be an error here
    assert cache.stack.stats[0].refused >= 9
    cache.stack.flush(5)
    assert cache.run(prompt(1)) == 20, "written anew, over the damaged ones"
    cache.stack.close()


# ---- written through --------------------------------------------------------------------------------------------


def test_published_blocks_are_seen_before_they_are_evicted(tmp_path):
    url = f"disk:{tmp_path}?max=8MiB&sync=off"
    writer = Cache(40, ["ram:1MiB", url], write_through=True)
    reader = Cache(40, [url])
    held = writer.open(prompt(1))
    writer.core.commit(writer.core.plan([held], [prompt(1)[:20]]))
    assert writer.stack.flush(5)
    assert writer.core.stats().evicted_blocks == 0
    assert (
        len(list(writer.stack.tiers[1].items())) == 10
    )  # written by an open sequence, five blocks in each layer group
    writer.core.close(held)
    writer.core.clear()
    assert writer.run(prompt(2)) == 0
    assert writer.stack.flush(5)
    assert reader.run(prompt(2)) == 20
    assert writer.stack.tiers[0].nbytes() == 0, "the pool has them already"
    for cache in (writer, reader):
        assert cache.stack.close(5)


def test_decoded_tokens_are_written_through_block_by_block(tmp_path):
    cache = Cache(40, [f"disk:{tmp_path}?max=8MiB&sync=off"], write_through=True)
    tokens = prompt(3, 13)
    seq = cache.core.open(tokens)
    cache.stack.serve(LAYOUT, cache.core.namespace, WEIGHTS, b"")
    counts = []
    for token in tokens:
        cache.core.commit(cache.core.plan([seq], [[token]]))
        cache.stack.flush(5)
        counts.append(len(list(cache.stack.tiers[0].items())) // 2)
    assert counts == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    assert cache.stack.demoted_blocks == 6
    cache.core.close(seq)
    cache.stack.close(5)


def test_blocks_evicted_before_the_writer_came_to_them_are_written_all_the_same(tmp_path):
    held = threading.Event()
    cache = Cache(6, [f"disk:{tmp_path}?max=8MiB&sync=off"], write_through=True)
    disk = cache.stack.tiers[0]
    put = disk.put_many

    def slow(items):
        held.wait(10)
        return put(items)

    disk.put_many = slow
    for seed in range(4):
        cache.run(prompt(seed))
    held.set()
    assert cache.stack.flush(10)
    assert cache.stack.dropped_blocks == 0
    assert [cache.run(prompt(seed)) for seed in range(4)] == [20] * 4
    cache.stack.close(5)


def test_evicted_while_the_writer_comes_to_it_is_written_through_all_the_same():
    tiers = [RamTier(1 << 10), RamTier(1 << 10)]
    tiers[1].persistent = True
    queue = DemotionQueue(tiers, 1 << 10, lambda number, key: False, lambda number, items, error: None)

    def evicted_first(now: int) -> None:
        assert queue.put(b"key", Pending(b"value", 5, lambda now: b"value"))

    assert queue.put(b"key", Pending(None, 5, evicted_first, through=True))
    assert queue.close(time.monotonic() + 5)
    assert tiers[1].get_many([b"key"]) == [b"value"]


def test_written_through_to_every_tier_that_others_see(tmp_path):
    urls = [f"disk:{tmp_path / name}?max=8MiB&sync=off" for name in ("one", "two")]
    cache = Cache(40, [urls[0], "ram:1MiB", urls[1]], write_through=True)
    cache.run(prompt(1))
    assert cache.stack.flush(5)
    for url in urls:
        other = Cache(40, [url])
        assert other.run(prompt(1)) == 20
        other.stack.close(5)
    cache.stack.close(5)


def test_write_through_needs_someone_to_see_it():
    with pytest.raises(InvalidInput, match="write_through needs a tier that others can see"):
        TierStack(["ram:1MiB"], write_through=True)


# ---- what is worth writing --------------------------------------------------------------------------------------


def test_what_was_computed_once_is_not_written():
    cache = Cache(6, [RamTier(1 << 20)], admit=AfterSightings(2))
    for seed in (1, 2, 1, 3, 1):
        cached = cache.run(prompt(seed))
        cache.stack.flush(5)
    assert cached == 20, "evicted twice: written at the second time"
    assert cache.run(prompt(2)) == 0
    assert cache.stack.refused_blocks >= 20
    cache.stack.close()


def test_a_sampled_chain_is_written_whole_or_not_at_all():
    tier = RamTier(1 << 20)
    cache = Cache(6, [tier], admit=Sampled(0.5, seed=3))
    for seed in range(40):
        cache.run(prompt(seed))
    cache.run(prompt(99))
    cache.stack.flush(5)
    keys = {item.key for item in tier.items()}
    whole = 0
    for seed in range(40):
        seq = cache.core.open(prompt(seed))
        there = {tier_key("block", group, key) in keys for key in seq.prompt_keys[:5] for group in range(2)}
        cache.core.close(seq)
        assert len(there) == 1
        whole += there == {True}
    assert 8 < whole < 32
    cache.stack.close()


def test_admission_of_chains():
    """A head goes down with the first chain behind it that does; each continuation of it is drawn anew."""
    rule = ChainAdmission(AfterSightings(2))
    for group in (0, 1):
        assert not rule.published(group, b"head", b"root")
    for turn in (1, 2, 3):
        assert rule.published(0, b"tail", b"head") is (turn == 2)
        assert rule.published(1, b"tail", b"head") is (turn == 2), "the layer groups share one sighting"
        assert rule.evicted(b"tail", b"head") is (turn == 2)
    assert rule.evicted(b"head", b"root")
    drawn = ChainAdmission(Sampled(0.5, seed=0))
    chains = []
    for chain in range(50):
        keys = [b"root", b"head", *(b"%d %d" % (chain, at) for at in range(5))]
        chains.append({drawn.published(0, key, parent) for parent, key in pairwise(keys[1:])})
    assert all(len(one) == 1 for one in chains)
    assert 10 < chains.count({True}) < 40


# ---- tiers that fail --------------------------------------------------------------------------------------------


class Broken(Tier):
    name = "broken"

    def get_many(self, keys):
        raise OSError("gone")

    def put_many(self, items: list[Item]) -> list[Item]:
        raise OSError("gone")


def test_a_broken_tier_is_a_counted_miss_and_one_warning():
    lower = RamTier(1 << 20)
    cache = Cache(6, [Broken(), lower])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for turn in range(8):
            assert cache.run(prompt(turn % 2)) == (20 if turn > 1 else 0)  # the tier below serves
            cache.stack.flush(5)
    assert sorted({str(one.message).split("(")[0] for one in warned}) == [
        "tier broken did not answer ",
        "tier broken did not take blocks ",
    ]
    assert len(warned) == 2
    assert cache.stack.stats[0].errors > 8
    assert cache.answered() == (8, 120)
    cache.stack.close()


def test_a_full_queue_drops_and_counts():
    held = threading.Event()

    class Stuck(RamTier):
        def put_many(self, items):
            held.wait(20)
            return super().put_many(items)

    block = LAYOUT.packed_bytes(0)
    cache = Cache(6, [Stuck(1 << 20)], queue_bytes=3 * block)
    started = time.monotonic()
    for seed in range(6):
        cache.run(prompt(seed))
    assert time.monotonic() - started < 5, "a step never waits"
    assert cache.stack.dropped_blocks > 0
    assert cache.stack.demoted_blocks <= 4
    assert not cache.stack.flush(0.05)
    held.set()
    assert cache.stack.close(5)


def test_what_cannot_be_encoded_is_lost_alone():
    tier, lost = RamTier(1 << 10), []

    def broken(now: int) -> bytes:
        raise RuntimeError("no bytes")

    queue = DemotionQueue(
        [tier],
        1 << 10,
        lambda number, key: False,
        lambda number, items, error: lost.extend((number, key, error) for key, _ in items if error is not None),
    )
    assert queue.put(b"bad", Pending(b"value", 5, broken))
    assert queue.put(b"good", Pending(b"value", 5, lambda now: b"value"))
    assert queue.close(time.monotonic() + 5)
    assert tier.get_many([b"good"]) == [b"value"]
    assert [(number, key, str(error)) for number, key, error in lost] == [(0, b"bad", "no bytes")]


def test_closing_has_a_time_limit():
    class Stuck(RamTier):
        def put_many(self, items):
            assert let_go.wait(60)
            return super().put_many(items)

    let_go = threading.Event()
    cache = Cache(6, [Stuck(1 << 20)])
    cache.run(prompt(1))
    cache.run(prompt(2))
    started = time.monotonic()
    assert not cache.stack.close(0.1)
    assert time.monotonic() - started < 10
    let_go.set()


def test_flush_ends_while_others_go_on():
    class Busy(RamTier):
        persistent = True

        def put_many(self, items):
            cache.run(prompt(next(numbers)))
            return super().put_many(items)

    numbers = count(2)
    cache = Cache(40, [Busy(1 << 20)])
    cache.run(prompt(1))
    assert cache.stack.flush(20, everything=True)
    assert next(numbers) < 10
    cache.stack.close(0)


def test_flush_believes_a_tier_that_cannot_say_what_it_holds():
    """``contains`` may forget, and by default says nothing: what was put without an error is there."""

    class Vague(Tier):
        persistent = True

        def __init__(self) -> None:
            self.kept = RamTier(1 << 20)

        def get_many(self, keys):
            return self.kept.get_many(keys)

        def put_many(self, items: list[Item]) -> list[Item]:
            if failing:
                raise OSError("gone")
            return self.kept.put_many(items)

    failing: list[bool] = []
    tier = Vague()
    cache = Cache(12, ["ram:12kB", tier])
    for seed in (0, 1, 2, 3, 0):  # what has come up again is in RAM and in the pool
        cache.run(prompt(seed))
        assert cache.stack.flush(5)
    assert cache.stack.flush(5, everything=True)
    again = Cache(20, [tier])
    assert [again.run(prompt(seed)) for seed in range(4)] == [20] * 4
    failing.append(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KVCacheWarning)
        assert not cache.stack.flush(5, everything=True)
        failing.clear()
        assert cache.stack.close()
        assert again.stack.close()


def test_no_thread_is_left_behind():
    running = set(threading.enumerate())  # one of another test may still be ending
    for _ in range(3):
        cache = Cache(6, [RamTier(1 << 20)])
        cache.run(prompt(1))
        cache.run(prompt(2))
        cache.stack.close()
    assert set(threading.enumerate()) <= running


def test_a_tier_that_costs_more_than_computing_is_left_out():
    class Slow(RamTier):
        def get_many(self, keys):
            time.sleep(0.02)
            return super().get_many(keys)

    cache = Cache(6, [Slow(1 << 20)], promote="auto")
    cache.run(prompt(1))
    cache.run(prompt(2))
    cache.stack.flush(5)
    cache.stack.computed(1000, 1000, 0.001)
    assert cache.run(prompt(1)) == 20, "nothing is known about its cost yet"
    cache.stack.flush(5)
    assert cache.run(prompt(2)) == 0
    assert cache.stack.stats[0].skipped == 1
    assert cache.stack.stats[0].seconds_per_mib > 0
    cache.stack.computed(1000, 1000, 1000.0)
    for _ in range(20):
        cache.stack.computed(1000, 1000, 1000.0)
    cache.stack.flush(5)
    assert cache.run(prompt(1)) == 20, "computing has become dear"
    cache.stack.close()


# ---- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tier", "message"),
    [
        ("ram", "unknown scheme"),
        ("ram:", "needs its size: 'ram:4GiB'"),
        ("ram:lots", "tier 'ram:lots': memory must be a size"),
        ("ram:-1", "tier 'ram:-1'"),
        ("ram:0", "more than zero"),
        ("ram:4", "4 bytes hold no block; with a unit the form is 'ram:4GiB'"),
        ("file:", "needs a file: 'file:PATH'"),
        ("floppy:a", "unknown scheme; there are ram:SIZE"),
        ("", "unknown scheme"),
    ],
)
def test_a_bad_url_is_one_clear_error(tier, message):
    with pytest.raises(InvalidInput, match=message):
        open_tier(tier)


def test_what_is_no_tier():
    with pytest.raises(InvalidType, match="a URL or a"):
        open_tier(5)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="promote must be 'auto' or 'always'"):
        TierStack(["ram:1kB"], promote="sometimes")
