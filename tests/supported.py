"""The table of what is supported: each test that has shown a cell to hold says so, and the docs show the cells.

A test calls :func:`proven` at its end. In a normal run the cell must stand in ``docs/supported.json``; with
``KVCACHE_WRITE_SUPPORTED=1`` it is written there. ``python -m tests.supported`` then makes ``docs/supported.md``. A
test module compares what the file claims for it with its own parameters (:func:`claimed`): no cell outlives its test.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
TABLE, PAGE = DOCS / "supported.json", DOCS / "supported.md"

MODES = (
    *("forward", "stepwise", "greedy", "sampling", "padding", "beam search", "several sequences", "assisted"),
    *("continued", "small pool", "graph"),
)
"""The columns, in order; a mode that is not listed comes behind them."""

_HEAD = """# What is supported

Made from the test run (`KVCACHE_WRITE_SUPPORTED=1 make test`, then `python -m tests.supported`); do not edit. A cell
says that a test with a small random model of the family has shown the cached result to equal the uncached one:

- forward: `with cache: model(ids)`, nothing, a part and all of it cached
- stepwise: random splits into steps over ragged rows, forks and truncations, and the library's own `generate`
- greedy, sampling, beam search, several sequences (`num_return_sequences`), assisted: the framework's own `generate`
- padding: rows of different lengths, padded on the left and on the right
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
    if not os.environ.get("KVCACHE_WRITE_SUPPORTED"):
        if (family, mode) not in claimed(framework):
            raise AssertionError(
                f"docs/supported.json does not have {framework!r}, {family!r}, {mode!r}: run the tests once with "
                "KVCACHE_WRITE_SUPPORTED=1, then python -m tests.supported"
            )
        return
    with open(DOCS / ".supported.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        table = _read()
        cells = table.setdefault(framework, {}).setdefault(family, [])
        if mode not in cells:
            cells.append(mode)
            cells.sort()
            TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")


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


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
