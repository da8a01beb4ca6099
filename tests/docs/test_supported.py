"""The table of what is supported is the one that the tests have made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import supported


def test_the_page_is_made_from_the_table() -> None:
    assert supported.PAGE.read_text(encoding="utf-8") == supported.page(), "run make supported"


def test_a_cell_that_no_run_has_written_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(supported.WRITING, raising=False)
    with pytest.raises(AssertionError, match="does not have 'a framework', 'a family', 'a mode'"):
        supported.proven("a framework", "a family", "a mode")


def test_a_run_writes_the_cells_it_has_shown_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TABLE", "PAGE"):
        monkeypatch.setattr(supported, name, tmp_path / name)
    supported.TABLE.write_text('{"a framework": {"gone": ["forward"]}}')
    monkeypatch.setenv(supported.WRITING, str(tmp_path / "cells"))
    for mode in ("stepwise", "forward", "forward"):
        supported.proven("a framework", "a family", mode)
    supported.write(tuple(json.loads(line)) for line in (tmp_path / "cells").read_text().splitlines())
    assert supported.claimed("a framework") == {("a family", "forward"), ("a family", "stepwise")}
    assert "| a family | yes | yes |" in supported.PAGE.read_text()
