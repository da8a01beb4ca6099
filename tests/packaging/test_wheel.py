"""What lies in the wheel, and what its metadata says."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

PACKAGES = {
    "kvcache_core": "kvcache_core",
    "kvcache_torch": "adapters/kvcache_torch",
    "kvcache_keras": "adapters/kvcache_keras",
}
EXTRAS = {"torch", "tensorflow", "tensorflow-cpu", "hf", "keras-hub", "cli", "demo", "bench", "test", "dev", "all"}
EXTRAS |= {"disk", "fast", "network", "fsspec", "examples"}
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", "venv", "build", "dist", "out", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "*.png"
)


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy so that the build leaves nothing in the checkout."""
    work = tmp_path_factory.mktemp("wheel")
    # Without this copy's tests, docs and examples the wheel could not carry them by mistake, so they come along.
    shutil.copytree(root, work / "source", ignore=NOT_SOURCE)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(work / "dist")]
    done = subprocess.run(command, cwd=work / "source", capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (work / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def _top_level(names: list[str]) -> set[str]:
    return {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}


def test_exactly_three_packages(wheel: zipfile.ZipFile) -> None:
    assert _top_level(wheel.namelist()) == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_is_whole_and_typed(wheel: zipfile.ZipFile, root: Path, package: str) -> None:
    """Every module of the checkout is there: a sub-package that pyproject.toml does not list would be left out."""
    folder = root / PACKAGES[package]
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for path in folder.rglob("*.*")
        if path.suffix in (".py", ".c", ".cpp")
    }
    shipped = {name for name in wheel.namelist() if name.startswith(f"{package}/")}
    assert f"{package}/__init__.py" in expected
    assert shipped == expected | {f"{package}/py.typed"}


def test_no_tests_docs_or_examples(wheel: zipfile.ZipFile) -> None:
    parts = {part for name in wheel.namelist() for part in name.split("/")}
    assert parts.isdisjoint({"tests", "docs", "examples", "adapters", "conftest.py", "demo.py"})


def test_licence_is_shipped(wheel: zipfile.ZipFile, metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_metadata(metadata: Message, root: Path) -> None:
    assert metadata["Name"] == "kvcache-core"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Version"] == _declared_version(root)
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS


def test_numpy_is_the_only_requirement_without_an_extra(metadata: Message) -> None:
    plain = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert plain == ["numpy>=1.26"]


def _declared_version(root: Path) -> str:
    for node in ast.parse((root / "kvcache_core/__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise AssertionError("kvcache_core/__init__.py sets no __version__")


def test_the_top_level_check_can_fail() -> None:
    names = ["kvcache_core/__init__.py", "tests/conftest.py", "kvcache_core-0.1.0.dist-info/METADATA"]
    assert _top_level(names) == {"kvcache_core", "tests"}
