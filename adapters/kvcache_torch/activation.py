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
from kvcache_torch.replay import with_replayed_gradient

if TYPE_CHECKING:
    from kvcache_torch.cache import KVCache

__all__ = ["Site", "call"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_RANDOM = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm, nn.RReLU)
_FAST_PATHS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""These compute in another way where no gradients flow, and leave zeros at padding."""


class Site(ActivationSite):
    """One attached module."""

    def __init__(self, cache: KVCache, module: nn.Module, *, identity: str | None, **options: Any) -> None:
        super().__init__(cache.sites.entries, module, Worth(auto=cache.bypass_rule == "auto"), **options)
        self._cache = cache
        self.identity = ModuleIdentity(identity, type(module).__name__)
        self._identity = (identity or "").encode()
        self._number = cache.sites.number(module).to_bytes(8, "little")
        self._modules = list(module.modules())
        self._has_fast_path = any(isinstance(part, _FAST_PATHS) for part in self._modules)
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

    def numbers(self, tensor: Tensor) -> tuple[str, np.ndarray[Any, Any]]:
        """The tensor's dtype by name, and its values [B, ...]."""
        plain = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
        if plain.is_floating_point() and plain.element_size() < 4:
            plain = plain.float()  # numpy knows no bfloat16
        return _name(tensor.dtype), np.array(plain.cpu().numpy())

    def precisions(self) -> set[str]:
        """The dtypes of weights, and of autocast."""
        dtypes = {weight.dtype for weight in self._weights.tensors}
        dtypes |= {torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)}
        return set(map(_name, dtypes))

    def may_mix(self) -> bool:
        """Whether a layer takes time in front (``batch_first=False``), or normalises by the batch."""
        return any(
            getattr(module, "batch_first", True) is False
            or (isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None)
            for module in self._modules
        )

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
        """Which modules are in training mode; autocast; what modules are switched to; whether gradients matter."""
        state = bytes(module.training for module in self._modules) + autocast_mode() + self._weights.mode()
        return state + b"gradients" * self.computes_by_gradients()

    @property
    def weights(self) -> list[Tensor]:
        """The module's parameters and buffers."""
        return self._weights.tensors

    def trains(self) -> bool:
        """Whether gradients would flow to the module's parameters."""
        return torch.is_grad_enabled() and self._weights.trains

    def computes_by_gradients(self) -> bool:
        """Whether gradients would flow, and the module computes in another way where none do."""
        return self._has_fast_path and self.trains()

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
        # Decided once: another thread may prove the module meanwhile.
        compares = not self.is_proven()
        before, given = _random_states(leaves), self._contents(leaves, compares)
        output = original(*args, **kwargs)
        if self._weights.quick_look():
            return output, "the module changed its own weights or buffers while it computed"
        if any(not torch.equal(one, two) for one, two in zip(before, _random_states(leaves), strict=True)):
            return output, "the module drew random numbers"
        if not all(map(np.array_equal, given, self._contents(leaves, compares))):
            return output, "the module changed an input in place"
        held = {_storage(tensor) for tensor in (*leaves, *self._weights.tensors)}
        try:
            results = flatten(output, self.is_tensor)[0]
        except InvalidType as error:
            return output, f"the output cannot be kept per sample: {error}"
        held.discard(0)
        if any(_storage(result) in held for result in results):
            return output, "the output shares memory with an input or a weight"
        return output, ""

    def is_proven(self) -> bool:
        """Whether one whole batch was seen to be computed cleanly, as the module computes now."""
        return self.mode() in self._proven

    def _contents(self, leaves: Sequence[Tensor], compares: bool) -> list[Any]:
        """What a write to an input changes: its version or, where inference mode keeps none, its bits.

        Args:
            compares: whether bits are compared, too: only until the module was once seen to leave its inputs alone.
        """
        return [
            (self.array(leaf).copy() if compares else None) if leaf.is_inference() else leaf._version for leaf in leaves
        ]


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
    trains = site.trains()
    # What is not proven yet may change its inputs, or itself: it runs once, with its graph, whatever comes of it.
    replayed = trains and site.is_proven() and not site.computes_by_gradients()
    with torch.set_grad_enabled(torch.is_grad_enabled() and not replayed):
        result, served = cache.serve(site, original, args, kwargs)
    if not served:
        return original(*args, **kwargs) if result is None or replayed else result
    if not trains or any(leaf.requires_grad for leaf in flatten(result, site.is_tensor)[0]):
        return result
    return _with_gradient(site, lambda: original(*args, **kwargs), (args, kwargs), result)


def _with_gradient(site: Site, forward: Callable[[], Any], inputs: Any, result: Any) -> Any:
    """Let a served result take part in autograd: backward runs the module once more, as outside."""
    leaves, tree = flatten(result, site.is_tensor)

    def outputs() -> list[Tensor]:
        return flatten(forward(), site.is_tensor)[0]

    given = flatten(inputs, site.is_tensor)[0]
    return tree.rebuild(with_replayed_gradient(outputs, site.module, given, leaves))


def _random_states(leaves: Sequence[Tensor]) -> list[Tensor]:
    """The states of the generators that a module on these tensors would draw from."""
    devices = {leaf.device for leaf in leaves if leaf.device.type == "cuda"}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _storage(tensor: Tensor) -> int:
    """Where the tensor's memory is; 0 for one that has none of its own."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
