"""The smallest whole use in Keras: write a model, attach a cache, run it, generate. Beside it: tiny_torch.py."""

import keras
import numpy as np
from keras import layers, ops

from kvcache_keras import KVCache, attention, generate, positions

VOCAB, HEADS, SIZE, LONGEST = 100, 4, 16, 256


class Layer(layers.Layer):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.norm = layers.LayerNormalization()
        self.qkv = layers.Dense(3 * HEADS * SIZE)
        self.out = layers.Dense(HEADS * SIZE)

    def call(self, h):
        batch, length, _ = ops.shape(h)
        qkv = ops.reshape(self.qkv(self.norm(h)), (batch, length, 3 * HEADS, SIZE))
        q, k, v = ops.split(qkv, 3, axis=2)  # each [B, T, H, D]
        y = attention(q, k, v, layer=self.index)  # inside `with cache:` over cached and new tokens
        return h + self.out(ops.reshape(y, (batch, length, HEADS * SIZE)))


class Tiny(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = layers.Embedding(VOCAB, HEADS * SIZE)
        self.places = layers.Embedding(LONGEST, HEADS * SIZE)
        self.decoder = [Layer(i) for i in range(2)]
        self.head = layers.Dense(VOCAB)

    def call(self, x):
        h = self.tokens(x) + self.places(positions(ops.shape(x)[1]))  # inside: where each token really stands
        for layer in self.decoder:
            h = layer(h)
        return self.head(h)


keras.utils.set_random_seed(0)
model = Tiny()
cache = KVCache(size=256)
cache.attach(model)

x = np.random.default_rng(0).integers(VOCAB, size=(2, 40))
plain = model(x)
for _ in range(2):  # the second time, 39 of each row's 40 tokens are found
    with cache:
        cached = model(x)
    difference = float(ops.max(ops.abs(cached - plain)))
    print(f"largest difference {difference:.1e}, {cache.stats().hit_tokens} tokens not computed again")

prompts = [[1, 2, 3] * 10, [1, 2, 3] * 10 + [4, 5]]
with_cache = generate(model, prompts, max_new_tokens=8, cache=cache)
print(f"generated {with_cache}, equal without a cache: {with_cache == generate(model, prompts, max_new_tokens=8)}")
print(f"found in the cache in all: {cache.stats().hit_tokens} tokens; computed: {cache.stats().miss_tokens}")
