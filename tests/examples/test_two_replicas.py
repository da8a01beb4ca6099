"""The example of two replicas in its short form: real server, two processes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.tiny import tiny_folder

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "two_replicas.py"
LINE = re.compile(r"document (\d)\s+(\w+)\s+[\d.]+ s\s+(\d+) tokens from the server,\s+(\d+) computed\s+answer (.+)")


def check(*arguments: str) -> None:
    """Each serves the other's prefix and answers alike, and another document has another answer."""
    command = [sys.executable, str(EXAMPLE), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    lines = [LINE.fullmatch(line).groups() for line in run.stdout.splitlines()]
    assert [line[:4] for line in lines] == [
        ("0", "torch", "0", "80"),
        ("0", "keras", "64", "16"),
        ("1", "keras", "0", "80"),
        ("1", "torch", "64", "16"),
    ]
    assert lines[0][4] == lines[1][4]
    assert lines[2][4] == lines[3][4]
    assert lines[0][4] != lines[2][4]


def test_a_tiny_model(tmp_path):
    check("64", str(tiny_folder(tmp_path, 400)))


@pytest.mark.slow
def test_smollm2():
    check("64")
