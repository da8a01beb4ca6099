"""Score multiple-choice questions with SmolLM2 in PyTorch: `python examples/score_torch.py [--questions N]`."""

from __future__ import annotations

import torch

import llama_torch
from kvcache_torch import KVCache, score
from score_questions import QUESTIONS
from score_run import Outcome, questions_wanted, run
from smollm2 import load_checkpoint


def main(questions: int = len(QUESTIONS)) -> Outcome:
    """Score the first so many questions with a cache and without."""
    checkpoint = load_checkpoint()
    model, cache = llama_torch.from_checkpoint(checkpoint), KVCache(size=2048)
    with torch.inference_mode():
        return run("PyTorch", checkpoint, score, model, cache, questions)


if __name__ == "__main__":
    main(questions_wanted(__doc__))
