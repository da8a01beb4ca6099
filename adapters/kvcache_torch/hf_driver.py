"""Serves the calls of a transformers model from a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kvcache_core.errors import CacheFull, InvalidInput, UsageError
from kvcache_torch.attached import AttachedForward
from kvcache_torch.attention import select_outputs
from kvcache_torch.context import local
from kvcache_torch.driver import device_of, logits_of
from kvcache_torch.hf import HFCache, Refused, close_abandoned
from kvcache_torch.hf_calls import named, reason_to_refuse, wants_gradient, with_mask
from kvcache_torch.hf_cross import Source, digests_of
from kvcache_torch.hf_decoder import HFDecoder
from kvcache_torch.hf_ended import AttachedCriteria, without_ended
from kvcache_torch.hf_pass import Pass
from kvcache_torch.hf_rows import Columns, columns_of, shifts_of
from kvcache_torch.hf_step import state
from kvcache_torch.transparent import with_gradient_of

__all__ = ["HFDriver"]


@dataclass(frozen=True)
class Request:
    """One call of the attached model on its way to the decoder.

    Attributes:
        past: the rows' past; the call goes on from it.
        keep: outputs wanted, of each row's last tokens; 0 for all columns.
    """

    past: HFCache
    keep: int


class HFDriver(HFDecoder):
    """For ``transformers.PreTrainedModel``: its own ``forward`` says which outputs are wanted, its decoder's
    ``forward`` sees the token ids and is the part that is cached.
    """

    def __init__(self, cache: Any, model: nn.Module) -> None:
        super().__init__(cache, model)
        self._seen: tuple[Tensor, Any, int, Source] | None = None

    def install(self) -> None:
        """Route calls of the model and of its decoder through the cache."""
        AttachedForward.install(self.model, self.enter)
        if self.decoder is not self.model:
            AttachedForward.install(self.decoder, self.enter_decoder)
        AttachedCriteria.listen(self.model)

    def uninstall(self) -> None:
        """Give back exactly the model that was attached."""
        if self.decoder is not self.model:
            AttachedForward.uninstall(self.decoder)
        AttachedForward.uninstall(self.model)
        AttachedCriteria.stop(self.model)

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
        ids = arguments["decoder_input_ids" if self.has_encoder else "input_ids"]
        try:
            with self.fast.inside():
                return self._decode(routed) if self.decoder is self.model else original(**routed)
        except (CacheFull, Refused) as error:
            if not past.transparent:
                raise
            reason = f"the cache has no room for it ({error})" if isinstance(error, CacheFull) else str(error)
        finally:
            state.request = None
        self.cache.bypass(ids.numel(), reason)
        return original(**self._as_outside(arguments, past))

    def _decode(self, arguments: dict[str, Any]) -> Any:
        """The decoder's output, [B, T, ...] or of the last tokens that are wanted."""
        request: Request = state.request
        state.request = None
        past = request.past
        columns = columns_of(arguments["input_ids"], arguments.get("attention_mask"), past.ids, past.valid)
        columns = without_ended(columns, past.valid)
        given = arguments.get("position_ids")
        shifts = shifts_of(columns, given, past.shifts, from_mask=self.positions_from_mask)
        if shifts is None:
            raise Refused("position_ids do not rise by one from token to token of a row")
        if shifts.any() and not self.takes_positions:
            raise Refused("the model counts columns, and there is padding before a row's tokens")
        hidden = Pass(self, past, columns, shifts, request.keep, self._source(arguments, len(shifts))).run()
        if wants_gradient(self.decoder):
            hidden = with_gradient_of(
                lambda: self._without_cache(columns, shifts, request.keep), self.decoder, (), hidden
            )
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
