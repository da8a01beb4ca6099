"""Linear layers at the speed of memory: a decode step is little more than reading the weights once."""

from __future__ import annotations

import platform
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcache_torch.native import active, has_operator

__all__ = ["linear", "pack_weights", "unpack_weights"]

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

_PACKED_FOR = 8
"""Rows that a packed weight is laid out for; oneDNN takes the same layout for every number from two rows on."""

_FEW, _FEW_PACKED = 32, 8
"""Rows up to which the kernel in C is faster than oneDNN, and than oneDNN with packed weights, as
`python tests/bench/torch_linear.py` has measured it."""
_ONEDNN_ON_INTEL = range(4, 64)
"""Rows for which oneDNN is faster than MKL on a CPU of MKL's own maker, by the same measurement."""


def _mkl_is_fast() -> bool:
    """Whether ``F.linear`` is MKL's on a CPU of its own maker: on others it reads weights at half the speed."""
    try:
        cpu = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpu = platform.processor()
    return torch.backends.mkl.is_available() and "GenuineIntel" in cpu


_MKL_IS_FAST = _mkl_is_fast()


class _Packed:
    """A weight's copy in oneDNN's own order, and the state of the weight that it was made from."""

    def __init__(self, weight: Tensor) -> None:
        self.of = weakref.ref(weight)
        self.version = weight._version
        self.values = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _PACKED_FOR)

    def fits(self, weight: Tensor) -> bool:
        """Whether it still holds the values of ``weight``, which may be another view of the same memory."""
        mine = self.of()
        return mine is not None and mine.data_ptr() == weight.data_ptr() and mine._version == self.version


_packed: dict[tuple[int, torch.Size], _Packed] = {}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, faster where a few rows meet many float32 weights on a CPU.

    There the usual BLAS reads the weights at a third of the memory's speed; oneDNN, which PyTorch carries along, reads
    them twice as fast, and three times from weights that :func:`pack_weights` has brought into its order. So does,
    without a copy, a kernel in C that is in use after ``cache.compile()``, for up to 32 rows. On an Intel CPU
    ``F.linear`` is MKL's, which is fast for fewer than 4 rows, and faster than oneDNN for many. Everywhere else
    (another dtype or device, autocast, gradients wanted) this is ``F.linear``.

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out] or None.

    Returns:
        [..., out].

    Example:
        >>> import torch
        >>> x, weight = torch.randn(2, 8), torch.randn(5, 8)
        >>> torch.allclose(linear(x, weight), torch.nn.functional.linear(x, weight), atol=1e-5)
        True
    """
    if not _HAS_ONEDNN or x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    wants_gradient = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and wants_gradient:
        return F.linear(x, weight, bias)
    if not torch.compiler.is_compiling():
        return _fast_linear(x, weight, bias)
    if x.numel() == x.shape[-1] and active() is None:
        # One row: the compiler makes one loop of this.
        product = (weight * x.reshape(-1)).sum(-1)
        return (product if bias is None else product + bias).reshape(*x.shape[:-1], -1)
    operator = torch.ops.kvcache.linear_few if has_operator() else torch.ops.kvcache.linear
    return operator(x, weight, bias)


def pack_weights(weights: Iterable[Tensor]) -> int:
    """Keep a copy of each matrix in the order that oneDNN reads fastest; :func:`linear` uses it from then on.

    The copies live as long as their weights; one whose weight changed in place is made again at its next use.

    Args:
        weights: tensors; what is no float32 matrix on the CPU is left out.

    Returns:
        Bytes that the copies take.
    """
    size = 0
    for weight in weights:
        if _HAS_ONEDNN and weight.dim() == 2 and weight.dtype == torch.float32 and weight.device.type == "cpu":
            if weight.is_inference() or not weight.is_contiguous():
                continue
            key = (weight.data_ptr(), weight.shape)
            _packed[key] = _Packed(weight)
            weakref.finalize(weight, _packed.pop, key, None)
            size += weight.nbytes
    return size


def unpack_weights(weights: Iterable[Tensor]) -> None:
    """Drop the copies that :func:`pack_weights` made."""
    for weight in weights:
        _packed.pop((weight.data_ptr(), weight.shape), None)


def _fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    kernels, packed = active(), _packed_of(weight)
    few = _FEW if packed is None else _FEW_PACKED
    if kernels is not None and x.numel() <= few * x.shape[-1] and _fits(x, weight, bias):
        return kernels.linear(x, weight, bias)
    if _MKL_IS_FAST and x.numel() // max(1, x.shape[-1]) not in _ONEDNN_ON_INTEL:
        return F.linear(x, weight, bias)
    values = weight if packed is None else packed.values
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, values, bias, "none", [], None)
    return result


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the shapes are those that the kernel reads: for others PyTorch knows the answer, or the error."""
    matrix = weight.is_contiguous() and weight.dim() == 2 and x.shape[-1] == weight.shape[1]
    return matrix and (bias is None or bias.shape == weight.shape[:1])


def _packed_of(weight: Tensor) -> _Packed | None:
    """The weight's packed copy, made again if the weight has changed."""
    if not _packed:
        return None
    key = (weight.data_ptr(), weight.shape)
    packed = _packed.get(key)
    if packed is not None and not packed.fits(weight):
        del _packed[key]
        pack_weights([weight])
        packed = _packed.get(key)
    return packed


_library = torch.library.Library("kvcache", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("linear", _fast_linear, "CPU")


@torch.library.register_fake("kvcache::linear", lib=_library)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
