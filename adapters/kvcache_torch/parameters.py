"""``ParameterCache`` for PyTorch models: weights are read from a file when their module runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvcache_core.errors import InvalidInput, InvalidType, UsageError
from kvcache_core.parameters import ParameterFrontend
from kvcache_core.sources import ModelTensor, ModelUnit, Source
from kvcache_core.weightfile import WeightFile, write_weights
from kvcache_torch.attached import AttachedForward
from kvcache_torch.fingerprint import SOURCE

__all__ = ["ParameterCache", "persistent", "values_of"]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LISTS = (nn.ParameterList, nn.ParameterDict)
_WHOLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""Modules that compute with weights of modules inside them without calling those."""


class ParameterCache(ParameterFrontend):
    """Runs a PyTorch model whose weights do not fit in memory, for inference.

    See :class:`kvcache_core.parameters.ParameterFrontend` for the arguments. A model that was made under
    ``torch.device("meta")`` never had its weights in memory; buffers that the file has are read once and stay.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
        >>> x = torch.ones(1, 8)
        >>> with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        ...     expected = model(x)
        ...     ParameterCache.save(model, f"{folder}/model.safetensors")
        ...     parameters = ParameterCache(f"{folder}/model.safetensors", memory=300)  # one layer's 288 bytes
        ...     model = parameters.attach(model)
        ...     torch.equal(model(x), expected), parameters.stats().bytes_read
        (True, 576)
    """

    def __init__(
        self,
        file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        memory: str | int,
        names: Mapping[str, str] | Callable[[str], str] | None = None,
        whole: Sequence[type] = (),
    ) -> None:
        super().__init__(file, memory=memory, names=names, whole=(*_WHOLE, *whole))

    @staticmethod
    def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
        """Write a model's weights and buffers as a safetensors file under the names that :meth:`attach` looks for.

        Raises:
            OSError: it cannot be written.
        """
        distinct: dict[tuple[Any, ...], tuple[str, np.ndarray[Any, Any]]] = {}
        names: dict[tuple[Any, ...], str] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            key = (tensor.data_ptr(), tensor.shape, tensor.stride())
            if key not in names:
                names[key] = name
                distinct[key] = (str(tensor.dtype).removeprefix("torch."), _bits(tensor))
        write_weights(path, {names[key]: found for key, found in distinct.items()})

    def _modules(self, model: Any) -> list[Any]:
        if not isinstance(model, nn.Module):
            raise InvalidType(f"kvcache_torch attaches a torch.nn.Module, got {type(model).__name__}")
        return list(model.modules())

    def _units(self, model: nn.Module) -> list[ModelUnit]:
        if any(module.training for module in model.modules()):
            raise UsageError("weights that are read from a file cannot be trained; call eval() first")
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        tensors = {
            id(parameter): ModelTensor(tuple(names[id(parameter)]), tuple(parameter.shape), parameter.nbytes, parameter)
            for parameter in model.parameters()
        }
        units = []
        for name, module, weights in _with_weights(model, self._whole):
            own = {id(parameter): None for parameter in weights}
            units.append(ModelUnit(name, module, tuple(tensors[key] for key in own)))
        return units

    def _install(self, model: nn.Module, units: Sequence[ModelUnit]) -> None:
        self._fill_buffers(model)
        self._wanted_gradients: dict[str, bool] = {}
        self._versions: dict[str, int] = {}
        with torch.inference_mode(mode=False):
            handles = self._without_meta(model)
        for name, source in list(self._sources.items()):
            parameter = handles[id(source.tensor.handle)]
            self._sources[name] = replace(source, tensor=replace(source.tensor, handle=parameter))
            self._wanted_gradients[name] = parameter.requires_grad
            parameter.requires_grad_(False)
            self._versions[name] = _version(parameter)
            setattr(parameter, SOURCE, self._sources[name])
            self._drop(self._sources[name])
        self._installed = units
        for unit in units:
            AttachedForward.install(unit.module, self._around(unit.name, unit.module))
        self._undo = [
            module.register_state_dict_pre_hook(_refuse_state_dict) for module in {unit.module for unit in units}
        ]

    def _uninstall(self) -> None:
        for unit in reversed(self._installed):
            AttachedForward.uninstall(unit.module)
        for handle in self._undo:
            handle.remove()
        for name, source in self._sources.items():
            delattr(source.tensor.handle, SOURCE)
            source.tensor.handle.requires_grad_(self._wanted_gradients[name])

    def _load(self, source: Source) -> None:
        parameter: nn.Parameter = source.tensor.handle
        if _version(parameter) != self._versions[source.name]:
            raise UsageError(
                f"weight {source.tensor.names[0]!r} was changed in memory, and is read from "
                f"{source.file.path}; change the file, or call detach() first"
            )
        # What was made in inference mode takes no other tensor, and what was not takes none that was.
        with torch.inference_mode(mode=parameter.is_inference()), torch.no_grad():
            parameter.data = values_of(source, parameter.dtype).to(parameter.device)

    def _drop(self, source: Source) -> None:
        parameter: nn.Parameter = source.tensor.handle
        # Of a shape that no operation takes for a weight: what is used without having been read raises.
        with torch.inference_mode(mode=parameter.is_inference()):
            parameter.data = torch.empty((0, 0), dtype=parameter.dtype, device=parameter.device)

    def _around(self, unit: str, module: nn.Module) -> Callable[..., Any]:
        def enter(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            if module.training:
                raise UsageError("weights that are read from a file cannot be trained; call eval() first")
            if torch.is_grad_enabled() and any(
                isinstance(value, Tensor) and value.requires_grad for value in (*args, *kwargs.values())
            ):
                raise UsageError(
                    "an input needs gradients, and the weights to compute them with are dropped behind the forward "
                    "pass; use torch.no_grad()"
                )
            self.hold(unit)
            try:
                return original(*args, **kwargs)
            finally:
                self.let_go(unit)

        return enter

    def _fill_buffers(self, model: nn.Module) -> None:
        """Read the buffers that the file has; they are small and stay."""
        found: list[tuple[nn.Module, str, Tensor]] = []
        for path, module in model.named_modules():
            for own, buffer in list(module._buffers.items()):
                name = self._name_in_file(f"{path}.{own}".lstrip("."))
                if buffer is None or name not in self._file_by_name:
                    if buffer is not None and buffer.is_meta:
                        raise InvalidInput(f"the file lacks the buffer {name!r}, and the model was made without values")
                    continue
                values = _tensor(self._file_by_name[name], name)
                if values.shape != buffer.shape:
                    raise InvalidInput(f"buffer {name!r} has shape {tuple(buffer.shape)}, in the file {values.shape}")
                device = "cpu" if buffer.is_meta else buffer.device
                found.append((module, own, values.to(device=device, dtype=buffer.dtype, copy=True)))
        for module, own, values in found:
            module._buffers[own] = values

    @staticmethod
    def _without_meta(model: nn.Module) -> dict[int, nn.Parameter]:
        """{id of a parameter: the same, or one on the CPU for it}; a parameter on the meta device cannot be filled."""
        handles: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for own, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                if parameter.is_meta and id(parameter) not in handles:
                    empty = torch.empty((0, 0), dtype=parameter.dtype, device="cpu")
                    handles[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                kept = handles.setdefault(id(parameter), parameter)
                if kept is not parameter:
                    setattr(module, own, kept)
        return handles


def _version(tensor: Tensor) -> int:
    """How often it was changed in place, where that is counted."""
    return -1 if tensor.is_inference() else tensor._version


def persistent(model: nn.Module) -> Iterator[Tensor]:
    """A model's parameters, and the buffers that belong to its weights."""
    for module in model.modules():
        yield from (tensor for tensor in module._parameters.values() if tensor is not None)
        kept = module._buffers.keys() - module._non_persistent_buffers_set
        yield from (tensor for name in kept if (tensor := module._buffers[name]) is not None)


def values_of(source: Source, dtype: torch.dtype) -> Tensor:
    """A copy of a weight's values, on the CPU."""
    return _tensor(source.file, source.name).to(dtype, copy=True)


def _tensor(file: WeightFile, name: str) -> Tensor:
    """A view of a tensor in its file."""
    return torch.from_numpy(file.bits(name)).view(getattr(torch, file.entries[name].dtype))


def _bits(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().contiguous().view(_BITS[tensor.element_size()]).numpy()


def _with_weights(model: nn.Module, whole: tuple[type, ...]) -> Iterator[tuple[str, nn.Module, list[nn.Parameter]]]:
    """(name, module, weights that it needs when it runs) of those that have weights."""
    covered: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in covered:
            continue
        if isinstance(module, whole):
            covered |= {id(part) for part in module.modules()}
            weights = list(module.parameters())
        else:  # lists of weights are modules, too, which nobody calls
            lists = [part for part in module.children() if isinstance(part, _LISTS)]
            covered |= {id(part) for part in lists}
            weights = [weight for part in (module, *lists) for weight in part.parameters(recurse=part is not module)]
        if weights:
            yield name, module, weights


def _refuse_state_dict(*_: Any) -> None:
    raise UsageError("the model's weights are not in memory but in a file; call the ParameterCache's detach() first")
