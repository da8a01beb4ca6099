"""What the adapters' caches share: sizes, attaching, ``with cache:``, transactions and statistics.

An adapter subclasses :class:`FrontendCache` and supplies the tensors; nothing here knows a framework.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import warnings
import weakref
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.activation import ActivationSite, Bypassed
from kvcache_core.admission import Admission, admission
from kvcache_core.analysis import Advice
from kvcache_core.blockformat import secret_from_environment
from kvcache_core.cache import BlockCache
from kvcache_core.errors import CacheFull, InvalidInput, InvalidType, KVCacheWarning, StaleSequence, UsageError
from kvcache_core.identity import named_identity, weights_identity
from kvcache_core.layout import BlockLayout, LayerSpec
from kvcache_core.plan import StepPlan
from kvcache_core.saving import load_sequence, save_sequence
from kvcache_core.sequence import Sequence as CachedSequence
from kvcache_core.sites import Sites
from kvcache_core.sizes import parse_memory
from kvcache_core.stats import CacheStats
from kvcache_core.stepping import PREFILL_CHUNK, Stepping
from kvcache_core.store import KVStore
from kvcache_core.tiering import TierStack, TierStats
from kvcache_core.tiers import Tier
from kvcache_core.types import TokenIds
from kvcache_core.weights import check_verify
from kvcache_core.worth import check_bypass

__all__ = ["Call", "FrontendCache", "ModelSpec", "parse_memory"]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What an adapter has found out about a model.

    Attributes:
        layers: one spec per attention layer, in the order of their ``layer`` numbers.
        dtype: the dtype of K and V.
        output_shape: shape of the model's output per token, for example (V,).
        output_dtype: its dtype.
        vocab_size: ids must be below it; None if unknown.
    """

    layers: tuple[LayerSpec, ...]
    dtype: str
    output_shape: tuple[int, ...]
    output_dtype: str
    vocab_size: int | None = None

    @property
    def output_size(self) -> int:
        """Elements of the output per token."""
        size = 1
        for dimension in self.output_shape:
            size *= dimension
        return size


@dataclass(slots=True)
class Call:
    """One ``model(x)`` under way inside ``with cache:``: its rows as sequences, and their step."""

    seqs: list[CachedSequence]
    plan: StepPlan
    lengths: list[int]


class FrontendCache(Stepping):
    """The base of both adapters' ``KVCache``.

    Args:
        size: capacity in blocks, or in entries for activations. Default 4096 when no ``memory`` is given.
        memory: capacity in bytes instead, as a number or text like ``"2GiB"``.
        block_size: tokens per block.
        dtype: stored dtype of K and V; default is the model's.
        salt: only caches and sequences with equal salt share results.
        tiers: where evicted blocks go and come back from, nearest first: ``"ram:4GiB"``,
            ``"disk:PATH?max=20GiB"``, ``"valkey://HOST:PORT/DB?ttl=SECONDS"`` or tier objects.
        promote: ``"auto"``: tiers are used while loading costs less than recomputing; or ``"always"``.
        admit: which activations are kept: ``"all"``, :class:`~kvcache_core.admission.Sampled` or
            :class:`~kvcache_core.admission.AfterSightings`.
        verify: how changed weights are noticed: ``"sample"`` of their content, ``"full"`` (every byte), or
            ``"never"``: only :meth:`invalidate` counts.
        bypass: ``"auto"``: a module whose activations cost more to look up and copy than computing them would take
            is computed without the cache, and looked at again ever less often. To know, such a module is now and
            then computed though its result is there.

    Raises:
        InvalidInput: a size, memory or block size that is no positive amount, or both size and memory; a malformed
            tier.
        TierError: a tier cannot be opened or reached.
    """

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
        self._tiers: TierStack | None = None
        if tiers:
            self._tiers = TierStack([tiers] if isinstance(tiers, str) else tiers, promote=promote)
            self._closer = weakref.finalize(self, self._tiers.close)

    # ---- what an adapter supplies --------------------------------------------------------------

    @abstractmethod
    def _dtype_name(self, dtype: Any) -> str:
        """The core's name of a native or textual dtype; raises InvalidType."""

    @abstractmethod
    def _describe(self, model: Any) -> ModelSpec:
        """Run the model on one token and report what its attention layers store."""

    def _new_site(self, module: Any, **options: Any) -> ActivationSite:
        """What keeps a module's results per sample."""
        raise UsageError("this adapter serves token models only")

    @abstractmethod
    def _new_store(self, layout: BlockLayout, num_blocks: int) -> KVStore:
        """Native storage for the layout."""

    @abstractmethod
    def _fingerprint(self, model: Any) -> bytes:
        """Bytes that change when the model's weights change."""

    def _install_part(self, model: Any) -> None:
        """:meth:`_install` for a module whose results are kept per sample."""
        self._install(model)

    def _has_embedding(self, model: Any) -> bool:
        """Whether the model looks ids up, so that it may be run on one to see whether it is a token model."""
        return False

    @abstractmethod
    def _install(self, model: Any) -> None:
        """Route the model's calls through this cache while it is active."""

    @abstractmethod
    def _uninstall(self, model: Any) -> None:
        """Give back exactly the model that was attached."""

    @abstractmethod
    def _active(self) -> Any:
        """The cache whose ``with`` block this thread is in, or None."""

    @abstractmethod
    def _set_active(self, cache: Any) -> None:
        """Set what :meth:`_active` returns for this thread."""

    # ---- what an adapter may supply ------------------------------------------------------------

    def _parameters(self, model: Any) -> Iterator[tuple[str, NDArray[Any]]]:
        """(dtype name, elements or their bits) of every distinct weight, for the portable identity."""
        raise UsageError(
            "this adapter does not hand over its weights: name them, attach(model, identity='name@version')"
        )

    # ---- what an adapter may supply, for kvcache_core.testing -------------------------------------

    def native_ids(self, ids: Any) -> Any:
        """Numpy ids [B, T] as the model takes them."""
        return ids

    def to_numpy(self, output: Any) -> Any:
        """A model's output as a numpy float64 array."""
        return np.asarray(output).astype(np.float64)

    def float64_model(self) -> Callable[[Any], Any] | None:
        """The attached model in float64 and without a cache, numpy ids [B, T] -> numpy [B, T, ...]; None where the
        framework or the model cannot.
        """
        return None

    # ---- attaching -----------------------------------------------------------------------------

    def attach(
        self,
        model: Any,
        *,
        outputs: str = "all",
        identity: str | None = None,
        kind: str | None = None,
        shared: Sequence[str] = (),
        side_effects: bool = False,
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
            shared: for activations: keyword arguments whose tensors belong to all samples, whatever their first
                dimension. Without it, tensors with the batch's first dimension are split into samples.
            side_effects: for activations: the module does more than compute its output, so every call runs it.

        Raises:
            UsageError: the model is attached to another cache, or this cache has another model.
        """
        if kind not in (None, "tokens", "activation"):
            raise InvalidInput(f"kind must be 'tokens', 'activation' or None, got {kind!r}")
        if outputs not in ("all", "last"):
            raise InvalidInput(f"outputs must be 'all' or 'last', got {outputs!r}")
        other = attached_to(model)
        if other is not None and other is not self:
            raise UsageError("the model is attached to another cache; call that cache's detach() first")
        if self.model is not None and self.model is not model and kind != "activation" != self._kind:
            raise UsageError(
                "this cache has a model already; call detach() first, or make a second cache (modules attached with "
                "kind='activation' may be as many as you like)"
            )
        if other is None:
            (self._install_part if kind == "activation" else self._install)(model)
            _attached[id(model)] = (weakref.ref(model), weakref.ref(self))
        options = {"identity": identity, "shared": tuple(shared), "side_effects": side_effects}
        if kind == "activation":
            self.sites.add(self._new_site(model, **options))
        if self.model is not None and self.model is not model:
            return model
        if self._served() is not model or outputs != self.outputs:
            # Another model, or another layout: what is stored does not fit it.
            self._core = self._store = self.spec = None
        self._served = weakref.ref(model)
        self._identified = None
        self.model, self.outputs, self.identity = model, outputs, identity
        self._kind, self._site_options = kind or ("tokens" if self._core is not None else None), options
        return model

    def detach(self, model: Any = None) -> Any:
        """Undo :meth:`attach`; returns the model as it was. What is cached stays, for when it is attached again.

        Args:
            model: which one, if several are attached; default the first one.
        """
        model = self.model if model is None else model
        if model is None or attached_to(model) is not self:
            raise UsageError("no model is attached to this cache")
        if self._active() is self:
            raise UsageError("cannot detach inside `with cache:`; leave the block first")
        self._uninstall(model)
        _attached.pop(id(model), None)
        self.sites.remove(model)
        if model is self.model:
            self.model = next((site.module for site in self.sites), None)
            self._kind = None if self.model is None else "activation"
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
        self._set_active(None)

    def _check_attached(self) -> None:
        if self.model is None:
            raise UsageError("no model is attached: call cache.attach(model) before `with cache:`")

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
        return self.spec is None or self._dtype is None or self._dtype == self.spec.dtype

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
            num_blocks = self._blocks_in(layout) if self._memory is not None else self._size
            self._store = self._new_store(layout, int(num_blocks or 0))
            namespace = self._namespace(layout)
            core = BlockCache(int(num_blocks or 0), layout=layout, namespace=namespace)
            if self._tiers is not None:
                self._tiers.bind(core, self._store)
            myself = weakref.ref(self)
            core.saver = lambda seq, path: myself()._save(seq, path)  # type: ignore[union-attr]
            self._core = core

    def _blocks_in(self, layout: BlockLayout, memory: int | None = None) -> int:
        memory = self._memory if memory is None else memory
        # One block more than the usable ones: the null block.
        blocks = (memory or 0) // layout.bytes_per_block - 1
        if blocks < 1:
            raise InvalidInput(
                f"memory={memory} bytes holds no block: two blocks of {layout.block_size} tokens need "
                f"{2 * layout.bytes_per_block} bytes"
            )
        return blocks

    def refresh(self) -> None:
        """Notice changed weights: from then on nothing computed with the old ones is found."""
        if self._core is None:
            self._prepare()
        elif self._core.layout is not None:
            self._core.namespace = self._namespace(self._core.layout)

    def _namespace(self, layout: BlockLayout) -> bytes:
        """16 bytes that stand for the weights, the layout and how often the cache was invalidated."""
        digest = hashlib.blake2b(digest_size=16)
        if self._tiers is None:
            weights = (self.identity or "").encode(), self._fingerprint(self.model)
        else:
            # Keys leave the process: the weights go by what any process makes of them.
            weights = self._portable_identity(), b""
        for field in (*weights, layout.digest, self._epoch):
            digest.update(len(field).to_bytes(8, "little") + field)
        return digest.digest()

    def _portable_identity(self) -> bytes:
        """The weights' identity for other processes; computed again only after a change was noticed."""
        mark = self._epoch + self._fingerprint(self.model)
        known = self._identified
        if known is None or known[0] != mark:
            if self.identity is None:
                weights = weights_identity(self._parameters(self.model))
            else:
                # The name was given for the weights as they were: changed ones are nobody's but this process's.
                changed = "" if known is None else os.urandom(16).hex()
                weights = named_identity(self.identity + changed)
            known = self._identified = (mark, weights)
        return known[1]

    def invalidate(self) -> None:
        """Never find anything again that was computed before now."""
        # Random, so that keys in a tier cannot be those of an earlier run either.
        self._epoch = os.urandom(16)
        self.looks += 1
        if self._core is not None and self.model is not None:
            self.refresh()

    # ---- sequences and steps -------------------------------------------------------------------

    def open(self, token_ids: TokenIds, *, max_new_tokens: int = 0) -> CachedSequence:
        """Start a sequence with whatever head of ``token_ids`` is cached; step the rest.

        Raises:
            InvalidInput: no tokens, or ids that are no integers or outside the vocabulary.
        """
        self.refresh()
        return self.open_fresh(token_ids, max_new_tokens)

    def open_fresh(self, token_ids: TokenIds, max_new_tokens: int = 0) -> CachedSequence:
        """:meth:`open` for a caller that has just called :meth:`refresh`."""
        self.check_vocabulary(token_ids)
        return self._open(token_ids, max_new_tokens=max_new_tokens)

    def _open(self, token_ids: TokenIds, **options: Any) -> CachedSequence:
        """Open a sequence in the core; what the tiers hold behind its match comes up."""
        core = self.core
        seq = core.open(token_ids, self.salt, **options)
        if self._tiers is not None and core.layout is not None and self._identified is not None:
            self._tiers.serve(core.layout, seq.namespace, self._identified[1], self.salt)
            try:
                self._tiers.promote(seq)
            except BaseException:
                seq.close()
                raise
        return seq

    @contextmanager
    def transaction(self, seqs: Sequence[CachedSequence], token_ids: Sequence[TokenIds]) -> Iterator[StepPlan]:
        """Plan a step; commit it when the block ends, roll it back when the block raises."""
        core = self.core
        plan = core.plan(seqs, token_ids)
        started = time.perf_counter()
        try:
            yield plan
        except BaseException:
            core.rollback(plan)
            raise
        core.commit(plan)
        self._computed(plan, started)

    def _computed(self, plan: StepPlan, started: float) -> None:
        """Tell the tiers what computing costs."""
        if self._tiers is not None:
            seconds = time.perf_counter() - started
            self._tiers.computed(int(plan.counts.sum()), int(plan.counts.max()), seconds)

    @contextmanager
    def call(self, rows: Sequence[TokenIds], extra_keys: Sequence[bytes] | None = None) -> Iterator[Call | None]:
        """One ``model(x)``: open every row, plan what is missing, and publish it when the block ends.

        ``extra_keys``: per row, what besides the token ids its state depends on.

        Yields None when there is no room: the caller then computes as outside.
        """
        core = self.core
        outputs = self.outputs == "all"
        seqs: list[CachedSequence] = []
        try:
            for at, row in enumerate(rows):
                extra = None if extra_keys is None else {0: extra_keys[at]}
                seqs.append(self._open(row, outputs=outputs, extra_keys=extra))
            lengths = [len(row) for row in rows]
            try:
                plan = core.plan(seqs, [row[seq.num_cached :] for row, seq in zip(rows, seqs, strict=True)])
            except CacheFull as full:
                self.bypass(sum(lengths), f"the cache has no room for it ({full})")
                yield None
                return
            started = time.perf_counter()
            try:
                yield Call(seqs, plan, lengths)
            except BaseException:
                core.rollback(plan)
                raise
            core.commit(plan)
            self._computed(plan, started)
            if outputs:
                self._saved_output_tokens += sum(seq.num_cached for seq in seqs)
        finally:
            for seq in seqs:
                core.close(seq)

    def bypass(self, tokens: int, reason: str, *, warn: bool = True) -> None:
        """Count a call that is computed as outside, and say so once per reason."""
        self._bypassed_calls += 1
        self._bypassed_tokens += tokens
        kind = reason.split("(", 1)[0].strip()
        self._bypass_reasons[kind] += 1
        if warn and kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"computed without the cache: {reason}", KVCacheWarning, stacklevel=3)

    def check_vocabulary(self, token_ids: TokenIds) -> None:
        """Raise InvalidInput for ids that the model's embedding does not have."""
        self._prepare()
        vocab = self.spec.vocab_size if self.spec else None
        if vocab is None or not len(token_ids):
            return
        try:
            largest = max(token_ids)
            too_large = bool(largest >= vocab)
        except (TypeError, ValueError):
            return  # no numbers in one row: opening or stepping says so
        if too_large:
            raise InvalidInput(f"token ids must be 0 .. {vocab - 1} for this model, got {largest}")

    # ---- housekeeping --------------------------------------------------------------------------

    def serve(self, site: ActivationSite, original: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, bool]:
        """``module(*args, **kwargs)`` from its activations; or (what is known of it, False): compute it as outside."""
        try:
            return site.serve(original, args, kwargs), True
        except Bypassed as bypassed:
            self.bypass(0, bypassed.reason, warn=not bypassed.expected)
            return bypassed.output, False

    def warm(self, prompts: Sequence[Any]) -> int:
        """Compute prompts before traffic comes; returns how many tokens were not cached yet.

        For activations: inputs, each a tensor, a tuple of arguments or a dict of keyword arguments; returns how
        many samples were not cached yet.
        """
        if self._kind == "activation" or (self._kind is None and not _are_prompts(prompts)):
            return self._warm_entries(prompts)
        computed = 0
        self.refresh()
        for prompt in prompts:
            seq = self.open(prompt)
            try:
                rest = prompt[seq.num_cached :]
                computed += len(rest)
                self.step([seq], [rest], prefill_chunk=PREFILL_CHUNK)
            finally:
                seq.close()
        return computed

    def _warm_entries(self, inputs: Sequence[Any]) -> int:
        before = self.sites.entries.miss_entries
        with self:
            for given in inputs:
                if isinstance(given, dict):
                    self.model(**given)
                else:
                    self.model(*(given if isinstance(given, tuple) else (given,)))
        return self.sites.entries.miss_entries - before

    def resize(self, size: int | None = None, *, memory: str | int | None = None) -> None:
        """Change the capacity while it is in use, in blocks or bytes. Shrinking evicts; nothing in use is lost.

        Raises:
            CacheFull: open sequences hold more than that; nothing was changed.
            InvalidInput: no positive amount, or both given.
        """
        if (size is None) == (memory is None):
            raise InvalidInput(f"give size (blocks) or memory (bytes); got {size!r} and {memory!r}")
        if isinstance(size, str):
            size, memory = None, size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise InvalidInput(f"size must be a whole number of blocks, at least 1; got {size!r}")
        self.sites.entries.resize(size, memory=None if memory is None else parse_memory(memory))
        if self._core is None:
            self._size, self._memory = size, None if memory is None else parse_memory(memory)
            return
        if memory is not None and self._core.layout is not None:
            size = self._blocks_in(self._core.layout, parse_memory(memory))
        with self._core.lock:
            results = self._core.resize(int(size or 0))
            self._store.resize(int(size or 0), [result.moves for result in results])

    def compact(self) -> int:
        """Bring the blocks of open sequences next to each other, for faster attention; returns how many moved.

        For idle moments: it copies the moved blocks, and needs as much room beside the cache while it does.
        """
        if self._core is None:
            return 0
        with self._core.lock:
            moves = [result.moves for result in self._core.compact()]
            for number, found in enumerate(moves):
                self._store.copy_blocks(number, np.array(list(found.items()), np.int64).reshape(-1, 2))
        return sum(map(len, moves))

    def clear(self) -> None:
        """Drop everything cached that no open sequence holds."""
        self.sites.clear()
        if self._core is not None:
            self._core.clear()

    def flush(self, timeout: float | None = None, *, everything: bool = False) -> bool:
        """Wait until what was demoted so far is in its tier; whether it is.

        Args:
            timeout: seconds to wait at most.
            everything: first demote all that can be found in the pool and in the RAM tier, down to the first tier
                that outlives the process: another process then finds it.
        """
        return self._tiers is None or self._tiers.flush(timeout, everything=everything)

    def close(self, timeout: float = 5.0) -> bool:
        """Flush everything to the tiers within ``timeout`` seconds and let go of them; whether nothing was lost.

        The cache itself goes on without tiers. Also done when the cache is forgotten or the process ends.
        """
        if self._tiers is None:
            return True
        self._closer.detach()
        tiers, self._tiers = self._tiers, None
        return tiers.close(timeout)

    def load(self, path: str | os.PathLike[str]) -> CachedSequence:
        """The sequence that ``sequence.save(path)`` wrote, in this framework or the other one.

        Raises:
            BlockRefused: the file is damaged, or of other weights, another layout or another salt.
            CacheFull: no room; nothing was changed.
        """
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

    def tier_stats(self) -> list[TierStats]:
        """What each tier has done for this cache, nearest first."""
        return [] if self._tiers is None else [replace(stats) for stats in self._tiers.stats]

    def record(self, accesses: int = 100_000) -> None:
        """Remember the last so many accesses to activations, for :meth:`advice`; 0 stops it."""
        self.sites.entries.record(accesses)

    def advice(self) -> Advice:
        """Which size pays for activations, by the accesses since :meth:`record`; print it.

        Raises:
            UsageError: none are recorded.
        """
        return self.sites.entries.advice(max((site.worth.row_seconds for site in self.sites), default=0.0))

    def stats(self) -> CacheStats:
        """Counters and contents; zeros before the first use."""
        entries, skipped, reasons = self.sites.entries, self.sites.skipped, dict(self._bypass_reasons)
        if skipped:
            reasons["the cache costs more than it saves"] = skipped
        if self._core is None:
            stats = CacheStats(block_size=self._block_size, num_blocks=self._size or 0)
        else:
            stats = replace(self._core.stats(), bytes=self._store.nbytes)
        return replace(
            stats,
            bytes=stats.bytes + entries.bytes,
            bypassed_calls=self._bypassed_calls + skipped,
            bypassed_tokens=self._bypassed_tokens,
            saved_output_tokens=self._saved_output_tokens,
            **({} if self._tiers is None else self._tiers.counters()),
            entries=len(entries),
            hit_entries=entries.hit_entries,
            miss_entries=entries.miss_entries,
            evicted_entries=entries.evicted_entries,
            refused_entries=entries.refused_entries,
            seconds_saved=self.sites.seconds_saved,
            seconds_spent=self.sites.seconds_spent,
            bypass_reasons=reasons,
        )


def _are_prompts(prompts: Sequence[Any]) -> bool:
    """Whether each is a list of token ids."""
    return all(
        isinstance(prompt, list | tuple) and all(isinstance(token, int) for token in prompt) for prompt in prompts
    )


_attached: dict[int, tuple[weakref.ref[Any], weakref.ref[FrontendCache]]] = {}


def attached_to(model: Any) -> FrontendCache | None:
    """The cache that the model is attached to."""
    entry = _attached.get(id(model))
    if entry is None or entry[0]() is not model:
        return None
    return entry[1]()
