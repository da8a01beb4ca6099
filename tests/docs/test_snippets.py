"""The documentation is right: its examples run, its links lead somewhere, its module table is complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.packaging.test_imports import ORDER

PAGES = ("README.md", "docs/guide.md", "docs/architecture.md", "docs/keras.md", "docs/transformers.md")
FRAMEWORKS = {"torch": ("kvcache_torch", "# PyTorch"), "keras": ("kvcache_keras", "# Keras")}


def blocks(text: str) -> list[tuple[int, str]]:
    """(lines before it, code) of each ```python block. (```py marks a fragment that does not run alone.)"""
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def framework_of(code: str) -> str | None:
    """The framework that a block names in an import or a first comment; None if it is the same in both."""
    for name, marks in FRAMEWORKS.items():
        if any(mark in code for mark in marks):
            return name
    return None


def programs(text: str) -> dict[str, str]:
    """One program per framework that the page shows: its blocks and those that name none, on their own lines."""
    found = blocks(text)
    names = {framework_of(code) for _, code in found} - {None} or {"core"}
    result = {}
    for name in sorted(filter(None, names)):
        source = ""
        for before, code in found:
            if framework_of(code) in (None, name):
                source += "\n" * (before - source.count("\n")) + code
        result[name] = source
    return result


def links(text: str) -> list[str]:
    """The targets of links and pictures that lie in this repository."""
    return re.findall(r"\]\((?!https?:)([^)\s]+)\)", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Links of a page to files or headings that are not there."""
    wrong = []
    for link in links(page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            wrong.append(f"{page.name}: {link}")
    return wrong


def pages(root: Path) -> list[Path]:
    """All pages of the project."""
    return [*root.glob("*.md"), *(root / "docs").glob("*.md")]


def _cases() -> list[tuple[str, str]]:
    root = Path(__file__).resolve().parents[2]
    return [(page, name) for page in PAGES for name in programs((root / page).read_text())]


@pytest.mark.parametrize(("page", "name"), _cases())
def test_examples_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str, name: str) -> None:
    """In this process, which has the frameworks loaded: what an import loads is tested in tests/packaging."""
    monkeypatch.chdir(tmp_path)
    code = programs((root / page).read_text())[name]
    exec(compile(code, str(root / page), "exec"), {"__name__": "__main__"})


def test_readme_and_guide_show_both_frameworks(root: Path) -> None:
    for page in ("README.md", "docs/guide.md"):
        assert sorted(programs((root / page).read_text())) == ["keras", "torch"]


def test_links_lead_somewhere(root: Path) -> None:
    assert [link for page in pages(root) for link in broken_links(page)] == []


def test_pages_name_only_files_and_tests_that_exist(root: Path) -> None:
    wrong = []
    for page in pages(root):
        for path, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text()):
            file = root / path
            if not file.exists() or (test and f"def {test}(" not in file.read_text()):
                wrong.append(f"{page.name}: {path} {test}")
    assert wrong == []


def test_architecture_lists_the_modules_of_the_core_in_their_order(root: Path) -> None:
    text = (root / "docs" / "architecture.md").read_text()
    table = text.split("| module | what it does |")[1].split("\n\n")[0]
    listed = re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)
    there = {path.stem for path in (root / "kvcache_core").glob("*.py")} - {"__init__"}
    assert sorted(listed) == sorted(there)
    rank = {module: number for number, line in enumerate(ORDER) for module in line}
    assert [rank[module] for module in listed] == sorted(rank[module] for module in listed)


# The checks above can fail ---------------------------------------------------------------------------------------


def test_a_program_keeps_its_lines_and_leaves_out_the_other_framework() -> None:
    both = "```python\nb = 2\n```\n"
    text = f"# T\n```python\n# PyTorch\na = 1\n```\n\n{both}```python\n# Keras\nc = 3\n```\n```py\nd\n```\n"
    found = programs(text)
    assert found["torch"].splitlines()[2:4] == ["# PyTorch", "a = 1"]
    assert found["keras"].splitlines()[-4:] == ["", "", "# Keras", "c = 3"]
    assert found["keras"].splitlines()[7] == "b = 2"
    assert "d" not in found["torch"]


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading, with `code`\n[a](#a-heading-with-code) [b](#none) [c](gone.md) [d](https://x.y/)\n")
    assert broken_links(page) == ["page.md: #none", "page.md: gone.md"]
