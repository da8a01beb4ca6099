"""A model's weights, and the tensors of files that they are read from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvcache_core.errors import InvalidInput
from kvcache_core.weightfile import WeightFile

__all__ = ["ModelTensor", "ModelUnit", "Source", "check_memory", "find_sources"]

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class ModelTensor:
    """A weight of a model.

    Attributes:
        names: its names in the model, more than one where modules share it.
        shape, nbytes: its dimensions and the bytes it takes in memory.
        handle: the framework's parameter or variable.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    nbytes: int
    handle: Any


@dataclass(frozen=True, slots=True)
class ModelUnit:
    """A module that has weights of its own, and the weights to be there while it runs."""

    name: str
    module: Any
    tensors: tuple[ModelTensor, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a weight that is not always in memory comes from: the tensor ``name`` of ``file``."""

    tensor: ModelTensor
    file: WeightFile
    name: str

    @property
    def identity(self) -> bytes:
        """Bytes that stand for the weight's values."""
        return self.file.identity + self.name.encode()


def find_sources(
    units: Sequence[ModelUnit], files: Mapping[str, WeightFile], name_in_file: Callable[[str], str]
) -> dict[str, Source]:
    """{name in the file: source} of every weight of the units.

    Args:
        units: a model's.
        files: the file of each tensor, by its name there.
        name_in_file: what a weight of the model is called there.

    Raises:
        InvalidInput: a weight is not there, has another shape there, or is there only as another weight too.
    """
    tensors = {id(tensor.handle): tensor for unit in units for tensor in unit.tensors}
    found: dict[str, Source] = {}
    missing: list[str] = []
    for tensor in tensors.values():
        names = [name_in_file(name) for name in tensor.names]
        name = next((name for name in names if name in files), None)
        if name is None:
            missing.append(names[0])
            continue
        entry = files[name].entries[name]
        if entry.shape != tensor.shape:
            raise InvalidInput(f"weight {tensor.names[0]!r} has shape {tensor.shape}, in the file {entry.shape}")
        if name in found:
            raise InvalidInput(f"weights {found[name].tensor.names[0]!r} and {tensor.names[0]!r} are both {name!r}")
        found[name] = Source(tensor, files[name], name)
    if missing:
        there = ", ".join(sorted(files)[:_SHOWN])
        raise InvalidInput(
            f"the file lacks {len(missing)} of the model's {len(tensors)} weights: "
            f"{', '.join(missing[:_SHOWN])}{', ...' * (len(missing) > _SHOWN)}; it has {there}, ...; "
            "names= says what they are called there"
        )
    return found


def check_memory(units: Sequence[ModelUnit], memory: int) -> None:
    """Raise InvalidInput unless ``memory`` bytes hold each unit together with those it runs inside.

    These are the ones whose names its own starts with.
    """
    by_name = {unit.name: unit for unit in units}
    for unit in units:
        parts = unit.name.split(".")
        around = ["", *(".".join(parts[:end]) for end in range(1, len(parts) + 1))]
        tensors = {
            id(tensor.handle): tensor.nbytes for name in around if name in by_name for tensor in by_name[name].tensors
        }
        if sum(tensors.values()) > memory:
            raise InvalidInput(
                f"memory={memory} bytes is too small: module {unit.name!r} and those around it need "
                f"{sum(tensors.values())} bytes of weights at a time"
            )
