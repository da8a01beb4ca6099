"""One step inside a transformers model: the cache its layers see, and the attention they call."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcache_core.errors import InvalidInput
from kvcache_core.plan import PAD_SLOT, StepPlan
from kvcache_torch.attention import attention
from kvcache_torch.context import local
from kvcache_torch.store import TensorStore

__all__ = [
    "IMPLEMENTATION",
    "NeedsReturned",
    "RecordingStepCache",
    "ReturningStepCache",
    "StepCache",
    "block_attention",
    "implementation",
    "state",
]

IMPLEMENTATION = "kvcache"
"""The name that the attention over blocks is registered under."""


_NOT_OURS = ("s_aux", "position_bias")
"""What an attention function may be passed that changes its result, and that steps over blocks do not know."""


class NeedsReturned(InvalidInput):
    """The model can only be served by returning K and V to it."""


class _State(threading.local):
    """What of a transformers model this thread is in."""

    view: Any = None
    """The cache of the step under way: a :class:`StepCache`, alone or with the cross-attention's."""
    request: Any = None
    """The call of the attached model under way, between its own forward and its decoder's."""


state = _State()


class StepCache(Cache):
    """What a model's layers see as their cache during one step.

    ``update`` stores nothing itself: it hands K and V on, and the attention over blocks, called next, writes them
    into their slots.

    Args:
        past: tokens that every row has before the step, as far as the model asks for one number.
    """

    def __init__(self, past: int, num_layers: int) -> None:
        super().__init__(layers=[])
        self.past = past
        self.num_layers = num_layers
        self.mask: Tensor | None = None
        """What the model is given as attention mask."""
        self.pending: int | None = None
        """The layer whose K and V were handed on and not attended yet."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand on a layer's new K and V, [B, H, T, D]."""
        if self.pending is not None:
            raise InvalidInput(
                f"layer {self.pending} called no registered attention function before layer {layer_idx} began; "
                "its attention cannot be cached"
            )
        self.pending = layer_idx
        return key_states, value_states

    def take(self) -> int | None:
        """The layer whose attention is called now; None for attention over something else, like an encoder."""
        layer, self.pending = self.pending, None
        return layer

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the step."""
        return self.past

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(context tokens, offset of the first)."""
        return self.past + query_length, 0

    def __len__(self) -> int:
        return self.num_layers

    @property
    def is_sliding(self) -> list[bool]:
        """No layer keeps a window of its own: the blocks do."""
        return [False] * self.num_layers

    is_linear = is_sliding
    is_dummy = is_sliding
    is_compileable = False


class ReturningStepCache(StepCache):
    """For models that do not call a registered attention function: ``update`` writes the new K and V into their slots
    and returns all of them, as transformers' own caches do.

    A row's past is aligned on the right, its new tokens follow; ``mask``, int64 [B, S], says where there is a token.

    Args:
        plan: the step.
        store: where K and V lie.
        num_layers: attention layers.
    """

    def __init__(self, plan: StepPlan, store: TensorStore, num_layers: int) -> None:
        super().__init__(int(plan.starts.max()), num_layers)
        self.store = store
        group = plan.groups[0]
        self.slots = torch.from_numpy(group.slots.reshape(-1)).to(store.device)
        positions = np.arange(self.past)[None] - (self.past - plan.starts[:, None])
        there = positions >= 0
        positions = positions.clip(min=0)
        blocks = np.take_along_axis(group.block_tables, positions // group.block_size, axis=1).astype(np.int64)
        past = np.where(there, blocks * group.block_size + positions % group.block_size, PAD_SLOT)
        index = np.concatenate([past, group.slots], axis=1)
        new = np.arange(group.slots.shape[1]) < plan.counts[:, None]
        valid = np.concatenate([there, new], axis=1)
        self.mask = None if valid.all() else torch.from_numpy(valid.astype(np.int64)).to(store.device)
        self.run = int(index[0, 0]) if len(index) == 1 and (np.diff(index[0]) == 1).all() else None
        """The first slot of a single row whose slots are adjacent: its K and V are views."""
        self.index = torch.from_numpy(index.reshape(-1)).to(store.device)
        self.shape = index.shape

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store [B, H, T, D]; returns K [B, H, S, D] and V [B, H, S, Dv]."""
        return self._written(layer_idx, "k", key_states), self._written(layer_idx, "v", value_states)

    def _written(self, layer: int, name: str, new: Tensor) -> Tensor:
        _, heads, _, size = new.shape
        self.store.put(layer, name, self.slots, new.transpose(0, 1).reshape(heads, -1, size))
        if self.run is not None:
            return self.store.take(layer, name, slice(self.run, self.run + self.shape[1]), new.dtype)[None]
        return self.store.take(layer, name, self.index, new.dtype).view(heads, *self.shape, size).transpose(0, 1)


class RecordingStepCache(StepCache):
    """Notes what each layer of such a model would store."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """K and V as they came; the layer's shape is noted."""
        recorder: Any = local.step
        recorder.attend(key_states, key_states, value_states, layer_idx, None, None, None)
        return key_states, value_states


def block_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function for transformers' ``AttentionInterface``: over the blocks of the step under way.

    Args:
        module: the attention module that calls.
        query: [B, Hq, T, D].
        key: [B, Hkv, T, D], the step's tokens only.
        value: [B, Hkv, T, Dv].
        attention_mask: not looked at: the step knows what each token sees.
        scaling: factor on the scores.
        sliding_window: tokens that a token sees, itself included; None for all.
        softcap: see :func:`kvcache_torch.attention`.
        **kwargs: whatever else the model passes.

    Returns:
        ([B, T, Hq, Dv], None).
    """
    view = state.view if local.stepping else None
    inner = getattr(view, "self_attention_cache", view)
    layer = inner.take() if inner is not None else None
    if layer is None and inner is not None and inner is view:
        raise NeedsReturned("attends to K and V of another layer")
    if layer is None:
        own = _own_function(module)
        return own(  # type: ignore[no-any-return]
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            sliding_window=sliding_window,
            softcap=softcap,
            **kwargs,
        )
    if not getattr(module, "is_causal", True):
        raise InvalidInput("the attention sees later tokens: nothing computed for a prefix stays right")
    if any(kwargs.get(name) is not None for name in _NOT_OURS):
        raise NeedsReturned(f"passes one of {_NOT_OURS} to its attention")
    result = attention(query, key, value, layer=layer, window=sliding_window, scale=scaling, softcap=softcap)
    return result.transpose(1, 2), None


def block_mask(*args: Any, config: Any = None, **kwargs: Any) -> Any:
    """A mask function for transformers' ``AttentionMaskInterface``: inside a step, self-attention needs no mask."""
    if local.stepping and "allow_is_bidirectional_skip" not in kwargs:
        if kwargs.get("use_vmap"):
            raise NeedsReturned("has a mask of its own besides the causal one")
        return None
    own = _originals[id(config)]
    return ALL_MASK_ATTENTION_FUNCTIONS[own](*args, config=config, **kwargs)


AttentionInterface.register(IMPLEMENTATION, block_attention)
AttentionMaskInterface.register(IMPLEMENTATION, block_mask)

_lock = threading.Lock()
_originals: dict[int, str] = {}
"""By id of a config; entries stay, for threads that have read our name just before it was taken back."""
_users: dict[int, int] = {}


@contextlib.contextmanager
def implementation(configs: Iterable[Any]) -> Iterator[None]:
    """Let the models of these configs call :func:`block_attention`, for the time of a step.

    Several threads may be in a step of one model; a thread that runs the model outside a step meanwhile gets the
    model's own attention through :func:`block_attention`.
    """
    with _lock:
        for config in configs:
            _users[id(config)] = _users.get(id(config), 0) + 1
            if _users[id(config)] == 1:
                _originals[id(config)] = config._attn_implementation_internal
                config._attn_implementation_internal = IMPLEMENTATION
    try:
        yield
    finally:
        with _lock:
            for config in configs:
                _users[id(config)] -= 1
                if not _users[id(config)]:
                    del _users[id(config)]
                    config._attn_implementation_internal = _originals[id(config)]


def _own_function(module: torch.nn.Module) -> Callable[..., Any]:
    """The attention function that the module would call if it were not attached."""
    name = _originals.get(id(module.config), "eager")
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)  # type: ignore[no-any-return]
