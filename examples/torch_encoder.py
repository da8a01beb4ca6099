"""A sentence encoder that computes each sentence once: all-MiniLM-L6-v2. Beside it: keras_encoder.py.

Sentences arrive in batches, many of them for the second or tenth time. Rows that were seen are served, the others are
computed, and the order stays. All batches are padded to one width: a row's padding is part of its key.
"""

import time

import torch
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

import minilm
import sentences
from kvcache_torch import KVCache


def load() -> tuple[BertModel, Tokenizer]:
    where = minilm.folder()
    model = BertModel.from_pretrained(where, config=BertConfig.from_pretrained(where)).eval()
    return model, minilm.tokenizer()


def encode(model, tokenizer, texts, batch=32):
    """Unit vectors [N, 384]: the mean over each sentence's tokens."""
    vectors = []
    for at in range(0, len(texts), batch):
        rows = tokenizer.encode_batch(texts[at : at + batch])
        ids = torch.tensor([row.ids for row in rows])
        mask = torch.tensor([row.attention_mask for row in rows])
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        vectors.append(torch.nn.functional.normalize(mean, dim=1))
    return torch.cat(vectors)


def main(count: int = 2000, repeated: float = 0.6) -> tuple[float, float]:
    model, tokenizer = load()
    texts = sentences.stream(count, repeated)
    cache = KVCache(memory="512MiB")
    cache.attach(model)
    with torch.inference_mode():
        encode(model, tokenizer, texts[:32])  # the first run loads and allocates
        start = time.perf_counter()
        plain = encode(model, tokenizer, texts)
        plain_seconds = time.perf_counter() - start
        start = time.perf_counter()
        with cache:
            found = encode(model, tokenizer, texts)
        seconds = time.perf_counter() - start
    stats = cache.stats()
    difference = (found - plain).abs().max().item()
    minilm.show(count, (plain_seconds, seconds), (stats.miss_entries, stats.hit_entries), stats.bytes, difference)
    return plain_seconds, seconds


if __name__ == "__main__":
    main(**minilm.wanted(__doc__))
