"""files.py: files appear whole or not at all. The faults of disks are in test_faults.py."""

import os

import pytest

from runtime.errors import UserError
from runtime.files import atomic_write, check_outputs, check_writable


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
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    for name, reason in (("loop", "symbolic links"), ("fifo", "not a file"), ("x" * 256, "too long")):
        with pytest.raises(UserError, match=f"cannot write .*{reason}.*; name another place"):
            check_writable(tmp_path / name)


def test_a_write_protected_file_is_not_replaced_and_a_private_one_stays_private(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o600)
    with atomic_write(path) as part:
        assert part.stat().st_mode & 0o777 == 0o600  # before anything is written
        part.write_text("new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o444)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write all files
    for write in (check_writable, lambda path: atomic_write(path).__enter__()):
        with pytest.raises(UserError, match="cannot write .*file: it is write-protected; name another place"):
            write(path)
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]
    check_writable(tmp_path / "other")


def test_no_output_replaces_the_description_of_a_model(tmp_path):
    check_outputs({"--record": tmp_path / "config.json"}, {})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="--record .*config.json would replace a file that describes a model"):
        check_outputs({"--record": tmp_path / "config.json"}, {"--ckpt": tmp_path})


def test_an_output_that_is_another_file_of_the_command_is_refused(tmp_path):
    (tmp_path / "in").write_text("in")
    (tmp_path / "link").symlink_to("in")
    inputs = {"--path": str(tmp_path / "in"), "--ckpt": None}
    for name in ("in", "link"):
        with pytest.raises(UserError, match=f"--out .*{name} is the file of --path too: name another one"):
            check_outputs({"--record": tmp_path / "a", "--out": tmp_path / name}, inputs)
    with pytest.raises(UserError, match="--out .*a is the file of --record too"):
        check_outputs({"--record": tmp_path / "a", "--out": tmp_path / "x" / ".." / "a"}, inputs)
    with pytest.raises(UserError, match="cannot write"):
        check_outputs({"--out": tmp_path}, inputs)
    check_outputs({"--record": tmp_path / "a", "--out": tmp_path / "b", "--table": None}, inputs)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["in", "link"]
    assert (tmp_path / "in").read_text() == "in"


@pytest.mark.parametrize(
    "name", ["x" * 251 + ".png", "x" * 250 + "\udce9.png", "é" * 125 + ".npz", "y" * 240], ids=str.isascii
)
def test_a_name_of_up_to_255_bytes_can_be_written(tmp_path, name):
    assert 240 <= len(os.fsencode(name)) <= 255
    check_writable(tmp_path / name)
    with atomic_write(tmp_path / name) as part:
        part.write_text("new")
        assert part.name.startswith(f".{os.fsdecode(os.fsencode(name)[:238])}") and part.name.endswith(".part")
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "new"
