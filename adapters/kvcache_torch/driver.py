"""How a cache runs one model: finds out what its layers store, and takes a step's tokens through it."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kvcache_core.binding import ModelSpec
from kvcache_core.errors import InvalidInput, KVCacheError
from kvcache_core.worth import Worth
from kvcache_torch import activation
from kvcache_torch.attached import AttachedForward, plain_forward
from kvcache_torch.compiled import CompiledDecode
from kvcache_torch.context import local
from kvcache_torch.intercept import AttentionCalls, Extras, MemoryStates, NotCausal
from kvcache_torch.recorder import Recorder
from kvcache_torch.step import Step
from kvcache_torch.store import dtype_name

__all__ = [
    "Driver",
    "device_of",
    "driver_of",
    "evaluating",
    "float_dtype",
    "logits_of",
]

_PADDING = {"lengths", "mask", "attention_mask"}
"""Keyword arguments that say which ids are padding: they are the cache's, no model sees them."""


class Driver:
    """For models built from ``kvcache_torch.attention``; a subclass knows another kind of model.

    Args:
        cache: the ``KVCache`` that the model is attached to.
        model: the attached model.
    """

    def __init__(self, cache: Any, model: nn.Module) -> None:
        self.cache = cache
        self.model = model
        self.worth: Worth | None = None
        self.decode: Callable[..., Any] | None = None
        """What runs steps of one token per row instead of the model's own forward."""
        self.intercepts: bool | None = None
        """Whether the model calls PyTorch's own attention; found out when it is described."""
        self.memories: OrderedDict[Any, list[Tensor]] = OrderedDict()
        """K and V of decoders' memories."""

    def compile(self) -> None:
        """Compile the decode step; a model that is compiled already stays as it is."""
        if self.plain is self.model and self.decode is None:
            self.decode = CompiledDecode(self.model.forward.original)

    @property
    def plain(self) -> nn.Module:
        """The model itself where a compiled one is attached: it is described without compiling it."""
        return getattr(self.model, "_orig_mod", self.model)

    def install(self) -> None:
        """Route the model's calls through the cache."""
        AttachedForward.install(self.model, self.enter)

    def uninstall(self) -> None:
        """Give back exactly the model that was attached."""
        AttachedForward.uninstall(self.model)

    def enter(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the attached model."""
        worth = self.worth
        if worth is not None and worth.skip and local.cache is self.cache:
            worth.skip -= 1
            worth.skipped += 1
            return original(*args, **kwargs)
        compiling = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if compiling or local.cache is not self.cache or local.stepping:
            return original(*args, **kwargs)
        if torch._C._are_functorch_transforms_active():  # vmap, grad, jacrev: their tensors show no content
            self.cache.bypass(0, "a transform of torch.func is active", warn=False)
            return original(*args, **kwargs)
        more = self._extras(args, kwargs)
        local.extras = more
        try:
            site = self.cache.site_of(self.model, more is not None or looks_like_ids(args, kwargs))
        finally:
            local.extras = None
        if site is not None:
            self.worth = site.worth
            return activation.call(self.cache, site, original, args, kwargs)
        return self.cache.transparent_call(original, args, kwargs)

    def describe(self) -> ModelSpec:
        """Run the model on one token and report what its layers store.

        Raises:
            InvalidInput: the model is not one that can be cached.
        """
        device = device_of(self.model)
        recorder = Recorder(device)
        try:
            output = self._probe(recorder, 1, intercept=False)
            self.intercepts = not recorder.has_attention
            if self.intercepts:
                self._probe(Recorder(device, 2), 2, intercept=True)  # a mask says nothing about one token
                recorder = Recorder(device)
                output = self._probe(recorder, 1, intercept=True)
        except NotCausal:
            raise
        except KVCacheError:  # `attention` or `positions` refused, or a mask that cannot be honoured
            self.cache.saw_attention = True
            raise
        finally:
            self.cache.saw_attention |= bool(recorder.layers)
        if not isinstance(output, Tensor) or output.dim() < 2 or output.shape[1] != 1:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise InvalidInput(
                f"a token model must map ids [B, T] or frames [B, T, F] to a tensor [B, T, ...], got {found} for T = 1"
            )
        return ModelSpec(
            recorder.specs(),
            recorder.kv_dtype(),
            tuple(output.shape[2:]),
            dtype_name(output.dtype),
            None if self.cache.frames else vocab_size(self.plain, output),
        )

    def _probe(self, recorder: Recorder, width: int, *, intercept: bool) -> Any:
        """The model over [1, width] tokens, or over as many rows as the call under way has."""
        extras = local.extras
        rows = 1 if extras is None else len(extras.keys)
        if self.cache.frames:
            ids = torch.zeros(rows, width, self.cache.frames, dtype=float_dtype(self.plain))
        else:
            ids = torch.zeros(rows, width, dtype=torch.int64)
        with recording(self.plain, recorder), AttentionCalls(width) if intercept else contextlib.nullcontext():
            args, kwargs = ((), {}) if extras is None else (extras.args, extras.kwargs)
            return plain_forward(self.plain)(ids.to(device_of(self.model)), *args, **kwargs)

    def _extras(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Extras | None:
        """What a model that needs more than token ids is called with, if the first argument may be token ids."""
        if not args or len(args) + len(kwargs) < 2 or not looks_like_ids(args[:1], {}) or not self.needs_more():
            return None
        return Extras.of(args[1:], {name: kwargs[name] for name in kwargs.keys() - _PADDING}, len(args[0]))

    def needs_more(self) -> bool:
        """Whether the model cannot be called with token ids alone, like a decoder that needs a memory."""
        parameters = inspect.signature(plain_forward(self.plain)).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return sum(one.kind in kinds and one.default is one.empty for one in parameters) > 1

    def run(self, tokens: Tensor, step: Step) -> Tensor:
        """The model over a step's new tokens [B, T], or frames [B, T, F], inside it: [B, T, ...], or [B, 1, ...]."""
        if self.intercepts is None:
            self._describe_again()
        extras = local.extras
        args, kwargs = ((), {}) if extras is None else (extras.args, extras.kwargs)
        memory = extras and MemoryStates(self.memories, (self.cache.core.namespace, extras.digest))
        with AttentionCalls(tokens.shape[1], memory) if self.intercepts else contextlib.nullcontext():
            plain = not self.intercepts and extras is None and not self.cache.frames
            compiled = self.decode is not None and tokens.shape[1] == 1 and plain
            forward = self.decode if compiled and self.decode else self.model.forward.original
            output: Tensor = forward(tokens, *args, **kwargs)
        return output

    def _describe_again(self) -> None:
        """For a model that was attached before: its layout is known, this driver has not seen it yet."""
        step, last_only = local.step, local.last_only
        try:
            self.describe()
        finally:
            local.begin(step, last_only)


def driver_of(cache: Any, model: nn.Module) -> Driver:
    """The driver for this kind of model."""
    transformers = sys.modules.get("transformers")
    plain = getattr(model, "_orig_mod", model)
    # One without causal attention is an encoder: kept per sample, if it does not call `attention` itself.
    if transformers is not None and isinstance(plain, transformers.PreTrainedModel) and _is_causal(plain):
        from kvcache_torch.hf_driver import HFDriver

        return HFDriver(cache, model)
    return Driver(cache, model)


def _is_causal(model: Any) -> bool:
    return bool(model.can_generate()) or any(getattr(module, "is_causal", False) for module in model.modules())


def looks_like_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is one of a token model: integer ids [B, T], and at most what says which are padding."""
    integers = len(args) == 1 and isinstance(args[0], Tensor) and not args[0].is_floating_point()
    return integers and args[0].dim() == 2 and not kwargs.keys() - _PADDING


@contextlib.contextmanager
def recording(model: nn.Module, recorder: Any) -> Iterator[None]:
    """Run the model's attention calls through a recorder; nothing random moves."""
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices):
        local.begin(recorder)
        try:
            yield
        finally:
            local.end()


def logits_of(output: Any) -> Tensor:
    """The per-token tensor [B, T, ...] in a model's output."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    raise InvalidInput(f"a token model must give a tensor [B, T, ...] or an output with logits, got {type(output)}")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode; each module gets its own mode back."""
    if not model.training:
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's weights."""
    found = (weight.dtype for weight in model.parameters() if weight.is_floating_point())
    return next(found, torch.get_default_dtype())


def vocab_size(model: nn.Module, output: Tensor) -> int | None:
    """The number of token ids: the embedding as wide as the output, or the only embedding."""
    sizes = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    if output.dim() == 3 and output.shape[-1] in sizes:
        return output.shape[-1]
    return sizes[0] if len(sizes) == 1 else None
