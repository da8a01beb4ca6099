"""The language model that the figures are measured on, and prompts for it."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

from smollm2 import Checkpoint, load_checkpoint

__all__ = ["checkpoint", "prompt"]


@cache
def checkpoint() -> Checkpoint:
    """SmolLM2-135M-Instruct, float32."""
    return load_checkpoint()


def prompt(length: int, seed: int) -> list[int]:
    """Random token ids: what they say does not change how long they take."""
    vocabulary = checkpoint().config.vocab_size
    return np.random.default_rng(seed).integers(100, vocabulary, length).tolist()
