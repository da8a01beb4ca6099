"""What a transformers model is called with, and which models and calls the cache cannot serve."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kvcache_core.errors import InvalidInput
from kvcache_torch.transparent import reason_to_bypass

__all__ = ["named", "reason_to_refuse", "refuse_other_state", "wants_gradient", "with_mask"]

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_PLAIN_ARGUMENTS = {
    *("input_ids", "attention_mask", "position_ids", "cache", "past_key_values", "use_cache", "return_dict"),
    *("logits_to_keep", "labels", "cache_position", "num_items_in_batch"),
    *("decoder_input_ids", "decoder_attention_mask", "decoder_position_ids", "encoder_outputs", "input_features"),
}
_MORE_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


def reason_to_refuse(model: Any, arguments: dict[str, Any]) -> str | None:
    """Why a call cannot be served, or None."""
    for name, value in arguments.items():
        if name not in _PLAIN_ARGUMENTS and value is not None and value is not False:
            return f"arguments besides token ids, mask and positions are not cached (got {name})"
    for name in _MORE_OUTPUTS:
        if getattr(model.config, name, False) and arguments.get(name) is not False:
            return f"outputs besides the logits are not cached (got {name} in the model's config)"
    prefix = "decoder_" if model.config.is_encoder_decoder else ""
    if arguments.get(f"{prefix}input_ids") is None:
        return "the cache needs token ids, got none"
    mask = arguments.get(f"{prefix}attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        return "the attention mask is not [B, T]"
    if arguments.get("labels") is not None and torch.is_grad_enabled():
        return "a loss is asked for with gradients; use torch.no_grad() to use the cache"
    if model.config.is_encoder_decoder and wants_gradient(model):
        return "gradients go through the encoder; use torch.no_grad() to use the cache"
    return reason_to_bypass(model)


def wants_gradient(model: nn.Module) -> bool:
    """Whether a result has to take part in autograd."""
    return torch.is_grad_enabled() and any(weight.requires_grad for weight in model.parameters())


def named(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(original).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def with_mask(arguments: dict[str, Any]) -> dict[str, Any]:
    """``lengths=`` [B], as other models take it inside ``with cache:``, as a mask."""
    lengths, ids = torch.as_tensor(arguments.pop("lengths")), arguments["input_ids"]
    there = torch.arange(ids.shape[1])[None] < lengths.cpu()[:, None]
    return {**arguments, "attention_mask": there.to(ids.device, torch.int64)}


def refuse_other_state(model: Any) -> None:
    """Refuse a model whose layers keep a state that is not K and V.

    Raises:
        InvalidInput: says which.
    """
    name = type(model).__name__
    kinds = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()) - _KNOWN_LAYERS
    if kinds:
        raise InvalidInput(
            f"{name} cannot be cached: its layers of type {sorted(kinds)} keep a state that is not K and V per token "
            "(a recurrent or convolution state, or K and V of chunks), which no prefix can be cut from"
        )
    if getattr(model, "_is_stateful", False):
        raise InvalidInput(
            f"{name} cannot be cached: it keeps a recurrent state, which stands for all tokens so far and cannot be "
            "shared by tokens as K and V can"
        )
