"""Tiers: an hour of real conversation requests replayed through a small pool, with and without tiers below it."""

from __future__ import annotations

import os
from pathlib import Path

from measure import Row, Table

from kvcache_core.simulate import read_trace, simulate

TRACE = Path(os.environ.get("KVCACHE_TRACES", Path(__file__).resolve().parents[3] / "shared" / "traces"))
FILE = TRACE / "conversation_trace.jsonl"
WITHOUT = "the same pool without tiers"


def main(*, quick: bool = False) -> Table:
    """Prompt tokens that have to be computed."""
    text = [
        "Mooncake's conversation trace (FAST 2025), one block per 512 prompt tokens, replayed one request after "
        "another through a pool of 5 % of all different blocks; RAM tier 20 %, disk tier 100 %. The figure is the "
        "share of prompt tokens that has to be computed; bookkeeping alone: it does not depend on the machine.",
    ]
    if not FILE.exists():
        text.append(f"Skipped: the trace is not here (`{FILE.name}`; set KVCACHE_TRACES to its folder).")
        return Table("tiers_trace", "Tiers: a conversation trace", text, [])
    prompts = read_trace(FILE)
    prompts = prompts[: len(prompts) // 4] if quick else prompts
    different = len({block for prompt in prompts for block in prompt})
    pool = different // 20
    alone = 100 * (1 - simulate(prompts, pool).saved)
    rows = []
    for name, tiers in (("RAM 20 %", [different // 5]), ("RAM 20 % + disk 100 %", [different // 5, different])):
        found = simulate(prompts, pool, tiers)
        shares = [count / found.blocks * 100 for count in (found.from_pool, *found.from_tiers)]
        extra = dict(zip(("from pool %", "from RAM %", "from disk %"), shares, strict=False))
        samples = {"ours": [100 * (1 - found.saved)], WITHOUT: [alone]}
        rows.append(Row.of(f"pool 5 %, {name}", "% of tokens computed", samples, extra=extra))
    unlimited = 100 * (1 - simulate(prompts, different + 1000).saved)
    rows.append(Row.of("a pool that holds everything", "% of tokens computed", {"ours": [unlimited], WITHOUT: [alone]}))
    return Table("tiers_trace", "Tiers: a conversation trace", text, rows)
