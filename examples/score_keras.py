"""Score multiple-choice questions with SmolLM2 in Keras: `python examples/score_keras.py [--questions N]`."""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")  # must stand before Keras is imported
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import llama_keras
from kvcache_keras import KVCache, score
from score_questions import QUESTIONS
from score_run import Outcome, compare, in_batches, show
from smollm2 import load_checkpoint


def main(questions: int = len(QUESTIONS)) -> Outcome:
    """With a cache, and with everything computed in full, eight pairs at a time."""
    checkpoint = load_checkpoint()
    model, cache = llama_keras.from_checkpoint(checkpoint), KVCache(size=2048)
    outcome = compare(
        checkpoint,
        lambda pairs: score(model, pairs, cache=cache),
        in_batches(lambda pairs: score(model, pairs), 8),
        questions,
    )
    show(outcome, "Keras")
    return outcome


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=len(QUESTIONS), help="only the first so many")
    main(parser.parse_args().questions)
