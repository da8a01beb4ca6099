"""A Llama in PyTorch, to be read in one sitting beside `llama_keras.py`.

Two calls make it ready for a cache and change nothing without one: `positions` instead of `arange`, and
`attention` instead of `scaled_dot_product_attention`; `linear` is `F.linear`, only faster on a CPU. What was just made
and has no other use is changed in place: in a long prompt, fresh memory costs more than the arithmetic.

Shapes: B batch, T new tokens, C hidden size, H query heads, G key/value heads, D head size, F feed-forward size,
V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvcache_torch import attention, linear, positions, select_outputs
from smollm2 import Checkpoint, LlamaConfig


def weight(*shape: int) -> nn.Parameter:
    """A weight to be loaded later."""
    return nn.Parameter(torch.empty(shape))


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last axis: `F.rms_norm` in fewer passes, no square is written."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return (x * size.square().div_(x.shape[-1]).add_(eps).rsqrt_()).to(x.dtype).mul_(scale)


def rotary(pos: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of every angle at positions [B or 1, T]: both [B or 1, 1, T, D]."""
    angles = pos[:, None, :, None].to(torch.promote_types(dtype, torch.float32)) * frequencies
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of x [B, H, T, D] by its angle."""
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half])
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y


class Block(nn.Module):
    """One decoder layer: [B, T, C] -> [B, T, C]; inside, the tokens of all rows stand in one list, N = B * T. The last
    one's results are of the tokens whose logits are wanted.
    """

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        self.norm1 = weight(config.hidden_size)
        self.qkv = weight((config.num_heads + 2 * config.num_kv_heads) * config.head_dim, config.hidden_size)
        self.out = weight(config.hidden_size, config.num_heads * config.head_dim)
        self.norm2 = weight(config.hidden_size)
        self.gate_up = weight(2 * config.intermediate_size, config.hidden_size)
        self.down = weight(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, size = x.shape
        x = x.reshape(batch * length, size)
        x = self.attend(rms_norm(x, self.norm1, self.config.norm_eps), batch, length, cos, sin).add_(x)
        if self.index == self.config.num_layers - 1:  # behind the last attention a prefill needs each row's last token
            x = select_outputs(x.view(batch, length, size)).flatten(0, 1)
        x = self.feed_forward(rms_norm(x, self.norm2, self.config.norm_eps)).add_(x)
        return x.view(batch, -1, size)

    def attend(self, x: Tensor, batch: int, length: int, cos: Tensor, sin: Tensor) -> Tensor:
        """Grouped-query attention with rotary positions."""
        heads, kv_heads, size = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        qkv = linear(x, self.qkv).view(batch, length, heads + 2 * kv_heads, size).transpose(1, 2)
        qk, v = qkv.split((heads + kv_heads, kv_heads), dim=1)
        q, k = rotate(qk, cos, sin).split((heads, kv_heads), dim=1)
        y = attention(q, k, v, layer=self.index)  # [B, H, T, D]
        return linear(y.transpose(1, 2).reshape(batch * length, heads * size), self.out)

    def feed_forward(self, x: Tensor) -> Tensor:
        """SwiGLU."""
        gate, up = linear(x, self.gate_up).chunk(2, dim=-1)
        return linear(F.silu(gate).mul_(up), self.down)


class Llama(nn.Module):
    """Token ids [B, T] -> logits [B, T, V]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = weight(config.hidden_size)
        self.head = self.embed.weight if config.tied else weight(config.vocab_size, config.hidden_size)
        self.register_buffer("frequencies", torch.from_numpy(config.frequencies), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        cos, sin = rotary(positions(x.shape[1], device=x.device), self.frequencies, h.dtype)
        for block in self.blocks:
            h = block(h, cos, sin)
        h = rms_norm(h, self.norm, self.config.norm_eps)
        return linear(h.flatten(0, 1), self.head).view(*h.shape[:2], -1)


def load_weights(model: Llama, weights: dict[str, np.ndarray]) -> Llama:
    """Copy weights, named as in transformers, into `model`; returns it."""

    def fill(parameter: Tensor, *names: str) -> None:
        parts = [weights[name + ".weight"] for name in names]
        parameter.copy_(torch.from_numpy(np.concatenate(parts)))

    with torch.no_grad():
        fill(model.embed.weight, "model.embed_tokens")
        fill(model.norm, "model.norm")
        if not model.config.tied:
            fill(model.head, "lm_head")
        for i, block in enumerate(model.blocks):
            at = f"model.layers.{i}."
            fill(block.norm1, at + "input_layernorm")
            fill(block.qkv, *(at + f"self_attn.{name}_proj" for name in "qkv"))
            fill(block.out, at + "self_attn.o_proj")
            fill(block.norm2, at + "post_attention_layernorm")
            fill(block.gate_up, at + "mlp.gate_proj", at + "mlp.up_proj")
            fill(block.down, at + "mlp.down_proj")
    return model


def from_checkpoint(checkpoint: Checkpoint) -> Llama:
    """The model in `checkpoint`, ready to run."""
    return load_weights(Llama(checkpoint.config), checkpoint.weights).eval().requires_grad_(False)
