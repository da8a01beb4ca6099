"""A new head on a frozen CNN: features are computed once per picture, not once per epoch. Beside it: keras_images.py.

The CNN is trained here, on the digits 0 to 4 of scikit-learn's real handwritten digits; then its trunk is frozen and a
new head learns all ten, from shuffled batches.
"""

import argparse
import contextlib
import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kvcache_torch import KVCache


def build_trunk() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(128, 128, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2048, 64),
        nn.ReLU(),
    )


def digits(keep=range(10)):
    data = load_digits()
    chosen = torch.tensor([label in keep for label in data.target])
    x = torch.tensor(data.images[:, None] / 16, dtype=torch.float32)
    return TensorDataset(x[chosen], torch.tensor(data.target)[chosen])


def fit(trunk, head, data, epochs, around=contextlib.nullcontext):
    """Train what wants gradients; the losses and the seconds."""
    weights = [weight for weight in (*trunk.parameters(), *head.parameters()) if weight.requires_grad]
    optimizer = torch.optim.Adam(weights, 1e-3)
    order = torch.Generator().manual_seed(1)
    losses, start = [], time.perf_counter()
    for _ in range(epochs):
        for x, y in DataLoader(data, batch_size=64, shuffle=True, generator=order):
            with around():
                features = trunk(x)
            loss = nn.functional.cross_entropy(head(features), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, time.perf_counter() - start


def new_head(classes):
    torch.manual_seed(2)
    return nn.Linear(64, classes)


def main(pretrain_epochs: int = 3, epochs: int = 5) -> tuple[float, float]:
    trunk = build_trunk()
    fit(trunk, new_head(5), digits(range(5)), pretrain_epochs)
    trunk.requires_grad_(False).eval()

    data = digits()
    head, expected = new_head(10), new_head(10)
    losses, plain_seconds = fit(trunk, expected, data, epochs)

    cache = KVCache(size=len(data))
    cache.attach(trunk)
    cached_losses, seconds = fit(trunk, head, data, epochs, lambda: cache)

    stats = cache.stats()
    same = torch.allclose(torch.tensor(losses), torch.tensor(cached_losses), rtol=1e-3, atol=1e-4)
    ratio = seconds / plain_seconds
    print(f"{epochs} epochs: {plain_seconds:.2f} s without the cache, {seconds:.2f} s with it ({ratio:.2f})")
    print(f"features computed {stats.miss_entries}, served {stats.hit_entries}; losses equal: {same}")
    print(f"seconds saved {stats.seconds_saved:.2f}, spent {stats.seconds_spent:.2f}")
    assert same
    return plain_seconds, seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrain-epochs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    main(**vars(parser.parse_args()))
