"""The linear layer: same values as F.linear on every route."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F

from kvcache_torch import linear, native
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


@pytest.fixture
def operator():
    """``kvcache::linear_few``, in use."""
    if not native.use_native() or not native.has_operator():
        pytest.skip("needs a C and a C++ compiler")
    return torch.ops.kvcache.linear_few


@pytest.mark.parametrize("rows", [(1,), (2, 4), (9,), (40,)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_operator_equals_torch(operator, rows, biased, packed):
    """Also where it hands over: for many rows, and for what is not contiguous."""
    x, weight, bias = torch.randn(*rows, 24), torch.randn(41, 24), torch.randn(41) if biased else None
    if packed:
        pack_weights([weight])
    expected = F.linear(x, weight, bias)
    for given in (x, torch.stack((x, x), -1)[..., 0]):
        torch.testing.assert_close(operator(given, weight, bias), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(operator(x, weight.T.contiguous().T, bias), expected, atol=1e-5, rtol=1e-5)
    torch.library.opcheck(operator, (x, weight, bias))


def test_a_compiled_model_calls_the_operator(operator):
    called = []

    def compiler(graph, _):
        called.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compiler.reset()
    compiled = torch.compile(lambda x, weight: linear(x, weight) + 1, backend=compiler, fullgraph=True, dynamic=True)
    x, weight = torch.randn(3, 24), torch.randn(40, 24)
    torch.testing.assert_close(compiled(x, weight), F.linear(x, weight) + 1, atol=1e-5, rtol=1e-5)
    assert operator in called or operator.default in called


@pytest.mark.parametrize("name", ["function", "linear", "linear_few"])
def test_other_shapes_are_for_pytorch(operator, name):
    """Its error, or its answer: a kernel that believed them would read past the end."""
    call = linear if name == "function" else getattr(torch.ops.kvcache, name)
    weight = torch.randn(5, 16)
    for x, bias in ((torch.randn(2, 8), None), (torch.randn(2, 32), None), (torch.randn(2, 16), torch.randn(3))):
        with pytest.raises(RuntimeError):
            call(x, weight, bias)
    x, one = torch.randn(2, 16), torch.randn(1)
    torch.testing.assert_close(call(x, weight, one), F.linear(x, weight, one), atol=1e-5, rtol=1e-5)
