"""``ParameterCache``: the same results with weights that are read when they are used."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kvcache_core import BlockRefused, InvalidInput, UsageError
from kvcache_torch import KVCache, ParameterCache, generate
from tests.adapters.torch.models import Small, close, prompt


class Nested(nn.Module):
    """Weights of its own around layers, one of them used twice, one weight shared, one buffer."""

    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm = nn.BatchNorm1d(width)
        self.tied = nn.Linear(width, width, bias=False)
        self.tied.weight = self.layers[0].weight

    def forward(self, x):
        for layer in (*self.layers, self.layers[0]):
            x = torch.tanh(layer(x))
        return self.tied(self.norm(x)) * self.scale


def nested(seed: int = 0, **options: int) -> Nested:
    torch.manual_seed(seed)
    model = Nested(**options)
    model(torch.randn(16, model.scale.shape[0]))  # gives the buffers values
    return model.eval()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def run(model, x):
    with torch.no_grad():
        return model(x)


@given(st.integers(2, 9), st.integers(1, 4), st.floats(0, 1), st.integers(0, 99), st.booleans())
@settings(max_examples=25)
def test_the_same_as_with_all_weights(tmp_path_factory, width, depth, share, seed, on_meta):
    path = tmp_path_factory.mktemp("parameters") / "file"
    model = nested(seed, width=width, depth=depth)
    x = torch.randn(3, width)
    expected = run(model, x)
    ParameterCache.save(model, path)
    if on_meta:
        with torch.device("meta"):
            model = Nested(width, depth).eval()
    least = 4 * (width * width + width + width)  # a layer and the scale around it
    total = sum(parameter.nbytes for parameter in model.parameters())
    parameters = ParameterCache(path, memory=int(least + share * (total - least)))
    assert parameters.attach(model) is model
    for _ in range(3):
        assert torch.equal(run(model, x), expected)
        parameters.residence.check_valid()
        held = sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
        assert held == parameters.stats().bytes <= parameters.stats().memory
    parameters.detach()
    assert torch.equal(run(model, x), expected)
    assert "forward" not in vars(model) and len(model.state_dict()) == len(
        nested(width=width, depth=depth).state_dict()
    )


def test_least_recently_used_first_and_bytes_are_counted(path):
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3))).eval()
    ParameterCache.save(model, path)
    parameters = ParameterCache(path, memory=2 * 64)
    parameters.attach(model)
    x = torch.ones(1, 4)
    for layer in (0, 1, 0, 2, 0, 1):
        run(model[layer], x)
    units = parameters.stats().units
    assert [(units[name].hits, units[name].misses) for name in "012"] == [(2, 1), (0, 2), (0, 1)]
    assert parameters.stats().bytes_read == 4 * 64 and parameters.stats().evicted == 2
    parameters.resize(64)
    assert parameters.stats().bytes == 64
    parameters.clear()
    assert parameters.stats().bytes == 0 and parameters.stats().peak_bytes == 128


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_models_dtype_counts(path, dtype):
    model = nested()
    ParameterCache.save(model, path)
    x = torch.randn(3, 8, dtype=dtype)
    expected = run(nested().to(dtype), x)
    parameters = ParameterCache(path, memory="1MiB")
    assert torch.equal(run(parameters.attach(nested(1).to(dtype)), x), expected)


def test_modules_that_do_not_call_their_parts(path):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 8)
    expected = run(model, x)
    ParameterCache.save(model, path)
    parameters = ParameterCache(path, memory=sum(weight.nbytes for weight in model.layers[0].parameters()))
    assert torch.equal(run(parameters.attach(model), x), expected)
    assert parameters.stats().evicted > 0


def test_lists_of_weights_belong_to_the_module_that_has_them(path):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.scales = nn.ParameterList([nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))])
            self.named = nn.ParameterDict({"shift": nn.Parameter(torch.randn(4))})
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x * self.scales[0] + self.named["shift"]) * self.scales[1]

    torch.manual_seed(0)
    model, x = nn.Sequential(Layer(), Layer(), Layer()).eval(), torch.randn(2, 4)
    expected = run(model, x)
    ParameterCache.save(model, path)
    parameters = ParameterCache(path, memory=4 * (3 * 4 + 20))
    assert torch.equal(run(parameters.attach(model), x), expected)
    assert parameters.stats().evicted > 0


def test_several_files_and_other_names(path, tmp_path):
    model = nested()
    x = torch.randn(3, 8)
    expected = run(model, x)
    ParameterCache.save(model.layers, path)
    ParameterCache.save(
        nn.ModuleDict({"norm": model.norm, "rest": nn.ParameterDict({"scale": model.scale})}), tmp_path / "b"
    )
    names = {"scale": "rest.scale"}
    parameters = ParameterCache(
        [path, tmp_path / "b"], memory="1MiB", names=lambda name: names.get(name, name.removeprefix("layers."))
    )
    assert torch.equal(run(parameters.attach(nested(1)), x), expected)


@pytest.mark.parametrize("kind", ["tokens", "activation"])
def test_with_a_kv_cache_behind_it(path, kind):
    model = Small()
    prompts = [prompt(0, 9), prompt(1, 14)]
    x = torch.tensor([prompt(0, 9)])
    expected = run(model, x)
    ParameterCache.save(model, path)
    sizes = [weight.nbytes for weight in model.parameters()]
    parameters = ParameterCache(path, memory=max(sum(sizes) // 2, *sizes))
    parameters.attach(model)
    cache = KVCache(64)
    cache.attach(model, kind=kind)
    with torch.no_grad(), cache:
        for _ in range(2):
            close(model(x), expected)
    assert cache.stats().hit_tokens + cache.stats().hit_entries > 0
    if kind == "tokens":
        plain = KVCache(64)
        plain.attach(Small())
        tokens = generate(plain.model, prompts, max_new_tokens=5, cache=plain)
        assert generate(model, prompts, max_new_tokens=5, cache=cache) == tokens
        assert cache._portable_identity() == plain._portable_identity()
        with pytest.raises(UsageError, match=r"cannot be compiled"):
            cache.compile()
    with pytest.raises(UsageError, match=r"attached to a KVCache"):
        parameters.detach()
    cache.detach()
    parameters.detach()
    close(run(model, x), expected)


def test_another_file_is_another_model(path, tmp_path):
    """What was computed with one file's weights is not found with another's."""
    cache = KVCache(64)
    x = torch.randn(3, 8)
    model = nested()
    answers = []
    for seed in (0, 1):
        ParameterCache.save(nested(seed), tmp_path / str(seed))
        parameters = ParameterCache(tmp_path / str(seed), memory="1MiB")
        parameters.attach(model)
        cache.attach(model, kind="activation")
        with torch.no_grad(), cache:
            answers.append(model(x))
        cache.detach()
        parameters.detach()
        torch.testing.assert_close(answers[-1], run(nested(seed), x))
    assert not torch.equal(*answers)


# ---- bad input -------------------------------------------------------------------------------------------------------


def untouched(model):
    """A model that could not be attached is as it was."""
    x = torch.randn(3, 8)
    assert torch.equal(run(model, x), run(nested(), x))


def test_too_little_memory(path):
    model = nested()
    ParameterCache.save(model, path)
    with pytest.raises(InvalidInput, match=r"memory=319 bytes is too small: module 'layers.0' .* need 320 bytes"):
        ParameterCache(path, memory=319).attach(model)
    untouched(model)
    parameters = ParameterCache(path, memory=320)
    parameters.attach(model)
    with pytest.raises(InvalidInput, match=r"too small"):
        parameters.resize(300)
    run(model, torch.randn(1, 8))


def test_missing_and_misshapen_weights(path):
    model = nested(depth=2)
    ParameterCache.save(model, path)
    with pytest.raises(InvalidInput, match=r"lacks 2 of the model's .*: layers.2.weight, layers.2.bias; it has"):
        ParameterCache(path, memory="1MiB").attach(nested())
    with pytest.raises(InvalidInput, match=r"'scale' has shape \(9,\), in the file \(8,\)"):
        ParameterCache(path, memory="1MiB").attach(nested(width=9, depth=2))
    with torch.device("meta"):
        bare = nn.Sequential(nn.BatchNorm1d(8)).eval()
    with pytest.raises(InvalidInput, match=r"lacks the buffer '0.running_mean'"):
        ParameterCache(path, memory="1MiB", names={"0.weight": "norm.weight", "0.bias": "norm.bias"}).attach(bare)


def test_a_damaged_file(path):
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(BlockRefused):
        ParameterCache(path, memory="1MiB")
    with pytest.raises(FileNotFoundError):
        ParameterCache(path.with_name("other"), memory="1MiB")


def test_a_file_that_changes_under_it(path):
    model = nested()
    ParameterCache.save(model, path)
    parameters = ParameterCache(path, memory=400)
    parameters.attach(model)
    run(model, torch.randn(1, 8))
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    with pytest.raises(BlockRefused, match="was changed since it was opened"):
        run(model, torch.randn(1, 8))
    parameters.residence.check_valid()


def test_training(path):
    model = nested()
    ParameterCache.save(model, path)
    with pytest.raises(UsageError, match=r"cannot be trained"):
        ParameterCache(path, memory="1MiB").attach(nested().train())
    parameters = ParameterCache(path, memory="1MiB")
    parameters.attach(model)
    x = torch.randn(2, 8)
    with pytest.raises(UsageError, match=r"needs gradients"):
        model(x.clone().requires_grad_())
    model.train()
    with pytest.raises(UsageError, match=r"cannot be trained"):
        model(x)
    model.eval()
    model(x)  # without gradients it runs, also where they are not switched off
    with torch.no_grad():
        model.scale.add_(1)
    parameters.clear()
    with pytest.raises(UsageError, match=r"'scale' was changed in memory"):
        run(model, x)


def test_weights_that_are_not_there_are_never_used(path):
    model = nested()
    ParameterCache.save(model, path)
    parameters = ParameterCache(path, memory="1MiB")
    parameters.attach(model)
    with pytest.raises(RuntimeError):
        nn.functional.linear(torch.randn(2, 8), model.layers[0].weight)
    with pytest.raises(UsageError, match=r"not in memory but in a file"):
        model.state_dict()


def test_attached_twice(path):
    model = nested()
    ParameterCache.save(model, path)
    parameters = ParameterCache(path, memory="1MiB")
    with pytest.raises(UsageError, match=r"no model"):
        parameters.stats()
    with pytest.raises(UsageError, match=r"no model"):
        parameters.detach()
    parameters.attach(model)
    with pytest.raises(UsageError, match=r"has a model already"):
        parameters.attach(nested())
    with pytest.raises(UsageError, match=r"another ParameterCache"):
        ParameterCache(path, memory="1MiB").attach(model)
    parameters.detach()
    KVCache(8).attach(model, kind="activation")
    with pytest.raises(UsageError, match=r"before the KVCache"):
        parameters.attach(model)
    with pytest.raises(InvalidInput, match=r"attaches a torch.nn.Module"):
        parameters.attach(len)


def test_a_raising_module_lets_go(path):
    model = nested()
    ParameterCache.save(model, path)
    parameters = ParameterCache(path, memory="1MiB")
    parameters.attach(model)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            run(model, torch.randn(2, 3))
    parameters.clear()
    assert parameters.stats().bytes == 0
    run(model, torch.randn(2, 8))
