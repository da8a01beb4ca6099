"""A speech encoder that hears 100 ms at a time. Beside it: torch_streaming_speech.py.

Causal convolutions and causal attention: what the encoder needs of the past (the convolutions' last inputs, the
attention's K and V) is a sequence in the cache, so each chunk of sound is computed once. The speech is spoken by
eSpeak NG; the weights are random, for what is shown does not depend on them.
"""

import os
import time

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf

import speech
import speech_run
from kvcache_keras import CachedAttention, KVCache, causal_conv1d


class Convolution(keras.layers.Layer):
    def __init__(self, layer, out, kernel, dilation=1, **kwargs):
        super().__init__(**kwargs)
        self.layer, self.out, self.kernel_size, self.dilation = layer, out, kernel, dilation

    def build(self, shape):
        self.kernel = self.add_weight(shape=(self.kernel_size, shape[-1], self.out), name="kernel")
        self.bias = self.add_weight(shape=(self.out,), initializer="zeros", name="bias")

    def call(self, x):  # [B, T, C]
        return keras.ops.gelu(causal_conv1d(x, self.kernel, self.bias, layer=self.layer, dilation=self.dilation))


class Attention(keras.layers.Layer):
    def __init__(self, width, heads, **kwargs):
        super().__init__(**kwargs)
        self.norm = keras.layers.LayerNormalization()
        self.attention = CachedAttention(heads, width // heads)

    def call(self, h):
        return h + self.attention(self.norm(h))


class Encoder(keras.Model):
    def __init__(self, width=192, layers=4, heads=4):
        super().__init__()
        self.front = [Convolution(None, width, 5), Convolution(None, width, 3, dilation=2)]
        self.attentions = [Attention(width, heads) for _ in range(layers)]
        self.convolutions = [Convolution(None, width, 3) for _ in range(layers)]
        self.norms = [keras.layers.LayerNormalization() for _ in range(layers)]
        self.up = [keras.layers.Dense(4 * width, "gelu") for _ in range(layers)]
        self.down = [keras.layers.Dense(width) for _ in range(layers)]

    def call(self, x):  # frames [B, T, 64] -> [B, T, width]
        for layer in self.front:
            x = layer(x)
        for at, block in enumerate(self.attentions):
            x = block(x)
            x = x + self.convolutions[at](x)
            x = x + self.down[at](self.up[at](self.norms[at](x)))
        return x


def build(**sizes):
    keras.utils.set_random_seed(0)
    model = Encoder(**sizes)
    model(tf.zeros((1, 1, speech.FRAME)))
    return model


def stream(cache, frames, chunk):
    """Yield the encoder's output behind each chunk: [chunk, width]."""
    seq = cache.open(frames[:chunk])
    try:
        for at in range(0, len(frames), chunk):
            new = frames[max(at, seq.length) : at + chunk]
            yield cache.step_all([seq], [new])[0]
    finally:
        seq.close()


def main(seconds=20.0, chunk=10, **sizes):
    frames = speech.speech(seconds)
    model = build(**sizes)
    spec = tf.TensorSpec([1, None, speech.FRAME])
    run = tf.function(model, input_signature=[spec])  # one graph for every length
    run(frames[None, :chunk])
    start = time.perf_counter()
    for end in range(chunk, len(frames) + chunk, chunk):
        whole = run(frames[None, :end])
    again = time.perf_counter() - start

    cache = KVCache(size=len(frames) // 16 + 4)
    cache.attach(model, frames=speech.FRAME, outputs="last")
    for _ in stream(cache, frames[: 2 * chunk], chunk):
        pass  # traces the step's graph, once
    cache.clear()
    start = time.perf_counter()
    streamed = np.concatenate(list(stream(cache, frames, chunk)))
    once = time.perf_counter() - start

    return speech_run.show(streamed, once, whole[0].numpy(), again, chunk)


if __name__ == "__main__":
    main(**speech_run.wanted())
