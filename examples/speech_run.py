"""What `torch_streaming_speech.py` and `keras_streaming_speech.py` share: what is said, and the command line."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np


def show(streamed: np.ndarray, once: float, whole: np.ndarray, again: float, chunk: int) -> float:
    """Print it: outputs and seconds of the stream, and of the whole utterance again for each chunk.

    Returns:
        The largest difference of two outputs, as a share of the largest output.
    """
    difference = float(np.abs(streamed - whole).max() / np.abs(streamed).max())
    print(f"{len(streamed) / 100:g} s of speech in chunks of {chunk * 10} ms, {len(streamed)} frames")
    print(f"whole utterance again for each chunk: {again:.2f} s; streamed: {once:.2f} s, {once / again:.2f} of it")
    print(f"largest difference: {difference:.1e} of the largest output; equal but for rounding: {difference < 1e-4}")
    return difference


def wanted() -> dict[str, Any]:
    """From the command line: how many seconds, in which chunks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--chunk", type=int, default=10, help="frames of 10 ms")
    return vars(parser.parse_args())
