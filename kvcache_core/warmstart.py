"""What a cache holds to a file and back: one sequence, or all of it for a warm start."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import chain
from typing import Any, TypeVar

from kvcache_core.attaching import Attaching
from kvcache_core.blockformat import secret_from_environment
from kvcache_core.errors import BlockRefused, StaleSequence, UsageError
from kvcache_core.keys import root_key
from kvcache_core.layout import BlockLayout
from kvcache_core.poolitems import block_codecs, pool_items
from kvcache_core.saving import layout_of, load_sequence, save_sequence
from kvcache_core.sequence import Sequence as CachedSequence
from kvcache_core.sizes import parse_memory
from kvcache_core.tier_file import FileTier, write_saved
from kvcache_core.tiers import Item

__all__ = ["WarmStart"]

_C = TypeVar("_C", bound="WarmStart")


class _Load:
    """``KVCache.load(path)`` makes a cache of a saved one, ``cache.load(path)`` reads a sequence into ``cache``."""

    def __get__(self, cache: WarmStart | None, kind: type[WarmStart]) -> Callable[..., Any]:
        return kind._load_cache if cache is None else cache._load_sequence


class WarmStart(Attaching):
    """The part of :class:`~kvcache_core.frontend.FrontendCache` that saves and loads.

    ``KVCache.load(path, **options)`` makes a cache with the settings of one that was saved, in this framework or the
    other one. Attach the same weights: what was saved is found as if it had been computed here. The file is read block
    by block as prompts ask for it, and must stay where it is. ``options`` are those of the class; the salt is not in
    the file.

    ``cache.load(path)`` gives back the sequence that ``sequence.save(path)`` wrote, in this framework or the other one.

    Raises:
        BlockRefused: the file is damaged, or of other weights, another layout or another salt. Of a saved cache that is
            known when its model is first used.
        CacheFull: no room for the sequence; nothing was changed.
    """

    load = _Load()
    _saved_from: tuple[str, bytes, bytes] | None = None

    def save(self, path: str | os.PathLike[str], *, max_bytes: str | int | None = None) -> int:
        """Write all full blocks that can be found to a file, for :meth:`load`; returns how many values it holds.

        Activations too, if the cache has tiers.
        What was computed with weights as they were before a change is left out, and so is what lies in tiers that
        outlive the process. What the file that this cache was loaded from holds is kept. Other threads can go on
        meanwhile.

        Args:
            path: of the file.
            max_bytes: leave out what would make more bytes, as a number or text like ``"2GiB"``; the pool goes first.

        Raises:
            UsageError: no model is attached, or activations are to be saved from a cache without tiers.
            OSError: the file cannot be written; what stood there before is untouched.
        """
        self._check_attached()
        secret = secret_from_environment()
        limit = None if max_bytes is None else parse_memory(max_bytes)
        if self._kind == "activation":
            return write_saved(path, self._entry_settings(), self._saved_entries(), max_bytes=limit, secret=secret)
        self.refresh()
        layout, weights = layout_of(self.core), self._portable_identity()
        settings = {
            "size": self.core.num_blocks,
            "block_size": layout.block_size,
            "dtype": self._dtype,
            "layout": layout.digest.hex(),
            "weights": weights.hex(),
        }
        items = chain(self._saved_blocks(layout, weights, secret), self._saved_entries())
        return write_saved(path, settings, items, max_bytes=limit, secret=secret)

    def _saved_blocks(self, layout: BlockLayout, weights: bytes, secret: bytes) -> Iterator[Iterable[Item]]:
        """The pool under keys that any process finds."""
        codecs = {
            root_key(layout.block_size, self.core.namespace, salt): block_codecs(layout, weights, salt, secret)
            for salt in self.core.salts()
        }
        return pool_items(self.core, self.store, codecs, namespace=self._portable_namespace(layout))

    def _saved_entries(self) -> Iterator[Iterable[Item]]:
        """Activations, and what the tiers would lose with this process."""
        if self._tiers is not None:
            for source in self._tiers.sources:
                yield from source(lambda key: False)
            self._tiers.queue.flush(None)
            for tier in self._tiers.tiers:
                yield tier.values() if isinstance(tier, FileTier) else tier.volatile_items()

    def _entry_settings(self) -> dict[str, Any]:
        if self._tiers is None:
            raise UsageError(
                "activations are saved from a cache with tiers (tiers=['ram:1MiB'] will do): only there have they keys "
                "that another process can make"
            )
        return {"size": self._size, "memory": self._memory, "block_size": self._block_size, "dtype": self._dtype}

    @classmethod
    def _load_cache(cls: type[_C], path: str | os.PathLike[str], **options: Any) -> _C:
        with closing(FileTier(path)) as file:
            settings = file.settings
        if "size" not in options and "memory" not in options:
            options |= {name: settings[name] for name in ("size", "memory") if settings.get(name)}
        for name in ("block_size", "dtype"):
            options.setdefault(name, settings[name])
        tiers = options.pop("tiers", ())
        tiers = [tiers] if isinstance(tiers, str) else list(tiers)
        cache = cls(tiers=[*tiers, f"file:{os.fspath(path)}"], **options)
        if "layout" in settings:
            cache._saved_from = os.fspath(path), bytes.fromhex(settings["layout"]), bytes.fromhex(settings["weights"])
        return cache

    def _check_layout(self, layout: BlockLayout) -> None:
        if self._saved_from is None:
            return
        path, saved_layout, weights = self._saved_from
        for what, mine, saved in (
            ("layout (other layers, block_size, dtype or outputs=)", layout.digest, saved_layout),
            ("weights", self._portable_identity(), weights),
        ):
            if mine != saved:
                raise BlockRefused("foreign", f"{path} holds a cache of other {what}; nothing of it can be used here")
        self._saved_from = None

    def _load_sequence(self, path: str | os.PathLike[str]) -> CachedSequence:
        self.refresh()
        return load_sequence(
            self.core,
            self.store,
            path,
            weights=self._portable_identity(),
            salt=self.salt,
            secret=secret_from_environment(),
        )

    def _save(self, seq: CachedSequence, path: str | os.PathLike[str]) -> None:
        if seq.namespace != self.core.namespace:
            raise StaleSequence(f"cannot save {seq!r}: the weights changed since it was opened")
        weights = self._portable_identity()
        save_sequence(self.core, self.store, seq, path, weights=weights, secret=secret_from_environment())
