"""The decode kernel in C, compiled on this machine for this machine when a cache is asked to compile."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["DecodeKernel", "load"]

_SOURCE = Path(__file__).with_name("decode.c")
_QUERIES_AT_MOST = 8
"""With more, the matrix products of PyTorch's own kernel are faster."""
_CHUNK_AT_LEAST = 256
"""Tokens that a thread gets at least."""


class DecodeKernel:
    """Attention of few queries over K and V of float32 on the CPU.

    Args:
        path: the compiled library.
    """

    def __init__(self, path: Path) -> None:
        self._run = ctypes.CDLL(str(path)).kvcache_decode
        self._run.restype = None
        self._run.argtypes = [*[ctypes.c_void_p] * 8, ctypes.c_float]

    def serves(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether q [B, H, Q, D], k and v [B, H, S, D] are what the kernel is for."""
        width = q.shape[3]
        return (
            q.dtype == k.dtype == torch.float32
            and q.device.type == "cpu"
            and q.shape[2] <= _QUERIES_AT_MOST
            and k.stride(3) == v.stride(3) == 1
            and k.stride(2) == v.stride(2) == width == v.shape[3]
        )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        """Attention where all see all: [B, H, Q, D], and the log of its normaliser [B, H, Q]."""
        q = q.contiguous()
        rows, heads, queries, width = q.shape
        size = k.shape[2]
        threads = torch.get_num_threads()
        # Equal work for all threads: their number divides that of the chunks of all heads.
        wanted = threads // math.gcd(threads, rows * heads)
        chunks = wanted if size >= wanted * _CHUNK_AT_LEAST else 1
        out, lse = torch.empty_like(q), q.new_empty(rows, heads, queries)
        scratch = q.new_empty(rows * heads * chunks * queries * (width + 2))
        shape = (ctypes.c_int64 * 6)(rows, heads, queries, size, width, chunks)
        strides = (ctypes.c_int64 * 4)(k.stride(0), k.stride(1), v.stride(0), v.stride(1))
        pointers = [tensor.data_ptr() for tensor in (q, k, v, out, lse, scratch)]
        self._run(*pointers, shape, strides, width**-0.5 if scale is None else scale)
        return out, lse


@cache
def load() -> DecodeKernel | None:
    """The kernel, or None where it cannot be compiled: then PyTorch's own kernels are used."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not torch.backends.openmp.is_available():
        return None
    # Compiled for OpenMP but not linked against it: it must use the threads of the runtime that PyTorch has loaded.
    # Linked without -ffast-math, which would change how the whole process treats denormal numbers.
    flags = ["-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        built, library = Path(folder) / "decode.o", Path(folder) / "decode.so"
        try:
            for command in (
                [compiler, *flags, "-c", str(_SOURCE), "-o", str(built)],
                [compiler, "-shared", str(built), "-o", str(library), "-lm"],
            ):
                subprocess.run(command, check=True, capture_output=True, timeout=120)
            return DecodeKernel(library)
        except (OSError, subprocess.SubprocessError, AttributeError):
            return None
