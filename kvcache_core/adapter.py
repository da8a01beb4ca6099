"""What an adapter supplies to its cache, besides running steps (:class:`~kvcache_core.stepping.Stepping`)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.activation import ActivationSite
from kvcache_core.errors import UsageError
from kvcache_core.layout import BlockLayout, LayerSpec
from kvcache_core.stepping import Stepping
from kvcache_core.store import KVStore

__all__ = ["Adapter", "ModelSpec"]


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


class Adapter(Stepping):
    """The part of :class:`~kvcache_core.frontend.FrontendCache` that each adapter writes for its framework."""

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

    def _mode(self) -> bytes:
        """What besides the weights decides how this thread computes; empty as a rule."""
        return b""

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
