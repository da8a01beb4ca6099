"""`with cache:` around an ordinary PyTorch model, in training and in inference. Beside it: keras_train_and_infer.py.

Real data: scikit-learn's handwritten digits (1,797 pictures of 8 x 8). Training under the cache is the same training;
inference skips the pictures that were seen before, until the weights change.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

from kvcache_torch import KVCache


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def train_step(model, optimizer, cache, x, y):
    with cache:  # weights that are being trained are never served: the same loss, the same gradients
        loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def infer(model, cache, x):
    model.eval()
    with torch.inference_mode(), cache:
        return model(x)


def train(model, cache, x, y, epochs):
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    return [
        train_step(model, optimizer, cache, x[at : at + 64], y[at : at + 64])
        for _ in range(epochs)
        for at in range(0, len(x), 64)
    ]


def main(epochs: int = 3) -> None:
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    cache = KVCache(size=len(x))
    model, plain = cache.attach(build()), build()

    losses = train(model, cache, x, y, epochs)
    nowhere = KVCache(size=1)
    nowhere.attach(nn.Identity())  # a cache that knows nothing of the plain model
    same = losses == train(plain, nowhere, x, y, epochs)
    print(f"trained {len(losses)} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}; equal without the cache: {same}")
    print(f"bypassed while training: {cache.stats().bypass_reasons}")

    first, second = infer(model, cache, x), infer(model, cache, x)
    stats = cache.stats()
    accuracy = (second.argmax(1) == y).float().mean()
    print(f"accuracy {accuracy:.3f}; served {stats.hit_entries}, computed {stats.miss_entries}")
    print(
        f"equal without the cache: {torch.allclose(second, plain.eval()(x), atol=1e-5) and torch.equal(first, second)}"
    )

    train(model, cache, x[:64], y[:64], 1)
    infer(model, cache, x)
    print(f"after one more step nothing old is served: {cache.stats().hit_entries == stats.hit_entries}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    main(parser.parse_args().epochs)
