"""The examples in README.md run as they stand, each in a fresh interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def python_blocks(text: str) -> list[str]:
    """The ```python blocks of a Markdown text. (```py marks a fragment that does not run alone.)"""
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("package", ["kvcache_torch", "kvcache_keras"])
def test_example_runs(root: Path, tmp_path: Path, package: str) -> None:
    (code,) = (block for block in python_blocks((root / "README.md").read_text()) if f"from {package} " in block)
    path = os.pathsep.join([str(root), str(root / "adapters")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "hit_tokens" in done.stdout


def test_links_lead_somewhere(root: Path) -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (root / name).read_text())
        assert [link for link in links if not (root / link).exists()] == []
