"""The scoring examples in their short form, on the real model."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))


@pytest.mark.parametrize("framework", ["torch", pytest.param("keras", marks=pytest.mark.slow)])
def test_short_form(framework, capsys):
    outcome = importlib.import_module(f"score_{framework}").main(2)
    assert outcome.questions == 2
    assert outcome.same_answers
    assert outcome.largest_difference < 2e-3
    assert outcome.accuracy >= 0.5
    assert "same answers as full recompute" in capsys.readouterr().out
