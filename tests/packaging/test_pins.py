"""The tested set is one set: every place that names a version names the same one."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement


def pins(text: str) -> dict[str, str]:
    """``name==version`` lines of a constraints file."""
    lines = (line.split("#")[0].split(";")[0].strip() for line in text.splitlines())
    return dict(line.split("==") for line in lines if line)


@pytest.fixture(scope="module")
def tested(root: Path) -> dict[str, str]:
    return pins((root / "constraints.txt").read_text())


def test_pre_commit_runs_the_pinned_ruff(root: Path, tested: dict[str, str]) -> None:
    text = (root / ".pre-commit-config.yaml").read_text()
    found = re.search(r"ruff-pre-commit\n\s+rev: v(\S+)", text)
    assert found is not None
    assert found.group(1) == tested["ruff"]


def test_every_requirement_is_pinned_inside_its_range(root: Path, tested: dict[str, str]) -> None:
    tomllib = pytest.importorskip("tomllib", reason="the standard library reads TOML from Python 3.11 on")
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    for wanted in map(Requirement, [*project["dependencies"], *(line for extra in extras for line in extra)]):
        if wanted.name == "kvcache-core":
            continue
        assert wanted.name in tested, f"{wanted.name} is in pyproject.toml and not in constraints.txt"
        assert wanted.specifier.contains(tested[wanted.name]), f"{wanted} excludes the tested {tested[wanted.name]}"


def test_one_tensorflow_is_installed() -> None:
    """tensorflow and tensorflow-cpu overwrite each other's files; the Makefile installs one of them."""
    names = {(found.metadata["Name"] or "").lower().replace("_", "-") for found in metadata.distributions()}
    both = names & {"tensorflow", "tensorflow-cpu"}
    assert len(both) <= 1, f"{sorted(both)} are both installed: `make distclean`, then `make venv`"
