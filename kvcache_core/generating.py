"""``generate``, ``stream`` and ``score`` of both adapters: written once, over any framework's model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from kvcache_core.beam import beam_search
from kvcache_core.decoder import CacheDecoder, Decoder
from kvcache_core.errors import UsageError
from kvcache_core.frontend import FrontendCache
from kvcache_core.generation import generate_tokens, stream_tokens
from kvcache_core.options import GenerateOptions
from kvcache_core.sampling import Sampling
from kvcache_core.scoring import Score, score_pairs
from kvcache_core.speculation import Speculation
from kvcache_core.stepping import PREFILL_CHUNK

__all__ = ["Generating"]


class Generating(ABC):
    """The functions that continue and score token ids. An adapter gives its users the methods of one instance."""

    @abstractmethod
    def _active_cache(self) -> FrontendCache | None:
        """The cache whose ``with`` block this thread is in."""

    @abstractmethod
    def _without_cache(self, model: Any) -> Decoder:
        """The decoder that recomputes everything at every step."""

    def generate(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int],
        cache: FrontendCache | None = None,
        eos_id: int | Sequence[int] | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        n: int = 1,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        prefill_chunk: int | None = PREFILL_CHUNK,
        speculate: int | Speculation | None = None,
    ) -> list[list[int]]:
        """Continue prompts of any lengths.

        Args:
            model: maps ids [B, T] to logits [B, T, V].
            prompts: lists of token ids; no padding.
            max_new_tokens: tokens per continuation, at most: one number, or one per prompt.
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
            prefill_chunk: prompt tokens in one step over the whole batch, at most: bounds the memory that long prompts
                take, and how long rows that run already wait for them. None for no limit.
            speculate: draft up to so many tokens per row and step by prompt lookup, or a
                :class:`~kvcache_core.speculation.Speculation`. The result is the same, sooner where the text repeats
                itself. Needs a cache; without one it changes nothing.

        Returns:
            The new tokens: ``n`` lists per prompt, prompt by prompt.

        Raises:
            InvalidInput: an empty prompt, ids out of range, or an option out of range.
            CacheFull: a prompt that does not fit the whole cache; raised before anything is computed.
        """
        options = GenerateOptions(
            max_new_tokens,
            eos_id,
            Sampling(temperature, top_k, top_p, seed),
            n,
            num_beams,
            length_penalty,
            prefill_chunk,
            speculate,
        )
        search = beam_search if num_beams > 1 else generate_tokens
        return search(self._decoder(model, cache), prompts, options)

    def stream(
        self,
        model: Any,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        cache: FrontendCache | None = None,
        eos_id: int | Sequence[int] | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        prefill_chunk: int | None = PREFILL_CHUNK,
        speculate: int | Speculation | None = None,
    ) -> Iterator[int]:
        """Yield one continuation token by token; arguments as for :meth:`generate`.

        Closing the iterator, or leaving the loop over it, gives the room of its sequence back.

        Raises:
            InvalidInput, CacheFull: as :meth:`generate`; those about the prompt at the first token.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        options = GenerateOptions(max_new_tokens, eos_id, sampling, prefill_chunk=prefill_chunk, speculate=speculate)
        return stream_tokens(self._decoder(model, cache), prompt, options)

    def score(
        self,
        model: Any,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        cache: FrontendCache | None = None,
        prefill_chunk: int | None = PREFILL_CHUNK,
    ) -> list[Score]:
        """How likely continuations are behind their prompts.

        Equal prompts and prefixes that prompts share are computed once. Logits exist for the continuations alone, in
        chunks.

        Args:
            model: maps ids [B, T] to logits [B, T, V].
            pairs: (prompt, continuation), lists of token ids, at least one id each.
            cache: as for :meth:`generate`. Without one every pair is computed in full.
            prefill_chunk: prompt tokens in one step over the whole batch, at most; None for no limit.

        Returns:
            One :class:`~kvcache_core.scoring.Score` per pair: natural log-likelihoods, and whether greedy agrees.

        Raises:
            InvalidInput: an empty prompt or continuation, or ids out of range.
            CacheFull: a pair that does not fit the whole cache; raised before anything is computed.
        """
        return score_pairs(self._decoder(model, cache), pairs, prefill_chunk)

    def _decoder(self, model: Any, cache: FrontendCache | None) -> Decoder:
        cache = self._active_cache() if cache is None else cache
        if cache is None:
            return self._without_cache(model)
        if cache.model is None:
            cache.attach(model, outputs="last")
        elif cache.model is not model:
            raise UsageError("the cache is attached to another model; call its detach() first or make a second cache")
        cache.refresh()
        return CacheDecoder(cache)
