import argparse
import errno
import hashlib
import os
import socket

import huggingface_hub.constants
import pytest
from conftest import assert_refused, call, run
from http_server import Act, Server

from runtime import fetching, released
from runtime.errors import UserError

CONTENT = b"weights " * 1000
SIZE, SHA256 = len(CONTENT), hashlib.sha256(CONTENT).hexdigest()
UNKNOWN = {"size": None, "sha256": None}
VAE = "https://huggingface.co/stabilityai/sd-vae-ft-ema/resolve/" + "a" * 40


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetching, "DELAY", 0)
    server = Server(CONTENT)
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def table(server, monkeypatch, tmp_path):
    """Makes a table of one file below tmp_path, or as the fields say; returns the File."""
    monkeypatch.setattr(released, "ROOT", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("L2C_MIRROR", raising=False)

    def table(content=None, **fields):
        file = dict(name="model.pt", size=SIZE, sha256=SHA256, licence="MIT", folder="ckpt", url=server.url)
        file = released.File(**file | fields)
        monkeypatch.setattr(released, "FILES", (file,))
        if content is not None:
            file.path.parent.mkdir(exist_ok=True)
            file.path.write_bytes(content)
        return file

    return table


def refused(function, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def requests(server):
    return [path for path, _, _ in server.asked]


def change_time(file):
    os.utime(file.path, ns=(0, file.path.stat().st_mtime_ns + 10**9))


def test_a_missing_file_is_downloaded_and_then_used_without_a_request(server, table):
    file = table()
    assert released.fetch("model.pt") == file.path and file.path.read_bytes() == CONTENT
    assert released.fetch("model.pt") == file.path and requests(server) == ["/model.pt"]
    assert "model.pt" in refused(released.fetch, "other.pt")


@pytest.mark.parametrize("content", [b"short", CONTENT[::-1]], ids=["size", "hash"])
def test_a_wrong_file_that_exists_is_refused_and_left_alone(server, table, content):
    file = table(content)
    for _ in range(2):
        message = refused(released.fetch, "model.pt")
        assert f"move {file.path} away" in message and ("5 bytes" if content == b"short" else SHA256) in message
    assert file.path.read_bytes() == content and server.asked == []


@pytest.mark.parametrize("known", [{}, UNKNOWN], ids=["published", "first use"])
@pytest.mark.parametrize("present", [False, True], ids=["downloaded", "present"])
def test_a_file_is_hashed_again_only_if_its_time_changed_or_by_force(table, known, present, capsys):
    file = table(CONTENT if present else None, **known)
    released.fetch("model.pt")
    assert file.kept.read_text() == f"{SHA256}  model.pt\n"
    assert ("no SHA-256 is published" in capsys.readouterr().out) == (known == UNKNOWN)
    stat = file.path.stat()
    file.path.write_bytes(CONTENT[::-1])  # of the same size and time: only a hash can tell
    os.utime(file.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert released.fetch("model.pt") == file.path
    assert SHA256 in refused(released.check, file, force=True)
    change_time(file)
    assert SHA256 in refused(released.fetch, "model.pt") and file.path.read_bytes() == CONTENT[::-1]
    file.path.write_bytes(CONTENT)
    assert released.fetch("model.pt") == file.path


def test_the_hash_of_the_first_use_is_required_of_the_next_download(server, table):
    file = table(**UNKNOWN)
    released.fetch("model.pt").unlink()
    server.rest = Act(content=CONTENT[::-1])
    assert f"move {file.kept} away" in refused(released.fetch, "model.pt") and not file.exists()
    file.kept.unlink()
    assert released.fetch("model.pt").read_bytes() == CONTENT[::-1]


@pytest.fixture
def hub(table, monkeypatch):
    """A VAE of one file, and in place of the Hub's client one that writes `sends`, or raises it."""
    hub = argparse.Namespace(file=table(name="sd-vae-ft-ema", url=f"{VAE}/w.safetensors"), sends=CONTENT, asked=[])

    def hf_hub_download(repo, filename, *, revision):
        hub.asked.append((repo, revision, filename))
        if isinstance(hub.sends, Exception):
            raise hub.sends
        hub.file.path.parent.mkdir(parents=True)
        hub.file.path.write_bytes(hub.sends)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return hub


def test_a_vae_comes_from_the_hub_and_is_checked(hub, tmp_path):
    assert released.fetch_vae("ema") == released.fetch_vae("ema") == hub.file.path
    assert hub.asked == [("stabilityai/sd-vae-ft-ema", "a" * 40, "w.safetensors")]
    hub.file.path.write_bytes(CONTENT[::-1])
    change_time(hub.file)
    # To move only the snapshot's link would bring back the same content from the cache.
    assert f"move {tmp_path / 'models--stabilityai--sd-vae-ft-ema'} away" in refused(released.fetch_vae, "ema")
    assert "sd-vae-ft-ema" in refused(released.fetch_vae, "xl")


def test_faults_of_the_hub_and_of_the_disk_are_one_line(hub):
    hub.sends = huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")
    hub.sends.__cause__ = RuntimeError("no route\nand more")
    message = refused(released.fetch_vae, "ema")
    assert message.startswith(f"cannot download {hub.file.url} (no route)") and message.endswith(str(hub.file.path))
    hub.sends = OSError(errno.ENOSPC, "No space left on device", "/cache/blobs/x")
    assert refused(released.fetch_vae, "ema").startswith("cannot write /cache/blobs/x: No space left")


def test_the_real_client_of_the_hub_finds_files_in_their_places(table):
    file = table(name="sd-vae-ft-ema", url=f"{VAE}/config.json")
    file.path.parent.mkdir(parents=True)
    file.path.write_bytes(b"by hand")
    repo, revision, filename = file.hub
    assert huggingface_hub.hf_hub_download(repo, filename, revision=revision) == str(file.path)


def test_a_users_own_file_is_used_with_a_warning_if_it_takes_the_place_of_a_released_one(table, tmp_path, capsys):
    file = table(b"a router of one's own")
    (tmp_path / "model.pt").write_bytes(b"of the same name")
    assert released.find(tmp_path / "model.pt") == tmp_path / "model.pt"
    assert capsys.readouterr().err == ""
    assert released.find(str(file.path)) == file.path
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {file.path}") and "not the released file" in line


def test_a_missing_file_is_found_by_its_place_or_its_name(server, table, tmp_path, monkeypatch):
    file = table()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in ("ckpt/model.pt", "../ckpt/model.pt", "model.pt", file.path):
        assert released.find(path) == file.path
        file.path.unlink()
    for path in ("other.pt", "ckpt/other.pt", "elsewhere/model.pt", "/model.pt"):
        assert refused(released.find, path).startswith(f"no such file: {path}")
    assert len(server.asked) == 4


def test_a_link_to_itself_is_no_file(table, tmp_path):
    table()
    (tmp_path / "loop.json").symlink_to("loop.json")
    assert refused(released.find, tmp_path / "loop.json").startswith("no such file: ")


def test_a_file_that_cannot_be_downloaded_does_not_keep_others_away(server, table, tmp_path, monkeypatch, capfd):
    fields = dict(size=SIZE, sha256=SHA256, licence="MIT", folder="", url=server.url)
    files = [released.File(name, **fields) for name in ("bad", "own", "good")]
    monkeypatch.setattr(released, "FILES", files)
    (tmp_path / "own").write_text("of the user")
    server.acts = [Act(status=404)]
    result = call("download.py", capfd=capfd)
    assert_refused(result, "HTTP 404", tmp_path / "own")
    lines = [line for line in result.stdout.splitlines() if not line.startswith("downloading")]
    assert lines == ["bad: not downloaded", "own: not downloaded", f"good: {tmp_path / 'good'}"]
    assert (tmp_path / "good").read_bytes() == CONTENT and (tmp_path / "own").read_text() == "of the user"


def test_without_a_network_one_line_names_the_url_and_the_place(table, monkeypatch, capfd):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        file = table(url=f"http://127.0.0.1:{closed.getsockname()[1]}/model.pt")
        assert_refused(call("download.py", capfd=capfd), file.url, "refused", f"put it at {file.path}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_refused(call("download.py", capfd=capfd), "HF_HUB_OFFLINE", file.url, f"put it at {file.path}")


def test_the_program_as_a_user_starts_it(tmp_path):
    result = run("download.py", "sd-vae-ft-ema", cwd=tmp_path, HF_HOME=str(tmp_path))
    assert_refused(result, "HF_HUB_OFFLINE is set", "https://huggingface.co/stabilityai", f"put it at {tmp_path}")


def test_list_and_check_show_the_state_of_each_file(server, monkeypatch, tmp_path, capfd, table):
    fields = dict(sha256=SHA256, licence="MIT", folder="", url=server.url)
    files = [released.File(name, SIZE, **fields) for name in ("right", "wrong", "short", "absent")]
    monkeypatch.setattr(released, "FILES", files)
    for name, content in {"right": CONTENT, "wrong": CONTENT[::-1], "short": b"cut"}.items():
        (tmp_path / name).write_bytes(content)
    listed = call("download.py", "--list", capfd=capfd).stdout.splitlines()
    assert [line.split()[2] for line in listed] == ["exists", "exists", "wrong", "missing"]
    checked = call("download.py", "--check", capfd=capfd)
    assert [line.split()[1] for line in checked.stdout.splitlines()] == ["right,", "wrong", "wrong", "missing"]
    assert_refused(checked, tmp_path / "wrong", tmp_path / "short")
    assert checked.returncode == 1 and server.asked == []
    assert call("download.py", "nothing.pt", "right", capfd=capfd).returncode == 2
    assert_refused(call("download.py", "--list", "--mirror", "http://host/", capfd=capfd), "--mirror is for downloads")


def test_a_mirror_has_the_files_by_their_names_and_the_flag_wins(server, table, monkeypatch, capfd):
    file = table(url="http://127.0.0.1:9/elsewhere/model.pt")
    monkeypatch.setenv("L2C_MIRROR", f"{server.address}/")
    server.acts = [Act(status=404)]
    assert_refused(call("download.py", capfd=capfd), server.url, f"download {file.url} elsewhere")
    monkeypatch.setenv("L2C_MIRROR", "http://127.0.0.1:9")
    result = call("download.py", "--mirror", server.address, capfd=capfd)
    assert result.returncode == 0 and f"model.pt: {file.path}" in result.stdout
    assert requests(server) == ["/model.pt"] * 2 and file.path.read_bytes() == CONTENT


@pytest.mark.parametrize("mirror", ["host/files", "ftp://host/", "http://", "http://me:word@host/", "http://h/?a"])
def test_a_mirror_that_is_no_url_of_a_folder_is_refused(table, mirror, capfd):
    table()
    assert_refused(call("download.py", "--mirror", mirror, capfd=capfd), "http://HOST/FOLDER")
