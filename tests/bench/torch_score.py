"""PyTorch: scoring multiple-choice answers behind five shots, with a cache and with everything computed in full."""

from __future__ import annotations

import torch
from measure import Row, Table, alternate, seconds
from smol import checkpoint

import llama_torch
from kvcache_torch import KVCache, score
from score_questions import QUESTIONS
from score_run import Pair, in_batches, pairs_of

FULL = "everything in full, 8 pairs at a time"
TARGET = 0.25


def main(*, quick: bool = False) -> Table:
    """All questions cold, or some of them."""
    count = 8 if quick else len(QUESTIONS)
    model, cache = llama_torch.from_checkpoint(checkpoint()), KVCache(size=2048)
    pairs: list[Pair] = pairs_of(checkpoint(), count)
    full = in_batches(lambda some: score(model, some), 8)
    answers: dict[str, list[float]] = {}

    def ours() -> float:
        def answer() -> None:
            answers["ours"] = [found.log_likelihood for found in score(model, pairs, cache=cache)]

        cache.clear()
        return seconds(answer)

    @torch.inference_mode()
    def without() -> float:
        def answer() -> None:
            answers[FULL] = [found.log_likelihood for found in full(pairs)]

        return seconds(answer)

    samples = alternate({"ours": ours, FULL: without}, 3 if quick else 1, "scoring", warm_up=int(quick))
    largest = max(abs(one - other) for one, other in zip(answers["ours"], answers[FULL], strict=True))
    case = f"{count} questions, 4 answers each"
    row = Row.of(case, "s", samples, targets={FULL: TARGET}, extra={"largest difference x 1,000": largest * 1e3})
    text = [
        f"`kvcache_torch.score` on {4 * count} pairs whose prompts share five questions and answers, cold, against the "
        "same without a cache. As `examples/score_torch.py`, which also shows the accuracy.",
    ]
    return Table("torch_score", "PyTorch: scoring", text, [row])
