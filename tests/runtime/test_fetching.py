import errno
import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from http_server import Act, Server

from runtime import fetching
from runtime.errors import UserError
from runtime.fetching import DownloadError

CONTENT, OTHER = random.Random(0).randbytes(100_000), random.Random(1).randbytes(100_000)
SIZE, SHA256 = len(CONTENT), hashlib.sha256(CONTENT).hexdigest()
NEW = ("/model.pt", None, None)  # a request for the whole file
UNKNOWN = {"size": None, "sha256": None}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(CONTENT)
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The pauses before retries, which tests skip."""
    pauses = []
    monkeypatch.setattr(fetching.time, "sleep", pauses.append)
    return pauses


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


def fetch(server, path, size=SIZE, sha256=SHA256):
    return fetching.fetch(server.url, path, size, sha256)


def failure(call, *args, kind=DownloadError, **kwargs):
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def stop_early(server, path, at=30_000, **known):
    """A download that an earlier process could not complete: `at` bytes have come."""
    server.acts = [Act(cut=at), Act(status=404)]
    message = failure(fetch, server, path, **known)
    assert not path.exists() and part(path).read_bytes() == server.content[:at]
    server.asked.clear()
    server.sent = 0
    return message


def part(path):
    return path.with_name(".model.pt.part")


def files(path):
    return sorted(file.name for file in path.parent.iterdir() if file.suffix != ".lock")


def rest(start, version='"one"'):
    return "/model.pt", f"bytes={start}-", version


def test_a_cut_or_reset_connection_is_resumed(server, path, capsys):
    server.acts = [Act(cut=30_000), Act(cut=20_000, reset=True)]
    assert fetch(server, path) == SHA256
    assert path.read_bytes() == CONTENT and files(path) == ["model.pt"]
    assert server.asked[:2] == [NEW, rest(30_000)] and len(server.asked) == 3
    start = int(server.asked[2][1].strip("bytes=-"))  # a reset may lose bytes on their way
    assert 30_000 <= start <= 50_000 and server.sent == SIZE + 50_000 - start
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 2 and "retry 1 of 4 in 1 s" in err


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1", "socksio"),
        ("HTTPS_PROXY", "socks://127.0.0.1:1", "proxy"),
        ("SSL_CERT_FILE", "/none", "No such file"),
    ],
)
def test_variables_of_the_network_that_cannot_be_used_are_named(server, path, name, value, words, monkeypatch):
    monkeypatch.setenv(name, value)
    message = failure(fetch, server, path)
    assert words in message and message.endswith(": check HTTPS_PROXY, ALL_PROXY and SSL_CERT_FILE")
    assert not path.exists() and server.asked == []


@pytest.mark.parametrize("known", [{}, UNKNOWN], ids=["known hash", "unknown"])
def test_the_next_launch_resumes(server, path, known):
    assert "30.0kB are kept" in stop_early(server, path, **known)
    assert fetch(server, path, **known) == SHA256
    assert server.asked == [rest(30_000)] and server.sent == SIZE - 30_000
    assert path.read_bytes() == CONTENT and files(path) == ["model.pt"]


@pytest.mark.parametrize(
    "act",
    [Act(ranges=False), Act(headers={"Content-Range": None}), Act(status=416)],
    ids=["no ranges", "unknown range", "no such range"],
)
def test_an_answer_that_is_not_the_rest_is_not_appended(server, path, act):
    stop_early(server, path, **UNKNOWN)
    server.acts = [act]
    assert fetch(server, path, **UNKNOWN) == SHA256
    assert path.read_bytes() == CONTENT and server.asked == [rest(30_000)] + [NEW] * act.ranges


def test_versions_of_a_file_are_never_mixed(server, path):
    stop_early(server, path, **UNKNOWN)
    server.content, server.etag = OTHER, '"two"'
    assert fetch(server, path, **UNKNOWN) == hashlib.sha256(OTHER).hexdigest()
    assert path.read_bytes() == OTHER and server.asked == [rest(30_000)]


def test_wrong_bytes_are_discarded_and_a_resumed_file_is_downloaded_anew(server, path):
    stop_early(server, path)
    part(path).write_bytes(bytes(30_000))  # damaged on the disk
    assert fetch(server, path) == SHA256 and path.read_bytes() == CONTENT
    assert server.asked == [rest(30_000), NEW]
    path.unlink()
    server.rest = Act(content=OTHER)
    message = failure(fetch, server, path)
    assert hashlib.sha256(OTHER).hexdigest() in message and SHA256 in message
    assert files(path) == [] and len(server.asked) == 3


@pytest.mark.parametrize(
    "act, known",
    [(act, known) for act in (Act(content=b""), Act(headers={"Content-Encoding": "gzip"})) for known in ({}, UNKNOWN)]
    + [(Act(headers={"Content-Length": None}), UNKNOWN)],
)
def test_an_answer_that_cannot_be_the_file_is_refused(server, path, act, known):
    server.rest = act
    failure(fetch, server, path, **known)
    assert not path.exists() and len(server.asked) == 1


def test_transient_faults_are_retried_with_growing_pauses(server, path, pauses):
    server.acts = [Act(status=status) for status in (500, 503, 429, 408)]
    assert fetch(server, path) == SHA256
    assert pauses == [1, 2, 4, 8]


def test_retries_end_after_five_failures_without_progress(server, path):
    server.rest = Act(status=503)
    assert "HTTP 503 Service Unavailable, 5 times in a row" in failure(fetch, server, path)
    server.rest, server.acts = Act(cut=10_000, ranges=False), [Act(cut=10_000)] * 9
    failure(fetch, server, path)
    assert len(server.asked) == 5 + 9 + 4 and not path.exists()


@pytest.mark.parametrize("act", [Act(status=404), Act(status=302, headers={"Location": "file:///etc/passwd"})])
def test_lasting_faults_end_at_once(server, path, pauses, act):
    server.rest = act
    failure(fetch, server, path)
    assert len(server.asked) == 1 and pauses == [] and files(path) == []


def test_a_silent_server_is_asked_again(server, path, monkeypatch):
    monkeypatch.setattr(fetching, "TIMEOUT", 0.5)
    server.acts = [Act(stall=60), Act(cut=30_000, stall=60)]
    assert fetch(server, path) == SHA256
    assert server.asked == [NEW, NEW, rest(30_000)]


@pytest.mark.parametrize("begun", [False, True])
def test_an_unreachable_server_ends_at_once_unless_it_was_reached_before(server, path, pauses, begun):
    if begun:
        stop_early(server, path)
        pauses.clear()
    with socket.socket() as closed:  # bound but not listening: nobody else gets the port
        closed.bind(("127.0.0.1", 0))
        nobody = SimpleNamespace(url=f"http://127.0.0.1:{closed.getsockname()[1]}/model.pt")
        message = failure(fetch, nobody, path)
    assert "refused" in message and ("30.0kB are kept" in message) == begun
    assert len(pauses) == 4 * begun


def test_a_file_that_appears_meanwhile_is_left_alone(server, path, monkeypatch):
    monkeypatch.setattr(fetching, "sha256_of_file", lambda part: path.write_bytes(b"the user's") and SHA256)
    assert fetch(server, path) is None
    assert path.read_bytes() == b"the user's" and files(path) == ["model.pt"]


def test_a_disk_that_is_too_small_is_refused_first(server, path, monkeypatch):
    stop_early(server, path)
    free = SIZE - 30_000 - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=10**6, free=free))
    assert "make room" in failure(fetch, server, path, kind=UserError) and server.sent <= SIZE - 30_000
    assert part(path).read_bytes() == CONTENT[:30_000]
    free += 1
    assert fetch(server, path) == SHA256


def test_a_disk_that_fills_up_is_one_line_and_keeps_what_came(server, path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetching.os, "fsync", full)
    message = failure(fetch, server, path, kind=UserError)
    assert message.startswith("cannot write") and "No space left" in message
    assert not path.exists() and part(path).read_bytes() == CONTENT


def test_without_locks_each_process_downloads_for_itself(server, path, monkeypatch):
    def no_locks(path, patience):
        raise OSError(errno.ENOLCK, "its file system has no locks")

    monkeypatch.setattr(fetching, "lock_file", no_locks)
    server.acts = [Act(cut=30_000), Act(status=404)]
    failure(fetch, server, path)
    assert files(path) == []
    assert fetch(server, path) == SHA256 and files(path) == ["model.pt"]


@pytest.fixture
def start(server, path):
    """Starts a process that downloads the server's file to `path`."""
    started = []
    code = "import sys, pathlib; from runtime.fetching import fetch; fetch(sys.argv[1], pathlib.Path(sys.argv[2]))"

    def start():
        command, root = [sys.executable, "-c", code, server.url, path], Path(fetching.__file__).parent.parent
        started.append(subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        os.sched_yield()


@pytest.mark.slow
def test_several_processes_download_once(server, path, start):
    server.acts = [Act(cut=30_000, stall=600)]
    first = start()
    wait_for(lambda: server.sent == 30_000)
    others = [start(), start()]
    for other in others:
        assert "another process is downloading it; waiting" in other.stderr.readline()
    server.unstall.set()  # the first one is cut, and resumes
    for process in (first, *others):
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert path.read_bytes() == CONTENT and server.asked == [NEW, rest(30_000)]


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_process_leaves_its_part_to_the_next(server, path, start, end):
    server.acts = [Act(cut=50_000, stall=600)]
    process = start()
    wait_for(lambda: part(path).exists() and part(path).stat().st_size)
    process.send_signal(end)
    process.communicate(timeout=120)
    size = part(path).stat().st_size
    assert not path.exists() and 0 < size <= 50_000
    assert fetch(server, path) == SHA256  # at once: the lock went with the process
    assert path.read_bytes() == CONTENT and server.asked[1] == rest(size)
