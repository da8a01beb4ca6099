"""Compiling the kernels in C: once per machine, compiler and state of the sources, then kept in the cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["built"]

_FLAGS = ["-O3", "-march=native", "-fopenmp", "-fPIC"]
_SOURCES = {"decode.c": ["-ffast-math"], "linear.c": ["-ffast-math"], "prefill.c": []}
"""The sources, and what each is compiled with besides."""

_Library = TypeVar("_Library")


def built(load: Callable[[Path], _Library]) -> _Library | None:
    """What ``load`` makes of the compiled library, which is compiled first where it is not kept yet.

    It is kept in ``kvcache`` below ``$XDG_CACHE_HOME`` or ``~/.cache``. That folder can be deleted at any time; where
    it cannot be written, each process compiles for itself.

    Args:
        load: takes the library's path; raises OSError or AttributeError for a file that is none.

    Returns:
        None where there is no compiler, or it fails.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    try:
        kept = _place(compiler)
        if kept is not None and kept.exists():
            with contextlib.suppress(OSError, AttributeError):  # damaged: it is made again
                return load(kept)
        with tempfile.TemporaryDirectory() as folder:
            library = _compile(compiler, Path(folder))
            if kept is not None:
                _keep(library, kept)
            return load(library)
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None


def _place(compiler: str) -> Path | None:
    """Where the library is kept: named after all that it is made from and for. None without a home."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=60).stdout
    made_from = hashlib.sha256(repr((compiler, version, _FLAGS, _SOURCES, _processor())).encode())
    for name in _SOURCES:
        made_from.update(_source(name).read_bytes())
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvcache"
    except RuntimeError:
        return None
    return folder / f"kernels-{made_from.hexdigest()[:32]}.so"


def _processor() -> str:
    """What ``-march=native`` depends on; a home may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.platform()} {platform.processor()} {platform.node()}"
    names = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(names)}))


def _compile(compiler: str, folder: Path) -> Path:
    # Compiled for OpenMP but not linked against it: it must use the threads of the runtime that PyTorch has loaded.
    # Linked without -ffast-math, which would change how the whole process treats denormal numbers.
    objects, library = [], folder / "kernels.so"
    for name, flags in _SOURCES.items():
        objects.append(str(folder / f"{name}.o"))
        _run([compiler, *_FLAGS, *flags, "-c", str(_source(name)), "-o", objects[-1]])
    _run([compiler, "-shared", *objects, "-o", str(library), "-lm"])
    return library


def _keep(library: Path, kept: Path) -> None:
    """All of it or nothing: other processes may be looking."""
    with contextlib.suppress(OSError):
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            os.replace(shutil.copy(library, folder), kept)


def _source(name: str) -> Path:
    return Path(__file__).with_name(name)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=120)
