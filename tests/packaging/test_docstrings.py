"""Every class, function and method has a docstring, also in private classes; its name's first letter decides.

Ruff's D rules leave out what stands in a private class, and all magic methods.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

MAGIC = {"__call__", "__contains__", "__enter__", "__exit__", "__getitem__", "__iter__"}


def undocumented(tree: ast.AST, inside: tuple[str, ...] = ()) -> Iterator[str]:
    """Names without a docstring; a property's setter is documented by its getter."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            setter = any(isinstance(one, ast.Attribute) and one.attr == "setter" for one in node.decorator_list)
            wanted = not node.name.startswith("_") or node.name in MAGIC
            if wanted and not setter and ast.get_docstring(node) is None:
                yield ".".join((*inside, node.name))
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node, (*inside, node.name))
        elif not isinstance(node, ast.expr):
            yield from undocumented(node, inside)


def test_everything_is_documented(root: Path) -> None:
    files = [*(root / "kvcache_core").glob("*.py"), *(root / "adapters").rglob("*.py")]
    assert len(files) > 50
    assert [f"{path.name}: {name}" for path in files for name in undocumented(ast.parse(path.read_text()))] == []


def test_what_is_missing_is_found() -> None:
    source = "class _A:\n  def b(self): ...\n  def _c(self): ...\n  def __call__(self): ...\nif 1:\n  def d(): ...\n"
    assert list(undocumented(ast.parse(source))) == ["_A.b", "_A.__call__", "d"]
