"""A tiny language model for the examples, at hand or in a folder as transformers writes one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from smollm2 import Checkpoint, LlamaConfig


def tiny_checkpoint(vocab: int = 50) -> Checkpoint:
    """A random Llama of two layers."""
    config = LlamaConfig(vocab, 16, 32, 2, 4, 2, 4, 1e4, 1e-5, tied=True, max_positions=128)
    random = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return random.normal(0, 0.3, shape).astype(np.float32)

    weights = {"model.embed_tokens.weight": weight(vocab, 16), "model.norm.weight": np.ones(16, np.float32)}
    for at in (f"model.layers.{layer}." for layer in range(2)):
        weights |= {at + f"{name}_layernorm.weight": np.ones(16, np.float32) for name in ("input", "post_attention")}
        shapes = {"self_attn.q": (16, 16), "self_attn.k": (8, 16), "self_attn.v": (8, 16), "self_attn.o": (16, 16)}
        shapes |= {"mlp.gate": (32, 16), "mlp.up": (32, 16), "mlp.down": (16, 32)}
        weights |= {at + f"{name}_proj.weight": weight(*shape) for name, shape in shapes.items()}
    return Checkpoint("tiny", config, weights, None, None)


def tiny_folder(folder: Path, vocab: int) -> Path:
    """The same in a folder, with a tokenizer that knows no words."""
    checkpoint = tiny_checkpoint(vocab)
    config = checkpoint.config
    save_file(checkpoint.weights, folder / "model.safetensors")
    said = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_positions,
    }
    (folder / "config.json").write_text(json.dumps(said))
    Tokenizer(models.WordLevel({"?": 0}, unk_token="?")).save(str(folder / "tokenizer.json"))
    return folder
