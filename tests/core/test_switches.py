"""Noticing what a model's parts are switched to."""

from __future__ import annotations

import pytest

from kvcache_core.switches import Switches


def nothing(part):
    pass


@pytest.mark.parametrize(
    ("change", "is_one"),
    [
        (nothing, False),
        (lambda part: part.update(active="b"), True),
        (lambda part: part.update(merged=True), True),
        (lambda part: part.update(other="a"), True),
        (lambda part: part["names"].append("b"), True),
        (lambda part: part["chosen"].add("b"), True),
        (lambda part: part["scaling"].update(a=2.0), True),
        (lambda part: part.pop("active"), True),
        (lambda part: part.update(calls=4), False),
        (lambda part: part.update(other=object()), False),
        (lambda part: part.update(quiet="b"), False),
        (lambda part: part["rows"].append(3), False),
    ],
)
def test_a_switch_is_noticed_and_a_counter_is_none(change, is_one):
    part = {
        "active": "a",
        "merged": False,
        "other": None,
        "names": ["a"],
        "chosen": {"a"},
        "scaling": {"a": 1.0},
        "calls": 3,
        "quiet": "a",
        "rows": [1, 2],
    }
    switches = Switches([{}, part], ignored={"quiet"})
    assert switches.mode() == b""
    change(part)
    assert bool(switches.mode()) == is_one
    assert switches.mode() == switches.mode()
    if is_one:
        assert Switches([{}, part], ignored={"quiet"}).first != switches.first


def test_switched_back_it_is_what_it_was():
    part = {"active": "a"}
    switches, seen = Switches([part]), []
    for active in ("a", "b", None, "b", "a"):
        part["active"] = active
        seen.append(switches.mode())
    assert seen[0] == seen[4] == b"" and seen[1] == seen[3] and len(set(seen)) == 3
