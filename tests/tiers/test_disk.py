"""The disk tier: budget, order of use, several processes, and every way a file can be spoiled."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from kvcache_core import InvalidInput, KVCacheWarning, lmdbfile
from kvcache_core.blockformat import ArrayEntry, BlockCodec
from kvcache_core.errors import TierError
from kvcache_core.lmdbfile import _is_damaged, footprint
from kvcache_core.opentiers import tier_key
from kvcache_core.tier_disk import DiskTier
from kvcache_core.tiers import open_tier
from tests.tiers.test_tiering import LAYOUT, SIZE, Cache, prompt, turns

MIB = 1 << 20
CODEC = BlockCodec(
    [ArrayEntry(0, "k", "float32", (1, 1, 2500))], 10_000, layout=b"l" * 16, weights=b"w" * 16, salt=b"s" * 16
)


def value(number: int) -> bytes:
    return CODEC.encode(number.to_bytes(16, "little"), bytes([number % 251]) * 10_000, 0)


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def verified(tier: DiskTier, count: int) -> int:
    """How many of the first ``count`` blocks are there; each that is there verifies."""
    found = tier.get_many([key(number) for number in range(count)])
    for number, one in enumerate(found):
        if one is not None:
            assert bytes(CODEC.decode(key(number), one)) == bytes([number % 251]) * 10_000
    return sum(one is not None for one in found)


def verifies(number: int, one: bytes) -> bool:
    try:
        CODEC.decode(key(number), one)
    except ValueError:
        return False
    return True


# ---- budget -----------------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first(tmp_path):
    tier = DiskTier(tmp_path, MIB, sync=False)
    for number in range(75):
        tier.put_many([(key(number), value(number))])
    tier.get_many([key(0), key(1)])
    for number in range(75, 110):
        tier.put_many([(key(number), value(number))])
    assert (tier.nbytes() or 0) <= MIB
    there = [number for number in range(110) if tier.contains(key(number))]
    gone = 110 - len(there)
    assert there == [0, 1, *range(gone + 2, 110)]
    tier.close()


def test_the_file_stays_near_its_budget_whatever_is_written(tmp_path):
    tier = DiskTier(tmp_path, 2 * MIB, sync=False)
    draw = random.Random(0)
    for number in range(400):
        tier.put_many([(key(number), draw.randbytes(draw.choice([10, 3000, 9000, 70_000])))])
        assert (tier.nbytes() or 0) <= 2 * MIB
    assert (tmp_path / "data.mdb").stat().st_size <= 2 * MIB * 1.25 + (16 << 20)
    assert sum(footprint(item.key, item.nbytes) for item in tier.items()) == tier.nbytes()
    tier.close()


@pytest.mark.parametrize("size", [pytest.param(500, marks=pytest.mark.slow), 2300, 4200])
def test_values_that_fill_their_pages_badly_never_fill_the_file(tmp_path, size):
    """A large value has whole pages, so the file would reach its end long before such values reach the budget."""
    tier = DiskTier(tmp_path, 48 * MIB, sync=False)
    draw = random.Random(0)
    for _ in range(2 * 48 * MIB // size // 400):
        last = (draw.randbytes(35), draw.randbytes(size))
        tier.put_many([*((draw.randbytes(35), bytes(size)) for _ in range(399)), last])
    assert (tmp_path / "data.mdb").stat().st_size <= 48 * MIB * 1.25 + (16 << 20)
    assert 0.95 * 48 * MIB < (tier.nbytes() or 0) <= 48 * MIB
    assert tier.get_many([last[0]]) == [last[1]]
    tier.close()


def test_a_smaller_budget_than_the_files(tmp_path):
    tier = DiskTier(tmp_path, 32 * MIB, sync=False)
    tier.put_many([(key(number), value(number)) for number in range(2500)])
    tier.close()
    size = (tmp_path / "data.mdb").stat().st_size
    tier = DiskTier(tmp_path, MIB, sync=False)
    tier.put_many([(key(2500), value(2500))])
    assert 0 < (tier.nbytes() or 0) <= MIB
    assert (tmp_path / "data.mdb").stat().st_size < size * 1.1
    assert tier.get_many([key(0), key(2500)]) == [None, value(2500)]
    tier.close()


def test_what_is_dropped_goes_to_the_tier_below_if_there_is_one(tmp_path):
    tier = DiskTier(tmp_path, MIB, sync=False)
    tier.keep_displaced = True
    dropped = [one for number in range(120) for one in tier.put_many([(key(number), value(number))])]
    assert [one[0] for one in dropped] == [key(number) for number in range(len(dropped))]
    assert bytes(dropped[3][1]) == value(3)
    assert tier.put_many([(b"big", bytes(2 * MIB))]) == [(b"big", bytes(2 * MIB))]
    tier.close()


def test_hits_are_counted(tmp_path):
    tier = DiskTier(tmp_path, MIB, sync=False)
    tier.put_many([(key(1), value(1)), (key(2), value(2))])
    for _ in range(3):
        tier.get_many([key(2)])
    tier.flush()
    assert {item.key: item.hits for item in tier.items()} == {key(1): 0, key(2): 3}
    tier.close()


def test_the_clock_does_not_matter(tmp_path, monkeypatch):
    tier = DiskTier(tmp_path, MIB, sync=False)
    for number in range(60):
        monkeypatch.setattr(time, "time", lambda number=number: 2e9 - 1e7 * number)
        tier.put_many([(key(number), value(number))])
    for number in range(60, 120):
        tier.put_many([(key(number), value(number))])
    assert tier.contains(key(119))
    assert not tier.contains(key(0))
    tier.close()


# ---- several processes ------------------------------------------------------------------------------------------

WRITER = """
import sys
from tests.tiers.test_disk import DiskTier, key, value
tier = DiskTier(sys.argv[1], 8 << 20, sync=False)
first, last = int(sys.argv[2]), int(sys.argv[3])
print("open", flush=True)
while True:
    for number in range(first, last):
        tier.put_many([(key(number), value(number))])
        tier.get_many([key(number)])
    print("round", flush=True)
    if len(sys.argv) < 5:
        break
tier.close()
"""


def writer(path: Path, first: int, last: int, *more: str) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(first), str(last), *more],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_several_processes_write_and_read_one_file(tmp_path):
    mine = DiskTier(tmp_path, 8 * MIB, sync=False)
    processes = [writer(tmp_path, first, first + 50) for first in (0, 50, 25)]
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert verified(mine, 100) == 100
    mine.close()


GROWS = """
import os, sys
from tests.tiers.test_disk import DiskTier
tier = DiskTier(sys.argv[1], 256 << 20, sync=False)
print("open", flush=True)
for number in range(int(sys.argv[2])):
    tier.put_many([(os.urandom(20), os.urandom(3000)) for _ in range(100)])
tier.close()
"""


def growing(path: Path, count: int) -> subprocess.Popen[str]:
    """A process that makes the file larger, by so many times 400 kB."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", GROWS, str(path), str(count)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    return process


def test_a_file_that_another_process_makes_larger_is_not_taken_for_damaged(tmp_path):
    filled(tmp_path)
    process = growing(tmp_path, 100_000)
    for _ in range(12):
        tier = DiskTier(tmp_path, 8 * MIB, sync=False)
        assert verified(tier, 100) == 100
        tier.close()
    assert process.poll() is None, "it still writes"
    process.kill()
    process.communicate()
    assert not list(tmp_path.glob("*.damaged"))


def test_a_process_with_a_larger_budget_makes_the_file_larger_than_mine(tmp_path):
    mine = DiskTier(tmp_path, 4 * MIB, sync=False)
    mine.put_many([(key(1), value(1))])
    growing(tmp_path, 100).communicate(timeout=60)
    assert (tmp_path / "data.mdb").stat().st_size > 30 * MIB
    with mine.lease():
        assert mine.get_many([key(1)]) == [value(1)]
    mine.put_many([(key(2), value(2))])
    assert mine.get_many([key(2)]) == [value(2)]
    mine.close()


def test_a_file_that_outgrew_mine_waits_for_threads_that_use_it(tmp_path):
    mine = DiskTier(tmp_path, 4 * MIB, sync=False)
    mine.put_many([(key(1), value(1))])
    inside, go = threading.Event(), threading.Event()

    def use() -> None:
        with mine.lease():
            inside.set()
            go.wait(60)

    thread = threading.Thread(target=use)
    thread.start()
    assert inside.wait(60)
    growing(tmp_path, 100).communicate(timeout=60)
    with pytest.raises(TierError, match="cannot be mapped while it is in use"):
        mine.get_many([key(1)])
    go.set()
    thread.join()
    assert mine.get_many([key(1)]) == [value(1)]
    mine.close()


def test_a_file_that_cannot_be_examined_is_not_taken_for_damaged(tmp_path, monkeypatch):
    filled(tmp_path)
    monkeypatch.setattr(sys, "path", [])  # the client cannot be imported
    assert not _is_damaged(tmp_path, 64 * MIB)
    monkeypatch.undo()
    assert not _is_damaged(tmp_path, 64 * MIB)
    assert not _is_damaged(tmp_path, 1 << 60), "more than can be mapped"
    (tmp_path / "data.mdb").write_bytes(bytes(100_000))
    assert _is_damaged(tmp_path, 64 * MIB)


@pytest.mark.parametrize(
    ("end", "damaged"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", True),
        ("import os, signal; os.kill(os.getpid(), signal.SIGBUS)", True),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", False),
        ("raise SystemExit(1)", False),
        ("import time; time.sleep(60)", False),
    ],
)
def test_a_check_that_ends_early_proves_damage_only_if_the_file_crashed_it(tmp_path, monkeypatch, end, damaged):
    filled(tmp_path)
    monkeypatch.setattr(lmdbfile, "_CHECK", end)
    monkeypatch.setattr(lmdbfile, "_CHECK_SECONDS", 0.5 if "sleep" in end else 30)
    assert _is_damaged(tmp_path, 64 * MIB) is damaged


def test_what_another_process_has_begun_anew_is_not_set_aside(tmp_path, monkeypatch):
    filled(tmp_path)
    begun = filled(tmp_path / "new")

    def late(path: Path, map_size: int) -> bool:
        (path / "data.mdb").rename(path / "data.mdb.other.damaged")
        begun.rename(path / "data.mdb")
        return True

    monkeypatch.setattr(lmdbfile, "_is_damaged", late)
    tier = DiskTier(tmp_path, 8 * MIB, sync=False)
    assert verified(tier, 100) == 100
    assert len(list(tmp_path.glob("*.damaged"))) == 1
    tier.close()


def killed(path: Path, times: int) -> tuple[int, int]:
    """Kill a writer so often; the requests that a cache over its file answers after that, and tokens from the file."""
    draw = random.Random(0)
    served = tokens = 0
    for turn in range(times):
        process = writer(path, 0, 60, "forever")
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(draw.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        tier = DiskTier(path, 8 * MIB, sync=False)
        there = verified(tier, 60)
        assert sum(footprint(item.key, item.nbytes) for item in tier.items()) == tier.nbytes()
        tier.put_many([(b"turn", b"%d" % turn)])
        cache = Cache(6, [tier])
        turns(cache, 4)
        assert cache.stack.close()
        tier.close()
        served, tokens = served + cache.served, tokens + cache.stack.promoted_tokens
    assert there
    return served, tokens


def test_killed_while_writing(tmp_path):
    assert killed(tmp_path, 4) == (4 * 4, 4 * 80 - 40), "all but the very first two prompts come from the file"
    assert not list(tmp_path.glob("*.damaged"))


@pytest.mark.slow
def test_killed_200_times_while_writing(tmp_path):
    assert killed(tmp_path, 200) == (200 * 4, 200 * 80 - 40)
    assert not list(tmp_path.glob("*.damaged"))


# ---- spoiled files ----------------------------------------------------------------------------------------------


def filled(path: Path) -> Path:
    tier = DiskTier(path, 8 * MIB, sync=False)
    tier.put_many([(key(number), value(number)) for number in range(100)])
    cache = Cache(6, [tier])
    assert turns(cache, 4) == [0, 0, 20, 20]
    assert cache.stack.close()
    tier.close()
    return path / "data.mdb"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9])
def test_a_truncated_file_is_set_aside(tmp_path, share):
    file = filled(tmp_path)
    os.truncate(file, int(file.stat().st_size * share))
    with pytest.warns(KVCacheWarning, match=r"its file was damaged and is data.mdb.*.damaged now"):
        tier = DiskTier(tmp_path, 8 * MIB, sync=False)
    assert len(list(tmp_path.glob("*.damaged"))) == 1
    assert verified(tier, 100) == 0
    tier.put_many([(key(1), value(1))])
    assert tier.get_many([key(1)]) == [value(1)]
    cache = Cache(6, [tier])
    assert turns(cache, 4) == [0, 0, 20, 20]
    assert cache.answered() == (4, 40)
    assert cache.stack.close()
    tier.close()


@pytest.mark.parametrize("seed", range(6))
def test_a_file_overwritten_with_noise(tmp_path, seed):
    file = filled(tmp_path)
    draw = random.Random(seed)
    with file.open("r+b") as handle:
        for _ in range(200 if seed % 2 else 3):
            handle.seek(draw.randrange(file.stat().st_size - 4096))
            handle.write(draw.randbytes(draw.choice([1, 100, 4096])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KVCacheWarning)
        tier = DiskTier(tmp_path, 8 * MIB, sync=False)
    found = tier.get_many([key(number) for number in range(100)])
    tier.put_many([(key(101), value(101))])
    assert tier.get_many([key(101)]) == [value(101)]
    there = [(number, one) for number, one in enumerate(found) if one is not None]
    served = [(number, one) for number, one in there if verifies(number, one)]
    assert served == [(number, one) for number, one in there if one == value(number)], "served if whole, and only then"
    assert len(served) < 100 or seed % 2 == 0, "so much noise has hit some"
    cache = Cache(6, [tier])
    cached = turns(cache, 6)
    assert cached[2:] == [20] * 4, "what was spoiled is computed, and written anew"
    assert cache.answered() == (6, sum(cached))
    assert cache.stack.close()
    tier.close()


@contextlib.contextmanager
def no_file_beyond(nbytes: int) -> Iterator[None]:
    """Inside, this process can write no file behind so many bytes."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path):
    tier = DiskTier(tmp_path, 64 * MIB, sync=False)
    tier.put_many([(key(number), value(number)) for number in range(20)])
    cache = Cache(6, [tier])
    assert turns(cache, 4) == [0, 0, 20, 20]
    assert cache.answered() == (4, 40)
    with (
        no_file_beyond((tmp_path / "data.mdb").stat().st_size + 8192),
        pytest.raises(lmdb.Error, match=r"Input|large|space"),
    ):
        tier.put_many([(key(number), value(number)) for number in range(20, 500)])
    with no_file_beyond(8192):  # two pages, which say where the others are
        assert turns(cache, 4) == [20] * 4, "what is there is served"
        assert turns(cache, 4, first=5) == [0] * 4, "what cannot be written is computed"
        assert cache.answered() == (8, 80)
    assert cache.stack.stats[0].lost > 0
    assert verified(tier, 20) == 20
    tier.put_many([(key(600), value(600))])
    assert tier.get_many([key(600)]) == [value(600)]
    cached = turns(cache, 6, first=5)
    assert cached[2:] == [20] * 4, "and written as soon as there is room"
    assert cache.answered() == (6, sum(cached))
    assert cache.stack.close()
    tier.close()


def test_a_writer_that_holds_the_lock_holds_up_writers_only(tmp_path):
    tier = DiskTier(tmp_path, 8 * MIB, sync=False)
    tier.put_many([(key(number), value(number)) for number in range(300)])
    cache = Cache(6, [tier], queue_bytes=40 * LAYOUT.packed_bytes(0))
    assert turns(cache, 4) == [0, 0, 20, 20]
    assert cache.answered() == (4, 40)
    holder = holds_the_lock(tmp_path)
    started = time.monotonic()
    assert verified(tier, 300) == 300, "so many that their order of use is to be written"
    assert verified(tier, 300) == 300
    assert time.monotonic() - started < 5
    assert [cache.run(prompt(turn % 2)) for turn in range(60)] == [20] * 60, "read, however often"
    assert [cache.run(prompt(seed)) for seed in (5, 6, 5)] == [0, 0, 20], "found while it waits to be written"
    assert cache.stack.dropped_blocks == 0
    assert [cache.run(prompt(seed)) for seed in range(10, 20)] == [0] * 10
    assert cache.stack.dropped_blocks > 0, "the queue is full"
    assert cache.answered() == (73, 61 * 20)
    assert time.monotonic() - started < 10, "no step has waited"
    started = time.monotonic()
    assert not cache.stack.flush(0.2), "nothing was written meanwhile"
    assert time.monotonic() - started < 5
    assert not tier.contains(tier_key_of(cache, 5))
    let_go(holder)
    assert cache.stack.flush(10)
    assert tier.contains(tier_key_of(cache, 5))
    assert turns(cache, 4, first=5) == [20] * 4
    assert cache.answered() == (4, 80)
    tier.put_many([(key(2), value(2))])
    assert tier.get_many([key(2)]) == [value(2)]
    assert cache.stack.close()
    tier.close()


def holds_the_lock(path: Path) -> subprocess.Popen[str]:
    """A process that has the file open and its lock; it makes the file if there is none."""
    code = (
        "import lmdb, sys, time\n"
        "env = lmdb.open(sys.argv[1], max_dbs=4, map_size=30 << 20)\n"
        "txn = env.begin(write=True)\nprint('held', flush=True)\ntime.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()
    return holder


def let_go(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    assert holder.stdout is not None
    holder.stdout.close()


WAITING = {"kvcache-waiting", "kvcache-opening", "kvcache-touches"}


def waiting_threads() -> list[str]:
    """Threads that wait for a lock, after a moment in which they may end; other tests may have left a writer."""
    deadline = time.monotonic() + 5
    while found := [one.name for one in threading.enumerate() if one.name in WAITING]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return found


def test_opening_waits_for_the_lock_and_not_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("kvcache_core.lmdbfile.LOCK_SECONDS", 0.3)
    tier = DiskTier(tmp_path / "old", 8 * MIB)
    tier.put_many([(key(1), value(1))])
    tier.close()
    (tmp_path / "new").mkdir()
    holders = [holds_the_lock(tmp_path / name) for name in ("old", "new")]
    for name in ("old", "new", "old"):
        with pytest.raises(TierError, match=r"was not opened within 0.3 s.*fuser .*lock.mdb"):
            DiskTier(tmp_path / name, 8 * MIB)
    for holder in holders:
        let_go(holder)
    assert waiting_threads() == []
    tier = DiskTier(tmp_path / "old", 8 * MIB)
    assert tier.get_many([key(1)]) == [value(1)]
    tier.close()
    tier = DiskTier(tmp_path / "new", 8 * MIB)
    tier.put_many([(key(2), value(2))])
    assert tier.get_many([key(2)]) == [value(2)]
    tier.close()


def test_closing_keeps_its_time_limit_while_another_holds_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr("kvcache_core.lmdbfile.LOCK_SECONDS", 0.3)
    tier = DiskTier(tmp_path, 8 * MIB)
    tier.put_many([(key(1), value(1)), (key(2), value(2))])
    holder = holds_the_lock(tmp_path)
    tier.get_many([key(1)])
    started = time.monotonic()
    with pytest.warns(KVCacheWarning, match=r"was not closed within 0.3 s.*fuser"):
        tier.close()
    tier.close()
    assert time.monotonic() - started < 5
    with pytest.raises(TierError, match="is closed"):
        tier.get_many([key(1)])
    let_go(holder)
    assert waiting_threads() == []
    tier = DiskTier(tmp_path, 8 * MIB)
    assert [one.key for one in tier.items()] == [key(2), key(1)], "the order of use was written"
    tier.close()


def test_flush_writes_again_what_made_room_for_the_rest_of_it(tmp_path):
    cache = Cache(12, [f"disk:{tmp_path}?max=1MiB&sync=off"])
    cache.run(prompt(0))
    held = cache.open(prompt(0))  # found in the pool all the time, so on disk it becomes the least recently used
    [disk] = cache.stack.tiers
    for number in range(1, 200):
        cache.run(prompt(number))
        assert cache.stack.flush(5, everything=True)
        findable = [tier_key("block", one.group, one.key or b"") for one in cache.core.findable_blocks()]
        assert findable
        assert all(map(disk.contains, findable))
    assert sum(1 for _ in disk.items()) < 199 * len(prompt(0)) // SIZE, "it had to delete some"
    cache.core.close(held)


@pytest.mark.parametrize("read", [False, True], ids=["blocks to write", "an order of use to write too"])
def test_a_cache_closes_within_its_time_limit_while_another_holds_the_lock(tmp_path, read):
    url = f"disk:{tmp_path}?max=8MiB"
    cache = Cache(6, [url])
    assert turns(cache, 4) == [0, 0, 20, 20]
    assert cache.answered() == (4, 40)
    assert cache.stack.flush(5)
    holder = holds_the_lock(tmp_path)
    if read:
        cache.run(prompt(0))
    assert cache.run(prompt(5)) == 0
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KVCacheWarning)
        assert not cache.stack.flush(0.3, everything=True)
        assert not cache.stack.close(0.5), "what the pool held was not written, and it says so"
    assert time.monotonic() - started < 10
    let_go(holder)
    assert waiting_threads() == []
    cache = Cache(6, [url])
    assert turns(cache, 4) == [20] * 4
    assert cache.answered() == (4, 80)
    assert cache.stack.close()


def tier_key_of(cache: Cache, seed: int) -> bytes:
    """Where the first block of a prompt stands in a tier."""
    seq = cache.core.open(prompt(seed))
    found = tier_key("block", 0, seq.prompt_keys[0])
    cache.core.close(seq)
    return found


def put_one_by_one(tier: DiskTier, count: int) -> None:
    for number in range(count):
        tier.put_many([(key(number), value(number))])


@contextlib.contextmanager
def small_file_system(tmp_path: Path, size: str) -> Iterator[Path]:
    """The folder that a file system of its own lies at."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_small_file_system(tmp_path):
    """Real ENOSPC from a mount of its own, where mounting is allowed."""
    with small_file_system(tmp_path, "3m") as folder:
        cache = Cache(6, [f"disk:{folder}?max=64MiB&sync=on"])
        tier = cache.stack.tiers[0]
        with pytest.raises((lmdb.Error, OSError)):
            put_one_by_one(tier, 500)
        assert 0 < verified(tier, 500) < 500
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KVCacheWarning)
            cached = []
            for turn in range(20):
                cached.append(cache.run(prompt(turn % 3)))
                cache.stack.flush(5)
            assert cache.stack.stats[0].lost > 0
            assert cache.answered() == (20, sum(cached))
            subprocess.run(["mount", "-o", "remount,size=20m", str(folder)], check=True)
            turns(cache, 2)
            cache.answered()
            assert turns(cache, 4) == [20] * 4
            assert cache.answered() == (4, 80)
            cache.stack.close()


OPENS = """
import sys
from tests.tiers.test_disk import DiskTier, verified
try:
    print(verified(DiskTier(sys.argv[1], 8 << 20), 100))
except Exception as error:
    print(error)
"""


@pytest.mark.parametrize("there", [False, True], ids=["a new one", "one that has lost its lock file"])
def test_opening_on_a_full_disk_is_one_clear_error(tmp_path, there):
    """In a process of its own: LMDB would end it. What has its lock file is opened, and served."""

    def opened() -> str:
        root = str(Path(__file__).parents[2])
        command = [sys.executable, "-c", OPENS, str(folder / "tier")]
        return subprocess.run(
            command, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=True
        ).stdout

    with small_file_system(tmp_path, "4m") as folder:
        if there:
            filled(folder / "tier")
            lock = folder / "tier" / "lock.mdb"
            before = lock.read_bytes()
        with pytest.raises(OSError, match="No space left"):
            (folder / "rest").write_bytes(bytes(5 * MIB))
        if there:
            assert opened() == "100\n"
            lock.unlink()
            with (folder / "rest").open("ab") as rest, pytest.raises(OSError, match="No space left"):
                rest.write(before * 2)
        assert "its disk has no room ([Errno 28] No space left on device); free some" in opened()
        assert "its disk has no room" in opened()
        assert not list(folder.glob("tier/*.damaged"))
        (folder / "rest").unlink()
        assert opened() == ("100\n" if there else "0\n")


def newer_process(url: str) -> list[str]:
    """Requests that a process of the next format version answers, and tokens that it finds: of one prompt, twice."""
    done = subprocess.run(
        [sys.executable, "-c", NEWER, url],
        # What the prompt's tokens are worth is a hash.
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_two_code_versions_share_a_file(tmp_path):
    """A process of another block format version, in every order: neither sees the other's blocks, both are served."""
    url = f"disk:{tmp_path}?max=8MiB&sync=off"
    cache = Cache(20, [url])
    assert newer_process(url) == ["1", "0", "1", "20"], "while this one has the file open"
    assert cache.run(prompt(1)) == 0
    assert cache.answered() == (1, 0)
    assert cache.stack.flush(5, everything=True)
    assert newer_process(url) == ["1", "20", "1", "20"]
    cache.core.clear()
    assert cache.run(prompt(1)) == 20
    assert cache.answered() == (1, 20)
    assert cache.stack.stats[0].refused == 0, "other keys: a plain miss"
    assert cache.stack.close()
    tier = DiskTier(tmp_path, 8 * MIB)
    assert sorted({item.key[0] for item in tier.items()}) == [1, 2]
    mine = next(item.key for item in tier.items() if item.key[0] == 1)
    tier.put_many([(mine, tier.get_many([b"\2" + mine[1:]])[0] or b"")])
    tier.close()
    again = Cache(20, [url])
    with pytest.warns(KVCacheWarning, match="another format version"):
        cached = again.run(prompt(1))
    assert cached < 20, "up to the refused block"
    assert again.answered() == (1, cached)
    assert again.stack.stats[0].refused == 1
    again.stack.close()
    assert newer_process(url) == ["1", "20", "1", "20"]


NEWER = """
import sys
import kvcache_core.blockformat
kvcache_core.blockformat.FORMAT_VERSION = 2
from tests.tiers.test_tiering import Cache, prompt
for _ in range(2):
    cache = Cache(20, [sys.argv[1]])
    cache.run(prompt(1))
    print(*cache.answered())
    assert cache.stack.close()
"""


def test_the_clock_set_back_serves_what_was_written_in_the_future(tmp_path, monkeypatch):
    url = f"disk:{tmp_path}?max=8MiB&sync=off"
    monkeypatch.setattr(time, "time", lambda: 4e9)
    cache = Cache(20, [url])
    cache.run(prompt(1))
    assert cache.stack.close()
    monkeypatch.setattr(time, "time", lambda: 1e9)
    again = Cache(20, ["ram:1MiB", url])
    assert again.run(prompt(1)) == 20
    assert again.run(prompt(2)) == 0
    assert again.answered() == (2, 20)
    assert again.stack.close()
    monkeypatch.undo()
    last = Cache(20, [url])
    assert [last.run(prompt(1)), last.run(prompt(2))] == [20, 20]
    assert last.answered() == (2, 40)
    assert last.stack.close()


# ---- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("disk:", "it needs a folder; the form is disk:PATH"),
        ("disk:{}?max=lots", "max must be a size"),
        ("disk:{}?max=", "max must be a size"),
        ("disk:{}?max=1kB", "max must be at least 1,048,576 bytes, got 1,000"),
        ("disk:{}?size=1GiB", "unknown option 'size'; there are max, sync"),
        ("disk:{}?max=1GiB&max=2GiB", "an option stands twice"),
        ("disk:{}?sync=maybe", "sync must be 'on' or 'off'"),
        ("disk:{}/file", "is a file; a disk tier needs a folder of its own"),
        ("disk:/proc/nothing", "cannot be written"),
    ],
)
def test_a_bad_url_is_one_clear_error(tmp_path, url, message):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidInput, match=message) as raised:
        open_tier(url.format(tmp_path))
    assert "disk:" in str(raised.value)


@pytest.fixture
def everybodys() -> Iterator[Path]:
    """A folder that any user can look into; pytest's own are one user's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize(
    ("kept", "remedy"), [("folder", "name a folder that can"), ("file", "let this user read and write its data.mdb")]
)
def test_no_permission_is_one_clear_error(everybodys, kept, remedy):
    """Somebody else's folder, or file: tried by a child, for the tests may run as a user who may do everything."""
    folder = everybodys / "theirs"
    folder.mkdir()
    if kept == "file":
        filled(folder)
        (folder / "data.mdb").chmod(0o400)
        (folder / "lock.mdb").chmod(0o400)
    folder.chmod(0o555 if kept == "folder" else 0o777)
    code = """
import os, sys
import kvcache_core.tier_disk
from kvcache_core.tiers import open_tier
if not os.geteuid():
    os.setuid(65534)
try:
    open_tier(sys.argv[1])
except Exception as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, f"disk:{folder}?max=8MiB"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "tier 'disk:" in done.stdout
    assert remedy in done.stdout
    assert not list(folder.glob("*.damaged"))


@pytest.mark.parametrize("named", [[], [b"values"]], ids=["no named databases", "a name of ours"])
def test_another_programs_file_stays_as_it_is(tmp_path, named):
    with lmdb.open(str(tmp_path), max_dbs=1, map_size=1 << 24) as env:
        databases = [env.open_db(one) for one in named] or [None]
        with env.begin(write=True) as txn:
            for number in range(500):
                txn.put(key(number), b"precious", db=databases[0])
    before = (tmp_path / "data.mdb").read_bytes()
    with pytest.raises(TierError, match=r"tier 'disk:.*': its data.mdb is another program's; name a folder of its own"):
        open_tier(f"disk:{tmp_path}?max=8MiB")
    assert (tmp_path / "data.mdb").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.mdb", "lock.mdb"]


def test_a_file_of_another_version_is_refused(tmp_path):
    filled(tmp_path)
    with lmdb.open(str(tmp_path), max_dbs=4) as env:
        meta = env.open_db(b"meta")
        with env.begin(write=True) as txn:
            txn.put(b"format", b"kvcache-disk-99", db=meta)
    with pytest.raises(TierError, match="written by another version"):
        DiskTier(tmp_path, 8 * MIB)


def test_closed(tmp_path):
    tier = DiskTier(tmp_path, MIB)
    tier.close()
    with pytest.raises(TierError, match="is closed"):
        tier.get_many([b"a"])
