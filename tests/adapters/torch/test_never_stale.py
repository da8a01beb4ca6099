"""However the weights change, nothing computed with the old ones is served: activations, prompts, open sequences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kvcache_core import StaleSequence
from kvcache_torch import KVCache, generate
from kvcache_torch.fingerprint import Fingerprint
from tests.adapters.torch.models import Small, prompt


class Lora(nn.Module):
    """A linear layer with adapters by name: one is active, or merged into the weight."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active = None

    def load(self, name, seed):
        generator = torch.Generator().manual_seed(seed)
        low = nn.Sequential(
            nn.Linear(self.base.in_features, 2, bias=False), nn.Linear(2, self.base.out_features, bias=False)
        )
        with torch.no_grad():
            for weight in low.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))
        self.adapters[name] = low

    def merge(self, name):
        down, up = self.adapters[name]
        with torch.no_grad():
            self.base.weight += up.weight @ down.weight

    def forward(self, x):
        y = self.base(x)
        return y if self.active is None else y + self.adapters[self.active](x)


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lora = Lora(nn.Linear(8, 24))
        self.norm = nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.lora(x))))


def an_optimizer_step(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model(torch.ones(3, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def other_state(model):
    torch.manual_seed(1)
    model.load_state_dict({name: value + 0.5 for name, value in model.state_dict().items()})


def assigned_state(model):
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()}, assign=True)


def in_place(model):
    with torch.no_grad():
        model.head.weight.mul_(2)


def a_new_parameter(model):
    model.head.weight = nn.Parameter(model.head.weight.detach() * 2)


def a_new_module(model):
    torch.manual_seed(5)
    model.head = nn.Linear(24, 4)


def a_new_adapter(model):
    model.lora.load("a", 3)
    model.lora.active = "a"


def the_same_adapter_name_with_new_weights(model):
    model.lora.load("a", 4)


def merged(model):
    model.lora.active = None
    model.lora.merge("a")


def batch_statistics(model):
    model.train()
    with torch.no_grad():
        model(torch.ones(4, 8) * torch.arange(4.0)[:, None])
    model.eval()


def data_of_a_tensor(model):
    model.head.weight.data.mul_(3)


def data_of_a_row(model):
    model.head.weight.data[2] += 1


def data_replaced(model):
    model.head.weight.data = model.head.weight.data * 0.5


def through_numpy(model):
    model.head.bias.detach().numpy()[1] = 7


def double(model):
    model.double()


CHANGES = [
    an_optimizer_step,
    other_state,
    assigned_state,
    in_place,
    a_new_parameter,
    a_new_module,
    a_new_adapter,
    the_same_adapter_name_with_new_weights,
    merged,
    batch_statistics,
    data_of_a_tensor,
    data_of_a_row,
    data_replaced,
    through_numpy,
]


@pytest.mark.parametrize("verify", ["sample", "full"])
def test_a_history_of_every_change(verify):
    model = Trunk().eval()
    cache = KVCache(512, verify=verify)
    cache.attach(model)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    before = None
    for change in (lambda _: None, *CHANGES):
        change(model)
        with torch.no_grad():
            expected = model.forward.original(x)
            same = before is not None and torch.allclose(before, expected)
            assert same == (change is merged), change.__name__
            before = expected
            for _ in range(2):
                with cache:
                    torch.testing.assert_close(model(x), expected)
    assert cache.stats().hit_entries == 3 * (1 + len(CHANGES)), "and unchanged weights are served"


@given(st.lists(st.sampled_from(CHANGES), min_size=1, max_size=5), st.booleans())
def test_any_order_of_changes(changes, inside):
    """Also inside one `with` block, where everything but `.data` is noticed at each call."""
    model = Trunk().eval()
    model.lora.load("a", 2)
    cache = KVCache(512)
    cache.attach(model)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), cache:
        model(x)
        if inside:
            for change in changes:
                if not change.__name__.startswith(("data_of", "through")):
                    with torch.enable_grad():
                        cache._set_active(None)
                        change(model)
                        cache._set_active(cache)
                    torch.testing.assert_close(model(x), model.forward.original(x))
    for change in changes:
        change(model)
        with torch.no_grad(), cache:
            torch.testing.assert_close(model(x), model.forward.original(x))


def test_dtype_and_mode():
    model = Trunk().eval()
    cache = KVCache(64)
    cache.attach(model)
    x = torch.randn(3, 8)
    with torch.no_grad(), cache:
        model(x)
    model.half()
    with torch.no_grad(), cache:
        assert model(x.half()).dtype == torch.float16
    model.float()
    with torch.no_grad(), cache:
        torch.testing.assert_close(model(x), model.forward.original(x))
    assert cache.stats().hit_entries == 0


def test_never_leaves_it_to_invalidate():
    model = Trunk().eval()
    cache = KVCache(64, verify="never")
    cache.attach(model)
    x = torch.randn(3, 8)
    with torch.no_grad(), cache:
        old = model(x)
    in_place(model)
    with torch.no_grad(), cache:
        assert torch.equal(model(x), old)
        cache.invalidate()
        torch.testing.assert_close(model(x), model.forward.original(x))


def test_weights_updated_between_two_generations_of_a_training_run():
    """As in prime-rl PR 1650: the policy is updated in place between rollouts, and old state skews what it samples."""
    model = Small()
    cache = KVCache(128, block_size=4)
    cache.attach(model, outputs="last")
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    prompts = [prompt(0, 20), prompt(0, 24)]
    rollouts = []
    for step in range(4):
        model.eval()
        rollouts.append(generate(model, prompts, max_new_tokens=6, cache=cache))
        assert rollouts[-1] == generate_plain(model, prompts), step
        model(torch.tensor([prompt(1, 30)])).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.blocks[0].requires_grad_(False)
    for weight in model.parameters():
        weight.data.mul_(-1.5)  # around the version counter
    assert generate(model, prompts, max_new_tokens=6, cache=cache) == generate_plain(model, prompts)


def test_an_adapter_loaded_again_under_its_name():
    """As in vllm issue 42125: a second adapter of the same name must not meet what was computed with the first."""
    model = Small()
    lora = model.blocks[0].qkv = Lora(model.blocks[0].qkv)
    cache = KVCache(256, block_size=4)
    cache.attach(model.eval(), outputs="last")
    prompts = [prompt(0, 20), prompt(0, 24)]
    answers = []
    for seed in (1, 2, 1):
        lora.load("tone", seed)
        lora.active = "tone"
        before = cache.stats().hit_tokens
        answers.append(generate(model, prompts[:1], max_new_tokens=6, cache=cache))
        assert cache.stats().hit_tokens == before, "nothing of another load is found"
        assert answers[-1] == generate_plain(model, prompts[:1])
        assert generate(model, prompts[1:], max_new_tokens=6, cache=cache) == generate_plain(model, prompts[1:])
    assert answers[0] != answers[1] and answers[0] == answers[2]


def test_weights_swapped_under_a_prefix_that_many_requests_share():
    """As in lmdeploy issue 4917: weights are replaced while a system prompt is cached and reported as hit."""
    model = Small()
    cache = KVCache(256, block_size=4)
    cache.attach(model, outputs="last")
    system = prompt(0, 24)
    generate(model, [[*system, 1, 2]], max_new_tokens=4, cache=cache)
    running = cache.open([*system, 3])
    assert running.num_cached >= 20
    model.load_state_dict(Small(seed=7).state_dict())
    before = cache.stats().hit_tokens
    prompts = [[*system, 1, 2], [*system, 3, 4]]
    found = [generate(model, [each], max_new_tokens=6, cache=cache)[0] for each in prompts]
    assert found == generate_plain(model, prompts)
    assert cache.stats().hit_tokens - before <= len(system), "the second finds what the first computed, no more"
    with pytest.raises(StaleSequence):
        cache.step([running], [[3]])
    running.close()


def generate_plain(model, prompts):
    from kvcache_torch.recompute import recompute

    result = []
    for each in prompts:
        row = list(each)
        for _ in range(6):
            row.append(int(recompute(model.forward.original, torch.device("cpu"), [row])[0].argmax()))
        result.append(row[len(each) :])
    return result


def test_an_open_sequence_raises_at_its_next_step():
    model = Small()
    cache = KVCache(64, block_size=4)
    cache.attach(model, outputs="last")
    tokens = prompt(0, 9)
    seq = cache.open(tokens)
    cache.step([seq], [tokens[seq.num_cached :]])
    with torch.no_grad():
        model.head.weight.add_(1)
    with pytest.raises(StaleSequence, match="weights changed"):
        cache.step([seq], [[1]])
    seq.close()


def test_a_row_of_a_large_weight_is_noticed_within_16_looks():
    layer = nn.Linear(700, 500)
    fingerprint = Fingerprint(layer, "sample")
    for row in (0, 123, 499):
        assert not fingerprint.look()
        layer.weight.data[row] += 1
        assert any(fingerprint.look() for _ in range(16))


def test_the_whole_of_a_large_weight_is_noticed_at_once():
    layer = nn.Linear(700, 500)
    fingerprint = Fingerprint(layer, "sample")
    for change in (lambda w: w.mul_(1.001), torch.Tensor.neg_, lambda w: w.add_(1e-3)):
        change(layer.weight.data)
        assert fingerprint.look()
        assert not fingerprint.look()


def test_detached_and_attached_again_the_state_is_known_unless_it_changed():
    layer = nn.Linear(7, 5)
    first = Fingerprint(layer, "sample")
    parked = first.park()
    assert Fingerprint(layer, "sample", parked).value == first.value
    layer.weight.data[0] += 1
    assert Fingerprint(layer, "sample", parked).value != first.value


# ---- switched, with the same weights ---------------------------------------------------------------------------------


def test_a_hook_put_on_a_part_while_the_model_is_detached():
    model, cache = Small().eval(), KVCache(64)
    cache.attach(model)
    ids = torch.tensor([prompt(0, 40)])
    with torch.no_grad(), cache:
        model(ids)
    cache.detach()
    model.blocks[0].register_forward_hook(lambda module, args, output: output * 1.5)
    with torch.no_grad():
        expected = model(ids)
    cache.attach(model)
    with torch.no_grad(), cache:
        torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)


def test_a_switched_adapter_and_what_was_computed_with_each():
    model = Trunk().eval()
    for name, seed in (("a", 3), ("b", 4)):
        model.lora.load(name, seed)
    cache = KVCache(64)
    cache.attach(model)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for active in (None, "a", "b", "a", None):
        model.lora.active = active
        with torch.no_grad(), cache:
            torch.testing.assert_close(model(x), model.forward.original(x))
        found.append(cache.stats().hit_entries)
    assert found == [0, 0, 0, 3, 6], "each adapter finds its own"
    model.lora.active = "b"
    cache.detach()
    cache.attach(model)
    with torch.no_grad(), cache:
        torch.testing.assert_close(model(x), model.forward.original(x))


def test_an_adapter_switched_under_prompts_and_an_open_sequence():
    model = Small()
    lora = model.blocks[0].qkv = Lora(model.blocks[0].qkv)
    for name, seed in (("a", 1), ("b", 2)):
        lora.load(name, seed)
    cache = KVCache(256, block_size=4)
    cache.attach(model.eval(), outputs="last")
    tokens = prompt(0, 20)
    answers = []
    for active in ("a", "b", "a", None):
        lora.active = active
        answers.append(generate(model, [tokens], max_new_tokens=6, cache=cache))
        assert answers[-1] == generate_plain(model, [tokens]), active
    assert answers[0] == answers[2] != answers[1]
    lora.active = "a"
    running = cache.open(tokens)
    assert running.num_cached >= 16, "what the adapter computed earlier is found"
    cache.step([running], [tokens[running.num_cached :]])
    lora.active = "b"
    with pytest.raises(StaleSequence):
        cache.step([running], [[3]])
    running.close()
    lora.active = "a"
    cache.detach()
    lora.active = "b"
    cache.attach(model, outputs="last")
    assert generate(model, [tokens], max_new_tokens=6, cache=cache) == generate_plain(model, [tokens])


# ---- moved to another device -----------------------------------------------------------------------------------------


def test_a_moved_module_is_another_one():
    layer = nn.Linear(7, 5)
    fingerprint = Fingerprint(layer, "sample")
    seen = [fingerprint.value]
    for move in (lambda: layer.to("meta"), lambda: layer.to_empty(device="cpu")):
        move()
        assert fingerprint.look() and not fingerprint.look()
        seen.append(fingerprint.value)
    assert len(set(seen)) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to move to")
def test_results_of_another_device_are_not_served():
    model = Trunk().eval()
    cache = KVCache(64)
    cache.attach(model)
    x = torch.randn(3, 8)
    for device in ("cpu", "cuda", "cpu"):
        model.to(device)
        with torch.no_grad(), cache:
            for _ in range(2):
                assert model(x.to(device)).device.type == device
            torch.testing.assert_close(model(x.to(device)), model.forward.original(x.to(device)))
    assert cache.stats().miss_entries == 9
