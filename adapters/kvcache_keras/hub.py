"""KerasHub models served from a cache: ``attach(causal_lm, cache)``, then ``causal_lm.generate`` as ever."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext
from typing import Any

import numpy as np
import tensorflow as tf

from kvcache_core.errors import CacheFull, InvalidInput, InvalidType, UsageError
from kvcache_keras.cache import KVCache
from kvcache_keras.hub_generate import Request, Rows, beam_search, sample
from kvcache_keras.hub_seq2seq import FAMILIES, Memory
from kvcache_keras.routes import here, is_routed
from kvcache_keras.tokenmodel import FORWARDS

try:
    import keras_hub
except ImportError as error:
    raise ImportError("kvcache_keras.hub needs KerasHub: pip install 'kvcache-core[keras-hub]'") from error

__all__ = ["attach", "generate"]

_Sampler = keras_hub.samplers.Sampler
_BeamSampler = keras_hub.samplers.BeamSampler


def attach(causal_lm: Any, cache: KVCache, *, outputs: str = "last", identity: str | None = None) -> Any:
    """Serve a KerasHub language model from a cache; returns the model.

    ``causal_lm.generate(...)`` then computes only what is not cached, with the sampler the model is compiled with.
    ``cache.detach()`` gives the model back as it was.

    Args:
        causal_lm: a ``keras_hub.models.CausalLM`` or ``Seq2SeqLM``; or a ``WhisperBackbone``, for which KerasHub has no
            model that generates: see :func:`generate`.
        cache: attached to this model or to none.
        outputs: ``"last"`` for generation; ``"all"`` if ``with cache: causal_lm(inputs)`` is to give all logits.
        identity: a name for these weights; see :meth:`KVCache.attach`.

    Raises:
        InvalidType: no ``CausalLM``.
        InvalidInput: a layer that cannot be served exactly, by name, or an encoder-decoder family that is not known.
    """
    family = FAMILIES.get(type(causal_lm).__name__)
    if not isinstance(causal_lm, (keras_hub.models.CausalLM, keras_hub.models.WhisperBackbone)):
        raise InvalidType(f"kvcache_keras.hub serves a keras_hub CausalLM, got {type(causal_lm).__name__}")
    if family is None and isinstance(causal_lm, keras_hub.models.Seq2SeqLM):
        raise InvalidInput(
            f"of KerasHub's encoder-decoder models {sorted(FAMILIES)} are served, {here(causal_lm)} is not"
        )
    _refuse_unknown(causal_lm)
    cache.attach(causal_lm, outputs=outputs, identity=identity)
    if isinstance(vars(causal_lm).get("make_generate_function"), ServedGenerate):
        return causal_lm
    memory = None if family is None else Memory(causal_lm, family)
    if memory is not None:
        FORWARDS[causal_lm] = memory.forward
        cache.at_detach(memory.close)
        cache.at_detach(lambda: FORWARDS.pop(causal_lm))
    ServedGenerate(causal_lm, cache, memory).install()
    return causal_lm


def generate(
    model: Any, inputs: dict[str, Any], *, sampler: Any = "greedy", stop_token_ids: Collection[int] | None = None
) -> dict[str, Any]:
    """Generation for an attached model that has none of its own: ``WhisperBackbone``.

    Args:
        model: attached by :func:`attach`.
        inputs: ``encoder_features`` [B, S, M], and ``decoder_token_ids`` and ``decoder_padding_mask`` [B, L], padded on
            the right to the length wanted.
        sampler: a KerasHub sampler or its name.
        stop_token_ids: tokens that end a row; None to fill all columns.

    Returns:
        ``decoder_token_ids`` int32 [B, L], and ``decoder_padding_mask`` bool [B, L], True up to the first stop token.

    Raises:
        UsageError: the model is not attached.
        InvalidInput: a sampler that chooses otherwise than token by token or by beams, or prompts not padded right.
        CacheFull: no room.
    """
    served = vars(model).get("make_generate_function")
    if not isinstance(served, ServedGenerate) or served.memory is None:
        raise UsageError("the model is not attached: call kvcache_keras.hub.attach(model, cache) first")
    return served.without_the_library(inputs, keras_hub.samplers.get(sampler), stop_token_ids)


def _refuse_unknown(model: Any) -> None:
    """Raise for attention that no route serves."""
    for layer in model._flatten_layers():
        kind = type(layer)
        if kind.__module__.startswith("keras_hub.") and kind.__name__.endswith("Attention") and not is_routed(layer):
            raise InvalidInput(f"layer {here(layer)} cannot be served from a cache exactly: its attention is not known")


class ServedGenerate:
    """Stands in for ``make_generate_function`` of one model; pickles and copies as the model's own."""

    def __init__(self, model: Any, cache: KVCache, memory: Memory | None) -> None:
        self.model = model
        self.cache = cache
        self.memory = memory

    def install(self) -> None:
        """Serve the model's ``generate``, until the cache is detached."""
        vars(self.model)["make_generate_function"] = self
        self.cache.at_detach(lambda: vars(self.model).pop("make_generate_function"))

    def __call__(self) -> Any:
        """What ``generate`` calls for each batch."""
        return self.generate

    def __reduce__(self) -> Any:
        return getattr, (self.model, "make_generate_function")

    def generate(self, inputs: dict[str, Any], stop_token_ids: Collection[int] | None = None) -> dict[str, Any]:
        """One batch, as the model's own ``generate_step`` takes and gives it."""
        tensors = {name: value if value is None else tf.convert_to_tensor(value) for name, value in inputs.items()}
        if _beams(self.model.sampler) and not self._has_images(tensors):
            parts = 2 if self.memory is None else self.memory.family.cache_parts
            stand = _Model(self.model, parts, lambda *request: self._fill(tensors, *request, self.model.sampler))
            try:
                with self.memory.lock if self.memory else nullcontext():
                    result: dict[str, Any] = type(self.model).generate_step(stand, tensors, stop_token_ids)
                    return {name: value for name, value in result.items() if name in inputs}
            except _Elsewhere as elsewhere:
                self.cache.bypass(elsewhere.tokens, elsewhere.reason)
        own = type(self.model).make_generate_function(self.model)
        return own(inputs, stop_token_ids=stop_token_ids)

    def without_the_library(
        self, inputs: dict[str, Any], sampler: Any, stop_token_ids: Collection[int] | None
    ) -> dict[str, Any]:
        """See :func:`generate`."""
        if not _beams(sampler):
            raise InvalidInput(f"{type(sampler).__name__} chooses otherwise than token by token or by beams")
        prompt, mask = (tf.convert_to_tensor(inputs[f"decoder_{name}"]) for name in ("token_ids", "padding_mask"))
        with self.memory.lock if self.memory else nullcontext():
            try:
                tokens = self._fill(inputs, prompt, mask, stop_token_ids, sampler)
            except _Elsewhere as elsewhere:
                raise (elsewhere.__cause__ or InvalidInput(elsewhere.reason)) from None
        stops = np.isin(tokens, list(stop_token_ids or ())) & ~np.asarray(mask, bool)
        ended = stops.cumsum(axis=1) - stops > 0
        return {"decoder_token_ids": tokens, "decoder_padding_mask": tf.constant(~ended)}

    def _fill(self, inputs: dict[str, Any], prompt: Any, mask: Any, stop: Collection[int] | None, sampler: Any) -> Any:
        """Fill the columns of a prompt [B, L] that are not given in the mask."""
        cache = self.cache
        ends = None if stop is None else frozenset(map(int, stop))
        request = Request(np.array(prompt, np.int64), np.array(mask, bool), ends)
        tokens = sum(request.lengths)
        if not request.is_padded_right:
            raise _Elsewhere(tokens, "a prompt is empty, or padded on the left")
        if request.is_done:
            return prompt
        beams = _beams(sampler)
        core = cache.core
        has_full = any(group.kind == "attention" and group.window is None for group in core.groups)
        if has_full and request.blocks(beams, core.block_size) > core.most_blocks:
            need = request.blocks(beams, core.block_size)
            full = CacheFull(
                f"generate needs {need} blocks for all rows; the whole cache has {core.most_blocks}; make it larger "
                "(size= or memory=) or generate fewer rows at once",
                needed=need,
                available=core.most_blocks,
                capacity=core.most_blocks,
            )
            raise _Elsewhere(tokens, f"the cache has no room for it ({full})") from full
        cache.refresh()
        seeds = [(variable, variable.numpy()) for variable in sampler.variables]
        try:
            (beam_search if beams > 1 else sample)(self._rows(inputs), request, sampler)
        except CacheFull as full:
            for variable, value in seeds:
                variable.assign(value)
            raise _Elsewhere(tokens, f"the cache has no room for it ({full})") from full
        return tf.constant(request.tokens, prompt.dtype)

    def _rows(self, inputs: dict[str, Any]) -> Rows:
        memory, cache = self.memory, self.cache
        if memory is None:
            return Rows(cache)
        digests = memory.digests(inputs, cache.core.namespace)
        return Rows(
            cache, [cache.salt + digest for digest in digests], lambda rows: memory.bind([digests[row] for row in rows])
        )

    def _has_images(self, inputs: dict[str, Any]) -> bool:
        return any(
            name.startswith(("image", "vision")) and np.size(value)
            for name, value in inputs.items()
            if value is not None
        )


class _Elsewhere(Exception):
    """The library's own generation has to compute this batch."""

    def __init__(self, tokens: int, reason: str) -> None:
        super().__init__(reason)
        self.tokens = tokens
        self.reason = reason


class _Model:
    """The model as its own ``generate_step`` sees it: no cache to build, and a sampler that fills all columns."""

    def __init__(self, model: Any, cache_parts: int, fill: Callable[[Any, Any, Any], Any]) -> None:
        self._model = model
        self._cache_parts = cache_parts
        self._fill = fill

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def _build_cache(self, *args: Any, **kwargs: Any) -> tuple[None, ...]:
        return (None,) * self._cache_parts

    def sampler(self, *, prompt: Any, mask: Any, stop_token_ids: Collection[int] | None, **rest: Any) -> Any:
        """A KerasHub sampler's call."""
        return self._fill(prompt, mask, stop_token_ids)


def _beams(sampler: Any) -> int:
    """Beams of a beam search, 1 for a sampler that chooses token by token, 0 for any other."""
    call = type(sampler).__call__
    if call is _BeamSampler.__call__:
        return 0 if sampler.return_all_beams else int(sampler.num_beams)
    return 1 if call is _Sampler.__call__ else 0
