"""Runs a transformers model's decoder over the new tokens of a step."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from kvcache_core.binding import ModelSpec
from kvcache_core.errors import InvalidInput
from kvcache_core.plan import StepPlan
from kvcache_torch.context import local
from kvcache_torch.driver import Driver, device_of, logits_of, recording
from kvcache_torch.hf_calls import refuse_other_state
from kvcache_torch.hf_cross import CrossStates, Source
from kvcache_torch.hf_linear import FastLinear
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

__all__ = ["HFDecoder"]

_POSITIONS_FROM_MASK = {"opt"}
"""Model types that count the mask's tokens when they are given no position_ids."""


class HFDecoder(Driver):
    """The part of :class:`~kvcache_torch.hf_driver.HFDriver` that knows the model's decoder: what it takes, what it
    stores, and how it is run over a step.
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
        head = model.get_output_embeddings()
        self.fast = FastLinear([*self.decoder.modules(), *([] if head is None else [head])])
        self.returns = not model._supports_attention_backend
        """Whether the layers get K and V returned, because they call no registered attention function."""
        self.described = False
        """Whether this driver has seen what the model calls; the layout may be known from an earlier attachment."""
        self.output_type: type[Any] = BaseModelOutputWithPast
        """What the decoder returns."""
        configs = [module.config for module in self.decoder.modules() if hasattr(module, "config")]
        self.configs = list({id(config): config for config in configs}.values())

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
        with self._inside(view), self.fast.inside():
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
