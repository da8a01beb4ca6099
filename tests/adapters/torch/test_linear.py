"""The linear layer: same values as F.linear on every route."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F

from kvcache_torch import linear
from kvcache_torch.linear import _packed, pack_weights, unpack_weights


@pytest.mark.parametrize("rows", [(1,), (3,), (2, 5), (1, 1)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_torch(rows, biased, packed):
    x, weight = torch.randn(*rows, 24), torch.randn(40, 24)
    bias = torch.randn(40) if biased else None
    if packed:
        assert pack_weights([weight]) == weight.nbytes
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-5, rtol=1e-5)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias), atol=1e-5, rtol=1e-5)


def test_a_changed_weight_is_packed_again():
    x, weight = torch.randn(4, 24), torch.randn(40, 24)
    pack_weights([weight])
    weight.mul_(2)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), atol=1e-5, rtol=1e-5)


def test_packed_copies_go_with_their_weights():
    gc.collect()
    before = len(_packed)
    weight = torch.randn(40, 24)
    pack_weights([weight, torch.randn(3), weight.double()])
    assert len(_packed) == before + 1
    unpack_weights([weight])
    assert len(_packed) == before
    pack_weights([weight])
    del weight
    gc.collect()
    assert len(_packed) == before


def test_gradients_and_other_dtypes_go_through_torch():
    x, weight = torch.randn(4, 24, requires_grad=True), torch.randn(40, 24)
    linear(x, weight).sum().backward()
    assert x.grad is not None
    bias = torch.randn(40, requires_grad=True)  # the only one to be trained
    linear(x.detach(), weight, bias).sum().backward()
    assert bias.grad is not None
    assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))


@pytest.mark.parametrize("rows", [*range(1, 10), 16])
@pytest.mark.parametrize(("size", "out"), [(576, 960), (24, 41), (7, 3), (1, 1)])
@pytest.mark.usefixtures("compiled")
def test_the_kernel_in_c_is_as_exact_as_torch(rows, size, out):
    torch.manual_seed(0)
    wide, weight, bias = torch.randn(rows, 2 * size), torch.randn(out, size), torch.randn(out)
    for x in (wide[:, :size].contiguous(), wide[:, ::2]):
        exact = F.linear(x.double(), weight.double(), bias.double())
        own = (F.linear(x, weight, bias).double() - exact).abs().max()
        error = (linear(x, weight, bias).double() - exact).abs().max()
        assert error <= 1.5 * own + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
