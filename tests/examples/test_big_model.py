"""Models whose weights do not fit, in a short form: the same tokens and outputs, and what was read is said."""

from __future__ import annotations

import importlib
import re

import pytest

from tests.examples.tiny import tiny_checkpoint

NAMES = ("torch_big_model", "keras_big_model")


@pytest.mark.parametrize("name", NAMES)
def test_tiny(name, capsys):
    importlib.import_module(name).main(new_tokens=5, share=0.6, checkpoint=tiny_checkpoint(), steps=60)
    said = capsys.readouterr().out
    assert said.count("equal: True") == 2
    overall, hottest = map(float, re.search(r"hit ratio ([\d.]+), of the 4 hottest experts ([\d.]+)", said).groups())
    assert 0 < overall < hottest


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_smollm2(name, capsys):
    pytest.importorskip("gguf")
    importlib.import_module(name).main(new_tokens=4)
    assert capsys.readouterr().out.count("equal: True") == 2
