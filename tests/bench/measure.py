"""Timing by turns, and what a benchmark hands to the report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["Row", "Spread", "Table", "alternate", "clock", "describe_machine", "read_bandwidth", "seconds"]

CLOCK = "BENCH_CLOCK"
PACKAGES = ("numpy", "torch", "tensorflow", "tensorflow-cpu", "keras", "keras-hub", "transformers")
OURS = "ours"


@dataclass(frozen=True)
class Spread:
    """Median and range of several runs."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1], len(found))


@dataclass
class Row:
    """One case: our time, each peer's, and how they compare.

    `ratios` are ours / peer, run by run: neighbouring runs share whatever else the machine was doing.
    `targets` are the most that the ratio to a peer may be.
    """

    case: str
    unit: str
    ours: Spread
    peers: dict[str, Spread] = field(default_factory=dict)
    ratios: dict[str, Spread] = field(default_factory=dict)
    targets: dict[str, float] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        case: str,
        unit: str,
        samples: dict[str, list[float]],
        *,
        targets: dict[str, float] | None = None,
        extra: dict[str, float] | None = None,
    ) -> Row:
        """A row from `samples` (name -> one value per run, `"ours"` among them)."""
        ours = samples[OURS]
        peers = {name: values for name, values in samples.items() if name != OURS}
        return cls(
            case,
            unit,
            Spread.of(ours),
            {name: Spread.of(values) for name, values in peers.items()},
            {
                name: Spread.of(mine / theirs for mine, theirs in zip(ours, values, strict=True))
                for name, values in peers.items()
            },
            targets or {},
            extra or {},
        )


@dataclass
class Table:
    """One benchmark's result."""

    name: str
    title: str
    text: list[str]
    rows: list[Row]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def clock() -> float:
    """Seconds that have passed; with `--clock processor` seconds that this process has computed.

    The latter is for one thread on a machine that others use too: waiting for a core is nobody's cost then.
    """
    return time.process_time() if os.environ.get(CLOCK) == "processor" else time.perf_counter()


def read_bandwidth() -> Callable[[], float]:
    """A function that measures how many bytes per second PyTorch reads from memory, with the threads it has.

    It is the dot product of half a gigabyte with itself: nothing reads faster and needs less else.
    """
    import torch

    values = torch.ones(2**27)
    return lambda: values.nbytes / seconds(lambda: torch.dot(values, values))


def seconds(function: Callable[[], object]) -> float:
    """How long one call takes."""
    start = clock()
    function()
    return clock() - start


def alternate(
    candidates: dict[str, Callable[[], float]], runs: int, what: str, *, warm_up: int = 1
) -> dict[str, list[float]]:
    """Let the candidates take turns; each call returns one run's figure. The order turns round every run."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, auto_refresh=False) as progress:  # a thread that draws would be measured too
        task = progress.add_task(what, total=(runs + warm_up) * len(candidates))
        for run in range(-warm_up, runs):
            names = list(candidates) if run % 2 else list(reversed(candidates))
            for name in names:
                progress.update(task, description=f"{what}: {name}", refresh=True)
                value = candidates[name]()
                if run >= 0:
                    samples[name].append(value)
                progress.advance(task)
        progress.update(task, description=what, refresh=True)
    return samples


def describe_machine() -> dict[str, Any]:
    """What the figures were measured on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
