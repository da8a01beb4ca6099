"""What several tests of the PyTorch adapter need."""

from __future__ import annotations

import pytest

from kvcache_torch import native


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> native.Kernels:
    """The kernels in C, in use."""
    found = native.load()
    if found is None:
        pytest.skip("needs a C compiler")
    monkeypatch.setattr(native, "_active", [found])
    return found
