"""The bar that `cache.warm` draws."""

from __future__ import annotations

import io

import pytest

from kvcache_core.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "show", "drawn"),
    [
        (Terminal(), None, True),
        (io.StringIO(), None, False),
        (Terminal(), False, False),
        (io.StringIO(), True, True),
    ],
)
def test_where_there_is_a_bar(stream, show, drawn):
    assert list(progress(range(4), "warm", show=show, stream=stream)) == [0, 1, 2, 3]
    said = stream.getvalue()
    assert bool(said) == drawn
    if drawn:
        assert said.split("\r")[1] == "warm [" + "." * 30 + "] 0/4"
        assert said.endswith("\rwarm [" + "#" * 30 + "] 4/4\n")


def test_it_is_drawn_a_thousand_times_at_most():
    stream = io.StringIO()
    assert sum(1 for _ in progress(range(50_000), "warm", show=True, stream=stream)) == 50_000
    assert stream.getvalue().count("\r") <= 1001


def test_an_error_ends_the_line():
    stream = io.StringIO()
    steps = progress([1, 2], "warm", show=True, stream=stream)
    next(steps)
    with pytest.raises(ValueError, match="stop"):
        steps.throw(ValueError("stop"))
    assert stream.getvalue().endswith("0/2\n")


def test_nothing_to_do():
    stream = io.StringIO()
    assert list(progress([], "warm", show=True, stream=stream)) == []
    assert stream.getvalue() == ""


def test_without_a_known_length_there_is_no_bar():
    stream = io.StringIO()
    assert list(progress(iter_of_two(), "warm", show=True, stream=stream)) == [1, 2]
    assert stream.getvalue() == ""


def iter_of_two():
    yield 1
    yield 2
