"""Compiling the kernels in C: once per machine, compiler and state of the sources, then kept in the cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

__all__ = ["built"]

_FLAGS = ["-O3", "-march=native", "-fopenmp", "-fPIC"]
_SOURCES = {"decode.c": ["-ffast-math"], "linear.c": ["-ffast-math"], "prefill.c": []}
"""The sources, and what each is compiled with besides."""
_OPERATOR = "operator.cpp"
"""What needs PyTorch's headers and a C++ compiler; the library does without."""

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
            for library in _compiled(compiler, Path(folder)):
                with contextlib.suppress(OSError, AttributeError):
                    found = load(library)
                    if kept is not None:
                        _keep(library, kept)
                    return found
    except (OSError, subprocess.SubprocessError):
        pass
    return None


def _place(compiler: str) -> Path | None:
    """Where the library is kept: named after all that it is made from and for. None without a home."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=60).stdout
    against = torch.__version__, torch.__file__, _cpp_compiler()
    made_from = hashlib.sha256(repr((compiler, version, _FLAGS, _SOURCES, _processor(), against)).encode())
    for name in (*_SOURCES, _OPERATOR):
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


def _compiled(compiler: str, folder: Path) -> Iterator[Path]:
    """The library with the operator, if that can be compiled, and without."""
    # Compiled for OpenMP but not linked against it: it must use the threads of the runtime that PyTorch has loaded.
    # Linked without -ffast-math, which would change how the whole process treats denormal numbers.
    objects = []
    for name, flags in _SOURCES.items():
        objects.append(str(folder / f"{name}.o"))
        _run([compiler, *_FLAGS, *flags, "-c", str(_source(name)), "-o", objects[-1]])
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        yield _link(compiler, [*objects, *_operator(folder)], folder / "kernels_operator.so")
    yield _link(compiler, objects, folder / "kernels.so")


def _operator(folder: Path) -> list[str]:
    """Compiled, and what it is linked with: the library that is loaded already."""
    home, compiled = Path(torch.__file__).parent, str(folder / "operator.o")
    include = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    _run([_cpp_compiler(), "-O2", "-std=c++20", "-fPIC", abi, *include, "-c", str(_source(_OPERATOR)), "-o", compiled])
    return [compiled, f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10", "-lstdc++"]


def _cpp_compiler() -> str:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "c++"


def _link(compiler: str, objects: list[str], library: Path) -> Path:
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
