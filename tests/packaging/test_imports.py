"""Who may import whom, read from the sources: the core stands alone, and its modules depend one way."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.packaging.imports import imports, modules

CORE, ADAPTERS = "kvcache_core", ("kvcache_torch", "kvcache_keras")

# Each module may import only modules of lines above its own. `__init__` gathers the public names and may import
# all of them; no module imports `__init__`.
ORDER: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("sizes", "identity", "weightfile", "described", "waiting", "switches"),
    ("types", "sharing", "crc", "staging", "tierurl"),
    ("keys", "stats", "admission", "tree", "weights", "worth", "analysis", "progress", "sources", "mixing"),
    ("inputs", "frames", "layout", "samples"),
    ("quantization", "blockformat", "statefile"),
    ("runs", "lru", "nodes", "siblings"),
    ("pool", "children"),
    ("blocktree",),
    ("prefix",),
    ("entrylookup", "residence", "entryformat"),
    ("entries", "proving"),
    ("activation",),
    ("sites",),
    ("match",),
    ("sequence",),
    ("plan",),
    ("eviction", "extents"),
    ("tails",),
    ("reserve",),
    ("transaction", "placement"),
    ("sequences",),
    ("planning",),
    ("cache",),
    ("store",),
    ("saving", "budget"),
    ("tiers", "lmdbfile", "splitting", "valkeynodes"),
    ("tier_disk", "tier_valkey", "tier_file"),
    ("tiercosts", "demotion", "readahead", "tier_contract", "simulate"),
    ("opentiers",),
    ("entrytiers", "spilling"),
    ("poolitems",),
    ("promotion",),
    ("tiering",),
    ("attention", "convolution"),
    ("sampling",),
    ("stepping",),
    ("adapter",),
    ("binding",),
    ("attaching",),
    ("warmstart",),
    ("parameters",),
    ("serving",),
    ("frontend",),
    ("recompute",),
    ("decoder",),
    ("scheduling",),
    ("speculation",),
    ("options",),
    ("generation",),
    ("beam",),
    ("scoring",),
    ("generating",),
    ("testing_bound",),
    ("testing_report",),
    ("testing_runs",),
    ("testing",),
    ("cli",),
    ("__main__",),
)

# Imports for annotations alone that point the other way, each with its reason.
TYPE_ONLY: dict[tuple[str, str], str] = {
    ("sequence", "sequences"): "a sequence is a handle that forwards to the cache that opened it",
}

# Modules that need an extra. Only modules that need it too may import them: nobody pays for what they did not ask for.
OPTIONAL: dict[str, frozenset[str]] = {
    "cli": frozenset({"typer", "rich"}),
    "lmdbfile": frozenset({"lmdb"}),
    "tier_disk": frozenset({"lmdb"}),
    "tier_valkey": frozenset({"valkey"}),
    "valkeynodes": frozenset({"valkey"}),
}

# Modules that use a package where it is installed and do without where it is not. Anyone may import them.
PREFERRED: dict[str, frozenset[str]] = {"crc": frozenset({"isal"})}


def foreign_imports(name: str, source: str, known: set[str]) -> list[str]:
    """Imports of a core module that are neither standard library, numpy nor the core itself."""
    extras = OPTIONAL.get(_short(name), frozenset()) | PREFERRED.get(_short(name), frozenset())
    allowed = {"numpy", CORE} | sys.stdlib_module_names | extras
    return [
        f"{name}:{found.line} imports {found.target}"
        for found in imports(source, name, known, is_package=name == CORE)
        if found.target.split(".")[0] not in allowed
    ]


def backward_imports(name: str, source: str, known: set[str]) -> list[str]:
    """Imports of a core module that point to its own line of ORDER or to one below."""
    rank = {module: number for number, line in enumerate(ORDER) for module in line}
    own = _short(name)
    if own == CORE:
        return []
    if own not in rank:
        return [f"{name} has no place yet: add it to ORDER in {Path(__file__).name}, below all that it imports"]
    wrong = []
    for found in imports(source, name, known):
        if found.target.split(".")[0] != CORE:
            continue
        target = _short(found.target)
        if found.type_only and (own, target) in TYPE_ONLY:
            continue
        if target == CORE:
            wrong.append(f"{name}:{found.line} imports a name from {CORE} itself; import the module that defines it")
        elif target not in rank:
            wrong.append(f"{name}:{found.line} imports {target}, which has no place yet in ORDER")
        elif rank[target] >= rank[own]:
            wrong.append(f"{name}:{found.line} imports {target}, which does not stand above {own} in ORDER")
    return wrong


def _short(name: str) -> str:
    """``kvcache_core.pool`` -> ``pool``; the package itself stays ``kvcache_core``."""
    return name.removeprefix(f"{CORE}.").split(".")[0]


def _core(root: Path) -> dict[str, Path]:
    found = modules(root / CORE)
    assert f"{CORE}.cache" in found  # an empty list would let everything pass
    return found


def test_core_imports_only_the_standard_library_and_numpy(root: Path) -> None:
    known = _core(root)
    assert [line for name, path in known.items() for line in foreign_imports(name, path.read_text(), set(known))] == []


def test_core_modules_depend_one_way(root: Path) -> None:
    known = _core(root)
    assert [line for name, path in known.items() for line in backward_imports(name, path.read_text(), set(known))] == []


def test_order_names_each_module_once() -> None:
    names = [module for line in ORDER for module in line]
    assert len(names) == len(set(names))


def test_optional_modules_are_imported_by_nobody(root: Path) -> None:
    known = _core(root)
    wrong = [
        f"{name}:{found.line}"
        for name, path in known.items()
        for found in imports(path.read_text(), name, set(known), is_package=name == CORE)
        if _short(found.target) in OPTIONAL
        and found.target.startswith(CORE)
        and _short(name) != "__main__"
        and not OPTIONAL[_short(found.target)] <= OPTIONAL.get(_short(name), frozenset())
    ]
    assert wrong == []


@pytest.mark.parametrize("package", ADAPTERS)
def test_adapters_never_import_each_other_or_the_other_framework(root: Path, package: str) -> None:
    other = {
        "kvcache_torch": {"kvcache_keras", "tensorflow", "keras", "keras_hub"},
        "kvcache_keras": {"kvcache_torch", "torch", "transformers"},
    }[package]
    known = modules(root / "adapters" / package)
    assert package in known, f"adapters/{package}/__init__.py is missing"
    wrong = [
        f"{name}:{found.line} imports {found.target}"
        for name, path in known.items()
        for found in imports(path.read_text(), name, set(known), is_package=path.name == "__init__.py")
        if found.target.split(".")[0] in other or found.target.split(".")[0] == "adapters"
    ]
    assert wrong == []


def test_adapters_folder_is_no_package(root: Path) -> None:
    """A package `adapters` on the path would hide the unrelated distribution of that name."""
    assert (root / "adapters").is_dir()
    assert not (root / "adapters" / "__init__.py").exists()


# The checks above can fail ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "from keras import ops",
        "def f():\n    import tensorflow as tf",
        "import importlib\nimportlib.import_module('torch')",
        "try:\n    import scipy\nexcept ImportError:\n    scipy = None",
        "import kvcache_torch",
        "import typer",
    ],
)
def test_a_foreign_import_is_seen(source: str) -> None:
    assert len(foreign_imports(f"{CORE}.pool", source, set())) == 1


@pytest.mark.parametrize("source", ["import numpy as np", "from collections import deque", "from .errors import X"])
def test_an_allowed_import_is_not_reported(source: str) -> None:
    assert foreign_imports(f"{CORE}.pool", source, set()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from kvcache_core.cache import BlockCache",
        "from .cache import BlockCache",
        "from . import cache",
        "from kvcache_core import cache",
        "import kvcache_core.cache",
        "from kvcache_core import BlockCache",
        "def f():\n    from kvcache_core.plan import StepPlan",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from kvcache_core.cache import BlockCache",
        "from kvcache_core.nowhere import X",
        "from kvcache_core.pool import BlockPool",
    ],
)
def test_a_backward_import_is_seen(source: str) -> None:
    assert len(backward_imports(f"{CORE}.pool", source, {f"{CORE}.cache", f"{CORE}.plan"})) == 1


def test_a_forward_import_is_not_reported() -> None:
    assert backward_imports(f"{CORE}.pool", "from .errors import X\nfrom . import types", {f"{CORE}.types"}) == []


def test_a_module_without_a_place_is_told_to_take_one() -> None:
    assert "add it to ORDER" in backward_imports(f"{CORE}.brand_new", "import os", set())[0]


def test_a_listed_type_only_import_is_refused_at_run_time() -> None:
    line = "from kvcache_core.sequences import OpenSequences"
    assert backward_imports(f"{CORE}.sequence", f"if TYPE_CHECKING:\n    {line}", set()) == []
    assert len(backward_imports(f"{CORE}.sequence", line, set())) == 1
