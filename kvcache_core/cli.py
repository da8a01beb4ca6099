"""The command line: ``kvcache inspect``, ``kvcache plan`` and ``kvcache simulate``. Extra ``cli``."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

from kvcache_core.blockformat import Header, check_value, read_header, secret_from_environment
from kvcache_core.errors import BlockRefused, InvalidInput, KVCacheError, PartlyFailed
from kvcache_core.layout import BlockLayout, LayerSpec
from kvcache_core.simulate import read_trace
from kvcache_core.simulate import simulate as run_simulation
from kvcache_core.sizes import parse_memory
from kvcache_core.tiers import StoredItem, Tier, open_tier

try:
    import typer
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
except ImportError as error:
    raise ImportError('the command line needs typer and rich: pip install "kvcache-core[cli]"') from error

__all__ = ["app", "main"]

_HEAD_BYTES = 1 << 14
_AGES = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_UNKNOWN = "not of this library"

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Look at K/V caches and their tiers.")
console = Console()


@dataclass
class _Model:
    """What lies in a tier of one model (weights and layout)."""

    blocks: int = 0
    nbytes: int = 0
    hits: int = 0
    oldest: int = 0
    newest: int = 0
    damaged: int = 0

    def add(self, item: StoredItem, header: Header | None) -> None:
        """Count one value."""
        self.blocks += 1
        self.nbytes += item.nbytes
        self.hits += item.hits or 0
        if header is not None:
            self.oldest = min(self.oldest or header.created, header.created)
            self.newest = max(self.newest, header.created)


@app.command()
def inspect(
    tier: Annotated[str, typer.Argument(help="disk:PATH, file:PATH or valkey://HOST:PORT/DB")],
    *,
    verify: Annotated[bool, typer.Option(help="read every value and check it")] = False,
    prune: Annotated[bool, typer.Option(help="delete what --older-than, --model and --down-to name")] = False,
    older_than: Annotated[str, typer.Option(help="an age such as 7d, 12h, 30m")] = "",
    model: Annotated[str, typer.Option(help="the first letters of a model's weights, as shown")] = "",
    down_to: Annotated[str, typer.Option(help="a size such as 5GiB: the oldest go first")] = "",
) -> None:
    """What lies in a tier: blocks, bytes, models, ages, hits. With --verify every value is read and checked."""
    try:
        chosen = _chooser(older_than, model)
        size = parse_memory(down_to) if down_to else None
        if prune and not (older_than or model or down_to):
            raise InvalidInput("--prune needs to know what: --older-than, --model or --down-to")
        if not prune and (older_than or model or down_to):
            raise InvalidInput("--older-than, --model and --down-to say what to delete; add --prune, or leave them out")
        _check_is_there(tier)
        opened = open_tier(tier)
    except KVCacheError as error:
        console.print(f"[red]{error}[/red]", soft_wrap=True)
        raise typer.Exit(2) from None
    failures: list[str] = []
    try:
        damaged = _show(opened, failures, verify=verify)
        if prune:
            console.print(f"deleted {_prune(opened, chosen, size, failures):,} blocks")
    except (KVCacheError, NotImplementedError) as error:
        console.print(f"[red]{error}[/red]", soft_wrap=True)
        raise typer.Exit(2) from None
    finally:
        opened.close()
    for failure in dict.fromkeys(failures):
        console.print(f"[red]{failure}[/red]", soft_wrap=True)
    if damaged or failures:
        raise typer.Exit(1)


@app.command()
def plan(
    layers: Annotated[int, typer.Option(help="L, attention layers")],
    heads: Annotated[int, typer.Option(help="H, K/V heads of a layer")],
    head_size: Annotated[int, typer.Option(help="D, elements of a head")],
    tokens: Annotated[int, typer.Option(help="tokens to keep, all sequences together")] = 4096,
    memory: Annotated[str, typer.Option(help="or: how many tokens fit into this")] = "",
    block_size: Annotated[int, typer.Option(help="tokens of a block")] = 16,
    dtype: Annotated[str, typer.Option(help="stored dtype")] = "float32",
) -> None:
    """How much memory a cache takes, or how much it holds."""
    try:
        layout = BlockLayout([LayerSpec.attention(heads, head_size)] * layers, block_size, dtype)
        blocks = -(-tokens // block_size) if not memory else parse_memory(memory) // layout.bytes_per_block - 1
        if blocks < 1:
            raise InvalidInput(f"{memory or tokens} holds no block of {layout.bytes_per_block:,} bytes")
    except KVCacheError as error:
        console.print(f"[red]{error}[/red]", soft_wrap=True)
        raise typer.Exit(2) from None
    table = Table("what", "how much", title=f"KVCache(size={blocks})")
    table.add_row("tokens", f"{blocks * block_size:,}")
    table.add_row("bytes of a token", f"{layout.bytes_per_token:,}")
    table.add_row("bytes of a block", f"{layout.bytes_per_block:,}")
    table.add_row("memory", _size((blocks + 1) * layout.bytes_per_block))
    console.print(table)


@app.command()
def simulate(
    trace: Annotated[str, typer.Argument(help="JSON lines with hash_ids, as Mooncake's traces")],
    pool: Annotated[str, typer.Option(help="blocks of the pool, or a share of all different blocks: 5%")] = "5%",
    tier: Annotated[
        list[str] | None, typer.Option(help="blocks or share of each tier, from the top; repeat it")
    ] = None,
) -> None:
    """What a pool and tiers of these sizes would have saved on a recorded trace. One block is the trace's block."""
    try:
        prompts = read_trace(trace)
        different = len({block for prompt in prompts for block in prompt})
        sizes = [_blocks(size, different) for size in (pool, *(tier or ()))]
        done = run_simulation(track(prompts, "replaying", console=console, transient=True), sizes[0], sizes[1:])
    except (KVCacheError, OSError) as error:
        console.print(f"[red]{error}[/red]", soft_wrap=True)
        raise typer.Exit(2) from None
    table = Table("where", "capacity", "blocks found", "share", title=f"{done.requests:,} requests")
    for name, size, found in zip(
        ["pool", *(f"tier {number}" for number in range(1, len(sizes)))],
        sizes,
        [done.from_pool, *done.from_tiers],
        strict=True,
    ):
        table.add_row(name, f"{size:,}", f"{found:,}", f"{found / max(1, done.blocks):.1%}")
    table.add_row("computed", "", f"{done.blocks - done.from_pool - sum(done.from_tiers):,}", f"{1 - done.saved:.1%}")
    console.print(table)


def main() -> None:
    """The program ``kvcache``."""
    app()


def _show(tier: Tier, failures: list[str], *, verify: bool) -> int:
    """Print a table of the models in a tier; returns how many values are damaged."""
    models: dict[tuple[str, str], _Model] = {}
    secret = secret_from_environment()
    for item, header in _scan(tier, "reading" if verify else "listing", failures):
        kind = "" if header is None else header.kind
        row = models.setdefault((_UNKNOWN if header is None else header.weights.hex(), kind), _Model())
        row.add(item, header)
        if verify and header is not None:
            try:
                check_value(tier.peek(item.key) or b"", secret)
            except BlockRefused:
                row.damaged += 1
    now = time.time()
    columns = ["weights", "kind", "blocks", "bytes", "oldest", "newest", "hits", *(["damaged"] if verify else [])]
    table = Table(*columns, title=tier.name)
    for (weights, kind), row in sorted(models.items()):
        ages = [_age(now - when) if when else "" for when in (row.oldest, row.newest)]
        cells = [weights, kind, f"{row.blocks:,}", _size(row.nbytes), *ages, f"{row.hits:,}"]
        table.add_row(*cells, *([f"{row.damaged:,}"] if verify else []))
    console.print(table)
    return sum(row.damaged for row in models.values())


def _scan(tier: Tier, what: str, failures: list[str]) -> Iterator[tuple[StoredItem, Header | None]]:
    """Every value with its header, or None where there is none; with a progress bar. What kept it from listing the
    whole tier goes to ``failures``.
    """
    items: list[StoredItem] = []
    try:
        items.extend(tier.items(_HEAD_BYTES))
    except PartlyFailed as error:
        failures.append(str(error))
    for item in track(items, what, console=console, transient=True):
        try:
            yield item, read_header(item.head)
        except BlockRefused:
            yield item, None


def _prune(tier: Tier, chosen: Callable[[Header | None], bool] | None, size: int | None, failures: list[str]) -> int:
    """Delete what was chosen, then the oldest until the rest is no larger than ``size``."""
    gone: list[bytes] = []
    kept: list[tuple[int, bytes, int]] = []
    for item, header in _scan(tier, "choosing", failures):
        if chosen is not None and chosen(header):
            gone.append(item.key)
        else:
            kept.append((0 if header is None else header.created, item.key, item.nbytes))
    left = sum(nbytes for _, _, nbytes in kept)
    for _, key, nbytes in sorted(kept):
        if size is None or left <= size:
            break
        gone.append(key)
        left -= nbytes
    batches = [gone[at : at + 256] for at in range(0, len(gone), 256)]
    return sum(tier.delete_many(batch) for batch in track(batches, "deleting", console=console, transient=True))


def _check_is_there(tier: str) -> None:
    """Opening a disk tier makes one, which nobody means who wants to see what is there; one in RAM is always new."""
    if tier.startswith("ram:"):
        raise InvalidInput(
            f"tier {tier!r} lies in the memory of a process that uses it: there, cache.tier_stats() tells"
        )
    path = unquote(tier.removeprefix("disk:").partition("?")[0])
    if tier.startswith("disk:") and path and not Path(path, "data.mdb").exists():
        raise InvalidInput(f"tier {tier!r}: nothing lies at {path}, no data.mdb; name the folder of a disk tier")


def _chooser(older_than: str, model: str) -> Callable[[Header | None], bool] | None:
    """Whether a value is to be deleted; None if neither age nor model was given."""
    if not older_than and not model:
        return None
    match = re.fullmatch(r"(\d+)([smhd])", older_than) if older_than else None
    if older_than and match is None:
        raise InvalidInput(f"an age is a number and s, m, h or d, such as 7d; got {older_than!r}")
    if model and not re.fullmatch(r"[0-9a-f]{1,32}", model):
        raise InvalidInput(f"a model is named by the first letters of its weights' identity, got {model!r}")
    latest = time.time() - int(match[1]) * _AGES[match[2]] if match else None

    def chosen(header: Header | None) -> bool:
        if header is None:
            return False
        return header.weights.hex().startswith(model) and (latest is None or header.created < latest)

    return chosen


def _blocks(text: str, different: int) -> int:
    """A number of blocks, or a share of all different ones."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text)
    blocks = 0 if match is None else int(float(match[1]) * (different / 100 if match[2] else 1))
    if blocks < 1:
        raise InvalidInput(f"a capacity is a number of blocks or a share such as 5%, at least one block; got {text!r}")
    return blocks


def _size(nbytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            return f"{nbytes / size:,.1f} {unit}"
    return f"{nbytes} B"


def _age(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
