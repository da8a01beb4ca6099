"""What a table says of its measuring is how it was measured."""

from __future__ import annotations

import html
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


def test_the_page_is_made_from_the_committed_figures(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "tests" / "bench"))
    report = importlib.import_module("report")
    assert report.page(json.loads(report.COMMITTED.read_text(encoding="utf-8"))) == report.PAGE.read_text(
        encoding="utf-8"
    )


def test_each_table_says_its_machine_if_there_are_several(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "tests" / "bench"))
    report = importlib.import_module("report")
    tables = report.in_order(json.loads(report.COMMITTED.read_text(encoding="utf-8"))["tables"])[:3]
    machine = tables[0]["measured"]["machine"]
    for table, cpu in zip(tables, ("one", "other", "one"), strict=True):
        table["measured"]["machine"] = {**machine, "cpu": cpu}
    page = report.page({"tables": tables})
    assert [page.count(f"on machine {number}") for number in (1, 2, 3)] == [2, 1, 0]
    assert page.index("1. ") < page.index("(one)") < page.index("2. ") < page.index("(other)")
    for table in tables:
        table["measured"]["machine"] = machine
    assert "on machine" not in report.page({"tables": tables})


def test_the_chart_shows_every_target(root, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "tests" / "bench"))
    report = importlib.import_module("report")
    tables = report.in_order(json.loads(report.COMMITTED.read_text(encoding="utf-8"))["tables"])
    importlib.import_module("chart").draw(tables, tmp_path)
    chart = (tmp_path / "performance.svg").read_text(encoding="utf-8")
    wanted = {f"{row['case']} / {peer}" for table in tables for row in table["rows"] for peer in row["targets"]}
    assert wanted
    assert not [label for label in wanted if html.escape(label, quote=False) not in chart]
