"""One call of an attached model inside ``with cache:``: on concrete ids, and in a graph of the user's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from kvcache_core.errors import UsageError
from kvcache_core.frontend import Call
from kvcache_keras.context import is_xla, local, not_recording
from kvcache_keras.hostcall import held_by_graph
from kvcache_keras.packing import pack, signature
from kvcache_keras.runner import last_of, place
from kvcache_keras.tokenmodel import model_input
from kvcache_keras.transparent import Rows, output_slots, rows_of

if TYPE_CHECKING:
    from kvcache_keras.attach import AttachedCall

__all__ = ["EagerCall", "GraphCall"]

_Tensor = Any
_LATEST = "_kvcache_latest"
"""The attribute of a graph under construction that holds the result of its latest cached call."""
_NO_GRADIENT = "KVCacheServed"
_HIDDEN = "token 0 is padding to this model (mask_zero=True); say with lengths= where padding is"


class EagerCall:
    """One call of the model on concrete ids."""

    def __init__(self, attached: AttachedCall, x: _Tensor, lengths: Any, mask: Any, plain: dict[str, Any]) -> None:
        self.cache, self.original, self.model = attached.cache, attached.original, attached.model
        self.x, self.plain_arguments = x, plain
        self.rows = rows_of(x.numpy(), _values(lengths), _values(mask))

    def plain(self, reason: str | None) -> _Tensor:
        """As outside; zeros at padding."""
        if reason:
            self.cache.bypass(self.rows.count, reason)
        rows = self.rows
        if rows.is_full:
            ids = self.x
        else:
            ids = tf.constant(rows.aligned(), self.x.dtype)
        output = self.original(model_input(self.model, ids), **self.plain_arguments)
        if reason is not None and self.cache.outputs == "last":
            return last_of(output, rows.last)
        return output if rows.is_full else place(output, rows.columns())

    def cached(self) -> _Tensor:
        """Compute what is missing, and put stored and new outputs together."""
        cache, rows = self.cache, self.rows
        cache.pending.roll_back_stale()
        cache.refresh()
        if any(map(cache.hides, rows.tokens)):
            return self.plain(_HIDDEN)
        for row in rows.tokens:
            cache.check_vocabulary(row)
        with not_recording(), cache.call(rows.tokens) as call:
            if call is None:
                return self.plain("")
            if cache.outputs == "last":
                return cache.runner.run(call.plan)
            return cache.runner.run_all(call.plan, output_slots(call.plan.groups[-1], rows))


class GraphCall:
    """One call of the model in a user's graph: ids are known only when it runs."""

    def __init__(self, attached: AttachedCall, x: _Tensor, lengths: Any, mask: Any, plain: dict[str, Any]) -> None:
        self.cache, self.original, self.model = attached.cache, attached.original, attached.model
        self.x, self.lengths, self.mask = x, lengths, mask
        self.plain_arguments = plain
        self.padded = lengths is not None or mask is not None
        self.all_outputs = self.cache.outputs == "all"

    def plain(self, reason: str | None) -> _Tensor:
        """As outside; zeros at padding."""
        if reason:
            self.cache.bypass(0, reason)
        only_last = reason is not None and not self.all_outputs
        if not self.padded:
            output = self.original(model_input(self.model, self.x), **self.plain_arguments)
            return output[:, -1:] if only_last else output
        aligned, columns, last = self._host(self._align, [tf.int32] * 3, [[None, None], [None, None], [None]])
        return self._plain(aligned, columns, last, only_last=only_last)

    def cached(self) -> _Tensor:
        """Decide while the graph runs what is computed."""
        cache = self.cache
        runner = cache.runner
        layout = cache.store.layout
        kinds = [kind for kind, _ in layout.groups if self.all_outputs or kind != "output"]
        count, packed = len(kinds), signature(kinds, layout.block_size, None)
        shapes = [[], [], [None, None], [None, None], [None]]  # fits, number, aligned, columns, last
        shapes += [[None, None], *([None, 2] for _ in range(count)), *(spec.shape for spec in packed)]
        types_ = [tf.bool, tf.int64, *[tf.int32] * (len(shapes) - 2)]
        self._weights = cache.weights_of(self.model)
        self._mode = self._weights.mode()
        samples = self._weights.sample()
        graph = tf.compat.v1.get_default_graph()
        with tf.control_dependencies(getattr(graph, _LATEST, [])):  # an earlier call's tokens are there to be found
            fits, number, aligned, columns, last, slots, *rest = self._host(self._begin, types_, shapes, samples)

        def through_cache() -> _Tensor:
            pairs, arrays = rest[:count], rest[count:]
            for group, copies in enumerate(pairs):
                tf.cond(tf.size(copies) > 0, lambda g=group, c=copies: _copy(cache.store, g, c, arrays[3]), _nothing)
            if self.all_outputs:
                y = runner.function("outputs")(slots, *arrays)
            else:
                y = runner.function("prefill")(*arrays)
            with tf.control_dependencies([y]):
                done = tf.numpy_function(held_by_graph(self._finish), [number], tf.int64)
            with tf.control_dependencies([done]):
                return tf.identity(y)

        y = tf.cond(fits, through_cache, lambda: self._plain(aligned, columns, last, only_last=not self.all_outputs))
        width = self.x.shape[1] if self.all_outputs else 1
        y.set_shape((self.x.shape[0], width, *cache.spec.output_shape))
        y = _without_gradient(y)
        setattr(graph, _LATEST, [y])
        return y

    def _plain(self, aligned: _Tensor, columns: _Tensor, last: _Tensor, *, only_last: bool) -> _Tensor:
        x = tf.cast(aligned, self.x.dtype) if self.padded else self.x
        output = self.original(model_input(self.model, x), **self.plain_arguments)
        if only_last:
            return last_of(output, last)
        return place(output, columns) if self.padded else output

    def _host(self, function: Any, types_: list[Any], shapes: list[Any], samples: Any = ()) -> list[_Tensor]:
        if is_xla():
            raise UsageError(
                "padded rows are aligned by the host, which a graph compiled by XLA cannot ask: call the model without "
                "lengths and masks, or in a graph with jit_compile=False"
            )
        arguments = [self.x]
        arguments += [tf.convert_to_tensor(given) for given in (self.lengths, self.mask) if given is not None]
        results = tf.numpy_function(held_by_graph(function), [*arguments, *samples], types_)
        for result, shape in zip(results, shapes, strict=True):
            result.set_shape(shape)
        return list(results)

    def _rows(self, arguments: tuple[NDArray[Any], ...]) -> tuple[Rows, tuple[NDArray[Any], ...]]:
        ids, *rest = arguments
        lengths = rest.pop(0) if self.lengths is not None else None
        mask = rest.pop(0) if self.mask is not None else None
        return rows_of(ids, lengths, mask), tuple(rest)

    def _align(self, *arguments: NDArray[Any]) -> list[NDArray[Any]]:
        rows, _ = self._rows(arguments)
        return [rows.aligned(), rows.columns(), rows.last]

    def _begin(self, *arguments: NDArray[Any]) -> list[NDArray[Any]]:
        """Runs on the host, in a thread of TensorFlow's."""
        cache = self.cache
        rows, samples = self._rows(arguments)
        aligned = [rows.aligned(), rows.columns(), rows.last]
        cache.pending.roll_back_stale()
        hidden = any(map(cache.hides, rows.tokens))
        if hidden:
            cache.bypass(rows.count, _HIDDEN)
        if cache.model is not self.model or hidden:
            return [np.array(False), np.array(0), *aligned, *self._no_plan()]
        local.samples, local.mode = self._weights.digest_of_samples(samples), self._mode
        try:
            cache.refresh()
        finally:
            local.samples = None
        for row in rows.tokens:
            cache.check_vocabulary(row)
        context = cache.call(rows.tokens)
        call = context.__enter__()
        if call is None:
            context.__exit__(None, None, None)
            return [np.array(False), np.array(0), *aligned, *self._no_plan()]
        try:
            arrays = self._plan_arrays(call, rows)
        except BaseException as error:
            context.__exit__(type(error), error, None)
            raise
        return [np.array(True), np.array(cache.pending.add(context)), *aligned, *arrays]

    def _plan_arrays(self, call: Call, rows: Rows) -> list[NDArray[Any]]:
        groups = call.plan.groups
        slots = output_slots(groups[-1], rows) if self.all_outputs else np.zeros((0, 0), np.int32)
        copies = [group.copies.astype(np.int32).reshape(-1, 2) for group in groups]
        return [slots, *copies, *pack(call.plan, self.cache.store)]

    def _no_plan(self) -> list[NDArray[Any]]:
        """Empty arrays in the place of a plan's: they are not used."""
        layout = self.cache.store.layout
        kinds = [kind for kind, _ in layout.groups if self.all_outputs or kind != "output"]
        count, packed = len(kinds), signature(kinds, layout.block_size, None)
        shapes = [(0, 0), *[(0, 2)] * count, *(tuple(size or 0 for size in spec.shape) for spec in packed)]
        return [np.zeros(shape, np.int32) for shape in shapes]

    def _finish(self, number: NDArray[Any]) -> NDArray[Any]:
        self.cache.pending.finish(int(number))
        return number


def _copy(store: Any, group: int, pairs: _Tensor, stride: _Tensor) -> _Tensor:
    store.copy_rows(group, pairs, stride)
    return tf.constant(0)


def _nothing() -> _Tensor:
    return tf.constant(0)


def _without_gradient(y: _Tensor) -> _Tensor:
    # Not tf.custom_gradient: TensorFlow would keep what that makes for each graph, and so the graph, for good.
    with tf.compat.v1.get_default_graph().gradient_override_map({"Identity": _NO_GRADIENT}):
        return tf.identity(y)


@tf.RegisterGradient(_NO_GRADIENT)
def _no_gradient(*_: Any) -> Any:
    raise UsageError(
        "no gradient flows through a call that used the cache; trace the tf.function inside its GradientTape, or call "
        "the model outside `with cache:`"
    )


def _values(given: Any) -> Any:
    return given.numpy() if tf.is_tensor(given) else given
