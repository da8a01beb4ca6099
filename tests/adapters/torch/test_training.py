"""Training under ``with cache:``: the same losses, gradients and weights, and a frozen trunk computed once a sample."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kvcache_torch import KVCache

LAYERS = {
    "linear": lambda: nn.Linear(6, 6),
    "norm": lambda: nn.LayerNorm(6),
    "batch": lambda: nn.BatchNorm1d(6),
    "dropout": lambda: nn.Dropout(0.3),
    "gelu": nn.GELU,
}
OPTIMIZERS = {
    "sgd": lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9),
    "adam": lambda weights: torch.optim.Adam(weights, 0.05),
}


def build(names, seed):
    torch.manual_seed(seed)
    return nn.Sequential(*(LAYERS[name]() for name in names), nn.Linear(6, 2))


def train(model, batches, optimizer, around, *, evaluate):
    """A few steps, each with an inference step behind it; what was seen on the way."""
    seen = []
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    update = OPTIMIZERS[optimizer](weights)
    torch.manual_seed(5)
    for x, y in batches:
        with around():
            loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        seen += [loss.detach(), *(weight.grad.clone() for weight in weights)]
        update.step()
        update.zero_grad()
        if evaluate:
            mode = [(module, module.training) for module in model.modules()]
            model.eval()
            with torch.no_grad(), around():
                seen.append(model(x))
            for module, training in mode:
                module.training = training
    return [*seen, *model.state_dict().values()]


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def batches_of(seed, steps):
    generator = torch.Generator().manual_seed(seed)
    pool = [(torch.randn(5, 6, generator=generator), torch.randn(5, 2, generator=generator)) for _ in range(2)]
    return [pool[step % 2] for step in range(steps)]


@pytest.mark.filterwarnings("ignore:computed without the cache. the output shares memory")  # dropout outside training
@settings(max_examples=40)
@given(
    st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=4),
    st.sampled_from(sorted(OPTIMIZERS)),
    st.integers(0, 3),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from(["whole", "frozen trunk", "trained trunk", "both"]),
)
def test_training_is_the_same_with_a_cache(names, optimizer, seed, steps, evaluate, attached):
    plain = build(names, seed)
    if attached in ("frozen trunk", "both"):
        plain[0].requires_grad_(False).eval()
    mine = copy.deepcopy(plain)
    cache = KVCache(64)
    if attached in ("whole", "both"):
        cache.attach(mine, kind="activation")
    if attached != "whole":
        cache.attach(mine[0], kind="activation")
    data = batches_of(seed, steps)
    expected = train(plain, data, optimizer, contextlib.nullcontext, evaluate=evaluate)
    found = train(mine, data, optimizer, lambda: cache, evaluate=evaluate)
    same(found, expected)
    cache.sites.entries.check_valid()


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8))
        self.rows = 0

    def forward(self, x):
        self.rows += len(x)
        return self.net(x)


class Augmented(torch.utils.data.Dataset):
    def __init__(self, x, y, noise):
        self.x, self.y, self.noise = x, y, noise

    def __len__(self):
        return len(self.x)

    def __getitem__(self, at):
        x = self.x[at]
        return x + self.noise * torch.randn_like(x), self.y[at]


def finetune(loader, epochs, cache=None):
    trunk = Trunk().requires_grad_(False).eval()
    torch.manual_seed(1)
    head = nn.Linear(8, 3)
    if cache is not None:
        cache.attach(trunk)
    update = torch.optim.Adam(head.parameters(), 0.02)
    losses = []
    for _ in range(epochs):
        for x, y in loader():
            if cache is None:
                features = trunk(x)
            else:
                with cache:
                    features = trunk(x)
            loss = nn.functional.cross_entropy(head(features), y)
            update.zero_grad()
            loss.backward()
            update.step()
            losses.append(loss.detach())
    return trunk, [*losses, *head.state_dict().values()]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_frozen_trunk_is_computed_once_per_sample(workers):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(30, 1, 8, 8, generator=generator), torch.arange(30) % 3)

    def shuffled():
        order = torch.Generator().manual_seed(3)
        return lambda: DataLoader(data, batch_size=7, shuffle=True, generator=order, num_workers=workers)

    cache = KVCache(64)
    plain, expected = finetune(shuffled(), 4)
    cached, found = finetune(shuffled(), 4, cache)
    same(found, expected)
    assert (plain.rows, cached.rows) == (120, 30)
    assert cache.stats().hit_entries == 90 and cache.stats().bypassed_calls == 0


def test_random_augmentation_misses_and_is_right():
    generator = torch.Generator().manual_seed(0)
    data = Augmented(torch.randn(20, 1, 8, 8, generator=generator), torch.arange(20) % 3, 0.1)

    def augmented():
        torch.manual_seed(7)
        return DataLoader(data, batch_size=6)

    cache = KVCache(512)
    _, expected = finetune(augmented, 1)
    _, found = finetune(augmented, 1, cache)
    same(found, expected)
    assert cache.stats().hit_entries == 0 and cache.stats().miss_entries == 20
