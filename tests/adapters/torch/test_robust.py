"""What may go wrong: errors inside the model, threads, resizing, attaching and bad input."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import time

import pytest
import torch
from torch import nn

from kvcache_core import CacheFull, InvalidInput, InvalidType, SequenceClosed, UsageError
from kvcache_torch import KVCache, attention, generate, positions
from kvcache_torch.store import TensorStore
from tests.adapters.torch.models import VOCAB, Small, close, ids, prompt


@pytest.fixture
def model():
    return Small()


@pytest.fixture
def cache(model):
    cache = KVCache(64, block_size=4)
    cache.attach(model)
    return cache


class Boom(Exception):
    pass


# ---- an exception inside the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("outputs", ["all", "last"])
def test_an_exception_inside_leaves_the_cache_as_it_was(model, layer, outputs):
    armed = []

    def explode(*_):
        if armed:
            raise Boom

    model.blocks[layer].register_forward_hook(explode)  # before a sequence is open: it might change what is computed
    cache = KVCache(64, block_size=4)
    cache.attach(model, outputs=outputs)
    x = ids(0, 2, 20)
    with torch.inference_mode(), cache:
        model(x[:, :9])
    tokens = x[0].tolist()
    seq = cache.open(tokens)
    names = ("live_blocks", "free_blocks", "cached_blocks", "open_sequences", "evicted_blocks")
    before = [cache.stats()[name] for name in names]

    armed.append(True)
    with torch.inference_mode():
        with pytest.raises(Boom), cache:
            model(x)
        with pytest.raises(Boom):
            cache.step([seq], [tokens[seq.num_cached :]])
        with pytest.raises(Boom):
            generate(model, [tokens], max_new_tokens=4, cache=cache, n=2)
        armed.clear()
        cache.core.check_valid()
        assert [cache.stats()[name] for name in names] == before
        assert seq.length == seq.num_cached
        y = model(x)
        with cache:
            close(model(x), y if outputs == "all" else y[:, -1:])
        logits = cache.step([seq], [tokens[seq.num_cached :]])
    close(torch.from_numpy(logits), y[:1, -1])
    seq.close()
    cache.core.check_valid()


def test_an_exception_leaves_no_step_behind(model, cache):
    """positions() and attention() are plain again, and another `with` may be entered."""
    hook = model.head.register_forward_hook(lambda *_: (_ for _ in ()).throw(Boom))
    with pytest.raises(Boom), cache:
        model(ids(0, 1, 5))
    hook.remove()
    assert positions(3).tolist() == [[0, 1, 2]]
    with cache:
        pass


def test_cache_full_changes_nothing(model):
    cache = KVCache(6, block_size=4)
    cache.attach(model, outputs="last")
    one, two = cache.open(prompt(0, 13)), cache.open(prompt(1, 12))
    first = cache.step([one], [prompt(0, 13)])
    with pytest.raises(CacheFull, match="block"):
        cache.step([two], [prompt(1, 12)])
    cache.core.check_valid()
    assert (one.length, two.length) == (13, 0)
    one.truncate(12)
    again = cache.step([one], [prompt(0, 13)[12:]])
    close(torch.from_numpy(again), torch.from_numpy(first))


# ---- threads -----------------------------------------------------------------------------------------------


def test_eight_threads_on_one_cache(model):
    cache = KVCache(96, block_size=4)
    cache.attach(model, outputs="last")
    base = prompt(9, 20)
    work = [[[*base[: 5 * (at % 4)], *prompt(at, 6)], prompt(100 + at, 9)] for at in range(8)]
    expected = [generate(model, prompts, max_new_tokens=6) for prompts in work]
    found: list[object] = [None] * 8
    start = threading.Barrier(8)

    def run(at):
        try:
            start.wait()
            found[at] = [generate(model, work[at], max_new_tokens=6, cache=cache) for _ in range(4)]
            with torch.inference_mode(), cache:
                model(torch.tensor([work[at][0]]))
        except BaseException as error:
            found[at] = error

    threads = [threading.Thread(target=run, args=(at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [[tokens] * 4 for tokens in expected]
    cache.core.check_valid()
    assert cache.stats().open_sequences == cache.stats().live_blocks == 0


def test_threads_that_meet_in_the_first_step_write_to_one_tensor(model, cache, monkeypatch):
    store, allocate = cache.store, TensorStore._new
    store._arrays.clear()
    store._pairs.clear()
    start, found = threading.Barrier(4), []

    def slow(*key):
        time.sleep(0.05)
        return allocate(*key)

    monkeypatch.setattr(TensorStore, "_new", slow)

    def first_use():
        start.wait()
        found.append(store.pair(0))

    threads = [threading.Thread(target=first_use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({keys.data_ptr() for keys, _ in found}) == len({values.data_ptr() for _, values in found}) == 1


def test_one_threads_block_is_no_other_threads(model, cache):
    seen = []
    with cache:
        thread = threading.Thread(target=lambda: seen.append(model(ids(0, 1, 4)).shape))
        thread.start()
        thread.join()
    assert len(seen) == 1
    assert cache.stats().miss_tokens == 0


# ---- resize and clear under way --------------------------------------------------------------------------------------


def test_resize_and_clear_in_the_middle_of_open_sequences(model):
    cache = KVCache(40, block_size=4)
    cache.attach(model, outputs="last")
    rows = [prompt(0, 30), prompt(1, 12)]
    with torch.inference_mode():
        plain = [model(torch.tensor([row]))[0] for row in rows]
    cache.warm([prompt(2, 40), prompt(3, 20)])
    seqs = [cache.open(row) for row in rows]
    cache.step(seqs, [row[:5] for row in rows])
    at = 5
    for change in (
        lambda: cache.resize(12),
        cache.clear,
        lambda: cache.resize(100),
        lambda: cache.resize(11),
        lambda: cache.resize(memory=cache.core.layout.bytes_per_block * 31),
    ):
        change()
        cache.core.check_valid()
        logits = cache.step(seqs, [row[at : at + 1] for row in rows])
        close(torch.from_numpy(logits), torch.stack([one[at] for one in plain]))
        at += 1
    assert cache.core.num_blocks == 30
    with pytest.raises(CacheFull, match="held by open sequences"):
        cache.resize(2)
    assert cache.core.num_blocks == 30
    for seq in seqs:
        seq.close()
    cache.resize(2)
    cache.core.check_valid()


def test_sequences_that_were_compacted_go_on_as_before(model):
    cache = KVCache(60, block_size=4)
    assert cache.compact() == 0, "nothing to move before the first use"
    cache.attach(model, outputs="last")
    rows = [prompt(row, 24) for row in range(3)]
    with torch.inference_mode():
        plain = [model(torch.tensor([row]))[0] for row in rows]
    cache.warm([rows[0][:9]])
    seqs = [cache.open(row) for row in rows]
    for at in range(9, 20):
        cache.step(seqs, [row[seq.length : at + 1] for seq, row in zip(seqs, rows, strict=True)])
    assert cache.compact() > 0
    cache.core.check_valid()
    for at in range(20, 24):
        logits = cache.step(seqs, [row[at : at + 1] for row in rows])
        close(torch.from_numpy(logits), torch.stack([one[at] for one in plain]))
    assert cache.compact() == 0


def test_resize_before_the_first_use():
    model = Small()
    cache = KVCache(8, block_size=4)
    cache.resize("2MiB")
    cache.attach(model)
    assert cache.core.num_blocks == 2 * 2**20 // cache.core.layout.bytes_per_block - 1


def test_warm_and_stats(model, cache):
    row = prompt(0, 20)
    assert cache.warm([row, row[:12]]) == 20 + 1
    assert cache.stats().miss_tokens == 21
    assert cache.stats().bytes > 0
    assert dict(cache.stats())["open_sequences"] == 0


# ---- attach and detach -----------------------------------------------------------------------------------------


def test_detach_gives_back_exactly_the_model(model):
    before = dict(vars(model))
    cache = KVCache(16)
    assert cache.attach(model) is model
    with torch.inference_mode(), cache:
        model(ids(0, 1, 5))
    assert cache.detach() is model
    assert {name: value for name, value in vars(model).items() if name not in ("computed", "calls")} == {
        name: value for name, value in before.items() if name not in ("computed", "calls")
    }
    with pytest.raises(UsageError, match="no model is attached"):
        cache.detach()


def test_detach_gives_back_a_forward_of_the_instances_own(model):
    def own(x):
        return Small.forward(model, x) * 2

    model.forward = own
    cache = KVCache(16, block_size=4)
    cache.attach(model)
    x = ids(0, 1, 9)
    y = own(x)
    for _ in range(2):
        with cache:
            close(model(x), y)
    cache.detach()
    assert model.forward is own


def test_what_is_cached_survives_detaching(model, cache):
    x = ids(0, 1, 9)
    with torch.inference_mode(), cache:
        model(x)
    cache.detach()
    cache.attach(model)
    with torch.inference_mode(), cache:
        model(x)
    assert cache.stats().hit_tokens == 8


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_an_attached_model_is_copied_as_a_plain_one(model, cache, how):
    x = ids(0, 1, 9)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    with torch.inference_mode():
        y = model(x)
        with torch.no_grad():
            other.head.weight.mul_(2)
            other.head.bias.mul_(2)
        with cache:
            close(other(x), 2 * y)
            close(model(x), y)
    assert cache.stats().miss_tokens == 9, "the copy is not served by the cache"
    second = KVCache(16)
    second.attach(other)
    with torch.inference_mode(), second:
        close(other(x), 2 * y)
    assert model.state_dict().keys() == other.state_dict().keys()


def test_a_compiled_model_is_described_and_copied():
    model = Small()
    compiled = torch.compile(model, backend="eager")
    cache = KVCache(16, block_size=4)
    cache.attach(compiled, outputs="last")
    assert cache.core.layout.layers[1].window == 7
    cache.detach()


def test_the_models_own_state_is_left_alone(model):
    """Describing a model runs it once: modes and random numbers stay."""
    model.train()
    model.blocks[0].eval()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    cache = KVCache(16)
    cache.attach(model)
    assert cache.core is not None
    generate(model, [[1, 2]], max_new_tokens=2, cache=cache)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert not model.blocks[0].training
    assert model.blocks[1].dropout.training


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be a whole number of blocks, at least 1; got 0"),
        ({"size": -3}, "size must be"),
        ({"size": 1.5}, "size must be"),
        ({"size": True}, "size must be"),
        ({"memory": "lots"}, "memory must be a size like '2GiB'"),
        ({"memory": "2 parsecs"}, "memory must be a size"),
        ({"memory": "0GiB"}, "more than zero"),
        ({"size": 4, "memory": "1GiB"}, "not both"),
        ({"block_size": 0}, "block_size must be"),
        ({"dtype": "int4"}, "dtype must be one of"),
        ({"dtype": torch.int64}, "dtype must be one of"),
        ({"salt": "text"}, "salt must be bytes"),
    ],
)
def test_bad_caches(arguments, message):
    with pytest.raises(InvalidInput, match=message):
        KVCache(**arguments)


def test_memory_too_small_for_a_block(model):
    cache = KVCache(memory=1000)
    cache.attach(model)
    with pytest.raises(InvalidInput, match="holds no block"), cache:
        pass
    with pytest.raises(UsageError, match="no model"):
        KVCache(4).core  # noqa: B018


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 3), InvalidType, "must be integers, got torch.float32"),
        (torch.zeros(2, 3, dtype=torch.bool), InvalidType, "must be integers"),
        (torch.zeros(3, dtype=torch.int64), InvalidInput, r"must be \[B, T\]"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), InvalidInput, r"must be \[B, T\]"),
        (torch.zeros(2, 0, dtype=torch.int64), InvalidInput, "at least one"),
        (torch.zeros(0, 2, dtype=torch.int64), InvalidInput, "at least one"),
        (torch.tensor([[1, VOCAB]]), InvalidInput, rf"0 \.\. {VOCAB - 1} for this model, got {VOCAB}"),
        (torch.tensor([[1, -1]]), InvalidInput, "outside 0"),
        ([[1, 2]], InvalidType, "must be a tensor"),
    ],
)
def test_bad_ids(cache, x, error, message):
    with pytest.raises(error, match=message), cache:
        cache.model(x)
    cache.core.check_valid()
    assert cache.stats().live_blocks == cache.stats().open_sequences == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [3, 0]}, "every row needs at least one token"),
        ({"lengths": [3, 9]}, "at most 5 tokens"),
        ({"lengths": [3]}, "lengths must be 2 numbers"),
        ({"mask": torch.ones(2, 4)}, r"mask must be \[B, T\]"),
        ({"mask": torch.tensor([[1, 0, 1, 0, 0], [1, 1, 1, 1, 1]])}, "no holes"),
        ({"mask": torch.tensor([[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])}, "every row needs at least one token"),
    ],
)
def test_bad_rows(cache, arguments, message):
    with pytest.raises(InvalidInput, match=message), cache:
        cache.model(ids(0, 2, 5), **arguments)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([], InvalidInput, "at least one token, got none"),
        ([1.5], InvalidType, "must be integers"),
        (["a"], InvalidType, "must be integers"),
        ([1, VOCAB], InvalidInput, rf"0 \.\. {VOCAB - 1}"),
        ([-1], InvalidInput, "outside 0"),
        ([2**40], InvalidInput, "0 "),
    ],
)
def test_bad_prompts(model, cache, tokens, error, message):
    for call in (
        lambda: generate(model, [[1], tokens], max_new_tokens=2, cache=cache),
        lambda: cache.open(tokens),
        lambda: cache.warm([tokens]),
    ):
        with pytest.raises(error, match=message):
            call()
        cache.core.check_valid()
        assert cache.stats().open_sequences == cache.stats().live_blocks == 0


def test_sequences_used_wrongly(cache):
    seq = cache.open([1, 2, 3])
    with pytest.raises(InvalidInput, match="at least one token"):
        cache.step([seq], [[]])
    with pytest.raises(InvalidInput, match="one list of new tokens per sequence"):
        cache.step([seq], [[1], [2]])
    with pytest.raises(InvalidInput, match="twice"):
        cache.step([seq, seq], [[1], [2]])
    seq.close()
    with pytest.raises(SequenceClosed, match="closed"):
        seq.close()
    with pytest.raises(SequenceClosed, match="open a new one"):
        cache.step([seq], [[1]])
    cache.core.check_valid()


def test_unattached_nested_and_attached_twice(model, cache):
    with pytest.raises(UsageError, match=r"call cache\.attach\(model\)"), KVCache(4):
        pass
    other = KVCache(4)
    other.attach(Small(seed=2))
    with cache:
        with pytest.raises(UsageError, match="nested: another cache"), other:
            pass
        with pytest.raises(UsageError, match="nested: this cache"), cache:
            pass
        with pytest.raises(UsageError, match="leave the block first"):
            cache.detach()
    with cache:
        pass
    with pytest.raises(UsageError, match="attached to another cache"):
        other.attach(model)
    with pytest.raises(UsageError, match="has a model already"):
        cache.attach(Small(seed=3))
    with pytest.raises(UsageError, match="attached to another model"):
        generate(Small(seed=4), [[1]], max_new_tokens=1, cache=cache)
    with pytest.raises(InvalidInput, match="'all' or 'last'"):
        cache.attach(model, outputs="some")
    with pytest.raises(InvalidType, match=r"torch\.nn\.Module, got function"):
        KVCache(4).attach(lambda x: x)


def test_a_model_whose_cache_is_out_of_reach_can_be_attached_again(model):
    KVCache(4).attach(model)
    cache = KVCache(4)
    with pytest.raises(UsageError, match=r"detach\(model\) of this one"):
        cache.attach(model)
    assert cache.detach(model) is model
    assert "forward" not in vars(model)
    assert cache.attach(model) is model
    cache.detach()
    with pytest.raises(UsageError, match="no model is attached"):
        cache.detach(model)


class Odd(nn.Module):
    """One attention layer whose call can be spoilt."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.options = {}
        self.twice = False
        self.spoil = lambda h: h

    def forward(self, x):
        h = self.spoil(self.embed(x).unsqueeze(1))
        y = attention(h, h, h, **{"layer": 0, **self.options})
        if self.twice:
            y = attention(y, y, y, layer=0)
        return y.flatten(1, 1).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m.options.update(layer=1), InvalidInput, r"layer must be 0 \.\. 0 for the attached model, got 1"),
        (lambda m: m.options.update(layer=-1), InvalidInput, "layer must be"),
        (lambda m: m.options.update(window=3), InvalidInput, "attached with window=None, got window=3"),
        (lambda m: setattr(m, "twice", True), InvalidInput, "layer 0 was used twice in one step"),
        (
            lambda m: setattr(m, "spoil", lambda h: h.repeat(1, 2, 1, 1)),
            InvalidInput,
            r"\[B, H, T, D\] = \(1, 1, 3, 8\)",
        ),
        (lambda m: setattr(m, "spoil", lambda h: h[..., :4]), InvalidInput, "must be"),
        (lambda m: setattr(m, "spoil", lambda h: h[:, :, 1:]), InvalidInput, "in this step"),
        (lambda m: setattr(m, "spoil", lambda h: h.double()), InvalidType, "torch.float32 as when"),
    ],
)
def test_a_model_that_changes_after_it_was_attached(change, error, message):
    model = Odd().eval()
    cache = KVCache(8, block_size=4)
    cache.attach(model)
    x = torch.arange(4)[None]
    with torch.no_grad(), cache:
        model(x[:, :1])
        change(model)
        with pytest.raises(error, match=message):
            model(x)
    cache.core.check_valid()
    assert cache.stats().live_blocks == 0


def test_models_that_cannot_be_attached():
    cache = KVCache(8)
    cache.attach(nn.Embedding(5, 4))
    with pytest.raises(InvalidInput, match=r"no call of kvcache_torch\.attention"):
        cache.core  # noqa: B018
    model = Odd()
    model.options["layer"] = 2
    gap = KVCache(8)
    gap.attach(model)
    with pytest.raises(InvalidInput, match=r"without gaps, got \[2\]"), gap:
        pass


def test_positions_of_another_length():
    class Wrong(Small):
        def where(self, x):
            return self.places(positions(x.shape[1] + 1)[:, :-1])

    model = Wrong()
    cache = KVCache(8)
    cache.attach(model)
    with pytest.raises(InvalidInput, match="must be asked for this step's 1 tokens, got 2"), cache:
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda():
    model = Small().cuda()
    cache = KVCache(64, block_size=4)
    cache.attach(model)
    x = ids(0, 2, 20).cuda()
    with torch.inference_mode():
        y = model(x)
        for _ in range(2):
            with cache:
                close(model(x), y)
    model.cpu()
    with pytest.raises(InvalidType, match="make a new cache"), cache:
        model(x.cpu())
