"""A module's results, kept per sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from kvcache_core.activation import ActivationSite, RowFormat
from kvcache_core.described import ModuleIdentity
from kvcache_core.errors import InvalidType
from kvcache_core.tree import flatten
from kvcache_core.worth import Worth
from kvcache_torch.context import autocast_mode
from kvcache_torch.fingerprint import Fingerprint
from kvcache_torch.portable import RowReader, export_row, module_identity

if TYPE_CHECKING:
    from kvcache_torch.cache import KVCache

__all__ = ["Site", "call"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_RANDOM = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm, nn.RReLU)


class Site(ActivationSite):
    """One attached module."""

    def __init__(self, cache: KVCache, module: nn.Module, *, identity: str | None, **options: Any) -> None:
        super().__init__(cache.sites.entries, module, Worth(auto=cache.bypass_rule == "auto"), **options)
        self._cache = cache
        self.identity = ModuleIdentity(identity, type(module).__name__)
        self._identity = (identity or "").encode()
        self._number = cache.sites.number(module).to_bytes(8, "little")
        self._modules = list(module.modules())
        self._weights = Fingerprint(module, cache.verify)
        self._looks = cache.looks

    # ---- tensors -------------------------------------------------------------------------------

    def is_tensor(self, value: Any) -> bool:
        """Whether it is a tensor."""
        return isinstance(value, Tensor)

    def array(self, tensor: Tensor) -> np.ndarray[Any, Any]:
        """The tensor as integers of its own width, [B, ...]."""
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.device.type == "meta":
            raise InvalidType(f"a tensor must be dense to be split into samples, got layout {tensor.layout}")
        plain = tensor.detach().cpu().contiguous()
        if plain.is_conj() or plain.is_neg():
            plain = plain.resolve_conj().resolve_neg()
        if plain.is_complex():
            plain = torch.view_as_real(plain)
        return plain.view(_BITS[plain.element_size()]).numpy()

    def take(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        """Rows of a tensor [B, ...]."""
        return tensor[torch.as_tensor(rows, device=tensor.device)]

    def copies(self, tensor: Tensor) -> list[tuple[Tensor, int]]:
        """Each row as a tensor of its own, and its bytes."""
        rows = tensor.detach().unbind(0)
        return [(row.clone(memory_format=torch.contiguous_format), row.nbytes) for row in rows]

    def stack(self, rows: Sequence[Tensor]) -> Tensor:
        """Rows as one new tensor [B, ...]."""
        return torch.stack(list(rows))

    # ---- what the result depends on ------------------------------------------------------------

    def look(self) -> None:
        """Notice changed weights: by their content, too, in the first call of a ``with cache:``."""
        before = time.perf_counter()
        changed = self._weights.quick_look() if self._looks == self._cache.looks else self._weights.look()
        self._looks = self._cache.looks
        if changed:
            self._modules = list(self.module.modules())
        self.worth.looked(time.perf_counter() - before)

    def namespace(self) -> bytes:
        """What stands for the weights as they are now, the module, the salt."""
        portable = None if self.entries.below is None else self.portable()
        fields = (self._weights.value, self._number, self._identity, self._cache.salt, self._cache.epoch)
        if portable is not None:
            fields = (*portable, self._cache.epoch, b"", b"")
        return b"".join(len(field).to_bytes(4, "little") + field for field in fields)

    def portable(self) -> tuple[bytes, bytes] | None:
        """What stands for the module with its weights in any process, and the salt; None if nothing does."""
        mark = self._weights.value + self._weights.mode() + self._cache.epoch
        weights = self.identity.of(mark, lambda: module_identity(self.module))
        return None if weights is None else (weights, self._cache.salt)

    def row_format(self) -> RowFormat:
        """How a row becomes bits and a row again."""
        device = next((tensor.device for tensor in self._weights.tensors), torch.device("cpu"))
        return export_row, RowReader(device)

    def mode(self) -> bytes:
        """Which modules are in training mode; autocast; what modules are switched to."""
        return bytes(module.training for module in self._modules) + autocast_mode() + self._weights.mode()

    @property
    def weights(self) -> list[Tensor]:
        """The module's parameters and buffers."""
        return self._weights.tensors

    def trains(self) -> bool:
        """Whether gradients would flow to the module's parameters."""
        return torch.is_grad_enabled() and self._weights.trains

    def reason_to_bypass(self, args: Any, kwargs: Any) -> str | None:
        """Why a call must be computed as outside, or None."""
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in flatten((args, kwargs), self.is_tensor)[0]):
            return "an input needs gradients"
        if not any(module.training for module in self._modules):
            return None
        if self.trains():
            return "the module is being trained; call eval() or use torch.no_grad() to use the cache"
        if any(isinstance(module, _RANDOM) and module.training for module in self._modules):
            return "the module is in training mode with dropout or batch statistics; call eval() to use the cache"
        return None

    def compute(
        self, original: Callable[..., Any], args: Any, kwargs: Any, leaves: Sequence[Tensor]
    ) -> tuple[Any, str]:
        """Run the module; what it did besides computing is a reason not to keep the result."""
        before = _random_states(leaves)
        output = original(*args, **kwargs)
        if self._weights.quick_look():
            return output, "the module changed its own weights or buffers while it computed"
        if any(not torch.equal(one, two) for one, two in zip(before, _random_states(leaves), strict=True)):
            return output, "the module drew random numbers"
        held = {_storage(tensor) for tensor in (*leaves, *self._weights.tensors)}
        try:
            results = flatten(output, self.is_tensor)[0]
        except InvalidType as error:
            return output, f"the output cannot be kept per sample: {error}"
        held.discard(0)
        if any(_storage(result) in held for result in results):
            return output, "the output shares memory with an input or a weight"
        return output, ""


def call(cache: KVCache, site: Site, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The attached module inside ``with cache:``."""
    site.look()
    try:
        reason = site.reason_to_bypass(args, kwargs)
    except InvalidType as error:
        reason = f"an input cannot be hashed: {error}"
    if reason is not None:
        cache.bypass(0, reason, warn="hashed" in reason)
        return original(*args, **kwargs)
    if not site.trains():
        result, served = cache.serve(site, original, args, kwargs)
        return result if served or result is not None else original(*args, **kwargs)
    with torch.no_grad():
        result, served = cache.serve(site, original, args, kwargs)
    if not served:
        return original(*args, **kwargs)
    return _with_gradient(site, lambda: original(*args, **kwargs), result)


def _with_gradient(site: Site, forward: Callable[[], Any], result: Any) -> Any:
    """Let a served result take part in autograd: backward runs the module once more, as outside."""
    leaves, tree = flatten(result, site.is_tensor)
    weights = [tensor for tensor in site.weights if tensor.requires_grad]

    def outputs() -> list[Tensor]:
        return flatten(forward(), site.is_tensor)[0]

    return tree.rebuild(_Recomputed.apply(outputs, len(leaves), *leaves, *weights))


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Callable[[], list[Tensor]], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The results as they are; what a gradient needs is kept."""
        ctx.outputs, ctx.count = outputs, count
        ctx.save_for_backward(*tensors[count:])
        results = tuple(tensor.view_as(tensor) for tensor in tensors[:count])
        ctx.mark_non_differentiable(*(result for result in results if not result.is_floating_point()))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # type: ignore[override]
        """Run the module again with gradients, and differentiate that."""
        with torch.enable_grad():
            outputs = ctx.outputs()
        wanted = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
        found = torch.autograd.grad(
            [output for output, _ in wanted], ctx.saved_tensors, [grad for _, grad in wanted], allow_unused=True
        )
        return None, None, *[None] * ctx.count, *found


def _random_states(leaves: Sequence[Tensor]) -> list[Tensor]:
    """The states of the generators that a module on these tensors would draw from."""
    devices = {leaf.device for leaf in leaves if leaf.device.type == "cuda"}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _storage(tensor: Tensor) -> int:
    """Where the tensor's memory is; 0 for one that has none of its own."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
