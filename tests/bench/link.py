"""A slow link: `python tests/bench/link.py PORT BYTES_PER_SECOND` prints a port that leads to the other one over it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

__all__ = ["link_to"]


@contextlib.contextmanager
def link_to(target: int, rate: int) -> Iterator[int]:
    """A port of a process of its own that leads to ``target`` over ``rate`` bytes per second each way."""
    command = [sys.executable, __file__, str(target), str(rate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as proxy:
        try:
            yield int(proxy.stdout.readline())
        finally:
            proxy.terminate()


def main() -> None:
    """Serve until the process is ended."""
    target, rate = map(int, sys.argv[1:])
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        near, _ = listener.accept()
        far = socket.create_connection(("127.0.0.1", target))
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=_pump, args=(source, sink, rate), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, rate: int) -> None:
    """Hand on what comes, no faster than the link."""
    free = 0.0
    with contextlib.suppress(OSError):
        while piece := source.recv(1 << 18):
            now = time.monotonic()
            free = max(free, now) + len(piece) / rate
            time.sleep(free - now)
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    main()
