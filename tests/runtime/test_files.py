"""files.py: files appear whole or not at all. The faults of disks are in test_faults.py."""

import os

import pytest

from runtime.errors import UserError
from runtime.files import atomic_write, check_writable


def test_a_written_file_replaces_the_old_one_and_has_the_permissions_of_the_umask(tmp_path, monkeypatch):
    path, link = tmp_path / "new" / "file", tmp_path / "link"
    link.symlink_to(path)
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.delattr(os, "umask")  # changing it would change what other threads write
            for text in ("old", "new"):
                with atomic_write(link) as part:
                    part.write_text(text)
    finally:
        os.umask(before)
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o640
    assert link.is_symlink() and os.listdir(path.parent) == ["file"]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as part:
        part.write_text("half")
        assert part.match(".file.*.part") and part.parent == tmp_path
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot write .*; name another place"):
            check_writable(path)
    check_writable(tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]
