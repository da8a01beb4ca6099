"""Tiers under the activations of a cache: evicted ones go down, what a call does not find comes up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from kvcache_core.blockformat import Buffer
from kvcache_core.demotion import Pending
from kvcache_core.entries import EntryCache
from kvcache_core.entryformat import EntryForm, Payload
from kvcache_core.entrylookup import Entry
from kvcache_core.errors import KVCacheError
from kvcache_core.opentiers import OpenTiers, Wanted, tier_key
from kvcache_core.tiers import Item

__all__ = ["EntryTiers"]

_BATCH = 64


class EntryTiers:
    """The way of activations down and up.

    Args:
        tiers: the tiers of the cache.
        entries: its activations; from now on they are served by the tiers.
        write_through: write a result as soon as it is computed, to every tier that outlives the process.
    """

    def __init__(self, tiers: OpenTiers, entries: EntryCache, *, write_through: bool) -> None:
        self._tiers = tiers
        self._entries = entries
        self._write_through = write_through
        entries.below = self

    def find(self, form: EntryForm, keys: Sequence[bytes]) -> Iterator[Entry]:
        """The results among ``keys`` that lie in a tier."""
        secret = self._tiers.secret
        wanted = [
            Wanted(tier_key("entry", 0, own), partial(form.decode, own, secret)) for own in map(form.content_key, keys)
        ]
        with self._tiers.lease():
            self._tiers.read(wanted, self._entries.mean_bytes, form.worth.row_seconds)
        for key, one in zip(keys, wanted, strict=True):
            if one.payload is not None:
                yield Entry(key, one.payload, _nbytes(form, one.payload), form)

    def kept(self, entry: Entry) -> None:
        """A result was computed and is kept: others may see it at once."""
        first = self._tiers.persistent
        if self._write_through and entry.form is not None and first is not None:
            key = tier_key("entry", 0, entry.form.content_key(entry.key))
            if not self._tiers.has(first, key):
                self._queue(key, entry, entry.form, through=True)

    def demote(self, entry: Entry) -> None:
        """A result is evicted: queue it."""
        if entry.form is not None:
            key = tier_key("entry", 0, entry.form.content_key(entry.key))
            if not self._tiers.is_kept(key):
                self._queue(key, entry, entry.form)

    def items(self, skip: Callable[[bytes], bool] = lambda key: False) -> Iterator[Sequence[Item]]:
        """Everything kept, as values of a tier, a few at a time; ``skip`` says which keys to leave out."""
        found = [(entry, entry.form) for entry in self._entries.contents() if entry.form is not None]
        for at in range(0, len(found), _BATCH):
            items = []
            for entry, form in found[at : at + _BATCH]:
                key = tier_key("entry", 0, form.content_key(entry.key))
                value = None if skip(key) else self._encode(entry, form, int(time.time()))
                if value is not None:
                    items.append((key, value))
            yield items

    def _queue(self, key: bytes, entry: Entry, form: EntryForm, *, through: bool = False) -> None:
        pending = Pending(entry.payload, entry.nbytes, partial(self._encode, entry, form), through)
        queued = self._tiers.queue.put(key, pending)
        self._tiers.demoted_blocks += queued
        self._tiers.dropped_blocks += not queued

    def _encode(self, entry: Entry, form: EntryForm, created: int) -> Buffer | None:
        """The value of a result; None if its tensors have no place in the format."""
        try:
            return form.encode(form.content_key(entry.key), entry.payload, self._tiers.secret, created)
        except KVCacheError:
            return None


def _nbytes(form: EntryForm, payload: Payload) -> int:
    return sum(form.export(row)[1].nbytes for row in payload[1])
