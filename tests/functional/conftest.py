"""Fixtures of the tests of mathematics."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from visard.functional import softmax_workspace


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """chunks(4): four classes at a time."""

    def set_size(classes: int) -> None:
        monkeypatch.setattr(softmax_workspace, "chunk_classes", lambda *_: classes)

    return set_size
