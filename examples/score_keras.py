"""Score multiple-choice questions with SmolLM2 in Keras: `python examples/score_keras.py [--questions N]`."""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")  # must stand before Keras is imported
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import llama_keras
from kvcache_keras import KVCache, score
from score_questions import QUESTIONS
from score_run import Outcome, questions_wanted, run
from smollm2 import load_checkpoint


def main(questions: int = len(QUESTIONS)) -> Outcome:
    """Score the first so many questions with a cache and without."""
    checkpoint = load_checkpoint()
    model, cache = llama_keras.from_checkpoint(checkpoint), KVCache(size=2048)
    return run("Keras", checkpoint, score, model, cache, questions)


if __name__ == "__main__":
    main(questions_wanted(__doc__))
