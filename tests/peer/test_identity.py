"""The node id in the cache directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from peer.identity import FILE_NAME, NODE_ID, NodeIdentity


def test_an_id_is_drawn_once_and_kept(tmp_path: Path) -> None:
    drawn = NodeIdentity(tmp_path).node_id()
    assert NODE_ID.fullmatch(drawn)
    assert NodeIdentity(tmp_path).node_id() == drawn
    other = NodeIdentity(tmp_path).redraw()
    assert other != drawn
    assert NodeIdentity(tmp_path).node_id() == other
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("content", [b"", b"\0" * 16, b"0123456789abcdeX", b"0123456789abcdef0", b"\xff" * 1_000_000])
def test_a_file_that_holds_no_id_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    drawn = NodeIdentity(tmp_path).node_id()
    assert NODE_ID.fullmatch(drawn)
    assert (tmp_path / FILE_NAME).read_text() == drawn + "\n"


@pytest.mark.expect_warnings("cannot be kept")
def test_a_directory_that_cannot_be_written_gives_an_id_for_now(tmp_path: Path) -> None:
    identity = NodeIdentity(tmp_path / "missing")
    assert NODE_ID.fullmatch(identity.node_id())
    assert identity.node_id() != identity.node_id()


@pytest.mark.expect_warnings("cannot be read")
def test_a_file_that_cannot_be_read_gives_an_id_for_now(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    assert NODE_ID.fullmatch(NodeIdentity(tmp_path).node_id())
