"""A model whose weights are read from a file when they are used: what both ``ParameterCache`` classes share."""

from __future__ import annotations

import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvcache_core.attaching import attached_to
from kvcache_core.errors import UsageError
from kvcache_core.residence import ParameterStats, Residence
from kvcache_core.sizes import parse_memory
from kvcache_core.sources import ModelUnit, Source, check_memory, find_sources
from kvcache_core.weightfile import WeightFile

__all__ = ["ParameterFrontend"]


class ParameterFrontend(ABC):
    """The base of both adapters' ``ParameterCache``.

    A module is brought into memory before it runs and let go behind it; what nobody uses is dropped, least recently
    used first, when another module needs the room.

    Args:
        file: a safetensors file, or several that hold the weights together.
        memory: how many bytes of weights may be in memory, a number or text like ``"200MiB"``.
        names: {name in the model: name in the file}, or a function that gives the latter; default the same names.
        whole: classes of modules whose weights come together with those of all modules inside them: for modules that
            compute with weights of modules they do not call.

    Raises:
        BlockRefused: a file is damaged, or no safetensors file.
        InvalidInput: no positive amount of memory.
    """

    def __init__(
        self,
        file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        memory: str | int,
        names: Mapping[str, str] | Callable[[str], str] | None = None,
        whole: Sequence[type] = (),
    ) -> None:
        self._memory = parse_memory(memory)
        paths = [file] if isinstance(file, str | os.PathLike) else list(file)
        self._file_by_name: dict[str, WeightFile] = {}
        for path in paths:
            opened = WeightFile(path)
            self._file_by_name.update(dict.fromkeys(opened.entries, opened))
        self._rename = names
        self._whole = tuple(whole)
        self.model: Any = None
        self._sources: dict[str, Source] = {}
        self._residence: Residence | None = None
        self._next: dict[str, str] = {}
        self._last = threading.local()

    # ---- what an adapter supplies --------------------------------------------------------------

    @abstractmethod
    def _modules(self, model: Any) -> list[Any]:
        """The model and every module inside it; raises InvalidType for what is no model."""

    @abstractmethod
    def _units(self, model: Any) -> list[ModelUnit]:
        """The modules with weights of their own, by dotted names; the model's own name is ``""``."""

    @abstractmethod
    def _install(self, model: Any, units: Sequence[ModelUnit]) -> None:
        """Have every unit's call surrounded by :meth:`hold` and :meth:`let_go`, and its weights dropped.

        If it raises, the model is as it was.
        """

    @abstractmethod
    def _uninstall(self) -> None:
        """Undo :meth:`_install`; the weights are in memory."""

    @abstractmethod
    def _load(self, source: Source) -> None:
        """Read a weight into memory."""

    @abstractmethod
    def _drop(self, source: Source) -> None:
        """Give a weight's memory back."""

    # ---- attach and detach ---------------------------------------------------------------------

    def attach(self, model: Any) -> Any:
        """Read ``model``'s weights from the file when they are used; returns the model.

        What the weights are now does not matter: the file is what counts. A ``KVCache`` is attached afterwards.

        Raises:
            InvalidInput: the file lacks weights, or has them in another shape; or ``memory`` does not hold the largest
                module and those that run around it.
            UsageError: the model is in use elsewhere, or in training mode.
        """
        if self.model is not None:
            raise UsageError("this ParameterCache has a model already; call detach() first, or make a second one")
        modules = self._modules(model)
        if any(attached_to(module) is not None for module in modules):
            raise UsageError("attach the ParameterCache before the KVCache: call the KVCache's detach() first")
        if any(_of(module) is not None for module in modules):
            raise UsageError("the model's weights are read by another ParameterCache; call its detach() first")
        units = self._units(model)
        sources = find_sources(units, self._file_by_name, self._name_in_file)
        check_memory(units, self._memory)
        by_handle = {id(source.tensor.handle): name for name, source in sources.items()}
        self._sources = sources
        self._install(model, units)
        self._by_unit = {unit.name: [by_handle[id(tensor.handle)] for tensor in unit.tensors] for unit in units}
        self._sizes = units
        self._residence = Residence(
            self._memory,
            {name: source.tensor.nbytes for name, source in sources.items()},
            self._by_unit,
            self._read,
            lambda name: self._drop(sources[name]),
        )
        self.model = model
        for module in modules:
            _attached[id(module)] = (weakref.ref(module), self)
        return model

    def detach(self) -> Any:
        """Read all weights into memory, whatever the limit, and give the model back as an ordinary one.

        Raises:
            UsageError: no model is attached, or a ``KVCache`` still is attached to it.
        """
        if self.model is None:
            raise UsageError("no model is attached to this ParameterCache")
        modules = self._modules(self.model)
        if any(attached_to(module) is not None for module in modules):
            raise UsageError("the model is attached to a KVCache; call that cache's detach() first")
        for name in self._sources:
            if not self.residence.is_here(name):
                self._read(name)
        self._uninstall()
        for module in modules:
            _attached.pop(id(module), None)
        model, self.model = self.model, None
        self._residence, self._sources, self._next = None, {}, {}
        return model

    @property
    def residence(self) -> Residence:
        """Which weights are in memory."""
        if self._residence is None:
            raise UsageError("no model is attached: call attach(model) first")
        return self._residence

    def stats(self) -> ParameterStats:
        """Counters and contents."""
        return self.residence.stats()

    def resize(self, memory: str | int) -> None:
        """Change the limit while it is in use; what no longer fits is dropped.

        Raises:
            InvalidInput: it does not hold the largest module and those that run around it; nothing was changed.
            CacheFull: modules that are running hold more; nothing was changed.
        """
        size = parse_memory(memory)
        residence = self.residence
        check_memory(self._sizes, size)
        residence.resize(size)
        self._memory = size

    def clear(self) -> None:
        """Drop every weight that no running module uses."""
        self.residence.clear()

    # ---- a module's call -----------------------------------------------------------------------

    def hold(self, unit: str) -> None:
        """A module is about to run."""
        before = getattr(self._last, "unit", None)
        if before is not None:
            self._next[before] = unit
        self._last.unit = unit
        self.residence.hold(unit)
        # What ran next the last time is read ahead from the disk while this module computes.
        for name in self._by_unit.get(self._next.get(unit, ""), ()):
            if not self.residence.is_here(name):
                self._sources[name].file.prefetch(name)

    def let_go(self, unit: str) -> None:
        """A module has run."""
        self.residence.let_go(unit)

    def _read(self, name: str) -> None:
        source = self._sources[name]
        self._load(source)
        source.file.forget(name)

    def _name_in_file(self, name: str) -> str:
        if self._rename is None:
            return name
        return self._rename(name) if callable(self._rename) else self._rename.get(name, name)


_attached: dict[int, tuple[weakref.ref[Any], ParameterFrontend]] = {}


def _of(module: Any) -> ParameterFrontend | None:
    """The parameter cache that reads a module's weights."""
    entry = _attached.get(id(module))
    return entry[1] if entry is not None and entry[0]() is module else None
