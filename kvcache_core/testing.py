"""For users' own test suites: is a model, served from a cache, still the same model?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvcache_core.errors import InvalidInput
from kvcache_core.frontend import FrontendCache
from kvcache_core.testing_report import CacheReport
from kvcache_core.testing_runs import Kit
from kvcache_core.tier_contract import check_tier

__all__ = ["CacheReport", "assert_cached_equals_recompute", "check_tier"]


def assert_cached_equals_recompute(
    model: Any,
    cache: FrontendCache,
    prompts: Sequence[Sequence[int]] | None = None,
    *,
    vocab_size: int | None = None,
    max_length: int = 32,
    max_new_tokens: int = 8,
    rounds: int = 4,
    seed: int = 0,
    tolerance: float | None = None,
) -> CacheReport:
    """Check that ``model`` gives the same results from ``cache`` as without it.

    Compares calls inside ``with cache:`` (nothing cached, all cached, a shared prefix cached, ragged rows), random
    splits into steps over ragged batches, forks, truncations and greedy generation.

    The bound, when no ``tolerance`` is given. ulp is the distance of neighbouring numbers at the largest output, in
    the coarser one of the output's and the K/V dtype (float32: 1.2e-7 to 6e-8 of it; bfloat16: 0.8 % to 0.4 %).

    - Where the adapter can run the model in float64 (PyTorch): the error against float64 is at most 1.5 times
      that of the uncached runs of the same rows, plus 1 ulp; on both sides the largest error counts. One run's rounding
      can be small by luck: where the bound is passed by less than 16 times, all is run a dozen times more with
      the tokens renamed, and the bound must hold between the means.
    - Else (Keras; a model that is float64 itself): the difference from the uncached output is at most 2.5 times as
      far as uncached outputs move when the same rows are computed alone, together, and as parts (of which at most
      256 ulp count), plus 32 ulp. 2.5 = 1 + 1.5: the error of the uncached run and the one allowed to the cached run.

    A wrong position, layer or mask is off by thousands of ulp in float32 and float64. In bfloat16 a small fault can
    hide in the rounding: check such a model in float32 too.

    Generated tokens must be equal, except where the uncached logits of the two tokens are closer than twice the
    bound: there either choice is right.

    Args:
        model: attached to ``cache``, or to no cache: then it is attached for the time of the check.
        cache: either adapter's ``KVCache``. The check uses a salt of its own: what is cached is not used, but may be
            evicted.
        prompts: token ids to use besides random ones.
        vocab_size: random ids are below it; default is what the cache has found out.
        max_length: tokens of a sequence at most, generated ones included.
        max_new_tokens: tokens to generate.
        rounds: random scripts of steps, forks and truncations.
        seed: of the random choices.
        tolerance: allowed largest absolute difference from the uncached output, instead of the bound above.

    Raises:
        AssertionError: a result differs, or the cache was not used. Says where, by how much, and what it may mean.
        InvalidInput: a lossy cache (``cache.exact`` is False) without a tolerance, a cache too small for the check,
            or no vocabulary to draw ids from.
    """
    attached_here = cache.model is None
    if attached_here:
        cache.attach(model)
    salt = cache.salt
    try:
        core = cache.core
        if not cache.exact and tolerance is None:
            raise InvalidInput(
                "the cache stores another dtype than the model's and is not exact: give tolerance=, the largest "
                "difference you accept"
            )
        live = core.stats().live_blocks
        kit = Kit(model, cache, seed, _ids(cache, prompts, vocab_size), max_length)
        report = kit.run([list(prompt) for prompt in prompts or ()], max_new_tokens, rounds, tolerance)
        core.check_valid()
        if core.stats().live_blocks != live:
            raise AssertionError(f"{core.stats().live_blocks - live} blocks are still live after all sequences closed")
        return report
    finally:
        cache.salt = salt
        if attached_here:
            cache.detach()


def _ids(cache: FrontendCache, prompts: Sequence[Sequence[int]] | None, vocab_size: int | None) -> list[int]:
    """The ids that random prompts are drawn from."""
    known = vocab_size or (cache.spec.vocab_size if cache.spec else None)
    if known:
        return list(range(known))
    if prompts:
        return sorted({int(token) for prompt in prompts for token in prompt})
    raise InvalidInput("the vocabulary size is not known: give vocab_size= or prompts=")
