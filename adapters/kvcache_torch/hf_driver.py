"""Runs a transformers model for a cache."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from kvcache_core.binding import ModelSpec
from kvcache_core.errors import CacheFull, InvalidInput, UsageError
from kvcache_core.plan import StepPlan
from kvcache_torch.attention import select_outputs
from kvcache_torch.context import local
from kvcache_torch.driver import AttachedForward, Driver, device_of, logits_of, recording
from kvcache_torch.hf import HFCache, Refused, close_abandoned
from kvcache_torch.hf_calls import named, reason_to_refuse, refuse_other_state, wants_gradient, with_mask
from kvcache_torch.hf_cross import CrossStates, Source, digests_of
from kvcache_torch.hf_pass import Pass
from kvcache_torch.hf_rows import Columns, columns_of, shifts_of
from kvcache_torch.hf_step import (
    NeedsReturned,
    RecordingStepCache,
    ReturningStepCache,
    StepCache,
    implementation,
    state,
)
from kvcache_torch.recorder import Recorder
from kvcache_torch.step import Step
from kvcache_torch.store import dtype_name, torch_dtype
from kvcache_torch.transparent import with_gradient_of

__all__ = ["HFDriver"]

_POSITIONS_FROM_MASK = {"opt"}
"""Model types that count the mask's tokens when they are given no position_ids."""


@dataclass(frozen=True)
class Request:
    """One call of the attached model on its way to the decoder.

    Attributes:
        past: the rows' past; the call goes on from it.
        keep: outputs wanted, of each row's last tokens; 0 for all columns.
    """

    past: HFCache
    keep: int


class HFDriver(Driver):
    """For ``transformers.PreTrainedModel``: its own ``forward`` says which outputs are wanted, its decoder's
    ``forward`` sees the token ids and is the part that is cached.
    """

    def __init__(self, cache: Any, model: nn.Module) -> None:
        super().__init__(cache, model)
        if self.plain is not model:
            raise InvalidInput("attach the transformers model itself, not the compiled one")
        refuse_other_state(model)
        self.decoder: nn.Module = model.get_decoder()
        signature = inspect.signature(self.decoder.forward).parameters
        self.cache_name = "cache" if "cache" in signature else "past_key_values"
        self.takes_positions = "position_ids" in signature
        self.counts_columns = not self.takes_positions and hasattr(self.decoder, "embed_positions")
        """Whether a token's position is its column: then rows of one step must start at the same position."""
        from_mask = not self.takes_positions or self.decoder.config.model_type in _POSITIONS_FROM_MASK
        self.positions_from_mask = from_mask and not self.counts_columns
        self.has_encoder = bool(model.config.is_encoder_decoder)
        self.cross = CrossStates()
        self._seen: tuple[Tensor, Any, int, Source] | None = None
        self.returns = not model._supports_attention_backend
        """Whether the layers get K and V returned, because they call no registered attention function."""
        self.described = False
        """Whether this driver has seen what the model calls; the layout may be known from an earlier attachment."""
        self.output_type: type[Any] = BaseModelOutputWithPast
        """What the decoder returns."""
        configs = [module.config for module in self.decoder.modules() if hasattr(module, "config")]
        self.configs = list({id(config): config for config in configs}.values())

    def install(self) -> None:
        """Route calls of the model and of its decoder through the cache."""
        AttachedForward.install(self.model, self.enter)
        if self.decoder is not self.model:
            AttachedForward.install(self.decoder, self.enter_decoder)

    def uninstall(self) -> None:
        """Give back exactly the model that was attached."""
        if self.decoder is not self.model:
            AttachedForward.uninstall(self.decoder)
        AttachedForward.uninstall(self.model)

    # ---- what the core asks --------------------------------------------------------------------

    def describe(self) -> ModelSpec:
        """As :meth:`Driver.describe`; the output is the decoder's hidden state, the model's own head makes logits."""
        self.described = True
        self.cache.saw_attention = True  # whatever goes wrong, it is no module to keep activations of
        try:
            recorder, output = self._probe_decoder()
        except NeedsReturned:
            self.returns = True
            recorder, output = self._probe_decoder()
        if not recorder.layers:
            raise InvalidInput(
                f"{type(self.model).__name__} gave its cache no K and V: its state is of another kind, which cannot "
                "be cached by tokens"
            )
        hidden = logits_of(output)
        embeddings = self.model.get_input_embeddings()
        vocab = getattr(embeddings, "num_embeddings", None)
        return ModelSpec(
            recorder.specs(), recorder.kv_dtype(), tuple(hidden.shape[2:]), dtype_name(hidden.dtype), vocab
        )

    def _probe_decoder(self) -> tuple[Recorder, Any]:
        """The decoder over one token."""
        recorder = Recorder(device_of(self.model))
        view: Any = RecordingStepCache(0, 1) if self.returns else StepCache(0, 1)
        more = {}
        if self.has_encoder:
            size = self.decoder.config.hidden_size
            dtype = next(self.decoder.parameters()).dtype
            more["encoder_hidden_states"] = torch.zeros(1, 1, size, dtype=dtype, device=device_of(self.model))
            view = EncoderDecoderCache(view, DynamicCache())
        with recording(self.model, recorder), self._inside(view):
            ids = torch.zeros(1, 1, dtype=torch.int64, device=device_of(self.model))
            output = self._decoder_forward(input_ids=ids, **self._arguments(recorder.positions, view, None), **more)
        return recorder, output

    def run(self, tokens: Tensor, step: Step) -> Tensor:
        """The model over a step's new tokens: logits [B, T, V], or [B, 1, V]."""
        if not self.described:
            self._describe_again()
        if self.has_encoder:
            raise InvalidInput("an encoder-decoder model needs its encoder's input too: use model.generate")
        view = self._view(step.plan)
        with self._inside(view):
            arguments = self._arguments(step.positions, view, view.mask)
            output = self.model.forward.original(input_ids=tokens, **arguments)
        return logits_of(output)

    def hidden(self, plan: StepPlan, shifts: NDArray[np.int64], source: Source | None) -> Tensor:
        """The decoder over a plan's new tokens: its hidden state [B, T, ...].

        Args:
            plan: the step.
            shifts: int64 [B], added to the rows' positions.
            source: what an encoder has given for the rows.
        """
        if not self.described:
            self.describe()
        store = self.cache.store
        step = Step(plan, store, torch_dtype(self.cache.spec.dtype))
        positions = step.positions
        if shifts.any():
            positions = positions + torch.from_numpy(shifts).to(store.device)[:, None]
        own = self._view(plan)
        view: Any = own
        more: dict[str, Any] = {}
        if source is not None:
            view = self.cross.view(own, source, self.cache.core.namespace)
            more["encoder_hidden_states"] = source.hidden
            if source.mask is not None:
                more["encoder_attention_mask"] = source.mask
        local.begin(step)
        try:
            with torch.no_grad(), self._inside(view):
                tokens = torch.from_numpy(plan.tokens).to(store.device)
                output = self._decoder_forward(input_ids=tokens, **self._arguments(positions, view, own.mask), **more)
        finally:
            local.end()
        if source is not None:
            self.cross.keep(view, source, self.cache.core.namespace)
        self.output_type = type(output)
        return logits_of(output)

    def _view(self, plan: StepPlan) -> StepCache:
        """What the layers see as their cache."""
        layers = sum(spec.kind == "attention" for spec in self.cache.store.layout.layers)
        if self.returns:
            return ReturningStepCache(plan, self.cache.store, layers)
        return StepCache(int(plan.starts.max()), layers)

    def _arguments(self, positions: Tensor, view: Any, mask: Tensor | None) -> dict[str, Any]:
        arguments: dict[str, Any] = {self.cache_name: view, "use_cache": True, "return_dict": True}
        if self.takes_positions:
            arguments["position_ids"] = positions
        if self.returns:
            arguments["attention_mask"] = mask
        return arguments

    @property
    def _decoder_forward(self) -> Callable[..., Any]:
        return self.decoder.forward.original  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _inside(self, view: Any) -> Iterator[None]:
        """The model's layers get the view as their cache, and its attention goes through the step under way."""
        state.view = view
        try:
            with implementation(() if self.returns else self.configs):
                yield
        finally:
            state.view = None

    # ---- calls of the model --------------------------------------------------------------------

    def enter(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the attached model: by ``generate``, or by hand."""
        if torch.compiler.is_compiling() or local.stepping or state.request is not None:
            return original(*args, **kwargs)
        arguments = named(original, args, kwargs)
        given = arguments.get("cache", arguments.get("past_key_values"))
        explicit = isinstance(given, HFCache)
        if explicit and given.cache is not self.cache:
            raise UsageError("the HFCache belongs to another cache than the model is attached to")
        if not explicit and local.cache is not self.cache:
            return original(*args, **kwargs)
        if given is not None and not explicit and given.get_seq_length():
            return original(*args, **kwargs)  # another cache already holds this call's past
        close_abandoned()
        if "lengths" in arguments:
            arguments = with_mask(dict(arguments))
        reason = reason_to_refuse(self.model, arguments)
        if reason is not None:
            if explicit:
                raise InvalidInput(f"cannot use an HFCache here: {reason}")
            self.cache.bypass(0, reason)
            return original(**arguments)
        past = given if explicit else HFCache(self.cache, transparent=True)
        return self._serve(original, arguments, past)

    def enter_decoder(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the attached model's decoder."""
        if not local.stepping and state.request is not None and not torch.compiler.is_compiling():
            return self._decode(named(original, args, kwargs))
        output = original(*args, **kwargs)
        if local.stepping and local.last_only:
            output["last_hidden_state"] = select_outputs(output.last_hidden_state)
        return output

    def _serve(self, original: Callable[..., Any], arguments: dict[str, Any], past: HFCache) -> Any:
        keep = arguments.get("logits_to_keep", 0)
        if not isinstance(keep, int) or arguments.get("labels") is not None:
            keep = 0
        if self.cache.outputs == "last":
            keep = keep or 1
        state.request = Request(past, keep)
        routed = {name: value for name, value in arguments.items() if name != "past_key_values"}
        routed[self.cache_name] = past
        try:
            return self._decode(routed) if self.decoder is self.model else original(**routed)
        except (CacheFull, Refused) as error:
            if not past.transparent:
                raise
            reason = f"the cache has no room for it ({error})" if isinstance(error, CacheFull) else str(error)
        finally:
            state.request = None
        ids = arguments["decoder_input_ids" if self.has_encoder else "input_ids"]
        self.cache.bypass(ids.numel(), reason)
        return original(**self._as_outside(arguments, past))

    def _decode(self, arguments: dict[str, Any]) -> Any:
        """The decoder's output, [B, T, ...] or of the last tokens that are wanted."""
        request: Request = state.request
        state.request = None
        past = request.past
        columns = columns_of(arguments["input_ids"], arguments.get("attention_mask"), past.ids, past.valid)
        given = arguments.get("position_ids")
        shifts = shifts_of(columns, given, past.shifts, from_mask=self.positions_from_mask)
        if shifts is None:
            raise Refused("position_ids do not rise by one from token to token of a row")
        if shifts.any() and not self.takes_positions:
            raise Refused("the model counts columns, and there is padding before a row's tokens")
        hidden = Pass(self, past, columns, shifts, request.keep, self._source(arguments, len(shifts))).run()
        if wants_gradient(self.decoder):
            hidden = with_gradient_of(lambda: self._without_cache(columns, shifts, request.keep), self.decoder, hidden)
        use_cache = arguments.get("use_cache")
        use_cache = self.decoder.config.use_cache if use_cache is None else use_cache
        output = self.output_type(last_hidden_state=hidden)
        output[self.cache_name] = past if use_cache else None
        return output.to_tuple() if arguments.get("return_dict") is False else output

    def _without_cache(self, columns: Columns, shifts: NDArray[np.int64], keep: int) -> Tensor:
        """What a call's result would be, computed without the cache."""
        device = device_of(self.decoder)
        mask = torch.from_numpy(columns.valid).to(device, torch.int64)
        arguments = {"input_ids": torch.from_numpy(columns.ids).to(device), "attention_mask": mask, "use_cache": False}
        if self.takes_positions:
            own = (columns.valid.cumsum(axis=1) - 1).clip(min=0) + shifts[:, None]
            arguments["position_ids"] = torch.from_numpy(own).to(device)
        hidden = logits_of(self._decoder_forward(**arguments))[:, -columns.width :]
        mask = mask[:, -columns.width :]
        hidden = hidden * mask.reshape(*mask.shape, *[1] * (hidden.dim() - 2)).to(hidden.dtype)
        if not keep:
            return hidden
        order = mask.sort(dim=1, stable=True).indices[:, -keep:]  # padding first, tokens behind it
        return hidden[torch.arange(len(hidden), device=device)[:, None], order]

    def _source(self, arguments: dict[str, Any], count: int) -> Source | None:
        """What the encoder has given; its digests are made once for all steps that pass the same tensor."""
        hidden, mask = arguments.get("encoder_hidden_states"), arguments.get("encoder_attention_mask")
        if hidden is None:
            return None
        seen, version = self._seen, 0 if hidden.is_inference() else hidden._version
        if seen is None or seen[0] is not hidden or seen[1] is not mask or seen[2] != version:
            rows = hidden.expand(count, *hidden.shape[1:])
            self._seen = seen = (hidden, mask, version, Source(rows, mask, digests_of(rows, mask)))
        return seen[3]

    def _as_outside(self, arguments: dict[str, Any], past: HFCache) -> dict[str, Any]:
        """The arguments for computing a call without the cache; the past is computed again if there is one."""
        if not past.get_seq_length():
            return arguments
        prefix = "decoder_" if self.has_encoder else ""
        ids, mask, positions = (f"{prefix}{name}" for name in ("input_ids", "attention_mask", "position_ids"))
        columns = columns_of(arguments[ids], arguments.get(mask), past.ids, past.valid)
        device = arguments[ids].device
        again = {**arguments, ids: torch.from_numpy(columns.ids).to(device), self.cache_name: None}
        again[mask] = torch.from_numpy(columns.valid).to(device, torch.int64)
        if positions in arguments:
            own = (columns.valid.cumsum(axis=1) - 1).clip(min=0) + past.shifts[:, None]
            again[positions] = torch.from_numpy(own).to(device)
        if "logits_to_keep" in arguments:
            again["logits_to_keep"] = arguments["logits_to_keep"] or columns.width
        past.reset()
        return again
