"""The calls that a model is built from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcache_core.convolution import context_rows
from kvcache_core.errors import InvalidInput
from kvcache_torch.context import local
from kvcache_torch.kernels import plain_attention

__all__ = ["attention", "causal_conv1d", "positions", "select_outputs"]


def positions(length: int, *, device: torch.device | str | None = None) -> Tensor:
    """Absolute positions of the tokens in this forward pass.

    Args:
        length: T, the input's length.
        device: where to put them outside a cache; inside they are on the cache's device.

    Returns:
        int64 [B, T] inside ``with cache:`` (each row's own), [1, T] = 0 .. T - 1 outside.

    Raises:
        InvalidInput: inside, if ``length`` is not the step's T.
    """
    if not local.stepping:
        return torch.arange(length, device=device).unsqueeze(0)
    inside = local.positions
    if inside.shape[1] != length:
        raise InvalidInput(f"positions() must be asked for this step's {inside.shape[1]} tokens, got {length}")
    return inside


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layer: int,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention; inside ``with cache:`` over cached and new tokens.

    Args:
        q: [B, Hq, T, D].
        k: [B, Hkv, T, D], Hq a multiple of Hkv; heads are not repeated.
        v: [B, Hkv, T, Dv].
        layer: the layer's own number, 0 .. L - 1.
        window: a token sees itself and the ``window`` - 1 tokens before it; None for all.
        scale: factor on the scores; default 1 / sqrt(D).
        softcap: scores become ``softcap * tanh(scores / softcap)``.

    Returns:
        [B, Hq, T, Dv].

    Raises:
        InvalidInput, InvalidType: inside a step, for a layer used twice, or another shape, dtype or device
            than the cache's.
    """
    if not local.stepping:
        return plain_attention(q, k, v, window, scale, softcap)
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = _autocast(q), _autocast(k), _autocast(v)
    if torch.compiler.is_compiling():
        return torch.ops.kvcache.attend(q, k, v, layer, window, scale, softcap)  # type: ignore[no-any-return]
    return local.step.attend(q, k, v, layer, window, scale, softcap)


def _autocast(x: Tensor) -> Tensor:
    """As autocast hands it to ``F.scaled_dot_product_attention``: a model may give rotated K in float32 beside V."""
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, layer: int, dilation: int = 1, groups: int = 1
) -> Tensor:
    """Convolution over time that sees a token and the ones before it, zeros before the first.

    Inside ``with cache:`` a step's inputs stand behind the last (K - 1) * dilation inputs of their sequence, which are
    the layer's state in the cache.

    Args:
        x: [B, C, T].
        weight: [E, C / groups, K] as for ``F.conv1d``, K at least 2; ``weight[:, :, -1]`` is for the token itself.
        bias: [E], or None.
        layer: the layer's own number, 0 .. L - 1, counted together with the attention layers.
        dilation: distance between the inputs that one output sees.
        groups: as for ``F.conv1d``; C for a depthwise convolution.

    Returns:
        [B, E, T].

    Raises:
        InvalidInput, InvalidType: a kernel of 1; inside a step, a layer used twice, or another shape or dtype than
            when the model was first run.

    Example:
        >>> x = torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> causal_conv1d(x, torch.ones(1, 1, 2), layer=0)
        tensor([[[1., 3., 5.]]])
    """
    rows = context_rows(weight.shape[2], dilation)
    if not local.stepping:
        joined = F.pad(x, (rows, 0))
    elif torch.compiler.is_compiling():
        joined = torch.ops.kvcache.with_context(x, rows, layer)
    else:
        joined = local.step.with_context(x, rows, layer)
    return F.conv1d(joined, weight, bias, dilation=dilation, groups=groups)


def select_outputs(hidden: Tensor) -> Tensor:
    """Keep only what the step needs before an expensive output layer.

    Put it before the final projection: a prefill then computes logits for each row's last token alone. Behind the last
    layer's attention it saves that layer's feed-forward part too.

    Args:
        hidden: [B, T, ...].

    Returns:
        [B, 1, ...] in a step of which only each row's last output is wanted; ``hidden`` otherwise.
    """
    if not local.last_only or hidden.shape[1] == 1:
        return hidden
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    return hidden[rows, local.last_index].unsqueeze(1)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: int,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    # Contiguous, because the compiler plans with the strides that the fake below announces.
    return local.step.attend(q, k, v, layer, window, scale, softcap).contiguous()


# The step's attention as one opaque operation: a compiled model needs no new graph for a new step. Defined by hand:
# `torch.library.custom_op` would add its own bookkeeping to every layer of every step.
_library = torch.library.Library("kvcache", "FRAGMENT")
_library.define(
    "attend(Tensor q, Tensor k, Tensor v, int layer, int? window, float? scale, float? softcap) -> Tensor",
)
_library.impl("attend", _attend, "CompositeExplicitAutograd")


@torch.library.register_fake("kvcache::attend", lib=_library)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: int,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])


def _with_context(x: Tensor, rows: int, layer: int) -> Tensor:
    return local.step.with_context(x, rows, layer).contiguous()


_library.define("with_context(Tensor x, int rows, int layer) -> Tensor")
_library.impl("with_context", _with_context, "CompositeExplicitAutograd")


@torch.library.register_fake("kvcache::with_context", lib=_library)
def _(x: Tensor, rows: int, layer: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], rows + x.shape[2])
