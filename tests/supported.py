"""The table of what is supported: each test that has shown a cell to hold says so, and the docs show the cells.

A test calls :func:`proven` at its end. In a normal run the cell must stand in ``docs/supported.json``. ``make
supported`` runs all tests that call it, the slow ones too, and if all pass makes the table anew from the cells of that
run, and ``docs/supported.md`` from the table. A test module compares what the table claims for it with its own
parameters (:func:`claimed`): no cell outlives its test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE, PAGE = ROOT / "docs/supported.json", ROOT / "docs/supported.md"
WRITING = "KVCACHE_PROVEN"
"""The variable that names the file a run writes its cells to."""

MODES = (
    *("forward", "stepwise", "greedy", "sampling", "padding", "beam search", "several sequences", "assisted"),
    *("continued", "small pool", "graph"),
)
"""The columns, in order; a mode that is not listed comes behind them."""

_HEAD = """# What is supported

Made by `make supported` from a run of the tests; do not edit. A cell says that in that run a test with a small random
model of the family has shown the cached result to equal the uncached one:

- forward: `with cache: model(ids)`, nothing, a part and all of it cached
- stepwise: random splits into steps over ragged rows, forks and truncations, and the library's own `generate`
- greedy, sampling, beam search, several sequences (`num_return_sequences`), assisted: the framework's own `generate`
- padding: rows of different lengths, padded on the left and on the right; in KerasHub on the right, as it does itself
- continued: a kept cache goes on with the next turn; small pool: with eviction while it runs
- graph: inside a `tf.function` of your own
"""


def proven(framework: str, family: str, mode: str) -> None:
    """The test that calls this has shown that ``family`` works in ``mode``.

    Args:
        framework: the table's name, for example ``"PyTorch: transformers"``.
        family: a row, for example ``"Llama"``.
        mode: a column, see :data:`MODES`.
    """
    cells = os.environ.get(WRITING)
    if cells is not None:
        with open(cells, "a", encoding="utf-8") as file:  # one short line: appended whole, whoever else writes
            file.write(json.dumps([framework, family, mode]) + "\n")
    elif (family, mode) not in claimed(framework):
        raise AssertionError(
            f"docs/supported.json does not have {framework!r}, {family!r}, {mode!r}: run make supported"
        )


def claimed(framework: str) -> set[tuple[str, str]]:
    """The cells (family, mode) that the docs claim for a framework."""
    return {(family, mode) for family, modes in _read().get(framework, {}).items() for mode in modes}


def page() -> str:
    """The page, made from the table."""
    parts = [_HEAD]
    for framework, families in sorted(_read().items()):
        present = {mode for modes in families.values() for mode in modes}
        columns = [mode for mode in MODES if mode in present] + sorted(present - set(MODES))
        lines = [f"\n## {framework}\n", "| family | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for family, modes in sorted(families.items(), key=lambda item: item[0].lower()):
            lines.append(f"| {family} | " + " | ".join("yes" if mode in modes else "" for mode in columns) + " |")
        parts.append("\n".join(lines) + "\n")
    return "".join(parts)


def _read() -> dict[str, dict[str, list[str]]]:
    table: dict[str, dict[str, list[str]]] = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    return table


def write(cells: Iterable[tuple[str, str, str]]) -> None:
    """Make the table and the page anew from (framework, family, mode)."""
    table: dict[str, dict[str, list[str]]] = {}
    for framework, family, mode in sorted(set(cells)):
        table.setdefault(framework, {}).setdefault(family, []).append(mode)
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


def main(options: Sequence[str]) -> int:
    """Run the tests that prove cells, with more options for pytest; the table is left alone unless all pass."""
    tests = [path for path in sorted((ROOT / "tests/adapters").rglob("test_*.py")) if "proven(" in path.read_text()]
    with tempfile.TemporaryDirectory() as folder:
        cells = Path(folder, "cells")
        # What the table claims now is not what this run is about.
        chosen = ["-m", "slow or not slow", "-k", "not the_table_claims"]
        code = subprocess.call(
            [sys.executable, "-m", "pytest", *chosen, *options, *map(str, tests)],
            cwd=ROOT,
            env={**os.environ, WRITING: str(cells)},
        )
        if not code:
            write(tuple(json.loads(line)) for line in cells.read_text(encoding="utf-8").splitlines())
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
