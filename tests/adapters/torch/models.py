"""Models and helpers for the tests of kvcache_torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvcache_torch import KVCache, attention, causal_conv1d, positions, select_outputs
from tests.reference_decoder import DecoderConfig, InjectedFault, Weights, forward

# The models are tiny: a second thread would only be waited for, and worse where several test processes share cores.
torch.set_num_threads(1)

VOCAB = 50
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


class TorchOps:
    """What the reference decoder needs of a framework."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def take(self, table: Tensor, ids: Tensor) -> Tensor:
        return table[ids]

    def norm(self, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + 1e-6)

    def silu(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    def rotary(self, where: Tensor, size: int) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        frequencies = torch.exp(torch.arange(0, size, 2, dtype=wide, device=where.device) * (-np.log(100.0) / size))
        angles = where[:, :, None, None].to(wide) * frequencies
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def split_heads(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, -1))

    def merge_heads(self, x: Tensor) -> Tensor:
        return x.flatten(-2)

    def concat(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=-1)


class RandomDecoder(nn.Module):
    """The reference decoder as a torch module."""

    def __init__(self, config: DecoderConfig, weights: Weights) -> None:
        super().__init__()
        self.config = config
        self.named = nn.ParameterDict(
            {
                name.replace(".", "_"): torch.from_numpy(value).to(DTYPES[config.dtype])
                for name, value in weights.items()
            }
        )
        self.names = list(weights)
        self.fail: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: self.named[name.replace(".", "_")] for name in self.names}
        where = positions(x.shape[1], device=x.device)
        ops = TorchOps(weights["head"].dtype)
        return forward(ops, self.config, weights, x, where, self.attend, self.convolve)

    def convolve(self, layer: int, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        y = causal_conv1d(x.transpose(1, 2), weight.permute(2, 1, 0), layer=layer, dilation=dilation)
        return y.transpose(1, 2)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        config = self.config
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        y = attention(q, k, v, layer=layer, window=config.windows[layer], scale=config.scale, softcap=config.softcap)
        if layer == self.fail:
            raise InjectedFault(layer)
        return y.transpose(1, 2)


class TorchBackend:
    """A random decoder behind a ``KVCache``, for the script driver. See tests/reference_decoder.py."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: Weights,
        num_blocks: int,
        *,
        compiler: str | None = None,
        device: str = "cpu",
        stored: str | None = None,
        cache: KVCache | None = None,
    ) -> None:
        self.decoder = RandomDecoder(config, weights).eval().to(device)
        self.model: Any = self.decoder
        if compiler:
            self.model = torch.compile(self.decoder, backend=compiler, dynamic=True, fullgraph=True)
        self.compiled = compiler is not None
        self.cache = cache or KVCache(num_blocks, block_size=config.block_size, dtype=stored)
        self.cache.attach(self.model, outputs="last")
        self.core = self.cache.core
        self.device = device
        for layer in range(len(self.cache.store.layout.layers)):
            for spec in self.cache.store.layout.stored(layer):
                # Whoever reads a slot that no token was written to gets NaN: from scales where they are.
                array = self.cache.store.array(layer, spec.name)
                array.fill_(torch.nan if array.is_floating_point() else 127)

    def step(self, seqs: Any, token_lists: Any, fail: int | None = None) -> np.ndarray:
        self.decoder.fail = None if self.compiled else fail
        try:
            with torch.no_grad(), self.cache.transaction(seqs, token_lists) as plan:
                logits = self.cache._run(plan, last_only=False)
                if self.compiled and fail is not None:
                    raise InjectedFault(fail)
        finally:
            self.decoder.fail = None
        return logits.double().cpu().numpy()

    def uncached(self, tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            return self.decoder(torch.tensor([tokens], device=self.device))[0].double().cpu().numpy()

    def resize(self, num_blocks: int) -> None:
        self.cache.resize(num_blocks)


class Block(nn.Module):
    def __init__(self, index: int, width: int, heads: int, kv_heads: int, size: int, window: int | None) -> None:
        super().__init__()
        self.index, self.heads, self.kv_heads, self.size, self.window = index, heads, kv_heads, size, window
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * size)
        self.out = nn.Linear(heads * size, width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(0.1)

    def layer(self, length: int) -> int:
        return self.index

    def forward(self, h: Tensor) -> Tensor:
        split = [self.heads, self.kv_heads, self.kv_heads]
        qkv = self.qkv(self.norm(h)).unflatten(-1, (sum(split), self.size)).transpose(1, 2)
        q, k, v = qkv.split(split, dim=1)
        y = attention(q, k, v, layer=self.layer(h.shape[1]), window=self.window)
        h = h + self.dropout(self.out(y.transpose(1, 2).flatten(2)))
        return h + self.feed(self.norm2(h))


class Small(nn.Module):
    """A decoder of two layers, the second with a sliding window."""

    def __init__(self, windows: tuple[int | None, ...] = (None, 7), *, seed: int = 0, width: int = 24) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.tokens = nn.Embedding(VOCAB, width)
            self.places = nn.Embedding(512, width)
            self.blocks = nn.ModuleList(Block(at, width, 4, 2, 8, window) for at, window in enumerate(windows))
            self.head = nn.Linear(width, VOCAB)
        self.computed = 0
        self.calls = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.computed += x.numel()
            self.calls += 1
        h = self.tokens(x) + self.where(x)
        for block in self.blocks:
            h = block(h)
        return self.head(select_outputs(h))

    def where(self, x: Tensor) -> Tensor:
        return self.places(positions(x.shape[1], device=x.device))


def ids(seed: int, *shape: int) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def prompt(seed: int, length: int) -> list[int]:
    return ids(seed, length).tolist()


def close(cached: Tensor, plain: Tensor, tolerance: float = 2e-5) -> None:
    """Equal but for rounding; NaN is not."""
    assert cached.shape == plain.shape
    assert cached.dtype == plain.dtype
    error = (cached.detach().double() - plain.detach().double()).abs().max().item()
    assert error <= tolerance, error
