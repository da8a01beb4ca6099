"""Tiny random KerasHub models, one per family, with weights large enough that every position matters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

__all__ = ["CAUSAL", "SEQ2SEQ", "VOCAB", "batch", "build", "loud", "own", "run", "whisper"]

VOCAB = 61
hub = keras_hub.models


def _llama(kind: str, **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        sizes = {
            "vocabulary_size": VOCAB,
            "num_layers": 2,
            "num_query_heads": 4,
            "num_key_value_heads": 2,
            "hidden_dim": 16,
            "intermediate_dim": 24,
        }
        backbone = getattr(hub, f"{kind}Backbone")(**sizes | more)
        return getattr(hub, f"{kind}CausalLM")(backbone=backbone, preprocessor=None)

    return make


def _plain(kind: str, heads: str = "num_heads", **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        sizes = {"vocabulary_size": VOCAB, "num_layers": 2, heads: 4, "hidden_dim": 16, "intermediate_dim": 24}
        backbone = getattr(hub, f"{kind}Backbone")(**sizes | more)
        return getattr(hub, f"{kind}CausalLM")(backbone=backbone, preprocessor=None)

    return make


_GEMMA = {"head_dim": 8}
CAUSAL: dict[str, Callable[[], Any]] = {
    "Llama": _llama("Llama"),
    "Llama 3": _llama("Llama3", tie_word_embeddings=True),
    "Mistral": _llama("Mistral", sliding_window=6),
    "Mixtral": _llama("Mixtral", num_experts=3, top_k=2, sliding_window=6),
    "Qwen": _llama("Qwen"),
    "Qwen3": _llama("Qwen3", head_dim=8, layer_norm_epsilon=1e-6),
    "Gemma": _llama("Gemma", **_GEMMA),
    "Gemma 2": _llama(
        "Gemma",
        **_GEMMA,
        use_sliding_window_attention=True,
        sliding_window_size=6,
        attention_logit_soft_cap=5,
        final_logit_soft_cap=9,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
    ),
    "Gemma 3": _llama(
        "Gemma3",
        **_GEMMA,
        num_layers=6,
        image_size=None,
        vision_encoder=None,
        use_sliding_window_attention=True,
        sliding_window_size=6,
        use_query_key_norm=True,
    ),
    "Phi-3": _llama("Phi3"),
    "GPT-2": _plain("GPT2", max_sequence_length=64),
    "GPT-NeoX": _plain("GPTNeoX", rotary_percentage=0.5),
    "OPT": _plain("OPT", max_sequence_length=64),
    "BLOOM": _plain("Bloom", max_sequence_length=64),
    "Falcon": _plain("Falcon", "num_attention_heads"),
}


SEQ2SEQ: dict[str, Callable[[], Any]] = {
    "BART": lambda: hub.BartSeq2SeqLM(
        hub.BartBackbone(
            vocabulary_size=VOCAB, num_layers=2, num_heads=4, hidden_dim=16, intermediate_dim=24, max_sequence_length=32
        ),
        preprocessor=None,
    ),
    "Moonshine": lambda: hub.MoonshineAudioToText(
        hub.MoonshineBackbone(
            vocabulary_size=VOCAB,
            filter_dim=16,
            encoder_num_layers=1,
            decoder_num_layers=2,
            hidden_dim=16,
            intermediate_dim=24,
            encoder_num_heads=2,
            decoder_num_heads=2,
        ),
        preprocessor=None,
    ),
}


def whisper(seed: int = 0) -> Any:
    """The backbone: KerasHub has no Whisper that generates."""
    keras.utils.set_random_seed(seed)
    model = hub.WhisperBackbone(
        vocabulary_size=VOCAB,
        num_layers=2,
        num_heads=4,
        hidden_dim=16,
        intermediate_dim=24,
        num_mels=8,
        max_encoder_sequence_length=32,
        max_decoder_sequence_length=32,
    )
    return loud(model, seed)


def build(family: str, seed: int = 0) -> Any:
    """A model of the family, the same for the same seed."""
    keras.utils.set_random_seed(seed)
    model = (CAUSAL | SEQ2SEQ)[family]()
    model.compile(sampler="greedy", run_eagerly=True)
    return loud(model, seed)


def loud(model: Any, seed: int = 0) -> Any:
    """Set every weight to random numbers of size 0.4: as initialised, attention would hardly change the logits."""
    random = np.random.default_rng(seed)
    for variable in model.weights:
        if "seed" not in variable.path and "inv_freq" not in variable.path:
            variable.assign(random.normal(0, 0.4, variable.shape))
    return model


def batch(lengths: Sequence[int] = (9, 7, 5), width: int = 15, seed: int = 1) -> dict[str, Any]:
    """Ragged prompts [B, L] padded on the right; the second shares 4 tokens with the first."""
    ids = np.random.default_rng(seed).integers(1, VOCAB, (len(lengths), width))
    if len(lengths) > 1:
        ids[1, :4] = ids[0, :4]
    mask = np.arange(width) < np.array(lengths)[:, None]
    return {"token_ids": tf.constant(np.where(mask, ids, 0), tf.int32), "padding_mask": tf.constant(mask)}


def run(model: Any, inputs: dict[str, Any], stop: Sequence[int] | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
    """The model's generation without its text processing: tokens and mask."""
    result = model.make_generate_function()(dict(inputs), stop_token_ids=stop)
    return np.asarray(result["token_ids"]), np.asarray(result["padding_mask"])


def own(model: Any, inputs: dict[str, Any], stop: Sequence[int] | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
    """KerasHub's own generation of a model, attached or not."""
    result = type(model).make_generate_function(model)(dict(inputs), stop_token_ids=stop)
    model.generate_function = None
    return np.asarray(result["token_ids"]), np.asarray(result["padding_mask"])
