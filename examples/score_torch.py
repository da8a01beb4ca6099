"""Score multiple-choice questions with SmolLM2 in PyTorch: `python examples/score_torch.py [--questions N]`."""

from __future__ import annotations

import argparse

import torch

import llama_torch
from kvcache_torch import KVCache, score
from score_questions import QUESTIONS
from score_run import Outcome, compare, in_batches, show
from smollm2 import load_checkpoint


def main(questions: int = len(QUESTIONS)) -> Outcome:
    """With a cache, and with everything computed in full, eight pairs at a time."""
    checkpoint = load_checkpoint()
    model, cache = llama_torch.from_checkpoint(checkpoint), KVCache(size=2048)
    with torch.inference_mode():
        outcome = compare(
            checkpoint,
            lambda pairs: score(model, pairs, cache=cache),
            in_batches(lambda pairs: score(model, pairs), 8),
            questions,
        )
    show(outcome, "PyTorch")
    return outcome


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=len(QUESTIONS), help="only the first so many")
    main(parser.parse_args().questions)
