"""Which model goes through which cache: ``attach``, ``detach`` and ``with cache:``."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from kvcache_core.activation import ActivationSite
from kvcache_core.binding import ModelBinding
from kvcache_core.errors import InvalidInput, UsageError

__all__ = ["Attaching", "attached_to"]


class Attaching(ModelBinding):
    """The part of :class:`~kvcache_core.frontend.FrontendCache` that attaches models and is entered by ``with``."""

    _only_parts = False
    """Whether every attached module was attached with ``kind="activation"``: a token model may still come."""

    def attach(
        self,
        model: Any,
        *,
        outputs: str = "all",
        identity: str | None = None,
        kind: str | None = None,
        frames: int | None = None,
        shared: Sequence[str] = (),
        side_effects: bool = False,
        check_in_parts: bool | None = None,
    ) -> Any:
        """Serve ``model`` from this cache inside ``with cache:``; returns the model.

        A *token model*'s attention state is kept per token, any other module's result per sample of its batch (an
        *activation*). Unless ``kind`` says it, the first use decides: a module that has an embedding, or is called
        with integer ids [B, T] alone, is run on one token, and is a token model if it calls this adapter's
        ``attention``. ``generate``, ``open`` and ``step`` are for token models.

        Args:
            model: a token model built from this adapter's ``attention`` and ``positions``, or any module, also a
                part of a model, that computes each sample from the sample's own inputs.
            outputs: ``"all"``: ``model(x)`` gives its full output, and outputs are stored to that end;
                ``"last"``: it gives the last position only, [B, 1, ...], and no outputs are stored.
            identity: a name for these weights, ``"name@version"``, instead of a digest of their content.
            kind: ``"tokens"`` or ``"activation"``. A cache serves one token model, and as many modules as are
                attached with ``"activation"``.
            frames: F of a model that takes frames [B, T, F] of floating-point numbers (sound, sensor values) instead
                of token ids: sequences are then opened and stepped with frames [T, F], found again by their content.
            shared: for activations: keyword arguments whose tensors belong to all samples, whatever their first
                dimension. Without it, tensors with the batch's first dimension are split into samples.
            side_effects: for activations: the module does more than compute its output, so every call runs it.
            check_in_parts: for activations: whether the first batch of several samples is computed in small parts,
                too, to see that each result is its sample's own; a module of which it is not is left out of the cache.
                None: where a layer in it is known to take time in front or to compute with the batch's statistics.

        Raises:
            UsageError: the model is attached to another cache, or this cache has another model.
        """
        if kind not in (None, "tokens", "activation"):
            raise InvalidInput(f"kind must be 'tokens', 'activation' or None, got {kind!r}")
        if outputs not in ("all", "last"):
            raise InvalidInput(f"outputs must be 'all' or 'last', got {outputs!r}")
        if frames is not None:
            if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
                raise InvalidInput(f"frames must be the size F of a frame, at least 1, or None; got {frames!r}")
            if kind == "activation":
                raise InvalidInput("frames= is for a model that is served per token; leave kind='activation' out")
            kind = "tokens"
        other = attached_to(model)
        if other is not None and other is not self:
            raise UsageError(
                "the model is attached to another cache; call that cache's detach() first, or, where that is out of "
                "reach, detach(model) of this one"
            )
        beside = self.model is not None and self.model is not model
        if beside and kind != "activation" and not self._only_parts:
            raise UsageError(
                "this cache has a model already; call detach() first, or make a second cache (modules attached with "
                "kind='activation' may be as many as you like)"
            )
        if other is None:
            (self._install_part if kind == "activation" else self._install)(model)
            _attached[id(model)] = (weakref.ref(model), weakref.ref(self))
        options = {"identity": identity, "shared": tuple(shared), "side_effects": side_effects}
        options["check_in_parts"] = check_in_parts
        if kind == "activation":
            self.sites.add(self._new_site(model, **options))
        if beside and kind == "activation":
            return model
        self._only_parts = kind == "activation"
        if self._served() is not model or (outputs, frames) != (self.outputs, self.frames):
            # Another model, or another layout: what is stored does not fit it.
            self._forget_layout()
        self._served = weakref.ref(model)
        self._identified = self._named_at = None
        self.model, self.outputs, self.identity, self.frames = model, outputs, identity, frames
        self._kind, self._site_options = kind or ("tokens" if self._core is not None else None), options
        return model

    def detach(self, model: Any = None) -> Any:
        """Undo :meth:`attach`; returns the model as it was. What is cached stays, for when it is attached again.

        Args:
            model: which one, if several are attached; default the first one. One that is attached to another cache,
                perhaps no longer in reach (a notebook's cell was run again), is detached from that.

        Raises:
            UsageError: no model is attached, or its cache is active in this thread.
        """
        model = self.model if model is None else model
        owner = None if model is None else attached_to(model)
        if owner is None:
            raise UsageError("no model is attached to this cache")
        if owner is not self:
            return owner.detach(model)
        if self._active() is self:
            raise UsageError("cannot detach inside `with cache:`; leave the block first")
        self._uninstall(model)
        _attached.pop(id(model), None)
        self.sites.remove(model)
        if model is self.model:
            self.model = next((site.module for site in self.sites), None)
            self._kind, self._only_parts = (None, False) if self.model is None else ("activation", True)
        return model

    def site_of(self, model: Any, looks_like_ids: bool) -> ActivationSite | None:
        """What keeps the attached module's results per sample; None for the token model.

        Args:
            model: an attached module.
            looks_like_ids: whether it is being called with integer ids [B, T] alone.
        """
        site = self.sites.get(model)
        if site is not None or self._kind == "tokens":
            return site
        # Not under the lock: an adapter may look in another thread.
        if looks_like_ids and self._is_token_model():
            return None
        with self._prepare_lock:
            if self.sites.get(model) is None:
                self._kind = "activation"
                self.sites.add(self._new_site(model, **self._site_options))
            return self.sites.get(model)

    def _is_token_model(self) -> bool:
        self.saw_attention = False
        try:
            self._prepare()
        except Exception:
            if self.saw_attention:
                raise
            return False
        return True

    def __enter__(self) -> Any:
        """Serve the attached model's calls in this thread; returns the cache."""
        active = self._active()
        if active is not None:
            kind = "this cache is active already" if active is self else "another cache is active"
            raise UsageError(f"caches cannot be nested: {kind} in this thread; leave its `with` block first")
        self._check_attached()
        self._set_active(self)
        try:
            self.looks += 1
            if self._kind is None and self._has_embedding(self.model):
                self.site_of(self.model, True)
            if self._kind == "tokens":
                self.refresh()
        except BaseException:
            self._set_active(None)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        """Let the model compute as outside again."""
        self._set_active(None)


_attached: dict[int, tuple[weakref.ref[Any], weakref.ref[Attaching]]] = {}


def attached_to(model: Any) -> Attaching | None:
    """The cache that the model is attached to."""
    entry = _attached.get(id(model))
    if entry is None or entry[0]() is not model:
        return None
    return entry[1]()
