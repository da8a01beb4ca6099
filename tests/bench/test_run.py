"""What a table says of its measuring is how it was measured."""

from __future__ import annotations

import importlib
import json
import os
import sys
from types import SimpleNamespace

import pytest


@pytest.mark.parametrize(("name", "clock"), [("torch_decode", "processor"), ("streaming_speech", "wall")])
def test_the_clock_is_the_one_that_is_said(name, clock, root, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "tests" / "bench"))
    run = importlib.import_module("run")
    seen = []

    def main(*, quick):
        seen.append(os.environ[run.CLOCK])
        return SimpleNamespace(as_dict=dict)

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(main=main))
    monkeypatch.setenv(run.CLOCK, "processor")
    monkeypatch.setenv(run.THREADS[0], "1")
    run.work(name, quick=True, out=tmp_path)
    said = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))["measured"]["clock"]
    assert [said] == seen == [clock]
