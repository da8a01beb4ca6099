"""What `score_torch.py` and `score_keras.py` share: multiple-choice questions, scored with and without a cache."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from score_questions import QUESTIONS, SHOTS
from smollm2 import Checkpoint

Pair = tuple[list[int], list[int]]
Scorer = Callable[[Sequence[Pair]], list[Any]]


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        accuracy: share of questions whose right answer is the most likely.
        same_answers: whether both ways chose the same answer to every question.
        largest_difference: between the two ways' log-likelihoods of one answer.
        seconds: with the cache, and with everything computed in full.
    """

    questions: int
    accuracy: float
    same_answers: bool
    largest_difference: float
    seconds: tuple[float, float]


def pairs_of(checkpoint: Checkpoint, count: int) -> list[Pair]:
    """Four (prompt, answer) pairs per question; all prompts begin with the same five questions and answers."""
    encode = checkpoint.tokenizer.encode
    shots = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in SHOTS)
    pairs = []
    for question, answers in QUESTIONS[:count]:
        prompt = list(encode(f"{shots}Question: {question}\nAnswer:").ids)
        pairs += [(prompt, list(encode(f" {answer}").ids)) for answer in answers]
    return pairs


def run(
    name: str, checkpoint: Checkpoint, score: Callable[..., list[Any]], model: Any, cache: Any, count: int
) -> Outcome:
    """With a cache, and with everything computed in full, eight pairs at a time; ``score`` is either adapter's."""
    cached, full = (lambda pairs: score(model, pairs, cache=cache)), in_batches(lambda pairs: score(model, pairs), 8)
    for scorer in (cached, full):  # what a framework does once in a process (tracing, memory) is no part of the time
        scorer(pairs_of(checkpoint, 1))
    cache.clear()
    outcome = compare(checkpoint, cached, full, count)
    show(outcome, name)
    return outcome


def questions_wanted(description: str | None) -> int:
    """From the command line: how many questions."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--questions", type=int, default=len(QUESTIONS), help="only the first so many")
    wanted: int = parser.parse_args().questions
    return wanted


def compare(checkpoint: Checkpoint, cached: Scorer, full: Scorer, count: int) -> Outcome:
    """Score the first ``count`` questions in both ways. The right answer is the first of four."""
    pairs = pairs_of(checkpoint, count)
    found, seconds = [], []
    for scorer in (cached, full):
        start = time.perf_counter()
        scores = scorer(pairs)
        seconds.append(time.perf_counter() - start)
        found.append(np.array([score.log_likelihood for score in scores]).reshape(-1, 4))
    chosen = [table.argmax(axis=1) for table in found]
    return Outcome(
        len(chosen[0]),
        float((chosen[0] == 0).mean()),
        bool((chosen[0] == chosen[1]).all()),
        float(np.abs(found[0] - found[1]).max()),
        (seconds[0], seconds[1]),
    )


def in_batches(scorer: Scorer, size: int) -> Scorer:
    """Score ``size`` pairs at a time: what a harness without reuse does."""
    return lambda pairs: [score for at in range(0, len(pairs), size) for score in scorer(pairs[at : at + size])]


def show(outcome: Outcome, name: str) -> None:
    """Print it."""
    cached, full = outcome.seconds
    table = Table(title=f"{name}: {outcome.questions} questions, four answers each, five shots", show_header=False)
    table.add_row("accuracy", f"{outcome.accuracy:.0%} (guessing: 25%)")
    table.add_row("same answers as full recompute", "yes" if outcome.same_answers else "[red]no")
    table.add_row("largest difference of a log-likelihood", f"{outcome.largest_difference:.1e}")
    table.add_row("with the cache", f"{cached:.1f} s")
    table.add_row("everything computed in full", f"{full:.1f} s")
    table.add_row("ratio", f"{cached / full:.3f}")
    Console().print(table)
