"""The example of two replicas in its short form: real model, real server, two processes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "two_replicas.py"
LINE = re.compile(r"document (\d)\s+(\w+)\s+[\d.]+ s\s+(\d+) tokens from the server,\s+(\d+) computed\s+answer (.+)")


def test_each_serves_the_others_prefix_and_answers_alike():
    run = subprocess.run([sys.executable, str(EXAMPLE), "64"], capture_output=True, text=True, timeout=300, check=True)
    lines = [LINE.fullmatch(line).groups() for line in run.stdout.splitlines()]
    assert [line[:4] for line in lines] == [
        ("0", "torch", "0", "80"),
        ("0", "keras", "64", "16"),
        ("1", "keras", "0", "80"),
        ("1", "torch", "64", "16"),
    ]
    assert lines[0][4] == lines[1][4]
    assert lines[2][4] == lines[3][4]
