"""A speech encoder that hears 100 ms at a time. Beside it: keras_streaming_speech.py.

Causal convolutions and causal attention: what the encoder needs of the past (the convolutions' last inputs, the
attention's K and V) is a sequence in the cache, so each chunk of sound is computed once. The speech is spoken by
eSpeak NG; the weights are random, for what is shown does not depend on them.
"""

import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import speech
import speech_run
from kvcache_torch import KVCache, attention, causal_conv1d


class Convolution(nn.Module):
    def __init__(self, layer, size, out, kernel, dilation=1):
        super().__init__()
        self.layer, self.dilation = layer, dilation
        self.weight = nn.Parameter(torch.randn(out, size, kernel) * (size * kernel) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x):  # [B, T, C]
        y = causal_conv1d(x.mT, self.weight, self.bias, layer=self.layer, dilation=self.dilation)
        return F.gelu(y.mT)


class Block(nn.Module):
    def __init__(self, layer, width, heads):
        super().__init__()
        self.layer, self.heads = layer, heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.convolution = Convolution(layer + 1, width, width, 3)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h):
        q, k, v = self.qkv(self.norm(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + self.out(attention(q, k, v, layer=self.layer).transpose(1, 2).flatten(2))
        h = h + self.convolution(h)
        return h + self.feed(self.norm2(h))


class Encoder(nn.Module):
    def __init__(self, width=192, layers=4, heads=4):
        super().__init__()
        self.front = nn.ModuleList(
            [Convolution(0, speech.FRAME, width, 5), Convolution(1, width, width, 3, dilation=2)]
        )
        self.blocks = nn.ModuleList(Block(2 + 2 * at, width, heads) for at in range(layers))

    def forward(self, x):  # frames [B, T, 64] -> [B, T, width]
        for layer in self.front:
            x = layer(x)
        for block in self.blocks:
            x = block(x)
        return x


def build(**sizes):
    torch.manual_seed(0)
    return Encoder(**sizes).eval()


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
    with torch.inference_mode():
        model(torch.from_numpy(frames[None, :chunk]))
        start = time.perf_counter()
        for end in range(chunk, len(frames) + chunk, chunk):
            whole = model(torch.from_numpy(frames[None, :end]))
        again = time.perf_counter() - start

    cache = KVCache(size=len(frames) // 16 + 4)
    cache.attach(model, frames=speech.FRAME, outputs="last")
    cache.refresh()  # looks at the model, once
    start = time.perf_counter()
    streamed = np.concatenate(list(stream(cache, frames, chunk)))
    once = time.perf_counter() - start

    return speech_run.show(streamed, once, whole[0].numpy(), again, chunk)


if __name__ == "__main__":
    main(**speech_run.wanted())
