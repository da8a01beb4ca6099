"""The tier on the network: a Valkey or Redis server, or a cluster. Extra ``network``."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any
from urllib.parse import unquote

from kvcache_core.blockformat import Buffer
from kvcache_core.errors import PartlyFailed, TierError
from kvcache_core.splitting import MANIFEST_BYTES, in_parts, is_split, part_name, read_manifest
from kvcache_core.tiers import Item, StoredItem, Tier
from kvcache_core.tierurl import TierUrl
from kvcache_core.valkeynodes import Breaker, ClusterNodes, remedy

try:
    import valkey
    from valkey.backoff import NoBackoff
    from valkey.cluster import ValkeyCluster
    from valkey.retry import Retry
except ImportError as error:
    raise ImportError('a valkey tier needs the client: pip install "kvcache-core[network]"') from error

__all__ = ["ValkeyTier", "open_valkey_tier"]

_PREFIX = b"kvcache:"
_RECENT = 65_536
_CONNECTIONS = 64
_FORM = "valkey://[user:password@]host:6379/0?ttl=86400&timeout=1"
_OPTIONS = ("ttl", "timeout", "split", "cluster", "ca", "verify")


def open_valkey_tier(url: str) -> ValkeyTier:
    """A :class:`ValkeyTier` from ``valkey://[user:password@]host:port/db?ttl=86400`` (``valkeys://`` for TLS).

    Without a password in the URL, that of the environment's ``KVCACHE_VALKEY_PASSWORD`` is used.
    """
    at = TierUrl(url, _FORM, _OPTIONS)
    host, port, database = at.parts.hostname, at.port, at.parts.path.strip("/")
    user, password = (unquote(part) if part else None for part in (at.parts.username, at.parts.password))
    cluster = at.switch("cluster", default=False)
    if not host:
        raise at.error("it needs a host")
    if not (database or "0").isdecimal() or (cluster and int(database or 0)):
        raise at.error("the database must be a number" if not cluster else "a cluster has database 0 alone")
    return ValkeyTier(
        host,
        6379 if port is None else port,
        int(database or 0),
        username=user,
        password=password or os.environ.get("KVCACHE_VALKEY_PASSWORD"),
        ttl=int(at.seconds("ttl", 86_400, whole=True)),
        timeout=at.seconds("timeout", 1.0),
        split_bytes=at.size("split", "16MiB", least=1000),
        cluster=cluster,
        tls=_tls(at),
    )


def _tls(at: TierUrl) -> dict[str, Any]:
    """The client's options for TLS; empty for a connection without."""
    if at.parts.scheme not in ("valkeys", "rediss"):
        if given := at.given("ca", "verify"):
            raise at.error(f"{given[0]} is for TLS: valkeys:// or rediss://")
        return {}
    verify = at.switch("verify", default=True)
    # The client's own default takes a certificate that is valid for any other host.
    tls = {"ssl": True, "ssl_ca_certs": at.text("ca"), "ssl_check_hostname": verify}
    return tls if verify else {**tls, "ssl_cert_reqs": "none"}


class ValkeyTier(Tier):
    """Values on a server that many machines share. What to give up for room is the server's choice
    (``maxmemory-policy allkeys-lru``).

    A server that does not answer is left alone for half a second, then a second, and so on up to 30: meanwhile every
    call fails at once. In a cluster that holds for each node by itself: what lies on others is still served.

    Args:
        host: of the server, or of any node of the cluster.
        port: its port.
        database: its number.
        username: for servers with users.
        password: if the server wants one.
        ttl: seconds that a value is kept after it was last written.
        timeout: seconds that one read or write of a socket may take.
        split_bytes: larger values are stored in parts of so many bytes.
        cluster: whether the server is part of a cluster.
        tls: the client's ``ssl_...`` options; empty for none.

    Raises:
        TierError: the server cannot be reached, wants another password, speaks TLS where none was asked for or the
            other way round, or is no Valkey.
    """

    persistent = True

    def __init__(
        self,
        host: str,
        port: int = 6379,
        database: int = 0,
        *,
        username: str | None = None,
        password: str | None = None,
        ttl: int = 86_400,
        timeout: float = 1.0,
        split_bytes: int = 16 << 20,
        cluster: bool = False,
        tls: dict[str, Any] | None = None,
    ) -> None:
        self.name = f"valkey{'s' if tls else ''}://{host}:{port}/{database}"
        self._ttl, self._split = ttl, split_bytes
        self._lock = threading.Lock()
        self._call = Breaker(self.name, self._forget).call
        self._nodes: ClusterNodes | None = None
        self._recent: OrderedDict[bytes, float] = OrderedDict()
        common: dict[str, Any] = {
            "username": username,
            "password": password,
            "socket_timeout": timeout,
            "socket_connect_timeout": timeout,
            **(tls or {}),
        }
        try:
            if cluster:
                self._client: Any = ValkeyCluster(host=host, port=port, cluster_error_retry_attempts=1, **common)
                self._nodes = ClusterNodes(self._client, self._forget)
            else:
                # A connection that a restarted server has closed is opened anew, once.
                retry = Retry(NoBackoff(), 1, supported_errors=(valkey.ConnectionError,))
                kind = valkey.SSLConnection if common.pop("ssl", False) else valkey.Connection
                # Threads beyond so many wait: to them, too, a busy server is none that has failed.
                pool = valkey.BlockingConnectionPool(  # type: ignore[no-untyped-call]
                    _CONNECTIONS, timeout, kind, host=host, port=port, db=database, retry=retry, **common
                )
                self._client = valkey.Valkey.from_pool(pool)
            # A cluster has answered already; its client would ask every node, and one of them may be gone.
            if not cluster and self._client.ping() is not True:
                raise TierError("it does not answer PING")
        except Exception as error:
            raise TierError(f"tier {self.name!r} cannot be used: {remedy(error, tls=bool(tls))}") from error

    def get_many(self, keys: Sequence[bytes]) -> list[Buffer | None]:
        """The value of each key, or None: one MGET, and one more if values lie there in parts.

        What lies on a node of a cluster that does not answer is None too.
        """
        found = self._read([_PREFIX + key for key in keys])
        split = {at: read_manifest(value) for at, value in enumerate(found) if value is not None and is_split(value)}
        if split:
            self._join(keys, found, split)
        self._remember({key: value is not None for key, value in zip(keys, found, strict=True)})
        return found

    def put_many(self, items: Sequence[Item]) -> list[Item]:
        """Store values in one pipeline, each with its time to live.

        Raises:
            PartlyFailed: the server refused some of them, for example because it is out of memory, or a node of the
                cluster does not answer; the others are stored.
            TierError: nothing was stored.
        """
        owners: list[bytes] = []
        commands: list[tuple[Any, ...]] = []
        for key, value in items:
            for name, part in in_parts(_PREFIX + key, value, self._split):
                owners.append(key)
                commands.append(("SET", name, _sendable(part), "EX", self._ttl))
        replies = self._write(commands)
        refused = {key: reply for key, reply in zip(owners, replies, strict=True) if isinstance(reply, Exception)}
        self._remember({key: key not in refused for key, _ in items})
        if refused:
            why = next(iter(refused.values()))
            raise PartlyFailed(f"{len(refused)} of {len(items)} values were refused: {why}", refused)
        return []

    def contains(self, key: bytes) -> bool:
        """Whether this process has seen the key there not long ago."""
        return self._recent.get(key, 0.0) > time.monotonic()

    def delete_many(self, keys: Sequence[bytes]) -> int:
        """Forget values; returns how many there were."""
        with self._lock:
            for key in keys:
                self._recent.pop(key, None)
        return sum(self._call(self._client.delete, _PREFIX + key) for key in keys)

    def items(self, head_bytes: int = 0) -> Iterator[StoredItem]:
        """What lies under this library's prefix.

        Raises:
            PartlyFailed: at the end, when nodes of the cluster do not answer: what lies on them was left out.
        """
        if self._nodes is None:
            yield from self._listed(self._client, self._call, head_bytes)
            return
        gone = []
        for name, client in self._nodes.primaries():
            try:
                yield from self._listed(client, lambda run, *arguments: run(*arguments), head_bytes)
            except (TierError, valkey.exceptions.ValkeyError) as error:
                gone.append(f"node {name} of the cluster does not answer ({error}): what lies on it is not listed")
        if gone:
            raise PartlyFailed("; ".join(gone))

    def _listed(self, client: Any, call: Callable[..., Any], head_bytes: int) -> Iterator[StoredItem]:
        """What lies on one server."""
        names = call(client.scan_iter, _PREFIX + b"*", 500)
        while batch := list(islice(names, 200)):
            pipe = client.pipeline(transaction=False)
            for name in batch:
                pipe.strlen(name)
                pipe.getrange(name, 0, max(head_bytes, MANIFEST_BYTES) - 1)
            replies = call(pipe.execute)
            for name, size, head in zip(batch, replies[::2], replies[1::2], strict=True):
                key = name[len(_PREFIX) :]
                if is_split(head):  # its parts may lie on other nodes
                    first = self._call(self._client.getrange, part_name(name, 0), 0, max(0, head_bytes - 1))
                    yield StoredItem(key, read_manifest(head)[1], first[:head_bytes])
                else:
                    yield StoredItem(key, size, head[:head_bytes])

    def close(self) -> None:
        """Close the connections."""
        if self._nodes is not None:
            self._nodes.close()
        self._client.close()

    # ---- one exchange with the server, or with each node ----------------------------------------

    def _read(self, names: list[bytes]) -> list[Buffer | None]:
        if self._nodes is None:
            return self._call(self._mget, names)
        replies = self._nodes.execute([("GET", name) for name in names])
        return [reply if isinstance(reply, bytes) else None for reply in replies]

    def _mget(self, names: list[bytes]) -> list[Buffer | None]:
        found: list[Buffer | None] = self._client.mget(names) if names else []
        if len(found) != len(names) or any(value is not None and not isinstance(value, bytes) for value in found):
            raise TierError("the server's answer is not what was asked for")
        return found

    def _write(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        return self._call(self._set, commands) if self._nodes is None else self._nodes.execute(commands)

    def _set(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        pipe = self._client.pipeline(transaction=False)
        for command in commands:
            pipe.execute_command(*command)
        replies: list[Any] = pipe.execute(raise_on_error=False)
        broken = [reply for reply in replies if isinstance(reply, (valkey.ConnectionError, valkey.TimeoutError))]
        if broken:
            raise broken[0]
        return replies

    def _forget(self) -> None:
        """What failed may come back empty."""
        with self._lock:
            self._recent.clear()

    # ---- values in parts -----------------------------------------------------------------------

    def _join(self, keys: Sequence[bytes], found: list[Buffer | None], split: dict[int, tuple[int, int]]) -> None:
        """Replace manifests by the values they announce, or by None where a part is missing."""
        names = [part_name(_PREFIX + keys[at], number) for at, (count, _) in split.items() for number in range(count)]
        parts = iter(self._read(names))
        for at, (count, size) in split.items():
            mine = list(islice(parts, count))
            whole = b"".join(part for part in mine if part is not None)
            found[at] = whole if len(whole) == size and None not in mine else None

    def _remember(self, seen: dict[bytes, bool]) -> None:
        """Which keys were there just now, and which were not."""
        until = time.monotonic() + min(300.0, self._ttl / 2)
        with self._lock:
            for key, there in seen.items():
                self._recent.pop(key, None)
                if there:
                    self._recent[key] = until
            while len(self._recent) > _RECENT:
                self._recent.popitem(last=False)


def _sendable(value: Buffer) -> bytes | memoryview:
    """What the client sends without a copy."""
    return value if isinstance(value, bytes) else memoryview(value).cast("B")
