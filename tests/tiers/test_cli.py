"""The command line over real tiers."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

typer_testing = pytest.importorskip("typer.testing")

from kvcache_core.cli import app, console  # noqa: E402
from kvcache_core.tier_file import write_saved  # noqa: E402
from kvcache_core.tiers import open_tier  # noqa: E402
from tests.tiers.test_tiering import WEIGHTS, Cache, prompt  # noqa: E402


def run(*arguments: str) -> tuple[int, str]:
    console.width = 200  # the console may have been made with a narrower one
    done = typer_testing.CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.output


@pytest.fixture
def url(tmp_path):
    url = f"disk:{tmp_path}?max=8MiB"
    cache = Cache(20, [url])
    cache.run(prompt(1))
    cache.run(prompt(2), b"tenant")
    assert cache.stack.close()
    return url


def test_inspect_shows_what_is_there(url):
    code, text = run("inspect", url)
    assert code == 0
    assert WEIGHTS.hex() in text
    row = next(line for line in text.splitlines() if WEIGHTS.hex() in line)
    assert [cell.strip() for cell in row.split("│")[2:4]] == ["block", "20"]


def test_looking_makes_nothing(tmp_path):
    code, text = run("inspect", f"disk:{tmp_path / 'mistyped'}")
    assert code == 2
    assert "nothing lies at" in text
    assert not (tmp_path / "mistyped").exists()
    (tmp_path / "other").mkdir()
    code, text = run("inspect", f"disk:{tmp_path / 'other'}?max=8MiB")
    assert code == 2
    assert "no data.mdb" in text
    assert not list((tmp_path / "other").iterdir())


def test_looking_is_no_use(url):
    """Neither the counts of hits nor the order of use change."""
    tier = open_tier(url)
    keys = [item.key for item in tier.items()]
    tier.get_many(keys[:3])
    tier.close()
    for _ in range(2):
        assert run("inspect", url, "--verify")[0] == 0
    tier = open_tier(url)
    assert [(item.key, item.hits) for item in tier.items()] == [
        *((key, 0) for key in keys[3:]),
        *((key, 1) for key in keys[2::-1]),
    ]
    tier.close()


def test_verify_finds_the_damaged_one(url):
    assert run("inspect", url, "--verify")[0] == 0
    tier = open_tier(url)
    key = next(tier.items()).key
    value = bytearray(tier.get_many([key])[0] or b"")
    value[-40] ^= 1
    tier.put_many([(key, bytes(value)), (b"foreign", b"something else")])
    tier.close()
    code, text = run("inspect", url, "--verify")
    assert code == 1
    assert "not of this library" in text
    assert next(line for line in text.splitlines() if WEIGHTS.hex() in line).split("│")[-2].strip() == "1"


def test_progress_is_shown(url, monkeypatch):
    shown = []

    def track(values, description, **options):
        values = list(values)
        shown.append((description, len(values)))
        return values

    monkeypatch.setattr("kvcache_core.cli.track", track)
    run("inspect", url)
    run("inspect", url, "--verify")
    run("inspect", url, "--prune", "--model", WEIGHTS.hex())
    assert shown == [("listing", 20), ("reading", 20), ("listing", 20), ("choosing", 20), ("deleting", 1)]


def test_a_saved_cache_can_be_inspected_and_not_pruned(tmp_path, url):
    tier = open_tier(url)
    items = [(item.key, tier.get_many([item.key])[0] or b"") for item in tier.items()]
    tier.close()
    write_saved(tmp_path / "saved", {"size": 20}, [items])
    code, text = run("inspect", f"file:{tmp_path / 'saved'}", "--verify")
    assert code == 0
    assert WEIGHTS.hex() in text
    code, text = run("inspect", f"file:{tmp_path / 'saved'}", "--prune", "--model", WEIGHTS.hex())
    assert code == 2
    assert "cannot delete" in text


def test_a_server(valkey_url):
    cache = Cache(20, [valkey_url])
    cache.run(prompt(1))
    assert cache.stack.close()
    code, text = run("inspect", valkey_url, "--verify")
    assert code == 0
    row = next(line for line in text.splitlines() if WEIGHTS.hex() in line).split("│")
    assert [row[at].strip() for at in (2, 3, -2)] == ["block", "10", "0"]
    assert "deleted 0 blocks" in run("inspect", valkey_url, "--prune", "--older-than", "1h")[1]
    assert "deleted 10 blocks" in run("inspect", valkey_url, "--prune", "--model", WEIGHTS.hex()[:8])[1]
    again = Cache(20, [valkey_url])
    assert again.run(prompt(1)) == 0
    assert again.stack.close()


def test_prune_by_age(url, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3000)
    cache = Cache(20, [url])
    cache.run(prompt(3))
    assert cache.stack.close()
    monkeypatch.setattr(time, "time", lambda: now + 3700)
    assert "deleted 0 blocks" in run("inspect", url, "--prune", "--older-than", "2h")[1]
    assert "deleted 20 blocks" in run("inspect", url, "--prune", "--older-than", "1h")[1]
    tier = open_tier(url)
    assert len(list(tier.items())) == 10, "the newer ones stay"
    tier.close()


def test_prune(url):
    assert "deleted 0 blocks" in run("inspect", url, "--prune", "--older-than", "1h")[1]
    assert "deleted 0 blocks" in run("inspect", url, "--prune", "--model", "ffff")[1]
    assert "deleted 0 blocks" in run("inspect", url, "--prune", "--down-to", "1MiB")[1]
    first = next(
        line for line in run("inspect", url, "--prune", "--down-to", "5kB")[1].splitlines() if "deleted" in line
    )
    assert 0 < int(first.split()[1]) < 20
    assert "deleted" in run("inspect", url, "--prune", "--model", WEIGHTS.hex()[:6])[1]
    tier = open_tier(url)
    assert list(tier.items()) == []
    tier.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["floppy:a"], "unknown scheme"),
        (["disk:"], "needs a folder"),
        (["ram:4GiB"], "lies in the memory of a process that uses it"),
        (["URL", "--older-than", "7d"], "say what to delete; add --prune"),
        (["URL", "--prune"], "--prune needs to know what"),
        (["URL", "--prune", "--older-than", "soon"], "an age is a number"),
        (["URL", "--prune", "--model", "smollm"], "first letters of its weights"),
        (["URL", "--prune", "--down-to", "little"], "memory must be a size"),
    ],
)
def test_bad_input_is_one_clear_line(url, arguments, message):
    code, text = run("inspect", *(url if one == "URL" else one for one in arguments))
    assert code == 2
    assert message in text


def test_plan():
    code, text = run("plan", "--layers", "30", "--heads", "3", "--head-size", "64", "--memory", "2GiB")
    assert code == 0
    assert "737,280" in text
    assert "KVCache(size=2911)" in text
    assert run("plan", "--layers", "1", "--heads", "0", "--head-size", "64")[0] == 2
    assert run("plan", "--layers", "1", "--heads", "1", "--head-size", "64", "--memory", "1kB")[0] == 2


def test_simulate(tmp_path):
    trace = tmp_path / "trace.jsonl"
    prompts = [[1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 9], [5, 6, 7, 8]]
    trace.write_text("\n".join(json.dumps({"hash_ids": one}) for one in prompts))
    code, text = run("simulate", str(trace), "--pool", "4", "--tier", "100%")
    assert code == 0
    assert "4 requests" in text
    cells = {row.split("│")[1].strip(): row.split("│")[3].strip() for row in text.splitlines() if row.count("│") == 5}
    assert cells == {"pool": "0", "tier 1": "6", "computed": "10"}
    trace.write_text("{}")
    assert "line 1: no JSON object with hash_ids" in run("simulate", str(trace))[1]
    assert run("simulate", str(tmp_path / "nowhere"))[0] == 2
    trace.write_text('{"hash_ids": [1]}')
    assert "a capacity is a number of blocks" in run("simulate", str(trace), "--pool", "some")[1]


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "kvcache_core", "--help"], capture_output=True, text=True, check=True)
    assert "inspect" in done.stdout
