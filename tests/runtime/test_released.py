import argparse
import errno
import hashlib
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import download
from runtime import fetching, released
from runtime.errors import UserError

CONTENT = b"weights " * 1000
SIZE, SHA256 = len(CONTENT), hashlib.sha256(CONTENT).hexdigest()

# Written down here a second time, from downloads.md.
SIZES = {
    "DiT-XL-2-256x256.pt": [2700611775],
    "DiT-XL-2-512x512.pt": [None],
    "DDIM20_router.pt": [24064],
    "DDIM50_router.pt": [58744],
    "sd-vae-ft-ema": [547, 334643276],
    "sd-vae-ft-mse": [547, 334643276],
    "classify_image_graph_def.pb": [95673916],
    "VIRTUAL_imagenet256_labeled.npz": [2037122530],
    "VIRTUAL_imagenet512.npz": [None],
}


class Handler(http.server.BaseHTTPRequestHandler):
    """/right, /wrong (same size, other bytes), /cut (half of it), /long and /unsized; else 404."""

    def do_GET(self):
        self.server.asked.append(self.path)
        bodies = {"/right": CONTENT, "/wrong": CONTENT[::-1], "/cut": CONTENT[:4000], "/long": CONTENT * 2}
        body = bodies.get(self.path, CONTENT if self.path == "/unsized" else None)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        if self.path != "/unsized":
            self.send_header("Content-Length", str(max(len(body), len(CONTENT))))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(fetching, "DELAY", 0.001)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("L2C_MIRROR", raising=False)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Puts one file into the table, its destination below tmp_path; returns a function (url, **fields) -> File."""
    monkeypatch.setattr(released, "ROOT", tmp_path)

    def put(url, name="model.pt", size=SIZE, sha256=SHA256):
        file = released.File(name, url, size, sha256, "MIT", "ckpt")
        monkeypatch.setattr(released, "FILES", (file,))
        return file

    return put


def everything_in(folder):
    """The names of the files, but of locks and of the memory of what was hashed."""
    names = (path.name for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if not name.endswith(".lock") and name != ".hashed.json")


def touched(path, seconds=1):
    """Moves the time of a file, as writing to it later would."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + seconds * 10**9))


def refused(call, *args, **kwargs):
    """The message of the UserError that the call raises."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# The table.


def test_the_table_has_the_known_sizes():
    assert {name: [f.size for f in released.FILES if f.name == name] for name in released.names()} == SIZES


def test_every_known_hash_is_64_hex_digits_and_every_size_comes_with_one():
    for file in released.FILES:
        assert (file.size is None) == (file.sha256 is None)
        assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)


def test_every_file_has_its_own_place_a_licence_and_a_url_that_ends_in_its_name():
    assert len({file.path for file in released.FILES}) == len(released.FILES)
    for file in released.FILES:
        assert file.licence
        assert file.url.startswith("https://") and file.url.endswith("/" + file.path.name)


def test_destinations_are_in_the_repository_and_vaes_in_the_cache_of_the_hub():
    here = {str(file.path.relative_to(released.ROOT)) for file in released.FILES if not file.hub}
    assert {"pretrained_models/DiT-XL-2-256x256.pt", "ckpt/DDIM20_router.pt"} <= here
    for file in released.FILES:
        if file.hub:
            assert re.fullmatch("[0-9a-f]{40}", file.hub[1])
            assert file.hub[1] in file.url


UNSAFE = ["", ".", "..", "../x", "/x", "/", "a/../x", "a//x", "a\\x", "C:x", "C:/x", "a\0", "a\n", "..\n", "~/x"]


@pytest.mark.parametrize("unsafe", UNSAFE, ids=repr)
def test_a_name_or_folder_that_could_lead_elsewhere_cannot_be_in_a_table(unsafe):
    fields = dict(name="x.pt", url="http://h/x.pt", size=1, sha256=SHA256, licence="MIT")
    released.File(**fields, folder="a/b-c_d.e"), released.File(**fields, hub=("a/b", "c" * 40, "d/e.json"))
    tables = [fields | {"name": unsafe}, *(fields | {"hub": hub} for hub in hubs("a/b", "c" * 40, "d", unsafe))]
    if unsafe:  # the repository itself
        tables.append(fields | {"folder": unsafe})
    for table in tables:
        with pytest.raises(ValueError, match="no plain name"):
            released.File(**table)


def hubs(*parts):
    """The first three, with the last in the place of each."""
    *parts, other = parts
    return [tuple(other if i == k else part for i, part in enumerate(parts)) for k in range(3)]


def test_a_name_has_no_folder():
    with pytest.raises(ValueError, match="no plain name"):
        released.File("a/x.pt", "http://h/x.pt", 1, SHA256, "MIT")


# Fetching.


def test_an_absent_file_is_fetched_and_then_used_without_asking_again(server, table, tmp_path):
    table(server.address + "/right")
    path = released.fetch("model.pt")
    assert path == tmp_path / "ckpt" / "model.pt"
    assert path.read_bytes() == CONTENT
    assert released.fetch("model.pt") == path
    assert server.asked == ["/right"]
    assert everything_in(tmp_path) == ["model.pt"]


@pytest.mark.parametrize(
    ("page", "reason", "left"),
    [
        (
            "/wrong",
            "SHA-256 " + hashlib.sha256(CONTENT[::-1]).hexdigest() + ".*kept as .*rejected",
            "model.pt.rejected",
        ),
        ("/cut", "ended after 4000 of 8000 bytes, 5 times", None),
        ("/long", "offers 16000 bytes", None),
        ("/nowhere", "404", None),
    ],
)
def test_what_is_not_the_file_never_has_its_name_and_url_reason_and_place_are_named(
    server, table, tmp_path, page, reason, left
):
    table(server.address + page)
    message = refused(released.fetch, "model.pt")
    assert server.address + page in message and str(tmp_path / "ckpt" / "model.pt") in message
    assert re.search(reason, message)
    assert [name for name in everything_in(tmp_path) if not name.startswith(".")] == ([left] if left else [])


def test_a_body_without_stated_length_is_still_checked_by_the_table(server, table):
    table(server.address + "/unsized")
    assert released.fetch("model.pt").read_bytes() == CONTENT


def test_a_refused_connection_is_a_fault_of_the_network_and_not_of_the_disk(table, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as closed:  # bound but not listening, so nobody else gets the port
        closed.bind(("127.0.0.1", 0))
        table(f"http://127.0.0.1:{closed.getsockname()[1]}/right")
        message = refused(released.fetch, "model.pt")
    assert message.startswith("cannot fetch http://127.0.0.1") and "refused" in message
    assert everything_in(tmp_path) == []


def test_a_silent_server_is_given_up(table, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetching, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        table(f"http://127.0.0.1:{silent.getsockname()[1]}/right")
        message = refused(released.fetch, "model.pt")
    assert message.startswith("cannot fetch http://127.0.0.1") and "timed out" in message
    assert everything_in(tmp_path) == []


def test_a_fault_of_the_disk_is_not_called_one_of_the_network(server, table, tmp_path):
    table(server.address + "/right")
    (tmp_path / "ckpt").write_text("a file where the folder should be")
    assert refused(released.fetch, "model.pt").startswith("cannot write")
    assert server.asked == []


def test_a_name_that_is_not_in_the_table_is_refused_with_the_names(table):
    table("http://unused/")
    assert "model.pt" in refused(released.fetch, "other.pt")


# Files that are there.


@pytest.mark.parametrize("present", [b"short", CONTENT[::-1]], ids=["size", "hash"])
def test_a_wrong_file_that_is_there_is_refused_and_kept(server, table, tmp_path, present):
    file = table(server.address + "/right")
    file.path.parent.mkdir()
    file.path.write_bytes(present)
    message = refused(released.fetch, "model.pt")
    assert str(file.path) in message and "move" in message
    assert ("has 5 bytes" if present == b"short" else SHA256) in message
    assert file.path.read_bytes() == present
    assert everything_in(tmp_path) == ["model.pt"] and server.asked == []


def test_a_folder_or_a_link_to_nowhere_in_its_place_is_refused_and_kept(server, table, tmp_path):
    file = table(server.address + "/right")
    file.path.mkdir(parents=True)
    assert "not a file" in refused(released.fetch, "model.pt")
    file.path.rmdir()
    file.path.symlink_to(tmp_path / "elsewhere")
    assert "not a file" in refused(released.fetch, "model.pt")
    assert file.path.is_symlink() and server.asked == []


@pytest.mark.parametrize("content", [b"the user's", CONTENT], ids=["another", "the same"])
def test_a_file_that_appears_while_we_fetch_is_kept(server, table, monkeypatch, content):
    file = table(server.address + "/right")
    receive = fetching._receive

    def meanwhile(*args):
        file.path.write_bytes(content)
        return receive(*args)

    monkeypatch.setattr(fetching, "_receive", meanwhile)
    if content == CONTENT:
        assert released.fetch("model.pt") == file.path
    else:
        assert "move" in refused(released.fetch, "model.pt")
    assert file.path.read_bytes() == content
    assert everything_in(file.path.parent) == ["model.pt"]


# Hashed once.


@pytest.fixture
def there(server, table):
    """A right file that was fetched, whose address is dead by now."""
    table(server.address + "/right")
    released.fetch("model.pt")
    return table("http://127.0.0.1:9/")


def spoil(file):
    """Writes other bytes and keeps the size and time, which only a hash can see."""
    stat = file.path.stat()
    file.path.write_bytes(CONTENT[::-1])
    os.utime(file.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_file_that_was_hashed_is_not_hashed_again_until_its_time_changes(there):
    spoil(there)
    assert released.fetch("model.pt") == there.path  # the known limit: nothing tells that it changed
    touched(there.path)
    assert SHA256 in refused(released.fetch, "model.pt")
    assert there.path.read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("known", [{}, {"size": None, "sha256": None}], ids=["hash", "no hash"])
def test_what_was_hashed_on_its_way_is_not_hashed_once_more(server, table, monkeypatch, known):
    table(server.address + "/right", **known)
    monkeypatch.setattr(released, "hashlib", None)
    assert released.fetch("model.pt").read_bytes() == CONTENT


def test_check_hashes_whatever_is_remembered(there):
    spoil(there)
    assert SHA256 in refused(released.check, there, hashed=True)


def test_a_right_file_that_was_touched_is_hashed_once_more(there, monkeypatch):
    touched(there.path)
    assert released.fetch("model.pt") == there.path
    spoil(there)
    assert released.fetch("model.pt") == there.path


def test_a_file_that_was_not_fetched_by_us_is_hashed_at_its_first_use(server, table):
    file = table(server.address + "/right")
    file.path.parent.mkdir()
    file.path.write_bytes(CONTENT)
    assert released.fetch("model.pt") == file.path
    spoil(file)
    assert released.fetch("model.pt") == file.path
    assert server.asked == []


@pytest.mark.parametrize("lost", [None, "", "nonsense", "[]", "{}", '{"PATH": 1}', '{"PATH": {"STATE": 1}}', "cut"])
def test_where_the_memory_is_lost_the_file_is_hashed(there, tmp_path, lost):
    memory = tmp_path / "pretrained_models" / ".hashed.json"
    written = memory.read_text()
    ((path, entry),) = json.loads(written).items()
    if lost is None:
        memory.unlink()
    else:
        lost = written[:50] if lost == "cut" else lost.replace("PATH", path).replace("STATE", next(iter(entry)))
        memory.write_text(lost)
    assert released.fetch("model.pt") == there.path
    assert json.loads(memory.read_text()) == json.loads(written)
    memory.write_text(lost or "")
    spoil(there)
    assert SHA256 in refused(released.fetch, "model.pt")


def test_where_nothing_can_be_remembered_the_file_is_hashed_at_each_use(server, table, tmp_path):
    (tmp_path / "pretrained_models").write_text("a file, where no memory can be")
    file = table(server.address + "/right")
    assert released.fetch("model.pt") == released.fetch("model.pt") == file.path
    spoil(file)
    assert SHA256 in refused(released.fetch, "model.pt")


# Files whose hash nobody published.


def test_without_a_published_hash_the_first_one_is_kept_and_said(server, table, tmp_path, capsys):
    file = table(server.address + "/right", size=None, sha256=None)
    released.fetch("model.pt")
    assert everything_in(tmp_path) == ["model.pt", "model.pt.sha256"]
    assert file.pin.read_text() == f"{SHA256}  model.pt\n"
    assert SHA256 in capsys.readouterr().out
    assert released.check(file) == SHA256


def test_a_kept_hash_is_compared_with_the_file_and_with_the_next_fetch(server, table):
    file = table(server.address + "/right", size=None, sha256=None)
    path = released.fetch("model.pt")
    path.write_bytes(CONTENT[::-1])
    touched(path)
    assert str(file.pin) in refused(released.fetch, "model.pt")
    path.unlink()
    table(server.address + "/wrong", size=None, sha256=None)
    assert f"move {file.pin} away" in refused(released.fetch, "model.pt")
    assert everything_in(path.parent) == ["model.pt.rejected", "model.pt.sha256"]
    file.pin.unlink()
    assert released.fetch("model.pt").read_bytes() == CONTENT[::-1]


def test_a_file_put_there_by_hand_is_pinned_at_its_first_use(table, capsys):
    file = table("http://unused/", size=None, sha256=None)
    file.path.parent.mkdir()
    file.path.write_bytes(CONTENT)
    assert released.fetch("model.pt") == file.path
    assert file.pin.read_text() == f"{SHA256}  model.pt\n" and SHA256 in capsys.readouterr().out
    file.path.write_bytes(CONTENT[::-1])
    touched(file.path)
    assert str(file.pin) in refused(released.fetch, "model.pt")


def test_a_pin_that_cannot_be_written_is_said_and_the_file_is_used(table, monkeypatch, capsys):
    def unwritable(path):
        raise UserError(f"cannot write {path}: Read-only file system")

    file = table("http://unused/", size=None, sha256=None)
    file.path.parent.mkdir()
    file.path.write_bytes(CONTENT)
    monkeypatch.setattr(released, "atomic_write", unwritable)
    assert released.fetch("model.pt") == file.path
    assert "not kept: cannot write" in capsys.readouterr().out


def test_a_kept_hash_that_is_none_is_refused(server, table):
    file = table(server.address + "/right", size=None, sha256=None)
    file.path.parent.mkdir()
    file.pin.write_text("nonsense")
    assert "64 hex digits" in refused(released.fetch, "model.pt")


@pytest.mark.parametrize(("page", "reason"), [("/unsized", "how large"), ("/cut", "after 4000 of 8000 bytes")])
def test_without_a_known_size_a_cut_is_still_seen(server, table, tmp_path, page, reason):
    table(server.address + page, size=None, sha256=None)
    assert reason in refused(released.fetch, "model.pt")
    assert [name for name in everything_in(tmp_path) if not name.startswith(".")] == []


# The VAEs.


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A small VAE in the table, and a client that "fetches" hub.sends[file name] (bytes, or an error to raise)."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    config, repo, revision = b"{}", "stabilityai/sd-vae-ft-ema", "a" * 40
    contents = {"config.json": config, "weights.safetensors": CONTENT}
    monkeypatch.setattr(
        released,
        "FILES",
        tuple(
            released.File(
                "sd-vae-ft-ema",
                f"https://hub/{name}",
                len(content),
                hashlib.sha256(content).hexdigest(),
                "MIT",
                hub=(repo, revision, name),
            )
            for name, content in contents.items()
        ),
    )

    def hf_hub_download(repo_id, filename, *, revision):
        hub.asked.append((repo_id, filename, revision))
        if isinstance(hub.sends[filename], Exception):
            raise hub.sends[filename]
        path = tmp_path / "models--stabilityai--sd-vae-ft-ema" / "snapshots" / revision / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(hub.sends[filename])
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    hub = argparse.Namespace(sends=dict(contents), asked=[])
    return hub


def test_a_vae_is_a_folder_with_both_files_of_the_pinned_revision(hub):
    folder = released.fetch_vae("ema")
    assert everything_in(folder) == ["config.json", "weights.safetensors"]
    repo, revision = "stabilityai/sd-vae-ft-ema", "a" * 40
    assert hub.asked == [(repo, "config.json", revision), (repo, "weights.safetensors", revision)]
    assert released.fetch_vae("ema") == folder and len(hub.asked) == 2


def test_a_wrong_vae_is_refused_this_time_and_the_next(hub, tmp_path):
    hub.sends["weights.safetensors"] = CONTENT[::-1]
    for _ in range(2):
        message = refused(released.fetch_vae, "ema")
        assert SHA256 in message
        # Moving the snapshot's link alone would bring back the same content from the cache.
        assert f"move {tmp_path / 'models--stabilityai--sd-vae-ft-ema'} away" in message


def test_the_hub_out_of_reach_is_one_line_with_url_and_place(hub, tmp_path):
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    for cause in (OfflineModeIsEnabled("offline mode is enabled"), RuntimeError("transport\nand more")):
        error = LocalEntryNotFoundError("not in the cache")
        error.__cause__ = cause
        hub.sends["config.json"] = error
        message = refused(released.fetch_vae, "ema")
        place = tmp_path / "models--stabilityai--sd-vae-ft-ema" / "snapshots" / ("a" * 40) / "config.json"
        assert message.startswith(f"cannot fetch https://hub/config.json ({str(cause).splitlines()[0]})")
        assert message.endswith(f"put it at {place}")
    assert logging.get_verbosity() == before


def test_a_full_disk_below_the_hub_is_not_called_a_fault_of_the_network(hub):
    hub.sends["config.json"] = OSError(errno.ENOSPC, "No space left on device", "/cache/blobs/x")
    message = refused(released.fetch_vae, "ema")
    assert message.startswith("cannot write /cache/blobs/x: No space left on device") and "HF_HOME" in message


def test_files_put_into_the_cache_by_hand_are_taken_by_the_real_client(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for file in released.FILES:
        if file.hub:
            file.path.parent.mkdir(parents=True, exist_ok=True)
            file.path.write_bytes(b"by hand")
            repo, revision, filename = file.hub
            assert huggingface_hub.hf_hub_download(repo, filename, revision=revision) == str(file.path)


def test_an_unknown_kind_of_vae_is_refused():
    assert "sd-vae-ft-mse" in refused(released.fetch_vae, "xl")


# A user's path.


def test_a_path_that_exists_is_returned_as_it_is(server, table, tmp_path, capsys):
    file = table(server.address + "/right")
    (tmp_path / "model.pt").write_bytes(b"a router of one's own")
    assert released.find(tmp_path / "model.pt") == tmp_path / "model.pt"
    assert capsys.readouterr().err == ""
    file.path.parent.mkdir()
    file.path.write_bytes(CONTENT)
    assert released.find(file.path) == file.path
    assert capsys.readouterr().err == "" and server.asked == []


def test_a_file_of_ones_own_in_the_place_of_a_released_one_is_used_and_said(server, table, capsys):
    file = table(server.address + "/right")
    file.path.parent.mkdir()
    file.path.write_bytes(b"a router of one's own")
    assert released.find(str(file.path)) == file.path
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and str(file.path) in line and "not the released file" in line
    assert file.path.read_bytes() == b"a router of one's own" and server.asked == []


def test_a_missing_file_of_the_table_is_fetched_by_its_place_or_its_bare_name(server, table, tmp_path, monkeypatch):
    file = table(server.address + "/right")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for here, path in [
        (tmp_path, "ckpt/model.pt"),
        (elsewhere, "ckpt/model.pt"),
        (elsewhere, "../ckpt/model.pt"),
        (elsewhere, "model.pt"),
        (elsewhere, file.path),
    ]:
        monkeypatch.chdir(here)
        assert released.find(path) == file.path
        file.path.unlink()
    assert len(server.asked) == 5


@pytest.mark.parametrize("path", ["other.pt", "ckpt/other.pt", "elsewhere/model.pt", "/model.pt"])
def test_other_missing_paths_are_refused_and_nothing_is_fetched(server, table, tmp_path, monkeypatch, path):
    table(server.address + "/right")
    monkeypatch.chdir(tmp_path)
    assert refused(released.find, path).startswith(f"no such file: {path}")
    assert server.asked == [] and everything_in(tmp_path) == []


# The program.


@pytest.fixture
def program(tmp_path):
    """Runs a copy of the program, so that its destinations are below tmp_path, where no address can be reached."""
    for name in ("download.py", "fetching.py", "files.py", "cli.py"):
        shutil.copy(Path(released.__file__).with_name(name), tmp_path)

    def run(*args, **environment):
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            proxy = f"http://127.0.0.1:{closed.getsockname()[1]}"
            environ = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
            environ |= {"https_proxy": proxy, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
            environ |= environment
            command = [sys.executable, str(tmp_path / "download.py"), *args]
            return subprocess.run(
                command, env=environ, cwd=tmp_path.parent, capture_output=True, text=True, check=False
            )

    return run


@pytest.mark.parametrize(
    ("name", "file", "offline"),
    [
        ("DDIM20_router.pt", "DDIM20_router.pt", "0"),
        ("DDIM20_router.pt", "DDIM20_router.pt", "1"),
        ("sd-vae-ft-ema", "config.json", "1"),  # else the Hub's client tries for half a minute
    ],
)
def test_without_a_network_the_program_says_one_line_and_exits_1(program, tmp_path, name, file, offline):
    done = program(name, HF_HUB_OFFLINE=offline)
    assert done.returncode == 1
    assert ("HF_HUB_OFFLINE is set" if offline == "1" else "refused") in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("download.py: error: cannot fetch https://")
    assert re.search(rf"put it at {re.escape(str(tmp_path))}/.*{re.escape(file)}$", line)
    assert everything_in(tmp_path / "ckpt") == []


def test_an_unknown_name_exits_2_and_lists_the_names(program):
    done = program("nothing.pt", "DDIM20_router.pt")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert "nothing.pt" in line and all(name in line for name in SIZES)


def test_list_shows_every_file_and_whether_it_is_there(program, tmp_path):
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "DDIM20_router.pt").write_bytes(bytes(24064))
    (tmp_path / "ckpt" / "DDIM50_router.pt").write_bytes(b"cut")
    done = program("--list")
    assert done.returncode == 0 and done.stderr == ""
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert set(SIZES) < set(rows)
    assert " yes " in rows["DDIM20_router.pt"] and " wrong " in rows["DDIM50_router.pt"]
    assert " no " in rows["DiT-XL-2-256x256.pt"] and "CC-BY-NC 4.0" in rows["DiT-XL-2-256x256.pt"]


def test_check_hashes_what_is_there_and_exits_1_where_it_is_wrong(program, tmp_path):
    assert program("--check").returncode == 0
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "DDIM20_router.pt").write_bytes(bytes(24064))
    done = program("--check")
    assert done.returncode == 1
    assert "ckpt/DDIM20_router.pt: wrong" in done.stdout and "DDIM50_router.pt: not there" in done.stdout
    (line,) = done.stderr.splitlines()
    assert hashlib.sha256(bytes(24064)).hexdigest() in line


def test_the_program_fetches_what_is_missing_and_says_how_much(server, table, capsys):
    table(server.address + "/right")
    download.main(download.parse_args([]))
    download.main(download.parse_args(["model.pt", "model.pt"]))
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"to fetch: 1 of 1 files, 8.00 kB; [\d.]+ .?B free in /.*", lines[0])
    assert re.fullmatch(rf"fetching {server.address}/right \(8.00 kB, licence: MIT\) to .* free\)", lines[1])
    assert lines[-2:] == ["to fetch: 0 of 1 files, 0 B", "model.pt: ckpt/model.pt"]
    assert server.asked == ["/right"]


def test_what_does_not_fit_on_the_disk_is_not_begun(server, table, tmp_path, monkeypatch):
    file = table(server.address + "/right")
    other = released.File("other.pt", server.address + "/right", SIZE, SHA256, "MIT")
    monkeypatch.setattr(released, "FILES", (file, other))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: argparse.Namespace(total=10 * SIZE, free=2 * SIZE - 1))
    message = refused(download.main, download.parse_args([]))
    assert message.startswith("16.00 kB are to come to") and "make room" in message
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: argparse.Namespace(total=10 * SIZE, free=SIZE - 1))
    refused(released.fetch, "model.pt")
    assert server.asked == [] and everything_in(tmp_path) == []


def test_without_room_the_client_of_the_hub_is_not_begun(hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: argparse.Namespace(total=10, free=1))
    assert "make room" in refused(released.fetch_vae, "ema") and hub.asked == []


# Mirrors, and no network at all.


@pytest.mark.parametrize("by", ["flag", "environment"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_a_mirror_has_the_files_by_their_names(server, table, monkeypatch, by, slash):
    table("http://127.0.0.1:9/elsewhere/right", name="right")
    mirror = server.address + slash
    if by == "flag":
        monkeypatch.setenv("L2C_MIRROR", "http://127.0.0.1:9/")
        download.main(download.parse_args(["right", "--mirror", mirror]))
    else:
        monkeypatch.setenv("L2C_MIRROR", mirror)
        released.fetch("right")
    assert server.asked == ["/right"] and released.FILES[0].path.read_bytes() == CONTENT


def test_what_a_mirror_sends_is_checked_and_the_way_out_is_the_source(server, table, tmp_path):
    table("http://source/wrong", name="wrong")
    message = refused(released.fetch, "wrong", mirror=server.address)
    assert message.startswith(f"cannot fetch {server.address}/wrong (what came has SHA-256")
    assert "download http://source/wrong elsewhere" in message
    assert everything_in(tmp_path) == ["wrong.rejected"]


@pytest.mark.parametrize(
    "mirror",
    [
        "",
        "host/files",
        "ftp://host/",
        "file:///files",
        "http://",
        "http://host:x/",
        "http://me:word@host/",
        "http://h/?a",
    ]
    + ["http://h/#a", "http://h/a b", "http://h/\n"],
)
def test_a_mirror_that_is_no_address_of_a_folder_is_refused(server, table, monkeypatch, mirror, capsys):
    table(server.address + "/right")
    with pytest.raises(SystemExit) as stop:
        download.parse_args([f"--mirror={mirror}"])
    assert stop.value.code == 2 and "http://HOST/FOLDER" in capsys.readouterr().err
    if mirror:  # an empty variable is as good as none
        monkeypatch.setenv("L2C_MIRROR", mirror)
        assert "http://HOST/FOLDER" in refused(released.fetch, "model.pt")
        assert server.asked == []


@pytest.mark.parametrize("mirror", ["http://h", "https://h.org:80/a/b", "http://[::1]:80/", "http://127.0.0.1/%20@x"])
def test_addresses_of_folders_are_taken(mirror):
    assert download.parse_args(["--mirror", mirror]).mirror == mirror


def test_offline_nobody_is_asked_and_what_is_there_is_used(server, table, tmp_path, monkeypatch):
    file = table(server.address + "/right")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(released.fetch, "model.pt")
    assert "HF_HUB_OFFLINE" in message and file.url in message and message.endswith(f"put it at {file.path}")
    assert server.asked == [] and list(tmp_path.iterdir()) == []
    file.path.parent.mkdir()
    file.path.write_bytes(CONTENT)
    assert released.fetch("model.pt") == file.path


def test_offline_the_client_of_the_hub_is_not_called(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(released.fetch_vae, "ema") and hub.asked == []


def test_neither_torch_nor_the_client_of_the_hub_is_loaded_before_the_arguments_are_read():
    code = "import sys, download; print({'torch', 'huggingface_hub', 'tqdm', 'numpy'} & set(sys.modules))"
    root = Path(released.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
