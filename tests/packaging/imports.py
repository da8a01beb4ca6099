"""What a module imports, read from its source. Used by the tests beside this file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Import(NamedTuple):
    """One imported module, by its absolute name."""

    target: str
    line: int
    type_only: bool


def module_name(path: Path, package_dir: Path) -> str:
    """``.../kvcache_core/pool.py`` -> ``kvcache_core.pool``."""
    parts = [package_dir.name, *path.relative_to(package_dir).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(package_dir: Path) -> dict[str, Path]:
    """Every module of a package, by absolute name."""
    return {module_name(path, package_dir): path for path in sorted(package_dir.rglob("*.py"))}


def imports(source: str, module: str, known: set[str], *, is_package: bool = False) -> Iterator[Import]:
    """Every import in ``source``, wherever it stands, relative ones made absolute.

    ``from package import name`` counts as ``package.name`` where that is a module of ``known``.
    """
    tree = ast.parse(source)
    guarded = _type_checking_nodes(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, id(node) in guarded)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, is_package)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield Import(full if full in known else base, node.lineno, id(node) in guarded)
        elif isinstance(node, ast.Call) and (target := _dynamic_target(node)):
            yield Import(target, node.lineno, False)


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, node.module] if node.module else parts)


def _dynamic_target(node: ast.Call) -> str | None:
    """The name in ``import_module("name")`` or ``__import__("name")``."""
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if called not in {"import_module", "__import__"} or not node.args:
        return None
    first = node.args[0]
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None


def _type_checking_nodes(tree: ast.AST) -> set[int]:
    """Ids of the nodes under ``if TYPE_CHECKING:``."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.body:
                found.update(id(inner) for inner in ast.walk(statement))
    return found
