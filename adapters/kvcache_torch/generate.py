"""Generating tokens with a PyTorch model, with or without a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from kvcache_core.beam import beam_search
from kvcache_core.decoder import CacheDecoder, Decoder, RecomputeDecoder
from kvcache_core.errors import UsageError
from kvcache_core.generation import GenerateOptions, generate_tokens, stream_tokens
from kvcache_core.sampling import Sampling
from kvcache_torch.cache import KVCache, recompute
from kvcache_torch.context import local
from kvcache_torch.driver import device_of, plain_forward

__all__ = ["generate", "stream"]


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    cache: KVCache | None = None,
    eos_id: int | Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    n: int = 1,
    num_beams: int = 1,
    length_penalty: float = 1.0,
) -> list[list[int]]:
    """Continue prompts of any lengths.

    Args:
        model: maps ids [B, T] to logits [B, T, V].
        prompts: lists of token ids; no padding.
        max_new_tokens: tokens per continuation, at most.
        cache: a cache; attached to the model if it has none yet. Without one, inside ``with cache:`` that
            cache, else every step recomputes everything.
        eos_id: token (or tokens) behind which a row ends; it is kept.
        temperature: 0 for greedy; else logits are divided by it.
        top_k: sample from the k most likely tokens.
        top_p: sample from the most likely tokens that reach this probability together.
        seed: makes sampling repeatable; a row's choice does not depend on the other rows.
        n: continuations per prompt; the prompt is computed once.
        num_beams: beams of a beam search; the ``n`` best are returned.
        length_penalty: a beam's score is its log-probability / length ** length_penalty.

    Returns:
        The new tokens: ``n`` lists per prompt, prompt by prompt.

    Raises:
        InvalidInput: an empty prompt, ids out of range, or an option out of range.
        CacheFull: a prompt that does not fit the whole cache; raised before anything is computed.
    """
    options = GenerateOptions(
        max_new_tokens, eos_id, Sampling(temperature, top_k, top_p, seed), n, num_beams, length_penalty
    )
    search = beam_search if num_beams > 1 else generate_tokens
    return search(_decoder(model, cache), prompts, options)


def stream(
    model: nn.Module,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    cache: KVCache | None = None,
    eos_id: int | Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Iterator[int]:
    """Yield one continuation token by token; arguments as for :func:`generate`."""
    options = GenerateOptions(max_new_tokens, eos_id, Sampling(temperature, top_k, top_p, seed))
    return stream_tokens(_decoder(model, cache), prompt, options)


def _decoder(model: nn.Module, cache: KVCache | None) -> Decoder:
    cache = local.cache if cache is None else cache
    if cache is None:
        forward, device = plain_forward(model), device_of(model)
        return RecomputeDecoder(lambda rows: recompute(forward, device, rows))
    if cache.model is None:
        cache.attach(model, outputs="last")
    elif cache.model is not model:
        raise UsageError("the cache is attached to another model; call its detach() first or make a second cache")
    cache.refresh()
    return CacheDecoder(cache)
