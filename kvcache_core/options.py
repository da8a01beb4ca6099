"""What a caller of ``generate`` can ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import index

import numpy as np

from kvcache_core.errors import InvalidInput, InvalidType
from kvcache_core.sampling import Sampling
from kvcache_core.speculation import Speculation
from kvcache_core.stepping import PREFILL_CHUNK, check_chunk

__all__ = ["GenerateOptions"]


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """What to generate.

    Args:
        max_new_tokens: tokens per continuation, at most; one number, or one per prompt.
        eos_id: stop behind this token (it is kept); several may be given.
        sampling: how a token is chosen.
        n: continuations per prompt; the prompt is computed once.
        num_beams: 1, or the number of beams of a beam search.
        length_penalty: a finished beam's score is its log-probability / length ** length_penalty.
        prefill_chunk: prompt tokens per step over the whole batch, at most; None for no limit.
        speculate: tokens to draft by prompt lookup per row and step, or a :class:`Speculation`; the result is
            the same, in fewer steps where the text repeats itself.
    """

    max_new_tokens: int | Sequence[int]
    eos_id: int | Sequence[int] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    prefill_chunk: int | None = PREFILL_CHUNK
    speculate: int | Speculation | None = None

    def __post_init__(self) -> None:
        for name in ("n", "num_beams"):
            _check_count(name, getattr(self, name))
        if _is_sequence(self.max_new_tokens):
            for value in self.max_new_tokens:  # type: ignore[union-attr]
                _check_count("each of max_new_tokens", value)
        else:
            _check_count("max_new_tokens", self.max_new_tokens)
        check_chunk(self.prefill_chunk)
        _ = self.eos_ids  # raises for what is no token id
        if self.num_beams > 1 and self.sampling.temperature:
            raise InvalidInput("beam search takes no temperature: set temperature=0 or num_beams=1")
        if self.n > 1 and 1 < self.num_beams < self.n:
            raise InvalidInput(f"n={self.n} continuations need at least as many beams, got {self.num_beams}")
        if self.speculation is not None and self.num_beams > 1:
            raise InvalidInput("beam search cannot speculate: set speculate=None or num_beams=1")

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end a row."""
        if self.eos_id is None:
            return frozenset()
        try:  # of a tensor's or array's elements too: they would be equal to no token
            return frozenset(map(index, [self.eos_id] if isinstance(self.eos_id, (int, np.integer)) else self.eos_id))
        except TypeError:
            raise InvalidType(f"eos_id must be a token id or a list of token ids, got {self.eos_id!r}") from None

    @property
    def speculation(self) -> Speculation | None:
        """How to speculate, if at all."""
        given = self.speculate
        return given if given is None or isinstance(given, Speculation) else Speculation(tokens=given)

    def limits(self, prompts: int) -> list[int]:
        """``max_new_tokens`` of each of so many prompts.

        Raises:
            InvalidInput: another number of values was given.
        """
        if not _is_sequence(self.max_new_tokens):
            return [int(self.max_new_tokens)] * prompts  # type: ignore[arg-type]
        values = [int(value) for value in self.max_new_tokens]  # type: ignore[union-attr]
        if len(values) != prompts:
            raise InvalidInput(f"max_new_tokens must be one number or one per prompt ({prompts}), got {len(values)}")
        return values


def _is_sequence(value: object) -> bool:
    return isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise InvalidInput(f"{name} must be a whole number, at least 1; got {value!r}")
