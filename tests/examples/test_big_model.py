"""Models whose weights do not fit, in a short form: the same tokens and outputs, and what was read is said."""

from __future__ import annotations

import importlib
import re

import numpy as np
import pytest

NAMES = ("torch_big_model", "keras_big_model")


def tiny_checkpoint():
    """A random Llama of four layers."""
    smollm2 = importlib.import_module("smollm2")
    config = smollm2.LlamaConfig(50, 16, 32, 4, 4, 2, 4, 1e4, 1e-5, tied=True, max_positions=64)
    random = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return random.normal(0, 0.3, shape).astype(np.float32)

    weights = {"model.embed_tokens.weight": weight(50, 16), "model.norm.weight": np.ones(16, np.float32)}
    for at in (f"model.layers.{layer}." for layer in range(4)):
        weights |= {at + f"{name}_layernorm.weight": np.ones(16, np.float32) for name in ("input", "post_attention")}
        shapes = {"self_attn.q": (16, 16), "self_attn.k": (8, 16), "self_attn.v": (8, 16), "self_attn.o": (16, 16)}
        shapes |= {"mlp.gate": (32, 16), "mlp.up": (32, 16), "mlp.down": (16, 32)}
        weights |= {at + f"{name}_proj.weight": weight(*shape) for name, shape in shapes.items()}
    return smollm2.Checkpoint("tiny", config, weights, None, None)


@pytest.mark.parametrize("name", NAMES)
def test_tiny(name, capsys):
    importlib.import_module(name).main(new_tokens=5, share=0.6, checkpoint=tiny_checkpoint(), steps=60)
    said = capsys.readouterr().out
    assert said.count("equal: True") == 2
    overall, hottest = map(float, re.search(r"hit ratio ([\d.]+), of the 4 hottest experts ([\d.]+)", said).groups())
    assert 0 < overall < hottest


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_smollm2(name, capsys):
    pytest.importorskip("gguf")
    importlib.import_module(name).main(new_tokens=4)
    assert capsys.readouterr().out.count("equal: True") == 2
