"""The table of what is supported is the one that the tests have made."""

from __future__ import annotations

import pytest

from tests import supported


def test_the_page_is_made_from_the_table() -> None:
    assert supported.PAGE.read_text(encoding="utf-8") == supported.page(), "run python -m tests.supported"


def test_a_cell_that_no_run_has_written_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVCACHE_WRITE_SUPPORTED", raising=False)
    with pytest.raises(AssertionError, match="does not have 'a framework', 'a family', 'a mode'"):
        supported.proven("a framework", "a family", "a mode")
