"""Noticing that a module's weights changed."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvcache_core.sources import Source
from kvcache_core.switches import Switches
from kvcache_core.weights import ContentSample, digest_of

__all__ = ["SOURCE", "Fingerprint", "Parked", "source_of"]

SOURCE = "_kvcache_source"
"""The attribute of a weight that a ``ParameterCache`` reads from a file: it is not always in memory."""

_LOOKS = 16
"""So many looks meet every row of the weights: a look at SmolLM2's takes 1 % of a decode step, half of what it may."""

_numbers = itertools.count(1)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class Fingerprint:
    """Names the state of a module's parameters and buffers by a number that is never used again.

    A :meth:`look` compares, cheapest first: which tensors the module has, where their memory is, their version
    counters (every in-place change outside ``.data`` moves them), and a sample of their content. Weights that a
    ``ParameterCache`` reads stand for their file.

    :meth:`mode` says what its modules are switched to besides: an adapter by its name, for example.

    Args:
        module: the module.
        verify: ``"sample"``, ``"full"`` (every byte is hashed at every look), or ``"never"``.
        parked: what an earlier fingerprint left: if it finds the same, it goes on from there.
    """

    def __init__(self, module: nn.Module, verify: str, parked: Parked | None = None) -> None:
        self.module = module
        self.verify = verify
        self._collect()
        if parked is not None and parked.same(self.park()):
            self._value = parked.value

    @property
    def value(self) -> bytes:
        """Bytes that stand for the state that the last look found."""
        return self._value

    @property
    def tensors(self) -> list[Tensor]:
        """Parameters and buffers that are in memory, as the last look found them."""
        return self._tensors

    @property
    def trains(self) -> bool:
        """Whether a parameter wants gradients."""
        return any(tensor.requires_grad for tensor in self._parameters)

    def mode(self) -> bytes:
        """What the modules are switched to, and hooked, besides their weights; empty if as they were first."""
        if self.verify == "never":
            return b""
        hooked = self._hooked()
        return self._switches.mode() + (b"" if hooked == self._first_hooks else repr(hooked).encode())

    def look(self) -> bool:
        """Whether anything changed since the last look."""
        if self.verify == "never":
            return False
        if self.verify == "full":
            before = self._value
            if not self._same_tensors():
                self._collect()
            else:
                self._versions = [tensor._version for tensor in self._counted]
                self._value = self._digest()
            return self._value != before
        if self.quick_look():
            return True
        if self._sample is not None and self._sample.changed():
            self._renumber()
            return True
        return False

    def counters_moved(self) -> bool:
        """Whether a tensor that is known was changed in place; looks at nothing else."""
        return self.verify != "never" and self._versions != [tensor._version for tensor in self._counted]

    def park(self) -> Parked:
        """The state without holding the module or its memory."""
        seen = self._files if self._sample is None else self._files + self._sample.digest()
        seen += repr(self._hooked()).encode()
        references = [weakref.ref(tensor) for tensor in self._tensors]
        return Parked(self._value, references, self._places, self._versions, seen + self._switches.first)

    def quick_look(self) -> bool:
        """As :meth:`look`, without reading any content."""
        if self.verify == "never":
            return False
        if not self._same_tensors():
            self._collect()
            return True
        versions = [tensor._version for tensor in self._counted]
        if versions == self._versions:
            return False
        self._versions = versions
        if self._sample is not None:
            self._sample.changed()
        self._renumber()
        return True

    def _renumber(self) -> None:
        self._value = self._digest() if self.verify == "full" else next(_numbers).to_bytes(16, "little")

    def _digest(self) -> bytes:
        return digest_of([_memory(tensor.cpu()) for tensor in self._stored])

    def _same_tensors(self) -> bool:
        return (
            [len(held) for held in self._held] == self._lengths
            and all(map(is_, (item for held in self._held if held for item in held.values()), self._items))
            and [tensor.data_ptr() for tensor in self._stored] == self._places
        )

    def _collect(self) -> None:
        """Find the tensors, and where each is held."""
        self._held = [
            held for module in self.module.modules() for held in (module._modules, module._parameters, module._buffers)
        ]
        self._hooks = [
            hooks for module in self.module.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._first_hooks = self._hooked()
        self._lengths = [len(held) for held in self._held]
        self._items = [item for held in self._held for item in held.values()]
        self._parameters = list(self.module.parameters())
        found = [(tensor, source_of(tensor)) for tensor in (*self._parameters, *self.module.buffers())]
        self._tensors = [tensor for tensor, source in found if source is None]
        self._files = b"".join(source.identity for _, source in found if source is not None)
        self._stored = list(map(_elements, self._tensors))
        self._places = [tensor.data_ptr() for tensor in self._stored]
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._versions = [tensor._version for tensor in self._counted]
        self._sample = self._new_sample() if self.verify == "sample" else None
        others = (module for module in self.module.modules() if not type(module).__module__.startswith("torch."))
        self._switches = Switches(map(vars, others), _OF_EVERY_MODULE)
        self._renumber()

    def _hooked(self) -> list[list[int]]:
        """The numbers of the hooks on parts, which may change what they compute; PyTorch never gives one twice."""
        return [list(hooks) for hooks in self._hooks if hooks]

    def _new_sample(self) -> Any:
        here = [tensor for tensor in self._stored if tensor.device.type == "cpu" and tensor.numel()]
        away = [tensor for tensor in self._stored if tensor.device.type not in ("cpu", "meta") and tensor.numel()]
        samples: list[Any] = [_DeviceSample(away)] if away else []
        if here:
            rows = [tensor.shape[-1] if tensor.dim() > 1 else 1 for tensor in here]
            samples.append(ContentSample([_memory(tensor) for tensor in here], rows, _LOOKS))
        return _Samples(samples)


@dataclass(frozen=True)
class Parked:
    """A state that a fingerprint found, by weak references."""

    value: bytes
    tensors: list[weakref.ref[Tensor]]
    places: list[int]
    versions: list[int]
    seen: bytes

    def same(self, other: Parked) -> bool:
        """Whether it is the state of the same tensors, and nothing has changed them in between."""
        return (
            len(self.tensors) == len(other.tensors)
            and all(one() is two() for one, two in zip(self.tensors, other.tensors, strict=True))
            and (self.places, self.versions, self.seen) == (other.places, other.versions, other.seen)
        )


class _Samples:
    """Several samples looked at together."""

    def __init__(self, samples: list[Any]) -> None:
        self._samples = samples

    def changed(self) -> bool:
        """Whether any of them changed since the last look."""
        found = [sample.changed() for sample in self._samples]  # each must look
        return any(found)

    def digest(self) -> bytes:
        """Bytes that stand for all of them, as last looked at."""
        return b"".join(sample.digest() for sample in self._samples)


class _DeviceSample:
    """A strided sample of tensors on a device, compared there; a look waits for the device once."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._views = [_flat(tensor)[:: max(1, tensor.numel() // 64)] for tensor in tensors]
        self._seen = self._read()

    def changed(self) -> bool:
        """Whether the sample differs from the last look; the next look compares with this one."""
        now = self._read()
        different = any(not torch.equal(one, other) for one, other in zip(now, self._seen, strict=True))
        self._seen = now
        return different

    def digest(self) -> bytes:
        """The bytes of the sample, as last looked at."""
        return b"".join(part.cpu().view(torch.uint8).numpy().tobytes() for part in self._seen)

    def _read(self) -> list[Tensor]:
        by_kind: dict[Any, list[Tensor]] = {}
        for view in self._views:
            by_kind.setdefault((view.device, view.dtype), []).append(view)
        with torch.no_grad():
            return [torch.cat(views) for views in by_kind.values()]


def source_of(tensor: Tensor) -> Source | None:
    """Where a weight is read from that is not always in memory; None for an ordinary one."""
    return getattr(tensor, SOURCE, None)


def _elements(tensor: Tensor) -> Tensor:
    """The dense tensor that holds a sparse one's elements; any other one itself."""
    if tensor.layout is torch.strided:
        return tensor
    return tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()


def _flat(tensor: Tensor) -> Tensor:
    """All memory between a tensor's first and last element, in one dimension and without a copy."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size())
    flat = torch.as_strided(tensor.detach(), (extent,), (1,))
    return flat.view(torch.int64) if bits is None else flat.view(bits)


def _memory(tensor: Tensor) -> np.ndarray[Any, Any]:
    return _flat(tensor).numpy()
