"""Decode steps that XLA compiles."""

from __future__ import annotations

import numpy as np
import pytest

from kvcache_core.errors import UsageError
from tests.adapters.keras.models import KerasBackend
from tests.reference_decoder import DecoderConfig, Driver, Script, make_weights


def test_random_rows_and_lengths() -> None:
    """Invariant 1, with a window, forks and a growing context."""
    config = DecoderConfig(windows=(None, 9), heads=4, kv_heads=2, head_size=8, v_head_size=4)
    rng = np.random.default_rng(0)

    def made(weights: dict[str, np.ndarray]) -> KerasBackend:
        backend = KerasBackend(config, weights, 60)
        backend.cache.compile()
        return backend

    actions = [("open", 0, 20, (1,), 0), ("step", ((0, 64, 0),)), ("open", 1, 7, (2,), 0), ("step", ((1, 64, 0),))]
    actions += [("fork", 0), ("truncate", 2, 3)]
    for _ in range(16):
        actions.append(("step", tuple((row, 1, int(rng.integers(99))) for row in range(int(rng.integers(1, 4))))))
    driver = Driver(config, made)
    driver.run(Script(60, tuple(actions)))
    assert driver.backend.cache.runner.traces == {"prefill": 1, "compiled": 1}


def test_state_layers_are_refused() -> None:
    config = DecoderConfig(convs=((2, 1),))
    with pytest.raises(UsageError, match="state layers"):
        KerasBackend(config, make_weights(config), 20).cache.compile()


def test_compiling_ends_when_the_model_is_detached() -> None:
    config = DecoderConfig()
    cache = KerasBackend(config, make_weights(config), 20).cache
    cache.compile()
    model = cache.model
    cache.detach()
    cache.attach(model)
    seq = cache.open([1, 2, 3])
    cache.step([seq], [[1, 2, 3]])
    cache.step([seq], [[4]])
    assert cache.runner.traces == {"prefill": 1, "decode": 1}
