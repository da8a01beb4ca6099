"""The kernels in C are compiled once, kept, and made again where what is kept does not fit or is damaged."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import pytest

from kvcache_torch import build


@pytest.fixture
def compiled_files(tmp_path, monkeypatch):
    """A compiler that notes what it compiles, one small source, and a cache folder of the test's own."""
    real = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if real is None:
        pytest.skip("needs a C compiler")
    noted, compiler = tmp_path / "noted", tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*) echo "$*" >> {noted};; esac\nexec {real} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("CXX", "false")  # the operator takes five times as long: it has a test of its own
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_SOURCES", {"linear.c": []})
    return lambda: len(noted.read_text().splitlines()) if noted.exists() else 0


def has_kernel(path: Path) -> bool:
    return ctypes.CDLL(str(path)).kvcache_linear is not None


def test_compiled_once(compiled_files, tmp_path):
    for _ in range(3):
        assert build.built(has_kernel)
        assert compiled_files() == 1
    (kept,) = (tmp_path / "cache" / "kvcache").iterdir()
    assert kept.parent.stat().st_mode & 0o077 == 0


def test_an_operator_where_there_is_a_compiler_for_it(compiled_files, monkeypatch):
    assert build.built(has_kernel)
    assert build.built(lambda path: not hasattr(ctypes.CDLL(str(path)), "kvcache_define_operator"))
    monkeypatch.delenv("CXX")
    if (shutil.which("c++") or shutil.which("g++")) is None:
        pytest.skip("needs a C++ compiler")
    assert build.built(lambda path: hasattr(ctypes.CDLL(str(path)), "kvcache_define_operator"))


def test_without_the_operator_where_it_cannot_be_loaded(compiled_files, monkeypatch):
    monkeypatch.delenv("CXX")
    if (shutil.which("c++") or shutil.which("g++")) is None:
        pytest.skip("needs a C++ compiler")
    refused = []

    def load(path):
        library = ctypes.CDLL(str(path))
        if hasattr(library, "kvcache_define_operator"):
            refused.append(path)
            raise OSError("undefined symbol")
        return library.kvcache_linear is not None

    for _ in range(2):
        assert build.built(load)
        assert compiled_files() == 1
        assert len(refused) == 1


def test_compiled_again_for_other_flags(compiled_files, monkeypatch):
    assert build.built(has_kernel)
    monkeypatch.setattr(build, "_FLAGS", [*build._FLAGS, "-O1"])
    assert build.built(has_kernel)
    assert compiled_files() == 2


def test_compiled_again_where_what_is_kept_is_damaged(compiled_files, tmp_path):
    assert build.built(has_kernel)
    (kept,) = (tmp_path / "cache" / "kvcache").iterdir()
    kept.unlink()  # not written over: this process has it loaded
    kept.write_bytes(b"not a library")
    for _ in range(2):
        assert build.built(has_kernel)
        assert compiled_files() == 2


def test_without_a_folder_it_is_compiled_each_time(compiled_files, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for count in (1, 2):
        assert build.built(has_kernel)
        assert compiled_files() == count


def test_without_a_compiler_there_is_none(monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert build.built(has_kernel) is None
    monkeypatch.setenv("CC", "false")
    assert build.built(has_kernel) is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "/nowhere")
    assert build.built(has_kernel) is None
