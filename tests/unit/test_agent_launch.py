"""Finding an agent: what is said when there is no way to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cachefs.agent import launch
from cachefs.errors import AgentUnavailable


def test_nobody_listens(tmp_path: Path) -> None:
    assert launch.connect(str(tmp_path / "none.sock")) is None


def test_an_address_that_is_too_long_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(AgentUnavailable, match="path too long"):
        launch.connect(f"{tmp_path}/{'x' * 120}.sock")
