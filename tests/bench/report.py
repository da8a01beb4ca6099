"""Turn the benchmarks' JSON into docs/performance.md: `python tests/bench/report.py [FOLDER]`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from chart import draw

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "docs" / "performance.json"
PAGE = ROOT / "docs" / "performance.md"
ORDER = (
    "torch_decode",
    "torch_attention",
    "torch_memory",
    "torch_repeat",
    "torch_prefix",
    "torch_batch",
    "torch_requests",
    "torch_chunk",
    "torch_beam",
    "torch_score",
    "streaming_speech",
    "torch_activation",
    "stored_dtypes",
    "hf_generate",
    "hf_beam",
    "hf_decode",
    "hf_memory",
    "keras_decode",
    "keras_attention",
    "keras_lengths",
    "keras_hub_attached",
    "keras_activation",
    "core_workload",
    "core_scale",
    "core_trace",
    "tiers_restore",
    "tiers_step",
    "tiers_overlap",
    "tiers_trace",
)

HEAD = """# Performance

Made by `make bench` (`tests/bench/`) from [performance.json](performance.json); do not edit. `make bench ARGS="--only
torch_decode"` makes one table, `--quick` is shorter, `--publish` rewrites this page.

Figures are medians over the runs, with the lowest and highest in brackets. Ours and the peers take turns in one
process, so that whatever else the machine does hits all alike. A ratio is ours / peer, taken run by run: below 1 we
are faster. The model is SmolLM2-135M-Instruct in float32.

![Every target and what was measured](performance.svg)
"""


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    if value == 0:
        return "0"
    decimals = 2 - math.floor(math.log10(abs(value)))
    return f"{value:,.{min(max(decimals, 0), 6)}f}"


def spread(found: dict[str, Any]) -> str:
    """Median [lowest - highest]."""
    return f"{number(found['median'])} [{number(found['low'])}-{number(found['high'])}]"


def verdict(row: dict[str, Any], peer: str) -> str:
    """Whether the target against a peer is met; nothing if there is none."""
    if peer not in row["targets"]:
        return ""
    target, ratio = row["targets"][peer], row["ratios"][peer]["median"]
    return f"target ≤ {target:.3g} {'met' if ratio <= target else '**missed**'} ({ratio:.3f})"


def losses(tables: list[dict[str, Any]]) -> list[str]:
    """Every case where a peer is faster or a target is missed."""
    lines = []
    for table in tables:
        for row in table["rows"]:
            for peer, ratio in row["ratios"].items():
                said = verdict(row, peer)
                if ratio["median"] > 1.005 or "missed" in said:
                    line = f"- {table['title']}, {row['case']}: {number(ratio['median'])} x {peer}"
                    lines.append(f"{line}; {said}." if said else f"{line}.")
    return lines


def section(table: dict[str, Any], machines: list[str]) -> list[str]:
    """One benchmark: its text and a line per contender."""
    text = [*table["text"], circumstances(table["measured"], machines)]
    lines = [f"## {table['title']}", "", *[line + "\n" for line in text]]
    if any(row["peers"] for row in table["rows"]):
        lines += ["| case | who | time | ours / peer |", "|---|---|---|---|"]
        for row in table["rows"]:
            lines.append(f"| {row['case']}, {row['unit']} | **ours** | {spread(row['ours'])} | |")
            lines += [
                f"| | {peer} | {spread(row['peers'][peer])} | {spread(row['ratios'][peer])} |" for peer in row["peers"]
            ]
        lines.append("")
    return [*lines, *map(footnote, table["rows"]), ""]


def described(machine: dict[str, Any]) -> str:
    """What a table was measured on, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cores']} cores ({machine['cpu']}), {machine['memory_gib']} GiB, {machine['system']}, "
        f"Python {machine['python']}; {versions}"
    )


def circumstances(measured: dict[str, Any], machines: list[str]) -> str:
    """When, on which of the machines, and how a table was measured."""
    load = "load average not recorded"
    if measured["load"]:
        load = "load average {} at the start, {} at the end".format(*measured["load"])
    where = f" on machine {machines.index(described(measured['machine'])) + 1}" if len(machines) > 1 else ""
    said = f"Measured {measured['date']}{where}, threads: {measured['threads']}; {load}."
    if measured["clock"] == "processor":
        said += (
            " Processor time of this process, not wall time: other programs used the machine, and waiting for a core "
            "is left out on both sides."
        )
    return said


def footnote(row: dict[str, Any]) -> str:
    """A row's targets, its number of runs and what else was counted."""
    said = [f"{peer}: {verdict(row, peer)}" for peer in row["targets"]]
    said.append(f"{row['ours']['runs']} runs")
    said += [f"{name} {number(value)}" for name, value in row["extra"].items()]
    return f"- {row['case']}: {'; '.join(said)}."


def in_order(tables: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As the page shows them."""
    return sorted(tables, key=lambda table: ORDER.index(table["name"]))


def page(result: dict[str, Any]) -> str:
    """The whole page."""
    tables = in_order(result["tables"])
    machines = list(dict.fromkeys(described(table["measured"]["machine"]) for table in tables))
    lines = [HEAD]
    if len(machines) == 1:
        lines.append(f"Machine: {machines[0]}.\n")
    else:
        lines.append("The tables come from several machines; each table says from which:\n")
        lines += [*(f"{number}. {machine}." for number, machine in enumerate(machines, 1)), ""]
    lines += ["## Where we lose", "", *(losses(tables) or ["Nowhere in these tables."]), ""]
    missing = [name for name in ORDER if name not in {table["name"] for table in tables}]
    if missing:
        lines += [f"Not measured yet: {', '.join(f'`{name}`' for name in missing)}.", ""]
    for table in tables:
        lines += section(table, machines)
    return "\n".join(lines).rstrip() + "\n"


def main(source: Path = COMMITTED) -> None:
    """Write the page and its charts from the JSON."""
    result = json.loads(source.read_text())
    PAGE.write_text(page(result), encoding="utf-8")
    draw(in_order(result["tables"]), PAGE.parent)
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
