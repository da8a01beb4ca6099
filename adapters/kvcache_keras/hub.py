"""KerasHub language models served from a cache: ``attach(causal_lm, cache)``, then ``causal_lm.generate`` as ever."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from kvcache_core.decoder import CacheDecoder
from kvcache_core.errors import CacheFull, InvalidInput, InvalidType
from kvcache_keras.cache import KVCache
from kvcache_keras.hub_generate import Request, beam_search, sample
from kvcache_keras.routes import here, is_routed

try:
    import keras_hub
except ImportError as error:
    raise ImportError("kvcache_keras.hub needs KerasHub: pip install 'kvcache-core[keras-hub]'") from error

__all__ = ["attach"]

_Sampler = keras_hub.samplers.Sampler
_BeamSampler = keras_hub.samplers.BeamSampler


def attach(causal_lm: Any, cache: KVCache, *, outputs: str = "last", identity: str | None = None) -> Any:
    """Serve a KerasHub language model from a cache; returns the model.

    ``causal_lm.generate(...)`` then computes only what is not cached, with the sampler the model is compiled with.
    ``cache.detach()`` gives the model back as it was.

    Args:
        causal_lm: a ``keras_hub.models.CausalLM``.
        cache: attached to this model or to none.
        outputs: ``"last"`` for generation; ``"all"`` if ``with cache: causal_lm(inputs)`` is to give all logits.
        identity: a name for these weights; see :meth:`KVCache.attach`.

    Raises:
        InvalidType: no ``CausalLM``.
        InvalidInput: a layer that cannot be served exactly, by name.
    """
    if not isinstance(causal_lm, keras_hub.models.CausalLM):
        raise InvalidType(f"kvcache_keras.hub serves a keras_hub CausalLM, got {type(causal_lm).__name__}")
    _refuse_unknown(causal_lm)
    cache.attach(causal_lm, outputs=outputs, identity=identity)
    if not isinstance(vars(causal_lm).get("make_generate_function"), ServedGenerate):
        ServedGenerate(causal_lm, cache).install()
    return causal_lm


def _refuse_unknown(model: Any) -> None:
    """Raise for attention that no route serves."""
    for layer in model._flatten_layers():
        kind = type(layer)
        if kind.__module__.startswith("keras_hub.") and "Attention" in kind.__name__ and not is_routed(layer):
            raise InvalidInput(f"layer {here(layer)} cannot be served from a cache exactly: its attention is not known")


class ServedGenerate:
    """Stands in for ``make_generate_function`` of one model; pickles and copies as the model's own."""

    def __init__(self, model: Any, cache: KVCache) -> None:
        self.model = model
        self.cache = cache

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
        """One batch: {"token_ids", "padding_mask"}, both [B, L], filled up to L or to the last stop token."""
        request = self._request(inputs, stop_token_ids)
        if request is None or request.is_done:
            return self._own(inputs, stop_token_ids)
        beams = _beams(self.model.sampler)
        decoder = CacheDecoder(self.cache)
        if not decoder.fits(_room(request, beams, self.cache.core.block_size)):
            self.cache.bypass(int(sum(request.lengths)), "the cache has no room for all rows of generate")
            return self._own(inputs, stop_token_ids)
        self.cache.refresh()
        search = beam_search if beams > 1 else sample
        try:
            search(decoder, request, self.model.sampler)
        except CacheFull as full:
            self.cache.bypass(int(sum(request.lengths)), f"the cache has no room for it ({full})")
            return self._own(inputs, stop_token_ids)
        token_ids = tf.constant(request.tokens, tf.convert_to_tensor(inputs["token_ids"]).dtype)
        result = {"token_ids": token_ids, "padding_mask": tf.constant(request.output_mask())}
        return {**{name: inputs[name] for name in ("images",) if name in inputs}, **result}

    def _own(self, inputs: dict[str, Any], stop_token_ids: Collection[int] | None) -> dict[str, Any]:
        """The library's own generation."""
        result: dict[str, Any] = type(self.model).make_generate_function(self.model)(
            inputs, stop_token_ids=stop_token_ids
        )
        return result

    def _request(self, inputs: dict[str, Any], stop_token_ids: Collection[int] | None) -> Request | None:
        """The batch, or None for what the library's own generation does as it did."""
        if not _beams(self.model.sampler):
            return None
        others = [np.size(value) for name, value in inputs.items() if name not in ("token_ids", "padding_mask")]
        tokens, mask = _array(inputs["token_ids"], np.int64), _array(inputs["padding_mask"], bool)
        lengths = mask.sum(axis=1)
        padded_right = (mask == (np.arange(mask.shape[1]) < lengths[:, None])).all()
        if any(others) or not padded_right or not lengths.min():
            return None
        return Request(tokens, mask, None if stop_token_ids is None else frozenset(map(int, stop_token_ids)))


def _room(request: Request, beams: int, block_size: int) -> list[tuple[int, int]]:
    """(prompt, new) tokens of every row: further beams share their prompt but for its last block."""
    rows = [(length, request.width - length) for length in request.lengths]
    shortest = min(request.lengths)
    return rows + [(block_size, request.width - shortest)] * (len(rows) * (beams - 1))


def _beams(sampler: Any) -> int:
    """Beams of a beam search, 1 for a sampler that chooses token by token, 0 for any other."""
    call = type(sampler).__call__
    if call is _BeamSampler.__call__:
        return 0 if sampler.return_all_beams else int(sampler.num_beams)
    return 1 if call is _Sampler.__call__ else 0


def _array(value: Any, dtype: Any) -> NDArray[Any]:
    return np.array(value, dtype)
