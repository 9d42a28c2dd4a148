import errno
import hashlib
import json
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
from runtime.fetching import Failed, Rejected

CONTENT = random.Random(0).randbytes(100_000)
OTHER = random.Random(1).randbytes(100_000)
SIZE, SHA256 = len(CONTENT), hashlib.sha256(CONTENT).hexdigest()
BLOCK = 10_000


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(fetching, "DELAY", 0.001)
    monkeypatch.setattr(fetching, "BLOCK", BLOCK)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server():
    server = Server(CONTENT)
    yield server
    server.stop()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


@pytest.fixture
def slept(monkeypatch):
    """The delays before the tries, which are then not waited for."""
    delays = []
    monkeypatch.setattr(fetching.time, "sleep", delays.append)
    return delays


def fetch(server, path, size=SIZE, sha256=SHA256):
    with fetching.alone(path) as part:
        return fetching.fetch(server.url, path, part, size, sha256)


def failed(call, *args, kind=Failed, **kwargs):
    """The message of the error that the call raises."""
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def stopped(server, path, at=30_000, **known):
    """A fetch that an earlier process began, of which `at` bytes came."""
    server.acts = [Act(cut=at)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetching, "TRIES", 1)
        message = failed(fetch, server, path, **known)
    assert not path.exists() and part(path).read_bytes() == server.content[:at]
    server.asked.clear()
    server.sent = 0
    return message


def part(path):
    return path.with_name(f".{path.name}.part")


def aside(path):
    return path.with_name(f"{path.name}.rejected")


def files(path):
    """All that lies beside `path`, but the lock."""
    return sorted(other.name for other in path.parent.iterdir() if not other.name.endswith(".lock"))


def whole(server):
    return "/model.pt", None, None


def rest(server, start):
    return "/model.pt", f"bytes={start}-", server.etag


# Cut off, and gone on with.


def test_a_cut_connection_is_gone_on_with_where_it_was_cut(server, path, capsys):
    server.acts = [Act(cut=30_000), Act(cut=20_000, reset=True)]
    assert fetch(server, path) == SHA256
    assert path.read_bytes() == CONTENT and files(path) == ["model.pt"]
    assert server.asked[:2] == [whole(server), rest(server, 30_000)]
    # What a reset loses on its way has to be sent again, nothing else.
    start = int(server.asked[2][1].strip("bytes=-"))
    assert 30_000 <= start <= 50_000 and server.sent == SIZE + 50_000 - start and len(server.asked) == 3
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 2
    assert "ended after 30000 of 100000 bytes; trying again in 0.001 s (1 of 4)" in err


def test_the_next_start_goes_on_with_what_was_left(server, path):
    assert "30.00 kB are kept, the same command goes on from there" in stopped(server, path)
    assert fetch(server, path) == SHA256
    assert server.asked == [rest(server, 30_000)] and server.sent == SIZE - 30_000
    assert path.read_bytes() == CONTENT and files(path) == ["model.pt"]


def test_a_process_killed_before_it_could_give_the_name_leaves_nothing_to_ask_for(server, path):
    stopped(server, path)
    part(path).write_bytes(CONTENT)
    assert fetch(server, path) == SHA256 and server.asked == []
    assert path.read_bytes() == CONTENT and files(path) == ["model.pt"]


def test_a_server_that_knows_no_ranges_sends_all_of_it_again(server, path):
    stopped(server, path)
    server.rest = Act(ranges=False)
    assert fetch(server, path) == SHA256
    assert path.read_bytes() == CONTENT and server.sent == SIZE


@pytest.mark.parametrize(
    "lie",
    [
        {"Content-Range": "bytes 0-99999/100000"},
        {"Content-Range": "bytes 30000-99999/200000"},
        {"Content-Range": "bytes 30000-50000/100000"},
        {"Content-Range": "nonsense"},
        {"Content-Range": None},
        {"Content-Length": "69999"},
        {"ETag": '"two"'},
    ],
    ids=str,
)
@pytest.mark.parametrize("known", [{}, {"sha256": None}], ids=["hash", "no hash"])
def test_a_range_that_is_not_the_rest_is_not_used(server, path, capsys, lie, known):
    stopped(server, path, **known)
    server.acts = [Act(headers=lie, if_range=False)]
    assert fetch(server, path, **known) == SHA256
    assert path.read_bytes() == CONTENT and files(path) == ["model.pt"]
    assert server.asked == [rest(server, 30_000), whole(server)]
    assert "starting again" in capsys.readouterr().err


def test_a_server_that_lies_about_ranges_each_time_is_given_up(server, path):
    stopped(server, path)
    lie = Act(headers={"Content-Range": "bytes 1-2/3"})
    server.acts = [lie, Act(cut=40_000), lie]
    assert "bytes 1-2/3" in failed(fetch, server, path)
    assert not path.exists() and server.acts == []


def test_ranges_that_nobody_asked_for_are_refused(server, path):
    server.acts = [Act(status=206)]
    assert "status 206" in failed(fetch, server, path)
    assert files(path) == [] and len(server.asked) == 1


def test_a_file_that_grew_shorter_than_its_part_is_fetched_anew(server, path):
    stopped(server, path, size=None, sha256=None)
    server.rest = Act(content=OTHER[:20_000], if_range=False)
    assert fetch(server, path, size=None, sha256=None) == hashlib.sha256(OTHER[:20_000]).hexdigest()
    assert path.read_bytes() == OTHER[:20_000]


def test_a_file_that_changed_meanwhile_is_fetched_anew_and_never_mixed(server, path):
    stopped(server, path, size=None, sha256=None)
    old, server.content, server.etag = server.etag, OTHER, '"two"'
    assert fetch(server, path, size=None, sha256=None) == hashlib.sha256(OTHER).hexdigest()
    assert path.read_bytes() == OTHER
    assert server.asked == [("/model.pt", "bytes=30000-", old)]


def test_a_weak_mark_is_no_promise_and_the_date_is_taken_instead(server, path):
    server.etag, date = 'W/"one"', "Mon, 01 Jan 2024 00:00:00 GMT"
    server.rest = Act(headers={"Last-Modified": date})
    server.acts = [Act(headers={"Last-Modified": date}, cut=30_000)]
    assert fetch(server, path, sha256=None) == SHA256
    assert server.asked[1] == ("/model.pt", "bytes=30000-", date)


@pytest.mark.parametrize(("sha256", "range"), [(None, None), (SHA256, "bytes=30000-")], ids=["no hash", "hash"])
def test_without_a_mark_only_a_hash_makes_it_safe_to_go_on(server, path, sha256, range):
    server.rest = Act(headers={"ETag": None})
    server.acts = [Act(headers={"ETag": None}, cut=30_000)]
    assert fetch(server, path, sha256=sha256) == SHA256
    assert server.asked[1] == ("/model.pt", range, None) and path.read_bytes() == CONTENT


def notes_of(path):
    return part(path).with_name(".model.pt.part.json")


def from_elsewhere(path):
    notes_of(path).write_text(json.dumps(json.loads(notes_of(path).read_text()) | {"url": "http://elsewhere/model.pt"}))


@pytest.mark.parametrize("spoil", ["notes cut off", "no notes", "another address", "too long"])
def test_a_part_of_which_nothing_is_known_is_not_used(server, path, spoil):
    sha256 = None if spoil == "another address" else SHA256
    stopped(server, path, sha256=sha256)
    if spoil == "notes cut off":
        os.truncate(notes_of(path), 20)
    elif spoil == "no notes":
        notes_of(path).unlink()
    elif spoil == "another address":
        from_elsewhere(path)
    else:
        part(path).write_bytes(bytes(SIZE + 1))
    assert fetch(server, path, sha256=sha256) == SHA256
    assert path.read_bytes() == CONTENT and server.asked == [whole(server)]


def test_a_file_with_a_hash_is_gone_on_with_from_another_address(server, path):
    stopped(server, path)
    from_elsewhere(path)
    assert fetch(server, path) == SHA256 and path.read_bytes() == CONTENT
    assert server.asked == [("/model.pt", "bytes=30000-", None)]  # its mark means nothing here


# Another file than the right one.


def test_a_part_that_was_damaged_on_the_disk_costs_one_new_start(server, path, capsys):
    stopped(server, path)
    part(path).write_bytes(bytes(30_000))
    assert fetch(server, path) == SHA256
    assert path.read_bytes() == CONTENT and files(path) == ["model.pt"]
    assert server.asked == [rest(server, 30_000), whole(server)]
    assert "starting again" in capsys.readouterr().err


def test_another_file_is_kept_aside_and_replaced_by_the_next(server, path):
    for content in (OTHER, OTHER[::-1]):
        server.acts = [Act(content=content)]
        message = failed(fetch, server, path, kind=Rejected)
        assert hashlib.sha256(content).hexdigest() in message and SHA256 in message and str(aside(path)) in message
        assert aside(path).read_bytes() == content and files(path) == ["model.pt.rejected"]
    assert len(server.asked) == 2
    assert fetch(server, path) == SHA256


def test_another_file_that_came_in_parts_is_asked_for_once_more_and_then_refused(server, path):
    server.content = OTHER
    server.acts = [Act(cut=30_000), Act(), Act(cut=40_000)]
    failed(fetch, server, path, kind=Rejected)
    assert [range for _, range, _ in server.asked] == [None, "bytes=30000-", None, "bytes=40000-"]
    assert aside(path).read_bytes() == OTHER and files(path) == ["model.pt.rejected"]


@pytest.mark.parametrize("offered", [SIZE - 1, SIZE + 1, 10**12])
def test_another_size_is_refused_before_anything_is_taken(server, path, offered):
    server.rest = Act(headers={"Content-Length": str(offered)})
    assert f"offers {offered} bytes" in failed(fetch, server, path)
    assert files(path) == [] and len(server.asked) == 1


def test_without_any_size_a_cut_would_go_unseen(server, path):
    server.rest = Act(headers={"Content-Length": None})
    assert "how large" in failed(fetch, server, path, size=None, sha256=None)
    assert files(path) == []


def test_a_body_without_length_is_gone_on_with_where_it_ended(server, path):
    server.rest = Act(headers={"Content-Length": None})
    server.acts = [Act(headers={"Content-Length": None}, cut=30_000)]
    assert fetch(server, path) == SHA256 and server.asked[1] == rest(server, 30_000)


def test_what_appears_at_its_place_meanwhile_is_left_alone(server, path):
    path.write_bytes(b"the user's")
    assert fetch(server, path) is None
    assert path.read_bytes() == b"the user's" and files(path) == ["model.pt"]


# Tried again.


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 408])
def test_a_fault_that_may_pass_is_tried_again_later_and_later(server, path, slept, status):
    server.acts = [Act(status=status)] * 4
    assert fetch(server, path) == SHA256
    assert slept == [0.001, 0.002, 0.004, 0.008]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451])
def test_a_fault_that_stays_is_not(server, path, slept, status):
    server.rest = Act(status=status)
    assert str(status) in failed(fetch, server, path)
    assert len(server.asked) == 1 and slept == [] and files(path) == []


@pytest.mark.parametrize(
    ("asked", "waited"),
    [("7", 7), ("100000", 60), ("0", 0.001), ("Mon, 01 Jan 2024 00:00:00 GMT", 0.001), ("-5", 0.001)],
)
@pytest.mark.parametrize("status", [429, 503])
def test_a_server_says_how_long_to_wait_within_limits(server, path, slept, status, asked, waited):
    server.acts = [Act(status=status, headers={"Retry-After": asked})]
    assert fetch(server, path) == SHA256 and slept == [waited]


def test_tries_are_few(server, path, slept, capsys):
    server.rest = Act(status=503)
    assert "503" in (message := failed(fetch, server, path)) and "5 times in a row" in message
    assert len(server.asked) == fetching.TRIES == 5 and len(slept) == 4
    assert len(capsys.readouterr().err.splitlines()) == 4 and files(path) == []


def test_tries_are_counted_anew_while_it_gets_forward(server, path):
    server.acts = [Act(cut=BLOCK)] * 9
    assert fetch(server, path) == SHA256 and len(server.asked) == 10


@pytest.mark.parametrize("version", ["same", "new"])
def test_a_server_that_never_gets_to_the_end_is_given_up(server, path, version):
    server.rest = Act(cut=1000) if version == "same" else Act(cut=50_000, ranges=False)
    failed(fetch, server, path)
    assert len(server.asked) <= 2 * fetching.TRIES and not path.exists()


def test_a_silent_server_is_asked_again(server, path, monkeypatch, capsys):
    monkeypatch.setattr(fetching, "TIMEOUT", 0.3)
    server.acts = [Act(stall=60), Act(cut=30_000, stall=60)]
    assert fetch(server, path) == SHA256
    assert server.asked == [whole(server), whole(server), rest(server, 30_000)]
    assert capsys.readouterr().err.count("timed out") == 2


def test_where_nobody_answers_it_ends_at_once(path, slept):
    with socket.socket() as closed:  # bound but not listening, so nobody else gets the port
        closed.bind(("127.0.0.1", 0))
        server = SimpleNamespace(url=f"http://127.0.0.1:{closed.getsockname()[1]}/model.pt")
        assert "refused" in failed(fetch, server, path)
    assert slept == [] and files(path) == []


@pytest.mark.parametrize("again", [True, False])
def test_a_server_that_is_out_of_reach_for_a_while_is_asked_again(server, path, slept, monkeypatch, again):
    """Where it was reached before; and if not again, what came is kept."""
    server.acts = [Act(cut=30_000)]
    urlopen, down = fetching.urllib.request.urlopen, [None, OSError("no route"), ConnectionRefusedError("refused")]

    def sometimes(*args, **kwargs):
        error = down.pop(0) if down else None if again else OSError("no route")
        if error:
            raise fetching.urllib.error.URLError(error)
        return urlopen(*args, **kwargs)

    monkeypatch.setattr(fetching.urllib.request, "urlopen", sometimes)
    if again:
        assert fetch(server, path) == SHA256 and path.read_bytes() == CONTENT
        assert server.asked == [whole(server), rest(server, 30_000)] and slept == [0.001, 0.002, 0.004]
    else:
        message = failed(fetch, server, path)
        assert message.startswith("no route, 5 times in a row; 30.00 kB are kept")


def test_a_fault_that_stays_says_what_is_kept(server, path, slept):
    server.acts = [Act(cut=30_000), Act(status=404)]
    assert "404" in (message := failed(fetch, server, path)) and message.endswith("goes on from there")
    assert "30.00 kB are kept" in message and part(path).read_bytes() == CONTENT[:30_000]


def test_an_address_that_is_none_is_a_fault_of_the_address(path):
    assert "IPv6" in failed(fetch, SimpleNamespace(url="http://[:]/model.pt"), path)


def test_what_is_empty_or_packed_is_not_taken_for_the_file(server, path):
    server.rest = Act(content=b"")
    assert "empty" in failed(fetch, server, path, size=None, sha256=None)
    server.rest = Act(headers={"Content-Encoding": "gzip"})
    assert "packed (gzip)" in failed(fetch, server, path, size=None, sha256=None)
    assert files(path) == []


# Redirections.


def test_redirections_are_followed_with_the_range(server, path):
    stopped(server, path)
    server.acts = [Act(status=302, headers={"Location": "/a"}), Act(status=307, headers={"Location": "/b"})]
    assert fetch(server, path) == SHA256
    assert server.asked == [(place, "bytes=30000-", server.etag) for place in ("/model.pt", "/a", "/b")]


@pytest.mark.parametrize("place", ["/model.pt", "file:///etc/passwd", "http://127.0.0.1:x/", "http://a..b/"])
def test_redirections_that_lead_nowhere_are_refused(server, path, slept, place):
    server.rest = Act(status=302, headers={"Location": place})
    failed(fetch, server, path)
    assert slept == [] and files(path) == []


# The disk.


def test_without_room_nothing_is_begun(server, path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=10**6, free=SIZE - 1))
    message = failed(fetch, server, path, kind=UserError, size=None, sha256=None)
    assert "100.00 kB" in message and "make room" in message and str(path.parent) in message
    assert files(path) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=10**6, free=SIZE))
    assert fetch(server, path) == SHA256


def test_room_is_needed_for_the_rest_only(server, path, monkeypatch):
    stopped(server, path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=10**6, free=SIZE - 30_000))
    assert fetch(server, path) == SHA256


def test_room_is_counted_once_for_each_file_system(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=100, free=10))
    assert fetching.room({tmp_path / "a" / "x": 5, tmp_path / "b" / "c" / "y": 5}) == {tmp_path: 10}
    assert "11 B are to come" in failed(fetching.room, {tmp_path / "a" / "x": 5, tmp_path / "y": 6}, kind=UserError)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=0, free=0))
    assert fetching.room({tmp_path / "x": 5}) == {tmp_path: 0}


def test_a_disk_that_fills_up_is_one_line_and_what_came_is_kept(server, path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetching.os, "fsync", full)
    message = failed(fetch, server, path, kind=UserError)
    assert message.startswith("cannot write") and "No space left" in message
    assert not path.exists() and part(path).read_bytes() == CONTENT
    monkeypatch.undo()
    assert fetch(server, path) == SHA256 and len(server.asked) == 1


def test_a_place_that_cannot_be_written_is_known_before_anybody_is_asked(server, path):
    part(path).mkdir()
    assert failed(fetch, server, path, kind=UserError).startswith("cannot write")
    assert server.asked == []


# Several processes.

PROGRAM = f"""
import sys
from pathlib import Path
from runtime import cli, fetching, released as download
fetching.BLOCK = {BLOCK}
download.ROOT = Path(sys.argv[1])
download.FILES = (download.File("model.pt", sys.argv[2], {SIZE}, "{SHA256}", "MIT"),)
cli.run(download.main, download.parse_args(["model.pt"]))
"""


@pytest.fixture
def start(server, path, tmp_path_factory):
    """Starts download.py on the server's file, which it brings to `path`; kills what is left in the end.

    said: the file of its standard error.
    """
    started = []

    def start():
        env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        said = tmp_path_factory.mktemp("said") / "stderr"
        with said.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(path.parent), server.url],
                cwd=Path(fetching.__file__).parent,
                env=env,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        process.said = said
        started.append(process)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_several_processes_fetch_once(server, path, start):
    server.acts = [Act(cut=30_000, stall=60)]
    server.rest = Act(cut=0)  # whoever asks a second time before the first is done gets nothing
    first = start()
    wait_for(lambda: server.sent == 30_000)
    others = [start(), start()]
    for other in others:
        wait_for(lambda said=other.said: said.read_text() == "model.pt: another process fetches it; waiting\n")
    server.rest = Act()
    server.halted.set()  # the first one is cut, and goes on
    for process in (first, *others):
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and "model.pt: model.pt" in out, process.said.read_text()
    assert path.read_bytes() == CONTENT
    assert server.asked == [whole(server), rest(server, 30_000)]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_stopped_leaves_its_part_to_the_next(server, path, start, end):
    server.acts = [Act(cut=50_000, stall=60)]
    process = start()
    wait_for(lambda: part(path).exists() and part(path).stat().st_size)
    process.send_signal(end)
    process.communicate(timeout=60)
    assert not path.exists()
    if end == signal.SIGINT:
        (line,) = process.said.read_text().strip().splitlines()
        assert process.returncode == 130 and line.endswith("interrupted")
    size = part(path).stat().st_size
    assert fetch(server, path) == SHA256  # at once: the lock went with the process
    assert path.read_bytes() == CONTENT and server.asked[1] == rest(server, size)


def test_without_locks_each_fetches_for_itself_and_nothing_collides(server, path, monkeypatch):
    def no_locks(path, patience):
        raise OSError(errno.ENOLCK, "its file system has no locks")

    monkeypatch.setattr(fetching, "lock_file", no_locks)
    with fetching.alone(path) as one, fetching.alone(path) as two:
        assert one != two
        assert fetching.fetch(server.url, path, one, SIZE, SHA256) == SHA256
        server.acts = [Act(status=404, cut=0)]
        failed(fetching.fetch, server.url, path, two, SIZE, SHA256)
    assert path.read_bytes() == CONTENT
    path.unlink()
    server.acts = [Act(cut=30_000)] + [Act(status=404)]
    failed(fetch, server, path)
    assert list(path.parent.iterdir()) == []
