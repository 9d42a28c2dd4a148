"""Download one file: resume, retry, verify, once for all processes.

httpx makes the requests, filelock locks. The rest is by hand, because no library here does all of it for a plain URL:
torch.hub.download_url_to_file checks a hash but never resumes; huggingface_hub's http_get resumes within one call, but
without If-Range, so that two versions of a file may mix, and checks no hash. pooch checks a hash and does not resume.

An incomplete file is `.NAME.part`. `.NAME.part.version` holds its ETag or date: only the same version is resumed.
"""

import contextlib
import os
import shutil
import sys
import time
import uuid

import httpx
from tqdm import tqdm

from runtime.errors import UserError, first_line
from runtime.files import lock_file
from runtime.hashes import sha256_of_file

TIMEOUT = 60.0  # seconds without a byte
TRIES = 5  # failures in a row
DELAY = 1.0  # seconds before the first retry, doubled for each further one
UNREACHABLE = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError, httpx.UnsupportedProtocol)


class DownloadError(Exception):
    """The file could not be downloaded; the text is the reason, in one line."""


def fetch(url, path, size=None, sha256=None):
    """Download `url` to `path` and return its SHA-256; None if somebody else put a file there meanwhile.

    size: bytes, None if unknown. sha256: 64 hex digits, None accepts any.
    Raises DownloadError if the download fails or the file is wrong, UserError if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked_part(path) as part:
            if os.path.lexists(path):  # another process has downloaded it
                return None
            actual = _receive_with_retries(url, path.name, part, size, sha256)
            arrived = not os.path.lexists(path)  # else the user has put a file there, which stays
            if arrived:
                part.replace(path)
            _discard(part)
            return actual if arrived else None
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or path}: {error.strerror or error}; make room or make it writable, then "
            "repeat the command: it resumes"
        ) from error


def call_hub(download, *args, **kwargs):
    """Call a download function of huggingface_hub and return its result, without the log of its retries.

    Raises DownloadError with the last reason, UserError if the disk is at fault.
    """
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return download(*args, **kwargs)
    except Exception as error:  # the client passes on errors of its transports, which have no common class
        if isinstance(error, OSError) and error.strerror:
            place = error.filename or "the cache of the Hugging Face Hub"
            raise UserError(f"cannot write {place}: {error.strerror}; make room, or set HF_HOME elsewhere") from error
        raise DownloadError(first_line(error.__cause__ or error)) from error
    finally:
        logging.set_verbosity(verbosity)


def check_room(path, size):
    """Raise UserError if the disk of `path` has less than `size` bytes free."""
    usage = shutil.disk_usage(next(folder for folder in path.parents if folder.exists()))
    if usage.total and size > usage.free:  # a file system that does not know reports a total of 0
        raise UserError(
            f"{path} needs {amount(size)}, but only {amount(usage.free)} are free there: make room, or make "
            f"{path.parent} a link to a folder on a larger disk"
        )


def amount(size):
    """Bytes as a short text, in powers of 1000."""
    return "size unknown" if size is None else f"{tqdm.format_sizeof(size)}B"


@contextlib.contextmanager
def _locked_part(path):
    """Yield the path of the incomplete file while no other process downloads `path`; wait for one that does."""
    lock_path = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            lock = lock_file(lock_path, 0)
            if not lock:
                _say(path.name, "another process is downloading it; waiting")
                lock = lock_file(lock_path, -1)
            stack.callback(lock.release)
            part = path.with_name(f".{path.name}.part")
        except OSError:  # no locks, as on some network file systems: each process downloads for itself
            part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
            stack.callback(_discard, part)
        yield part


def _receive_with_retries(url, name, part, size, sha256):
    """Complete `part` and return its SHA-256. Raises DownloadError at a lasting fault or TRIES failures in a row."""
    failures, farthest = 0, _size(part)
    while True:
        try:
            return _receive(url, name, part, size, sha256)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reached = _size(part)
            if reached > farthest:  # only then, else it might never end
                failures, farthest = 0, reached
            failures += 1
            reason, transient = first_line(error), isinstance(error, httpx.TransportError)
            if isinstance(error, httpx.HTTPStatusError):
                status = error.response.status_code
                reason = f"HTTP {status} {error.response.reason_phrase}"
                transient = status in (408, 429) or status >= 500
            elif isinstance(error, UNREACHABLE):
                transient = reached > 0  # if it never worked, the host is wrong or there is no network
            if not transient or failures == TRIES:
                times = f", {failures} times in a row" if transient else ""
                kept = f"; {amount(reached)} are kept, repeat the command to resume" if reached else ""
                raise DownloadError(f"{reason}{times}{kept}") from error
            delay = DELAY * 2 ** (failures - 1)
            _say(name, f"{reason}; retry {failures} of {TRIES - 1} in {delay:.3g} s")
            time.sleep(delay)


def _receive(url, name, part, size, sha256):
    """Append what `part` lacks, with one request, and return the SHA-256 of the complete file.

    Raises an httpx error if it is incomplete, DownloadError if it is wrong.
    """
    start = _size(part)
    if start != size:  # else the process was killed between the last byte and the renaming
        start = _append(url, name, part, size)
    actual = sha256_of_file(part)
    if sha256 in (None, actual):
        return actual
    _discard(part)
    if start:
        raise httpx.RemoteProtocolError(f"the resumed file is wrong (SHA-256 {actual}), starting again")
    raise DownloadError(f"wrong SHA-256 {actual}, expected {sha256}; the file was discarded")


def _append(url, name, part, size):
    """Complete `part` with one request; return the number of bytes that it resumed after."""
    start, version_file = _size(part), _version_file(part)
    version = version_file.read_text() if version_file.exists() else ""
    resume = {"Range": f"bytes={start}-", "If-Range": version} if start and version else {}
    headers = {"Accept-Encoding": "identity"} | resume
    try:
        client = httpx.Client(timeout=TIMEOUT, follow_redirects=True)
    except (ImportError, ValueError, OSError) as error:  # a proxy of an unknown kind, certificates that are not there
        raise DownloadError(f"{first_line(error)}: check HTTPS_PROXY, ALL_PROXY and SSL_CERT_FILE") from error
    with client, client.stream("GET", url, headers=headers) as response:
        resumed = response.status_code == 206
        rest = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if response.status_code == 416 or resumed and not (rest and _version(response) in ("", version)):
            _discard(part)
            raise httpx.RemoteProtocolError("the server does not send the rest of this file, starting again")
        response.raise_for_status()
        start = start if resumed else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else size
        if not total:
            raise DownloadError("the server does not state a size, so that a cut would go unnoticed")
        if size not in (None, total):
            raise DownloadError(f"the server offers {total} bytes, the released file has {size}")
        check_room(part, total - start)
        if not resumed:
            _discard(part)  # in this order, so that no bytes ever lie beside another file's version
            version_file.write_text(_version(response))
        bar = tqdm(total=total, initial=start, desc=name, unit="B", unit_scale=True, disable=None)
        with bar, part.open("ab") as file:
            for chunk in response.iter_bytes():
                file.write(chunk)
                bar.update(len(chunk))
            os.fsync(file.fileno())
    if _size(part) != total:
        raise httpx.RemoteProtocolError(f"the connection ended after {_size(part)} of {total} bytes")
    return start


def _version(response):
    """A strong ETag, else the date, else "": what If-Range takes."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _version_file(part):
    return part.with_name(f"{part.name}.version")


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _discard(part):
    part.unlink(missing_ok=True)
    _version_file(part).unlink(missing_ok=True)


def _say(name, text):
    print(f"{name}: {text}", file=sys.stderr, flush=True)
