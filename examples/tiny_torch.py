"""The smallest whole use in PyTorch: write a model, attach a cache, run it, generate. Beside it: tiny_keras.py."""

import torch
from torch import nn

from kvcache_torch import KVCache, attention, generate, positions

VOCAB, HEADS, SIZE, LONGEST = 100, 4, 16, 256


class Layer(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.norm = nn.LayerNorm(HEADS * SIZE)
        self.qkv = nn.Linear(HEADS * SIZE, 3 * HEADS * SIZE)
        self.out = nn.Linear(HEADS * SIZE, HEADS * SIZE)

    def forward(self, h):
        batch, length, _ = h.shape
        qkv = self.qkv(self.norm(h)).view(batch, length, 3 * HEADS, SIZE).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=1)  # each [B, H, T, D]
        y = attention(q, k, v, layer=self.index)  # inside `with cache:` over cached and new tokens
        return h + self.out(y.transpose(1, 2).reshape(batch, length, HEADS * SIZE))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, HEADS * SIZE)
        self.places = nn.Embedding(LONGEST, HEADS * SIZE)
        self.layers = nn.ModuleList(Layer(i) for i in range(2))
        self.head = nn.Linear(HEADS * SIZE, VOCAB)

    def forward(self, x):
        h = self.tokens(x) + self.places(positions(x.shape[1]))  # inside: where each token really stands
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


torch.manual_seed(0)
model = Tiny().eval()
cache = KVCache(size=256)
cache.attach(model)

x = torch.randint(VOCAB, (2, 40))
plain = model(x)
for _ in range(2):  # the second time, 39 of each row's 40 tokens are found
    with torch.inference_mode(), cache:
        cached = model(x)
    difference = (cached - plain).abs().max()
    print(f"largest difference {difference:.1e}, {cache.stats().hit_tokens} tokens not computed again")

prompts = [[1, 2, 3] * 10, [1, 2, 3] * 10 + [4, 5]]
with_cache = generate(model, prompts, max_new_tokens=8, cache=cache)
print(f"generated {with_cache}, equal without a cache: {with_cache == generate(model, prompts, max_new_tokens=8)}")
print(f"found in the cache in all: {cache.stats().hit_tokens} tokens; computed: {cache.stats().miss_tokens}")
