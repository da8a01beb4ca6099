"""What an import really loads, seen in `sys.modules` of a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PYTORCH = ("torch", "transformers")
TENSORFLOW = ("tensorflow", "keras", "keras_hub")
EXTRAS = ("typer", "rich", "matplotlib", "gguf", "lmdb")


def loaded(root: Path, package: str, unwanted: tuple[str, ...], extra_path: Path | None = None) -> list[str]:
    """Import ``package`` in a fresh interpreter; which of ``unwanted`` did that load?"""
    code = f"import sys, {package}; print(*[name for name in {unwanted!r} if name in sys.modules])"
    path = [str(entry) for entry in (extra_path, root, root / "adapters") if entry]
    # No PYTHON* setting of the caller's (warning filters, start-up hooks) may change what is loaded.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env["PYTHONPATH"] = os.pathsep.join(path)
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_core_loads_no_framework_and_no_extra(root: Path) -> None:
    assert loaded(root, "kvcache_core", PYTORCH + TENSORFLOW + EXTRAS) == []


def test_torch_adapter_never_loads_tensorflow_or_keras(root: Path) -> None:
    pytest.importorskip("torch")
    assert loaded(root, "kvcache_torch", (*TENSORFLOW, "transformers", "kvcache_keras")) == []


def test_keras_adapter_never_loads_torch(root: Path) -> None:
    pytest.importorskip("keras")
    assert loaded(root, "kvcache_keras", (*PYTORCH, "keras_hub", "kvcache_torch")) == []


@pytest.mark.parametrize("unwanted", ["torch", "keras", "tensorflow"])
def test_the_check_can_fail(root: Path, tmp_path: Path, unwanted: str) -> None:
    """A module that loads the unwanted name is caught. Stand-ins, so that this is quick and needs no framework."""
    (tmp_path / f"{unwanted}.py").write_text("")
    (tmp_path / "bad_module.py").write_text(f"import kvcache_core\nimport {unwanted}\n")
    assert loaded(root, "bad_module", PYTORCH + TENSORFLOW, extra_path=tmp_path) == [unwanted]
