"""What a module computes, as bytes that any process makes alike: for activations that leave the process."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvcache_core.described import Unclear, add_text, describe
from kvcache_core.errors import InvalidType
from kvcache_torch.attached import AttachedForward

__all__ = ["RowReader", "export_row", "module_identity"]

_INTERNAL = frozenset(vars(nn.Module()))
"""What every module has: parameters, buffers and children, which are looked at one by one; the training mode, which is
in the key of each call; and hooks."""
_SAY_ALL = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def module_identity(module: nn.Module) -> bytes:
    """16 bytes for the classes of a module and its parts, their plain attributes, and every parameter and buffer.

    Raises:
        Unclear: some part has a hook, or an attribute of which nothing can be said, such as a lambda.
    """
    digest = blake2b(digest_size=16, person=b"kvcache-module")
    for name, part in module.named_modules(remove_duplicate=False):
        if part._forward_hooks or part._forward_pre_hooks:
            raise Unclear("it has hooks")
        add_text(digest, f"{name}:{describe(type(part))}")
        for key, value in sorted(vars(part).items()):
            if key not in _INTERNAL and not _is_ours(value):
                add_text(digest, f"{key}={describe(value, _SAY_ALL)}")
    parameters, buffers = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    for name, tensor in (*parameters, *buffers):
        add_text(digest, f"{name}:{tensor.dtype}:{tuple(tensor.shape)}")
        digest.update(_bytes(tensor))
    return digest.digest()


def _is_ours(value: Any) -> bool:
    """Whether this library has put it into the module."""
    return isinstance(value, AttachedForward) and not value.was_own_attribute


def _bytes(tensor: Tensor) -> memoryview:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    if plain.is_complex():
        plain = torch.view_as_real(plain.resolve_conj().resolve_neg()).reshape(-1)
    return plain.view(torch.uint8).numpy().data


def export_row(row: Tensor) -> tuple[str, np.ndarray[Any, Any]]:
    """A tensor as (dtype name, bits of its elements).

    Raises:
        InvalidType: its dtype has no place in the format.
    """
    name = str(row.dtype).removeprefix("torch.")
    if row.is_complex() or row.is_quantized:
        raise InvalidType(f"{name} has no place in the block format")
    bits = row.cpu().contiguous().view(_BITS[row.element_size()]).numpy()
    return name, bits.view(f"u{bits.itemsize}")


class RowReader:
    """Gives tensors back from dtype names and bits.

    Args:
        device: where they belong.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, name: str, bits: np.ndarray[Any, Any]) -> Tensor:
        """A tensor of its own."""
        known = _BITS[bits.itemsize]
        plain = torch.from_numpy(np.array(bits).view(np.uint8 if bits.itemsize == 1 else f"i{bits.itemsize}"))
        return plain.view(known).view(getattr(torch, name)).to(self._device)
