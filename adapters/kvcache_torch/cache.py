"""``KVCache`` for PyTorch models."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvcache_core.binding import ModelSpec
from kvcache_core.errors import InvalidType, KVCacheWarning, UsageError
from kvcache_core.frontend import Call
from kvcache_core.layout import BlockLayout
from kvcache_core.sequence import Sequence as CachedSequence
from kvcache_core.types import TokenIds
from kvcache_torch.activation import Site
from kvcache_torch.attached import AttachedForward
from kvcache_torch.compiled import compiler_works
from kvcache_torch.context import autocast_mode, local
from kvcache_torch.driver import Driver, device_of, driver_of, logits_of
from kvcache_torch.fingerprint import Fingerprint, Parked, source_of
from kvcache_torch.intercept import Extras
from kvcache_torch.linear import pack_weights as pack
from kvcache_torch.linear import unpack_weights as unpack
from kvcache_torch.native import use_native
from kvcache_torch.paged import use_paged
from kvcache_torch.parameters import persistent, values_of
from kvcache_torch.recompute import recompute
from kvcache_torch.running import ModelSteps
from kvcache_torch.store import TensorStore, stored_dtype_name
from kvcache_torch.transparent import Rows, assemble, reason_to_bypass, rows_of, with_recomputed_gradient

__all__ = ["KVCache"]


class KVCache(ModelSteps):
    """A K/V cache for one PyTorch model.

    Inside ``with cache:``, ``model(x)`` gives what it gives outside and skips the tokens whose state is
    cached. See :class:`kvcache_core.frontend.FrontendCache` for the arguments and :meth:`attach`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Tiny(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = nn.Embedding(10, 8)
        ...     def forward(self, x):
        ...         h = self.embed(x).unsqueeze(1)  # [B, H=1, T, D=8]
        ...         return attention(h, h, h, layer=0).squeeze(1)
        >>> from kvcache_torch import attention
        >>> cache = KVCache(size=64, block_size=4)
        >>> model = cache.attach(Tiny().eval())
        >>> x = torch.arange(9).unsqueeze(0)
        >>> with torch.inference_mode(), cache:
        ...     first, second = model(x), model(x)
        >>> torch.equal(first[:, :8], second[:, :8]), cache.stats().hit_tokens
        (True, 8)
    """

    _weights: Fingerprint | None = None
    _parked: Parked | None = None

    def _dtype_name(self, dtype: Any) -> str:
        return stored_dtype_name(dtype)

    def _active(self) -> Any:
        return local.cache

    def _set_active(self, cache: Any) -> None:
        local.cache = cache

    def _describe(self, model: nn.Module) -> ModelSpec:
        return self._driver.describe()

    def _new_site(self, module: nn.Module, **options: Any) -> Site:
        return Site(self, module, **options)

    def _has_embedding(self, model: nn.Module) -> bool:
        return any(isinstance(module, nn.Embedding) for module in model.modules()) and not self._driver.needs_more()

    def _new_store(self, layout: BlockLayout, num_blocks: int) -> TensorStore:
        return TensorStore(layout, num_blocks, device_of(self.model))

    def _parameters(self, model: nn.Module) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        for tensor in {id(tensor): tensor for tensor in persistent(model)}.values():
            if tensor.is_floating_point():
                source = source_of(tensor)
                values = tensor if source is None else values_of(source, tensor.dtype)
                bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
                yield str(tensor.dtype).removeprefix("torch."), values.detach().cpu().view(bits).numpy()

    def _fingerprint(self, model: nn.Module) -> bytes:
        self.weights_of(model).look()
        return self.weights_of(model).value

    def _mode(self) -> bytes:
        return autocast_mode() + self.weights_of(self.model).mode()

    def weights_of(self, model: nn.Module) -> Fingerprint:
        """What notices that the model's weights change."""
        if self._weights is None:
            self._weights = Fingerprint(model, self.verify, self._parked)
        return self._weights

    def _weights_changed(self) -> bool:
        # Finding the tensors costs a tenth of a millisecond in a deep model, comparing their counters microseconds.
        self._prepare()
        return self.weights_of(self.model).counters_moved() or self._mode() != self._seen_mode

    def open_row(self, token_ids: TokenIds, **options: Any) -> CachedSequence:
        """A sequence opened with the core's own ``options``, and with what the tiers hold behind its match."""
        return self._open(token_ids, **options)

    def notice_weights(self) -> None:
        """Notice weights changed in place since the last step."""
        if self._weights_changed():
            self.refresh()

    def _install(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise InvalidType(f"kvcache_torch attaches a torch.nn.Module, got {type(model).__name__}")
        self._driver = driver_of(self, model)
        self._driver.install()

    def _install_part(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise InvalidType(f"kvcache_torch attaches a torch.nn.Module, got {type(model).__name__}")
        Driver(self, model).install()

    def _uninstall(self, model: nn.Module) -> None:
        driver = vars(self).get("_driver")
        if driver is None or driver.model is not model:
            AttachedForward.uninstall(model)
            return
        driver.uninstall()
        if self._weights is not None:
            self._parked = self._weights.park()
        self._weights = None
        del self._driver  # it holds the model

    def compile(self, *, pack_weights: bool = False) -> None:
        """Make steps of the attached model faster, at the price of compiling once.

        Steps of one token per row then run through ``torch.compile``: one graph for a single row, one for any larger
        number, each compiled at its first use. On a CPU, attention of all steps and :func:`kvcache_torch.linear` of few
        rows run in kernels that are compiled for this machine and used by the whole process; on a GPU, attention reads
        by block table where FlashInfer, FlashAttention or FlexAttention can (:mod:`kvcache_torch.paged`). Where nothing
        can be compiled (no C++ compiler on a CPU) a warning says so and steps run as before; models of transformers are
        not compiled, only their attention and linear layers use the kernels. Call it again after attaching another
        model.

        Args:
            pack_weights: on a CPU, also keep a copy of every float32 matrix in the order that is read fastest when
                there are more than eight rows (:func:`kvcache_torch.linear`): twice the memory for the weights.

        Raises:
            UsageError: no model is attached, or its weights are not always in memory.
        """
        self._check_attached()
        if any(source_of(parameter) is not None for parameter in self.model.parameters()):
            raise UsageError("weights that a ParameterCache reads from a file cannot be compiled into a step")
        if pack_weights:
            pack(self.model.parameters())
        problem = compiler_works()
        if problem:
            warnings.warn(f"decode steps are not compiled: {problem}", KVCacheWarning, stacklevel=2)
        else:
            use_native()
            use_paged()
            self._driver.compile()

    def invalidate(self) -> None:
        """Never find anything again that was computed before now."""
        if self.model is not None:
            unpack(self.model.parameters())  # a write around the version counter left them stale
        super().invalidate()

    @property
    def _original(self) -> Callable[..., Any]:
        return self.model.forward.original  # type: ignore[no-any-return]

    # ---- for generation without a cache, and for kvcache_core.testing -----------------------------

    def recompute(self, rows: list[list[int]]) -> np.ndarray[Any, Any]:
        """Logits behind each row's last token, without the cache."""
        return recompute(self._original, device_of(self.model), rows)

    def native_ids(self, ids: np.ndarray[Any, Any]) -> Tensor:
        """Numpy ids [B, T] as a tensor on the model's device."""
        return torch.from_numpy(ids).to(device_of(self.model))

    def to_numpy(self, output: Any) -> np.ndarray[Any, Any]:
        """A model's output as a numpy float64 array."""
        return logits_of(output).detach().double().cpu().numpy()

    def float64_model(self) -> Callable[[Any], Any] | None:
        """A copy of the attached model in float64, or None where it does not run so."""
        plain = copy.deepcopy(getattr(self.model, "_orig_mod", self.model)).double()

        def run(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            with torch.no_grad():
                return self.to_numpy(plain(self.native_ids(ids)))

        try:
            run(np.zeros((1, 1), np.int64))
        except RuntimeError:  # somewhere the model asks for a dtype by name
            return None
        return run

    def transparent_call(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``model(x)`` inside ``with cache:``."""
        lengths, mask = kwargs.pop("lengths", None), kwargs.pop("mask", None)
        mask = kwargs.pop("attention_mask", mask)
        more = bool(len(args) != 1 or kwargs)
        extras = Extras.of(args[1:], kwargs, len(args[0])) if more and args else None
        if more and extras is None:
            extra = [*map(str, range(1, len(args))), *kwargs]
            self.bypass(0, f"arguments besides the token ids and tensors are not cached (got {extra})")
            return original(*args, **kwargs)
        local.extras = extras
        try:
            return self._transparent(
                _with_extras(original, extras), rows_of(args[0], lengths, mask, self.frames), args[0], extras
            )
        finally:
            local.extras = None

    def _transparent(self, original: Callable[..., Any], rows: Rows, x: Tensor, extras: Extras | None) -> Any:
        reason = reason_to_bypass(self.model)
        if reason:
            self.bypass(sum(map(len, rows.tokens)), reason)
            return rows.last_of(rows.outside(original, x)) if self.outputs == "last" else rows.outside(original, x)
        self.refresh()
        for row in rows.tokens:
            self.check_vocabulary(row)
        with torch.no_grad(), self.call(rows.tokens, extras and extras.keys) as call:
            result = rows.outside(original, x) if call is None else self._answer(call, rows)
        if call is None and self.outputs == "last":
            result = rows.last_of(result)
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in self.model.parameters()):
            result = with_recomputed_gradient(self, original, x, rows, result)
        return result

    def _answer(self, call: Call, rows: Rows) -> Tensor:
        """Compute what is missing, store its outputs, and put cached and new ones together."""
        if self.outputs == "last":
            return self._run(call.plan, last_only=True)
        new = self._run(call.plan, last_only=False)
        layer = len(self.store.layout.layers) - 1
        return assemble(self.store, layer, call, rows, new)


def _with_extras(original: Callable[..., Any], extras: Extras | None) -> Callable[..., Any]:
    """The model as a function of token ids alone."""
    return original if extras is None else lambda x: original(x, *extras.args, **extras.kwargs)
