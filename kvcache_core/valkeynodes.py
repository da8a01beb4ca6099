"""Servers that are left alone for a while after they failed, and a cluster in which each node is one of them."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from kvcache_core.errors import KVCacheWarning, TierError

try:
    import valkey
except ImportError as error:
    raise ImportError('a valkey tier needs the client: pip install "kvcache-core[network]"') from error

__all__ = ["Breaker", "ClusterNodes", "remedy"]

_T = TypeVar("_T")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_THREADS = 16
_PASSWORD = ("NOAUTH", "WRONGPASS", "Authentication required", "username-password pair")
"""A cluster's client hides what kind of error it was."""


class Breaker:
    """Exchanges with one server. One that fails is left alone for half a second, then a second, and so on up to 30:
    meanwhile every call fails at once.

    Args:
        name: of the server, for messages.
        failed: called after each failure.
    """

    def __init__(self, name: str, failed: Callable[[], None]) -> None:
        self._name, self._failed = name, failed
        self._lock = threading.Lock()
        self._failures = 0
        self._resume = 0.0

    def call(self, run: Callable[..., _T], *arguments: Any) -> _T:
        """Run one exchange.

        Raises:
            TierError: it failed, the server refused it, or the server is left alone.
        """
        if time.monotonic() < self._resume:
            raise TierError(f"{self._name} is not asked again for {self._resume - time.monotonic():.1f} s: it failed")
        try:
            result = run(*arguments)
        except valkey.exceptions.ResponseError as error:
            raise TierError(f"{self._name} refused: {error}") from error
        except Exception as error:
            with self._lock:
                pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**self._failures)
                self._failures = min(self._failures + 1, 16)
                self._resume = time.monotonic() + pause
            self._failed()
            raise TierError(f"{self._name}: {type(error).__name__}: {error}") from error
        self._failures = 0
        return result


class ClusterNodes:
    """The nodes of a cluster, asked side by side, so that one that is gone takes no other's keys with it.

    The client's own pipeline fails as a whole when one node cannot be reached, and asks a node that hangs again for
    every single command.

    Args:
        client: a ``valkey.cluster.ValkeyCluster``: it knows which node serves which key.
        failed: called after each failure of a node.
    """

    def __init__(self, client: Any, failed: Callable[[], None]) -> None:
        self._client, self._failed = client, failed
        self._breakers: dict[str, Breaker] = {}
        self._outdated = False
        self._lost: set[str] = set()
        self._told: set[str] = set()
        self._threads = ThreadPoolExecutor(_THREADS, "kvcache-valkey")

    def execute(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The reply to each command, whose second word is its key; an exception where its node gave none.

        Raises:
            TierError: no command was answered.
        """
        replies = self._round(commands)
        moved = [at for at, reply in enumerate(replies) if isinstance(reply, valkey.exceptions.MovedError)]
        if moved or self._outdated:
            self._outdated = False
            with suppress(Exception):  # nobody can say where keys are now: what is known stays
                self._client.nodes_manager.initialize()
        for at, reply in zip(moved, self._round([commands[at] for at in moved]), strict=True):
            replies[at] = reply
        self._tell()
        errors = [reply for reply in replies if isinstance(reply, Exception)]
        if errors and len(errors) == len(replies):
            raise TierError(f"no node took any of {len(replies)} commands: {errors[0]}")
        return replies

    def primaries(self) -> list[tuple[str, Any]]:
        """Name and client of each node that serves keys."""
        return [(node.name, self._client.get_valkey_connection(node)) for node in self._client.get_primaries()]

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def _round(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Send each command to the node that serves its key."""
        replies: list[Any] = [None] * len(commands)
        places: dict[str, list[int]] = {}
        nodes: dict[str, Any] = {}
        for at, command in enumerate(commands):
            try:
                node = self._client.get_node_from_key(command[1])
            except valkey.exceptions.ValkeyClusterException as error:  # a slot that no node serves
                self._outdated = True
                replies[at] = error
                continue
            nodes[node.name] = node
            places.setdefault(node.name, []).append(at)
        mine = [[commands[at] for at in of_node] for of_node in places.values()]
        answers = self._threads.map(self._ask, nodes.values(), mine)
        for of_node, answer in zip(places.values(), answers, strict=True):
            for at, reply in zip(of_node, answer, strict=True):
                replies[at] = reply
        return replies

    def _ask(self, node: Any, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """One pipeline to one node; an exception in place of each reply if it does not answer."""
        breaker = self._breakers.get(node.name) or self._breakers.setdefault(
            node.name, Breaker(f"node {node.name}", partial(self._lose, node.name))
        )
        try:
            return breaker.call(self._exchange, node, commands)
        except TierError as error:
            return [error] * len(commands)

    def _exchange(self, node: Any, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        pipe = self._client.get_valkey_connection(node).pipeline(transaction=False)
        for command in commands:
            pipe.execute_command(*command)
        replies: list[Any] = pipe.execute(raise_on_error=False)
        return replies

    def _lose(self, name: str) -> None:
        self._outdated = True
        self._lost.add(name)
        self._failed()

    def _tell(self) -> None:
        """Say it once of each node."""
        for name in self._lost - self._told:
            self._told.add(name)
            warnings.warn(
                f"node {name} of the cluster does not answer: what lies on it is a miss, counted in tier_stats()",
                KVCacheWarning,
                stacklevel=2,
            )


def remedy(error: Exception, *, tls: bool) -> str:
    """What went wrong at the first contact, and what to do."""
    text = f"{type(error).__name__}: {error}"
    other = "it speaks TLS at all (else valkey://)" if tls else "it wants TLS (valkeys://)"
    if "Cluster mode is not enabled" in text:
        return f"it is no part of a cluster ({text}); leave out ?cluster=on"
    if isinstance(error, valkey.AuthenticationError) or any(sign in text for sign in _PASSWORD):
        return f"wrong or missing password ({text}); put it into the URL or into KVCACHE_VALKEY_PASSWORD"
    if isinstance(error, valkey.TimeoutError):
        return f"no answer ({text}); check host and port, and whether {other}"
    if "SSL" in text or "CERTIFICATE" in text:
        return f"TLS failed ({text}); use valkey:// for a server without TLS, or name its certificate with ?ca=FILE"
    if isinstance(error, (valkey.exceptions.InvalidResponse, valkey.ResponseError, TierError)):
        return f"it is no Valkey or Redis server, or refuses to serve ({text}); check host, port and database"
    return f"no connection ({text}); check host and port, and whether {other}"
