"""Invariant 1 in PyTorch: random decoders, random scripts, cached equals full recompute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.adapters.torch.models import TorchBackend
from tests.reference_decoder import DecoderConfig, Driver, Script, decoder_configs, scripts

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CONTEXTS = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}


def run(config: DecoderConfig, script: Script, **options: Any) -> Driver:
    driver = Driver(config, lambda weights: TorchBackend(config, weights, script.num_blocks, **options))
    driver.run(script)
    return driver


@given(config=decoder_configs(dtypes=["float32"], max_layers=4), script=scripts())
@settings(max_examples=90)
def test_eager(config, script):
    run(config, script).report()


@given(config=decoder_configs(dtypes=["float64"], max_layers=4), script=scripts())
@settings(max_examples=40)
def test_eager_float64(config, script):
    run(config, script).report()


@given(config=decoder_configs(only_windows=True), script=scripts(max_blocks=10))
@settings(max_examples=25)
def test_eager_windows_and_little_room(config, script):
    run(config, script)


@given(config=decoder_configs(), script=scripts(max_actions=16), context=st.sampled_from(sorted(CONTEXTS)))
@settings(max_examples=15)
def test_under_inference_mode_and_no_grad(config, script, context):
    with CONTEXTS[context]():
        run(config, script)


@given(config=decoder_configs(convs=True, dtypes=["float32"], block_sizes=(1, 2, 3, 4)), script=scripts())
@settings(max_examples=30)
def test_convolutions(config, script):
    run(config, script).report()


@given(config=decoder_configs(dtypes=["bfloat16"], max_layers=2), script=scripts(max_actions=16))
@settings(max_examples=25)
def test_bfloat16(config, script):
    run(config, script)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@given(config=decoder_configs(max_layers=2), script=scripts(max_actions=9))
@settings(max_examples=3)
def test_compiled(compiler, config, script):
    """One graph per decoder (fullgraph=True); the fault comes behind the model, where a compiled model can stop."""
    torch._dynamo.reset()
    run(config, script, compiler=compiler)


def test_slots_that_only_look_adjacent():
    """After a truncation the window layer's step ran from slot 18 to 40 in 23 tokens, with slots 10 .. 14 inside."""
    config = DecoderConfig(windows=(None, 2), heads=1, width=8, block_size=5)
    actions = (("open", 0, 35, (0,), 0), ("step", ((0, 20, 0),)), ("truncate", 0, 7), ("step", ((0, 50, 0),)))
    run(config, Script(8, actions))


@CUDA
@given(config=decoder_configs(), script=scripts())
@settings(max_examples=50)
def test_cuda(config, script):
    run(config, script, device="cuda")
