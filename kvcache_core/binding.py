"""A cache and its model: what an adapter supplies, the core and the store behind it, and the weights' namespace."""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from kvcache_core.adapter import Adapter, ModelSpec
from kvcache_core.admission import Admission, admission
from kvcache_core.budget import Budget, first_blocks
from kvcache_core.cache import BlockCache
from kvcache_core.entrytiers import EntryTiers
from kvcache_core.errors import InvalidInput, InvalidType, UsageError
from kvcache_core.identity import named_identity, weights_identity
from kvcache_core.layout import SCALED_DTYPES, BlockLayout, LayerSpec
from kvcache_core.quantization import is_exact
from kvcache_core.sites import Sites
from kvcache_core.sizes import parse_memory
from kvcache_core.tiering import TierStack
from kvcache_core.tiers import Tier
from kvcache_core.weights import check_verify
from kvcache_core.worth import check_bypass

__all__ = ["ModelBinding", "ModelSpec"]


class ModelBinding(Adapter):
    """The part of :class:`~kvcache_core.frontend.FrontendCache` that knows the model, its layout and its weights.

    The arguments are described there.
    """

    _budget: Budget | None = None
    """What divides ``memory`` between the kinds, once there are blocks."""

    def __init__(
        self,
        size: int | None = None,
        *,
        memory: str | int | None = None,
        block_size: int = 16,
        dtype: Any = None,
        salt: bytes = b"",
        tiers: Sequence[str | Tier] = (),
        promote: str = "auto",
        write_through: bool = False,
        admit: Admission | str = "all",
        verify: str = "sample",
        bypass: str = "never",
    ) -> None:
        if size is not None and memory is not None:
            raise InvalidInput(f"give size (blocks) or memory (bytes), not both; got {size!r} and {memory!r}")
        if size is None and memory is None:
            size = 4096
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise InvalidInput(f"size must be a whole number of blocks, at least 1; got {size!r}")
        if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
            raise InvalidInput(f"block_size must be a whole number of tokens, at least 1; got {block_size!r}")
        if not isinstance(salt, bytes):
            raise InvalidType(f"salt must be bytes, got {type(salt).__name__}")
        self._size = size
        self._memory = None if memory is None else parse_memory(memory)
        self._block_size = block_size
        self._dtype = None if dtype is None else self._dtype_name(dtype)
        self.salt = salt
        self.verify = check_verify(verify)
        self.bypass_rule = check_bypass(bypass)
        self.model: Any = None
        self.sites = Sites(self._size, self._memory, admission(admit))
        self._kind: str | None = None
        self._site_options: dict[str, Any] = {}
        self.saw_attention = False
        self.looks = 0
        self._served: Callable[[], Any] = lambda: None
        self.outputs = "all"
        self.frames: int | None = None
        """F, where the attached model takes frames [B, T, F] instead of token ids."""
        self.identity: str | None = None
        self.spec: ModelSpec | None = None
        self._core: BlockCache | None = None
        self._store: Any = None
        self._epoch = b""
        self._bypassed_calls = 0
        self._bypass_reasons: Counter[str] = Counter()
        self._bypassed_tokens = 0
        self._saved_output_tokens = 0
        self._warned: set[str] = set()
        self._prepare_lock = threading.RLock()
        self._identified: tuple[bytes, bytes] | None = None
        self._named_at: bytes | None = None
        self._seen_mode = b""
        self._tiers: TierStack | None = None
        if write_through and not tiers:
            raise InvalidInput("write_through needs a tier that others can see: tiers=['disk:PATH'] or 'valkey://HOST'")
        if tiers:
            names = [tiers] if isinstance(tiers, str) else tiers
            self._tiers = TierStack(names, promote=promote, admit=admit, write_through=write_through)
            below = EntryTiers(self._tiers, self.sites.entries, write_through=write_through)
            self._tiers.sources.append(below.items)
            self._closer = weakref.finalize(self, self._tiers.close)

    # ---- the core behind it --------------------------------------------------------------------

    @property
    def core(self) -> BlockCache:
        """The bookkeeping; made at the first use, when the model's layout is known."""
        self._prepare()
        if self._core is None:
            raise UsageError("no model is attached: call cache.attach(model) first")
        return self._core

    @property
    def store(self) -> Any:
        """The native tensors; made at the first use."""
        self._prepare()
        return self._store

    @property
    def epoch(self) -> bytes:
        """Changes with :meth:`invalidate`."""
        return self._epoch

    @property
    def exact(self) -> bool:
        """Whether stored values are what the model computed: no lossy dtype."""
        if self.spec is None or self._dtype is None:
            return self._dtype not in SCALED_DTYPES
        return is_exact(self._dtype, self.spec.dtype)

    def _prepare(self) -> None:
        if self._core is not None:
            return
        with self._prepare_lock:
            if self._core is not None:
                return
            self._check_attached()
            if self._kind == "activation":
                raise UsageError(
                    "this cache keeps the activations of a module; sequences and steps are for token models"
                )
            self.spec = self._describe(self.model)
            self._kind = "tokens"
            layers = self.spec.layers
            if self.outputs == "all":
                layers += (LayerSpec.output(self.spec.output_size, self.spec.output_dtype),)
            layout = BlockLayout(layers, self._block_size, self._dtype or self.spec.dtype)
            self._check_layout(layout)
            namespace = self._namespace(layout)
            num_blocks = self._first_blocks(layout)
            self._store = self._new_store(layout, num_blocks)
            core = BlockCache(num_blocks, layout=layout, namespace=namespace, clock=self.sites.clock)
            if self._memory is not None:
                self._budget = Budget(self._memory, self.sites.entries, core, self._store)
            if self._tiers is not None:
                self._tiers.bind(core, self._store)
            myself = weakref.ref(self)
            core.saver = lambda seq, path: myself()._save(seq, path)  # type: ignore[union-attr]
            self._core = core

    def _check_layout(self, layout: BlockLayout) -> None:
        """Raise for a layout that what this cache was made from does not fit."""

    def _first_blocks(self, layout: BlockLayout) -> int:
        if self._memory is None:
            return int(self._size or 0)
        with self.sites.clock.lock:
            return first_blocks(self._memory, self.sites.entries, layout)

    def _forget_layout(self) -> None:
        """What is stored does not fit the model: the next use begins anew."""
        self._core = self._store = self.spec = None
        if self._budget is not None:
            self._budget = None
            self.sites.entries.resize(memory=self._memory)

    def refresh(self) -> None:
        """Notice changed weights: from then on nothing computed with the old ones is found."""
        if self._core is None:
            self._prepare()
        elif self._core.layout is not None:
            self._core.namespace = self._namespace(self._core.layout)

    def _namespace(self, layout: BlockLayout) -> bytes:
        """16 bytes that stand for the weights, the layout and how often the cache was invalidated."""
        if self._tiers is not None:
            return self._portable_namespace(layout, self._epoch)
        fingerprint = self._fingerprint(self.model)
        if self._named_at is None:
            self._named_at = self._epoch + fingerprint
        self._seen_mode = self._mode()
        return _digest((self.identity or "").encode(), fingerprint + self._seen_mode, layout.digest, self._epoch)

    def _portable_namespace(self, layout: BlockLayout, epoch: bytes = b"") -> bytes:
        """The namespace of keys that leave the process: the weights go by what any process makes of them."""
        return _digest(self._portable_identity(), b"", layout.digest, epoch)

    def _portable_identity(self) -> bytes:
        """The weights' identity for other processes; computed again only after a change was noticed."""
        mark = self._epoch + self._fingerprint(self.model)
        if self._named_at is None:
            self._named_at = mark
        known, mode = self._identified, self._mode()
        if known is None or known[0] != mark + mode:
            if self.identity is None:
                weights = weights_identity(self._parameters(self.model))
            else:
                # The name was given for the weights as they were: changed ones are nobody's but this process's.
                changed = "" if self._named_at == mark else os.urandom(16).hex()
                weights = named_identity(self.identity + changed)
            known = self._identified = (mark + mode, _digest(weights, mode) if mode else weights)
        self._seen_mode = mode
        return known[1]

    def invalidate(self) -> None:
        """Never find anything again that was computed before now."""
        # Random, so that keys in a tier cannot be those of an earlier run either.
        self._epoch = os.urandom(16)
        self.looks += 1
        if self._core is not None and self.model is not None:
            self.refresh()

    def _check_attached(self) -> None:
        if self.model is None:
            raise UsageError("no model is attached: call cache.attach(model) before `with cache:`")


def _digest(*fields: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for field in fields:
        digest.update(len(field).to_bytes(8, "little") + field)
    return digest.digest()
