"""Several greedy steps in one graph: the rows' context is gathered once, and the steps stay out of Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from kvcache_keras.kernels import Part, Scoring, attend_parts
from kvcache_keras.levels import Level, joined, merged
from kvcache_keras.step import Step

__all__ = ["choose_greedily"]

_Tensor = Any
_SHORT = 384
"""Tokens of context up to which the multiplication that takes less time to set up is the faster one."""


@dataclass(frozen=True)
class Context:
    """What a layer has before the loop.

    Attributes:
        long: of each row's own context, if that is long; else empty.
        short: the same if it is short, and behind it zeros in the places of what the loop will add.
        size: int32, how much of ``short`` is context.
        levels: keys [G, H, S, D] and values [G, H, S, Dv] of each shared level.
    """

    long: Part
    short: Part
    size: _Tensor
    levels: list[tuple[_Tensor, _Tensor]]


@dataclass
class LoopStep(Step):
    """One step of the loop. New K and V do not go into the store but stand beside the context.

    Args:
        context: per layer, what there was before the loop.
        own: per layer, a short context and what the loop has added so far.
        start: int32 [B, 1], position of the loop's first token.
        at: int32, which step of the loop this is.
        fixed: whether tensors keep their shapes from step to step, as XLA wants.
    """

    context: dict[int, Context] = field(default_factory=dict)
    own: dict[int, Part] = field(default_factory=dict)
    start: _Tensor = None
    at: _Tensor = None
    fixed: bool = False

    @property
    def stored(self) -> _Tensor:
        """int32 [B, 1], the position before the loop."""
        return self.start - 1

    def attend(self, q: _Tensor, k: _Tensor, v: _Tensor, layer: int | None, scoring: Scoring) -> _Tensor:
        """As :meth:`Step.attend`, for one token per row."""
        layer = len(self.used) if layer is None else layer
        self.check(q, k, v, layer, scoring.window)
        self.own[layer] = self._grown(layer, k, v)
        number, context, heads = self.store.layout.group_of(layer), self.context[layer], q.shape[2]
        parts = [context.long, self.own[layer]]
        q = self.grouped(q, layer, scoring)
        sizes, bias = self._sizes(number, parts), self._bias(number, scoring.window)
        values, total, top = attend_parts(q, parts, sizes, bias, scoring)
        if self.levels:
            y = merged([joined(values, total, top), *self.attend_levels(q, number, context.levels, scoring)])
        else:
            y = values / tf.cast(total, values.dtype)
        return tf.reshape(tf.cast(y, q.dtype), (-1, 1, heads, y.shape[3]))

    def _grown(self, layer: int, k: _Tensor, v: _Tensor) -> Part:
        """The layer's own part with the step's K and V, as the store would have rounded them."""
        k, v = self.store.rounded(layer, "k", k), self.store.rounded(layer, "v", v)
        own, number = self.own[layer], self.store.layout.group_of(layer)
        place = self.context[layer].size + self.at
        return Part(self._put(own.keys, k, place, number), self._put(own.values, v, place, number), is_long=False)

    def _put(self, own: _Tensor, new: _Tensor, place: _Tensor, number: int) -> _Tensor:
        """``own`` [B, H, S, D] with [B, 1, H, D] in one place of S: the same in all layers of a group."""
        _, heads, _, size = own.shape
        key = ("place", number, heads, size)
        if key not in self.shared:
            shape = tf.shape(own)
            rows = tf.range(shape[0] * heads) * shape[2] + place
            self.shared[key] = (shape, rows, tf.range(shape[2])[:, None] == place)
        shape, rows, here = self.shared[key]
        if self.fixed:
            return tf.where(here, tf.reshape(new, (-1, heads, 1, size)), own)
        # In place: nobody else reads what this step got, and the next step begins when this one has its token.
        flat = tf.raw_ops.InplaceUpdate(x=tf.reshape(own, (-1, size)), i=rows, v=tf.reshape(new, (-1, size)))
        return tf.reshape(flat, shape)

    def _sizes(self, number: int, parts: list[Part]) -> _Tensor:
        """int32 [parts], the tokens in each: the same in all layers of a group."""
        key = ("sizes", number)
        if key not in self.shared:
            self.shared[key] = tf.stack([tf.shape(part.values)[2] for part in parts])
        return self.shared[key]

    def _bias(self, number: int, window: int | None) -> _Tensor:
        """[B, 1, 1, S]: 0 at what the step's token can see in context and own part, else the least number."""
        key = ("bias", number)
        if key not in self.shared:
            context = self.visible_positions(number)
            added = tf.reduce_sum(self.shared["sizes", number]) - tf.shape(context)[1]
            known, own = context < self.start, self.start + tf.range(added)
            mask = tf.concat((known, own <= self.positions), axis=1)
            if window is not None:
                mask &= tf.concat((context, own), axis=1) > self.positions - window
            wide = tf.float64 if self.dtype == "float64" else tf.float32
            self.shared[key] = tf.where(mask, tf.zeros((), wide), wide.min)[:, None, None]
        return self.shared[key]


def choose_greedily(
    step: Step, run_model: Callable[[Step], _Tensor], eos_ids: _Tensor, *, fixed: bool = False
) -> tuple[_Tensor, _Tensor]:
    """Run a step of N tokens per row of which only the first is known: each next one is the most likely.

    Args:
        step: the step; all its rows have N new tokens, or fewer if ``fixed``: rows and tokens may then be padded.
        run_model: runs the model for a step of one token, [B, 1, V].
        eos_ids: int32 [E]; the loop ends behind the step in which any row chose one of them.
        fixed: keep the shapes of tensors from step to step, as XLA wants.

    Returns:
        The chosen tokens, int32 [B, n] or, if ``fixed``, [B, N] of which n are meant; and their number n, 1 <= n <= N.
        The store holds K and V of the first n tokens.
    """
    layers = [number for number, spec in enumerate(step.store.layout.layers) if spec.kind == "attention"]
    rows, room = tf.unstack(tf.shape(step.tokens))
    context = {layer: _context(step, layer, room, fixed) for layer in layers}
    count = step.last_index[0] + 1
    slots = step.group(step.store.layout.group_of(layers[0]))[0]
    is_row = slots[:, :1] >= step.store.layout.block_size  # a padding row writes to the null block

    def body(at: _Tensor, token: _Tensor, chosen: _Tensor, _: _Tensor, *own: list[_Tensor]) -> list[Any]:
        first = step.positions[:, :1]
        packed = [token, first + at, step.last_index * 0, *step.packed[3:]]
        now = LoopStep(
            step.store, step.dtype, packed, True, step.levels, context=context, start=first, at=at, fixed=fixed
        )
        now.own = {layer: Part(k, v, is_long=False) for layer, k, v in zip(layers, *own, strict=True)}
        token = tf.argmax(run_model(now)[:, 0], axis=-1, output_type=tf.int32)[:, None]
        ended = tf.reduce_any((token == eos_ids) & is_row)
        chosen = tf.where(tf.range(room) == at, token, chosen)
        keys, values = [now.own[layer].keys for layer in layers], [now.own[layer].values for layer in layers]
        return [at + 1, token, chosen, ended, keys, values]

    start = [tf.constant(0), step.tokens[:, :1], tf.zeros((rows, room), tf.int32), tf.constant(False)]
    start += [[context[layer].short.keys for layer in layers], [context[layer].short.values for layer in layers]]
    done, _, chosen, _, *own = tf.while_loop(
        lambda at, token, chosen, ended, *_: (at < count) & ~ended, body, start, parallel_iterations=1
    )
    for layer, keys, values in zip(layers, *own, strict=True):
        size = context[layer].size
        # Zeros in the slots that were planned and not used: see Step.write.
        step.write(layer, "k", tf.transpose(keys[:, :, size:], (0, 2, 1, 3)))
        step.write(layer, "v", tf.transpose(values[:, :, size:], (0, 2, 1, 3)))
    return chosen, done


def _context(step: Step, layer: int, room: _Tensor, fixed: bool) -> Context:
    """What a layer has before the loop of at most ``room`` steps."""
    number = step.store.layout.group_of(layer)
    key = ("known", number)
    if key not in step.shared:
        step.shared[key] = step.visible_positions(number) < step.positions[:, :1]
    k, v = _known(step, layer, step.shared[key])
    count = tf.shape(v)[2]
    long = count if fixed else tf.where(count > _SHORT, count, 0)
    k, own_k, v, own_v = (part for x in (k, v) for part in (x[:, :, :long], _padded(x[:, :, long:], room)))
    long_part = Part(tf.transpose(k, (0, 1, 3, 2)), v, is_long=True)
    levels = []
    for level in step.levels_of(number):
        key = ("known", id(level))
        if key not in step.shared:
            # A group's rows have the same blocks; what one of them knows there they all know.
            known = level.positions(step.store.layout.block_size) < step.positions[:, :1]
            step.shared[key] = tf.gather(known, level.members[:, 0])
        levels.append(_known(step, layer, step.shared[key], level))
    return Context(long_part, Part(own_k, own_v, is_long=False), count - long, levels)


def _padded(x: _Tensor, room: _Tensor) -> _Tensor:
    """[B, H, S, D] with zeros behind it: [B, H, S + room, D]."""
    return tf.pad(x, [[0, 0], [0, 0], [0, room], [0, 0]])


def _known(step: Step, layer: int, known: _Tensor, level: Level | None = None) -> tuple[_Tensor, _Tensor]:
    """Keys and values [B or G, H, S, D], zeros where nothing was before the loop: ``known`` is bool [B or G, S]."""
    k, v = (step.read(layer, name, step.dtype, level) for name in "kv")
    return tuple(tf.where(known[:, None, :, None], x, tf.zeros((), x.dtype)) for x in (k, v))
