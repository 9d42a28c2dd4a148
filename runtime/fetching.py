"""How one file arrives: gone on with where it was cut, tried again, hashed on the way, and by one process for all.

Until it is whole and right it lies in `.NAME.part`, beside what is known of it (`.NAME.part.json`) and the lock of who
fetches it (`.NAME.lock`). What came whole and is another file is kept as `NAME.rejected`, one at a time.

The client of the Hugging Face Hub does this for its own cache. For an address of our own it offers nothing: its inner
function resumes without asking whether the file is still the same one, believes any range, and takes no hash.
"""

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
import uuid

from runtime.errors import UserError
from runtime.files import lock_file

TIMEOUT = 60  # seconds without a byte
TRIES = 5  # in a row that bring less than a block
DELAY = 1.0  # seconds before the second try; before each further one twice as long
LONGEST_DELAY = 60.0  # seconds, even where a server asks for more
BLOCK = 1 << 20  # bytes read, hashed and written at a time


class Failed(Exception):
    """The file did not come, for the reason in the text.

    again: the same request may succeed later; delay: seconds that the server asks to wait until then.
    unreached: no server was; where one was before, it may be again.
    """

    def __init__(self, reason, again=False, delay=0.0, unreached=False):
        super().__init__(reason)
        self.again, self.delay, self.unreached = again, delay, unreached


class Rejected(Failed):
    """All of a file came, and it is another one; the text says where it is kept."""


class _Unrelated(Exception):
    """What is in the part and what the server sends do not belong together, for the reason in the text."""


@contextlib.contextmanager
def alone(path):
    """In this block no other process fetches `path`, for whose end it waits; yields the path of the part."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        place = path.with_name(f".{path.name}.lock")
        lock = lock_file(place, 0)
        if not lock:
            _say(path, "another process fetches it; waiting")
            lock = lock_file(place, -1)
    except OSError:
        lock = None
    if lock:
        try:
            yield _part(path)
        finally:
            lock.release()
    else:
        # Without locks, as on some network file systems, each process fetches for itself; the first to end wins.
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            yield part
        finally:
            _discard(part)


def fetch(url, path, part, size=None, sha256=None):
    """Brings what `url` sends to `path` by way of `part`, which may hold the beginning. Returns its SHA-256.

    size: bytes; None: as many as the server says. sha256: 64 hex digits; None: any.
    None is returned where something appeared at `path` meanwhile: it is left alone.
    Raises Failed where the file does not come, Rejected where it is another; UserError where it cannot be written.
    """
    try:
        actual = _fetch(url, path, part, size, sha256)
        with part.open("rb+") as whole:
            os.fsync(whole.fileno())
        if os.path.lexists(path):
            actual = None
        else:
            part.replace(path)
        _discard(part)
        return actual
    except OSError as error:  # those of the network are Failed
        raise UserError(
            f"cannot write {error.filename2 or error.filename or part}: {error.strerror or error}; make room, or make "
            "it writable; then the same command goes on"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            if not part.stat().st_size:
                _discard(part)


def room(wanted):
    """{folder: bytes free}, one folder for each file system on which files are to be; wanted: {path: bytes to come}.

    Raises UserError where they do not fit.
    """
    systems = {}  # by number: a folder that is there, the bytes to come, the folder they are for
    for path, size in wanted.items():
        folder = next(folder for folder in path.parents if folder.exists())
        place = systems.setdefault(folder.stat().st_dev, [folder, 0, path.parent])
        place[1] += size
    free = {}
    for folder, size, destination in systems.values():
        usage = shutil.disk_usage(folder)
        free[folder] = usage.free
        if usage.total and size > usage.free:  # a total of 0 is one that the file system does not tell
            raise UserError(
                f"{amount(size)} are to come to {destination}, and {amount(usage.free)} are free there: make room, or "
                "make that folder a link to one on a larger disk"
            )
    return free


def begun(path):
    """Bytes of `path` that came before and can be gone on from."""
    try:
        return _part(path).stat().st_size
    except OSError:
        return 0


def amount(size):
    """Bytes as a person reads them, in powers of 1000."""
    if size is None:
        return "size unknown"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} B"


def _fetch(url, path, part, size, sha256):
    """`fetch` until the part is whole and right: asks until it is, or until there is no use in it."""
    failures, from_zero, came = 0, False, False
    farthest = before = part.stat().st_size if part.exists() else 0
    while True:
        try:
            actual, continued = _receive(url, path, part, size, sha256)
            if sha256 in (None, actual):
                return actual
            if from_zero or not continued:
                aside = path.with_name(path.name + ".rejected")
                part.replace(aside)
                _discard(part)
                raise Rejected(f"what came has SHA-256 {actual} and not {sha256}; it is kept as {aside}")
            raise _Unrelated(f"the parts of it make a file with SHA-256 {actual}")
        except _Unrelated as error:
            if from_zero:
                raise Failed(str(error)) from error
            from_zero, farthest = True, 0
            _discard(part)
            _say(path, f"{error}; starting again from its beginning")
        except Failed as error:
            reached = part.stat().st_size if part.exists() else 0
            if reached >= farthest + BLOCK:  # so that this ends even if a server never gets to the end
                failures, farthest = 0, reached
            failures, came, before = failures + 1, came or reached > before, reached
            again = error.again or (error.unreached and came)
            if not again and not reached:
                raise
            if not again or failures >= TRIES:
                times = f", {failures} times in a row" if again else ""
                kept = f"; {amount(reached)} are kept, the same command goes on from there" if reached else ""
                raise Failed(f"{error}{times}{kept}") from error
            delay = min(max(DELAY * 2 ** (failures - 1), error.delay), LONGEST_DELAY)
            _say(path, f"{error}; trying again in {delay:.3g} s ({failures} of {TRIES - 1})")
            time.sleep(delay)


def _receive(url, path, part, size, sha256):
    """Asks once for what `part` lacks, and appends it.

    Returns the SHA-256 of the whole, and whether it came by more than one answer.
    Raises Failed where that is not all, _Unrelated where the answer does not continue the part.
    """
    from tqdm import tqdm

    start, digest = 0, hashlib.sha256()
    known = _known(part, url, size, sha256)
    if known:
        with part.open("rb") as begun:
            while block := begun.read(BLOCK):
                digest.update(block)
                start += len(block)
        if start == known["size"]:  # it was killed between the last byte and the name
            return digest.hexdigest(), True
    with part.open("ab") as written:  # before asking, so that a disk at fault is known first
        with _ask(url, start, known) as response:
            if start and response.status == 206:
                size = known["size"]
                _check_range(response, start, known)
            else:  # the whole file, from servers that know no ranges or have another version by now
                start, digest = 0, hashlib.sha256()
                size = _size_of_all(response, size)
                # In this order, so that bytes of one version never lie beside the mark of another.
                written.truncate(0)
                known = {"url": url, "mark": _mark(response), "size": size}
                _beside(part).write_text(json.dumps(known))
            room({path: size - start})
            # disable=None: a bar on a terminal, nothing in a log
            bar = tqdm(total=size, initial=start, desc=path.name, unit="B", unit_scale=True, disable=None)
            received = start
            with bar:
                while received < size:
                    with _network():
                        block = response.read1(min(BLOCK, size - received))
                    if not block:
                        raise Failed(f"the connection ended after {received} of {size} bytes", again=True)
                    written.write(block)
                    digest.update(block)
                    received += len(block)
                    bar.update(len(block))
    return digest.hexdigest(), start > 0


def _ask(url, start, known):
    """The response to a request for `url` from byte `start` on, if it is still the file that is `known`."""
    with _network():
        request = urllib.request.Request(url, headers={"User-Agent": "learning-to-cache-dit"})
    if start:
        request.add_header("Range", f"bytes={start}-")
        if known["mark"]:
            request.add_header("If-Range", known["mark"])
    try:
        with _network():
            return urllib.request.urlopen(request, timeout=TIMEOUT)
    except Failed as error:
        if start and getattr(error.__cause__, "code", None) == 416:
            raise _Unrelated(f"the server has nothing after the {start} bytes that are there") from error
        raise


def _size_of_all(response, size):
    """The bytes that the response to a request for all of a file brings; size: the right number, where it is known."""
    if response.status != 200:
        raise Failed(f"the server answers with status {response.status} where 200 belongs")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise Failed(f"the server sends it packed ({response.headers['Content-Encoding']}), which was not asked for")
    offered = response.length  # None where the server does not say
    if size is None and offered is None:
        raise Failed("the server does not say how large it is, so a cut would go unseen")
    if size is None and offered == 0:
        raise Failed("the server sends an empty file")
    if size is not None and offered not in (None, size):
        raise Failed(f"the server offers {offered} bytes, the released file has {size}")
    return offered if size is None else size


def _check_range(response, start, known):
    """Raises _Unrelated where a partial response is not the rest, from byte `start`, of the file that is `known`."""
    size = known["size"]
    ranged = response.headers.get("Content-Range")
    if ranged != f"bytes {start}-{size - 1}/{size}" or response.length not in (None, size - start):
        length = "" if response.length is None else f" with {response.length} bytes"
        raise _Unrelated(f"asked for bytes {start} to {size - 1} of {size}, the server sends {ranged}{length}")
    if known["mark"] and _mark(response) not in (None, known["mark"]):
        raise _Unrelated("the server has another version by now")


def _mark(response):
    """What tells one version of the file from another, as If-Range takes it; None where the server says nothing."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")  # W/"..." promises no equal bytes


def _known(part, url, size, sha256):
    """What is known of the file whose beginning lies in `part`: its url, mark and size. None: `part` is of no use.

    Without a hash to be right in the end, the server has to tell that the file is still the same one. With one, it may
    also come from another address, whose marks are others.
    """
    try:
        known = json.loads(_beside(part).read_text())
        if known["url"] != url:
            known["mark"] = None
        usable = size in (None, known["size"]) and (known["mark"] or sha256)
        return known if usable and part.stat().st_size <= known["size"] else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _part(path):
    return path.with_name(f".{path.name}.part")


def _beside(part):
    return part.with_name(part.name + ".json")


def _discard(part):
    for path in (_beside(part), part):
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def _network():
    """Turns faults of the network into Failed, so that an OSError is one of the disk."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        asked = error.headers.get("Retry-After", "")  # the other form, a date, is rare: then our own delays do
        passing = error.code in (408, 429) or error.code >= 500
        raise Failed(str(error), passing, float(asked) if asked.isdecimal() else 0.0) from error
    except urllib.error.URLError as error:
        # There was no connection: nobody is there, or a firewall is. One that broke on the way may work next time.
        broken = isinstance(error.reason, ConnectionError) and not isinstance(error.reason, ConnectionRefusedError)
        unreached = not isinstance(error.reason, ssl.SSLCertVerificationError)
        raise Failed(reason(error.reason), broken, unreached=unreached) from error
    except (ValueError, http.client.InvalidURL) as error:  # a redirection to what is no address
        raise Failed(reason(error)) from error
    except (OSError, http.client.HTTPException) as error:
        raise Failed(reason(error), again=True) from error


def reason(error):
    """The first line of what an error says, or its name where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _say(path, text):
    print(f"{path.name}: {text}", file=sys.stderr, flush=True)
