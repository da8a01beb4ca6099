"""A layer's results kept per sample, in graphs of the user's own: decided while the graph runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from kvcache_core.activation import NUMBER_IN_OUTPUT, Bypassed
from kvcache_core.tree import Tree, flatten
from kvcache_keras.context import not_recording
from kvcache_keras.graphsite import Traced
from kvcache_keras.hostcall import held_by_graph

if TYPE_CHECKING:
    from kvcache_keras.activation import Site

__all__ = ["ADDED_LOSS", "call_in_graph"]

ADDED_LOSS = "the module added a loss, by add_loss or an activity regularizer"

_Tensor = Any


def call_in_graph(site: Site, original: Callable[..., Any], leaves: Sequence[_Tensor], tree: Tree) -> Any:
    """The attached layer on ``leaves``; which samples are computed is decided while the graph runs.

    One call of the host looks them up, and brings the whole result if all are there; another one keeps what was
    computed.
    """
    if site.side_effects:
        raise Bypassed("the module was attached with side_effects=True", expected=True)
    leaves = [tf.convert_to_tensor(leaf) for leaf in leaves]
    args, kwargs = tree.rebuild(leaves)
    split = _which_split(site, args, kwargs, leaves)
    with not_recording():
        results, shape, known = _looked_up_or_computed(site, original, leaves, tree, split)
    batch = next((leaf.shape[0] for leaf, mine in zip(leaves, split, strict=True) if mine), None)
    for result, size in zip(results, known, strict=True):
        result.set_shape([batch, *size[1:]])
    return shape.rebuild([tf.stop_gradient(result) for result in results])


def _looked_up_or_computed(
    site: Site, original: Callable[..., Any], leaves: Sequence[_Tensor], tree: Tree, split: Sequence[bool]
) -> tuple[list[_Tensor], Tree, list[tf.TensorShape]]:
    """The result's tensors, its structure, and the tensors' shapes as far as the module says them."""
    found: list[Any] = []
    losses = [(layer, len(layer._losses)) for layer in site.module._flatten_layers()]

    def compute(rows: _Tensor) -> list[_Tensor]:
        some = [tf.gather(leaf, rows) if mine else leaf for leaf, mine in zip(leaves, split, strict=True)]
        for leaf, part in zip(leaves, some, strict=True):
            part.set_shape([None if leaf is not part else part.shape[0], *leaf.shape[1:]] if leaf.shape.rank else [])
        args, kwargs = tree.rebuild(some)
        outputs, shape = flatten(original(*args, **kwargs), site.is_tensor)
        if any(len(layer._losses) > before for layer, before in losses):
            for layer, before in losses:
                del layer._losses[before:]  # tensors of this graph, which nobody outside can use
            raise Bypassed(ADDED_LOSS)
        if shape.has_number():
            raise Bypassed(NUMBER_IN_OUTPUT)
        if not outputs or any(not output.shape.rank or output.shape[0] is not None for output in outputs):
            raise Bypassed(f"the output has no row per sample (its shapes are {[o.shape for o in outputs]})")
        found[:] = [shape, [output.dtype for output in outputs], [output.shape for output in outputs]]
        return _flat(outputs)

    # Traced before the call that decides about it: only now is it known what that call brings.
    spec = (tf.TensorSpec([None], tf.int64),)
    computing = tf.function(compute, input_signature=spec, autograph=False).get_concrete_function()
    shape, types, known = found
    traced = Traced(tree, split, [leaf.dtype for leaf in leaves], site.mode(), shape)
    weights, nothing = site.weights, np.zeros(0, np.int64)

    def begin(*arrays: Any) -> list[Any]:
        state = weights.digest_of_samples(arrays[len(leaves) :])
        number, rows, results = site.begin(traced, arrays[: len(leaves)], state)
        if results is not None:
            return [nothing, *results]
        return [np.array([number, *rows], np.int64), *(np.zeros(0, dtype.as_numpy_dtype) for dtype in types)]

    def finish(number: Any, *outputs: Any) -> list[Any]:
        number, rows, results = site.finish(int(number), outputs)
        return [np.array([number, *rows], np.int64) if rows else nothing, *results]

    def step(call: _Tensor, *_: _Tensor) -> list[_Tensor]:
        return _of_host(finish, [call[0], *_flat(computing(call[1:]))], types)

    def steps(call: _Tensor, *results: _Tensor) -> list[_Tensor]:
        open_shapes = [call.shape, *[tf.TensorShape(None)] * len(results)]
        return list(tf.while_loop(_computes, step, [call, *results], open_shapes)[1:])

    first = _of_host(begin, [*leaves, *weights.sample()], types)
    return _unless_there(steps, first), shape, known


def _of_host(function: Callable[..., list[Any]], inputs: Sequence[_Tensor], types: Sequence[tf.DType]) -> list[_Tensor]:
    """What the host gives: int64 [1 + R], the call's number and the samples to compute, or [0]; the results.

    The former are one tensor, because each one that leaves the host or goes round a loop takes its time.
    """
    call, *results = tf.numpy_function(held_by_graph(function), inputs, [tf.int64, *types])
    call.set_shape([None])
    return [call, *results]


def _computes(call: _Tensor, *_: _Tensor) -> _Tensor:
    return tf.size(call) > 0


def _unless_there(steps: Callable[..., list[_Tensor]], first: Sequence[_Tensor]) -> list[_Tensor]:
    """The results that the host gave, or those of ``steps`` where samples are to be computed.

    An ``If`` that stays one operation: ``tf.cond`` and ``tf.while_loop`` become a few for each tensor that is read
    inside, and these run in each call.
    """
    specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in first]
    computed = tf.function(steps, input_signature=specs, autograph=False).get_concrete_function()
    read = computed.captured_inputs
    specs += [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in read]
    there = tf.function(lambda *given: given[1 : len(first)], input_signature=specs, autograph=False)
    found: list[_Tensor] = tf.raw_ops.If(
        cond=_computes(*first),
        input=[*first, *read],
        Tout=[result.dtype for result in first[1:]],
        then_branch=computed,
        else_branch=there.get_concrete_function(),
    )
    return found


def _flat(tensors: Any) -> list[_Tensor]:
    found: list[_Tensor] = tf.nest.flatten(tensors)
    return found


def _which_split(site: Site, args: Any, kwargs: Any, leaves: Sequence[_Tensor]) -> list[bool]:
    """Per tensor, whether its rows are the samples'. An open first dimension counts as the batch's."""
    declared = [False] * len(flatten(args, site.is_tensor)[0])
    for name, value in kwargs.items():
        declared += [name in site.shared] * len(flatten(value, site.is_tensor)[0])
    sizes = [leaf.shape[0] if leaf.shape.rank else 0 for leaf in leaves]
    batch = next((size for size, shared in zip(sizes, declared, strict=True) if size != 0 and not shared), 0)
    if batch == 0:
        raise Bypassed("the input has no samples: no tensor with a first dimension of at least 1", expected=True)
    return [
        size != 0 and not shared and (size == batch or size is None)
        for size, shared in zip(sizes, declared, strict=True)
    ]
