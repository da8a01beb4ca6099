"""Invariant 1: random decoders and random scripts, cached equals recompute."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tensorflow as tf
from hypothesis import given, settings

from tests.adapters.keras.models import KerasBackend
from tests.reference_decoder import DecoderConfig, Driver, Script, decoder_configs, scripts

HEADS = (4, 8, 16, 64)


@pytest.fixture(scope="module")
def eager() -> Iterator[None]:
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def check(config: DecoderConfig, script: Script) -> None:
    driver = Driver(config, lambda weights: KerasBackend(config, weights, script.num_blocks))
    driver.run(script)
    driver.report()


@settings(max_examples=8)
@given(decoder_configs(head_sizes=HEADS, max_layers=2), scripts(max_actions=20))
def test_graph(config: DecoderConfig, script: Script) -> None:
    check(config, script)


@settings(max_examples=8)
@given(decoder_configs(head_sizes=HEADS), scripts(max_actions=20))
def test_eager(eager: None, config: DecoderConfig, script: Script) -> None:
    check(config, script)


@settings(max_examples=4)
@given(decoder_configs(head_sizes=HEADS, only_windows=True), scripts(max_actions=20))
def test_eager_windows(eager: None, config: DecoderConfig, script: Script) -> None:
    check(config, script)


@settings(max_examples=5)
@given(decoder_configs(head_sizes=HEADS, convs=True, max_layers=2, block_sizes=(1, 2, 4)), scripts(max_actions=20))
def test_graph_with_convolutions(config: DecoderConfig, script: Script) -> None:
    check(config, script)


@settings(max_examples=6)
@given(decoder_configs(head_sizes=HEADS, convs=True, block_sizes=(1, 2, 4)), scripts(max_actions=20))
def test_eager_with_convolutions(eager: None, config: DecoderConfig, script: Script) -> None:
    check(config, script)


@settings(max_examples=3)
@given(decoder_configs(head_sizes=HEADS, dtypes=("bfloat16",)), scripts(max_actions=16))
def test_eager_bfloat16(eager: None, config: DecoderConfig, script: Script) -> None:
    check(config, script)
