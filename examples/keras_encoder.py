"""A sentence encoder that computes each sentence once: all-MiniLM-L6-v2 in KerasHub. Beside it: torch_encoder.py.

Sentences arrive in batches, many of them for the second or tenth time. Rows that were seen are served, the others are
computed, and the order stays. All batches are padded to one width: a row's padding is part of its key.
"""

import os
import time

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from tokenizers import Tokenizer

import minilm
import sentences
from kvcache_keras import KVCache


def load() -> tuple[keras.Model, Tokenizer]:
    where = minilm.folder()
    model = keras_hub.models.BertBackbone.from_preset(str(where))
    for number in range(model.num_layers):
        # KerasHub approximates GELU by tanh; this model was trained with the exact one.
        layer = model.get_layer(f"transformer_layer_{number}")._feedforward_intermediate_dense
        layer.activation = lambda x: keras.activations.gelu(x, approximate=False)
    return model, minilm.tokenizer()


def graph(model):
    """The model as one graph for all batch sizes; traced inside `with cache:` it uses the cache."""
    spec = tf.TensorSpec((None, minilm.WIDTH), tf.int32)

    @tf.function(input_signature=(spec, spec), autograph=False)
    def hidden(ids, mask):
        inputs = {"token_ids": ids, "padding_mask": mask, "segment_ids": tf.zeros_like(ids)}
        return model(inputs, training=False)["sequence_output"]

    return hidden


def encode(hidden, tokenizer, texts, batch=32):
    """Unit vectors [N, 384]: the mean over each sentence's tokens."""
    vectors = []
    for at in range(0, len(texts), batch):
        rows = tokenizer.encode_batch(texts[at : at + batch])
        ids = np.array([row.ids for row in rows], np.int32)
        mask = np.array([row.attention_mask for row in rows], np.int32)
        states = hidden(ids, mask).numpy()
        mean = np.einsum("btc,bt->bc", states, mask.astype("float32")) / mask.sum(1, keepdims=True)
        vectors.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    return np.concatenate(vectors)


def main(count: int = 2000, repeated: float = 0.6) -> tuple[float, float]:
    model, tokenizer = load()
    texts = sentences.stream(count, repeated)
    plain_graph = graph(model)
    encode(plain_graph, tokenizer, texts[:32])  # traces the graph
    cache = KVCache(memory="512MiB")
    cache.attach(model, kind="activation")
    with cache:
        cached_graph = graph(model)
        encode(cached_graph, tokenizer, texts[:1])
    cache.clear()
    before = cache.stats()

    start = time.perf_counter()
    plain = encode(plain_graph, tokenizer, texts)
    plain_seconds = time.perf_counter() - start
    start = time.perf_counter()
    with cache:
        found = encode(cached_graph, tokenizer, texts)
    seconds = time.perf_counter() - start

    stats = cache.stats()
    difference = np.abs(found - plain).max()
    computed, served = stats.miss_entries - before.miss_entries, stats.hit_entries - before.hit_entries
    minilm.show(count, (plain_seconds, seconds), (computed, served), stats.bytes, difference)
    return plain_seconds, seconds


if __name__ == "__main__":
    main(**minilm.wanted(__doc__))
