"""A new head on a frozen CNN: features are computed once per picture, not once per epoch. Beside it: keras_images.py.

The CNN is trained here, on the digits 0 to 4 of real handwritten digits (MNIST); then its trunk is frozen and a new
head learns all ten, from shuffled batches.
"""

import argparse
import contextlib
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mnist
from kvcache_torch import KVCache


def build_trunk(width: int = 32) -> nn.Module:
    """Three stages of two convolutions, with `width` channels, then twice and four times as many."""
    torch.manual_seed(0)
    w = width
    return nn.Sequential(
        *(nn.Conv2d(1, w, 3, padding=1), nn.BatchNorm2d(w), nn.ReLU()),
        *(nn.Conv2d(w, w, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(w, 2 * w, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(2 * w, 2 * w, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(2 * w, 4 * w, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(4 * w, 4 * w, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, 64), nn.ReLU()),
    )


def pictures(count, keep=range(10)):
    x, y = mnist.load(count, keep)
    return TensorDataset(torch.from_numpy(x[:, None]), torch.from_numpy(y))


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


def main(count: int = 5000, pretrain_epochs: int = 3, epochs: int = 5) -> tuple[float, float]:
    trunk = build_trunk()
    fit(trunk, new_head(5), pictures(count, range(5)), pretrain_epochs)
    trunk.requires_grad_(False).eval()

    data = pictures(count)
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
    parser.add_argument("--count", type=int, default=5000, help="pictures")
    parser.add_argument("--pretrain-epochs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    main(**vars(parser.parse_args()))
