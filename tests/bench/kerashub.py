"""The peer in Keras: KerasHub's own Llama and `generate` on the same weights."""

from __future__ import annotations

import time
from typing import Any

import keras_hub
import numpy as np
import tensorflow as tf

from smollm2 import Checkpoint

__all__ = ["KerasHub"]


class KerasHub:
    """`Llama3CausalLM` as it ships: XLA on, greedy."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.config
        backbone = keras_hub.models.Llama3Backbone(
            vocabulary_size=config.vocab_size,
            num_layers=config.num_layers,
            num_query_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            hidden_dim=config.hidden_size,
            intermediate_dim=config.intermediate_size,
            rope_max_wavelength=config.rope_theta,
            layer_norm_epsilon=config.norm_eps,
            tie_word_embeddings=config.tied,
        )
        _fill(backbone, checkpoint.weights)
        self.model = keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)
        self.model.compile(sampler="greedy")
        self._kept: dict[tuple[int, ...], list[Any]] = {}

    def generate(self, prompt: list[int], total: int) -> tuple[float, list[int]]:
        """Continue `prompt` to `total` tokens: seconds, and the new tokens."""
        ids = np.zeros((1, total), np.int32)
        ids[0, : len(prompt)] = prompt
        mask = np.arange(total)[None] < len(prompt)
        start = time.perf_counter()
        output = self.model.generate({"token_ids": ids, "padding_mask": mask}, stop_token_ids=None)
        new = np.asarray(output["token_ids"])[0, len(prompt) :].tolist()
        return time.perf_counter() - start, new

    def keep_prefill(self, prompt: list[int], total: int) -> None:
        """Compute the prompt's K and V once: `generate` for it and for longer prompts then only runs its loop.

        The loop stays KerasHub's own, compiled by XLA as it ships; what is left out is the prefill of every call.
        A prompt that was kept before has its loop too.
        """
        key = (total, *prompt)
        if key not in self._kept:
            ids = np.zeros((1, total), np.int32)
            ids[0, : len(prompt)] = prompt
            kept = tf.function(type(self.model)._build_cache)(self.model, tf.constant(ids))
            self.model._build_cache = lambda token_ids: kept
            self.model.generate_function = None
            self._kept[key] = [self.model._build_cache, self.model.make_generate_function()]
        self.model._build_cache, self.model.generate_function = self._kept[key]


def _fill(backbone: Any, weights: dict[str, np.ndarray]) -> None:
    """Copy weights named as in transformers into the backbone."""

    def put(variable: Any, name: str) -> None:
        value = weights[name + ".weight"]
        variable.assign(value if value.ndim == 1 else value.T.reshape(variable.shape))

    embedding = backbone.get_layer("token_embedding")
    embedding.embeddings.assign(weights["model.embed_tokens.weight"])
    if not backbone.tie_word_embeddings:
        put(embedding.reverse_embeddings, "lm_head")
    put(backbone.get_layer("sequence_output_layernorm").scale, "model.norm")
    for number in range(backbone.num_layers):
        layer, at = backbone.get_layer(f"transformer_layer_{number}"), f"model.layers.{number}."
        put(layer._self_attention_layernorm.scale, at + "input_layernorm")
        put(layer._feedforward_layernorm.scale, at + "post_attention_layernorm")
        attention = layer._self_attention_layer
        for name, dense in (("q", "_query"), ("k", "_key"), ("v", "_value"), ("o", "_output")):
            put(getattr(attention, dense + "_dense").kernel, f"{at}self_attn.{name}_proj")
        for name, dense in (("gate", "gate"), ("up", "intermediate"), ("down", "output")):
            put(getattr(layer, f"_feedforward_{dense}_dense").kernel, f"{at}mlp.{name}_proj")
