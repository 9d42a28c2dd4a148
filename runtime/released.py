"""The released files of released.csv: downloaded when they are used, and checked.

A file is hashed before its first use. `NAME.sha256` beside it keeps the hash, and its modification time is set to the
file's: while the two times agree, the file is not hashed again. If no SHA-256 is published, the hash of the first use
is required from then on.
The Hub's client retries and locks, but checks no hash, and its current version does not resume after a restart.
"""

import csv
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from runtime import fetching
from runtime.errors import UserError
from runtime.fetching import DownloadError, amount
from runtime.files import atomic_write
from runtime.hashes import sha256_of_file

ROOT = Path(__file__).resolve().parent.parent
HUB_URL = re.compile(r"https://huggingface\.co/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
MIRROR = re.compile(r"https?://[^\s/?#@]+(/[^\s?#]*)?")
MIRROR_RULE = "the URL of a folder, as http://HOST/FOLDER or https://HOST/FOLDER"


@dataclass(frozen=True)
class File:
    """A file to download; size in bytes, and SHA-256, are None if they are not published.

    name: what a user types; the two files of a VAE share it.
    folder: its place below the repository; files of the Hugging Face Hub belong in the Hub's cache.
    """

    name: str
    size: int | None
    sha256: str | None
    licence: str
    folder: str
    url: str

    @property
    def hub(self):
        """The repository, revision and file name of a file of the Hugging Face Hub, else None."""
        match = HUB_URL.fullmatch(self.url)
        return match and match.groups()

    @property
    def path(self):
        if not self.hub:
            return ROOT / self.folder / self.name
        from huggingface_hub import constants

        repo, revision, filename = self.hub
        return Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}", "snapshots", revision, filename)

    @property
    def kept(self):
        """The file that keeps the SHA-256 that was computed last."""
        return self.path.with_name(f"{self.path.name}.sha256")

    def exists(self):
        return os.path.lexists(self.path)  # a dangling link is the user's, too

    def kept_sha256(self):
        """The SHA-256 in `kept`, None if there is none."""
        return self.kept.read_text(errors="replace").partition(" ")[0] or None if self.kept.is_file() else None

    def expected_sha256(self):
        """The published SHA-256, else the kept one, else None."""
        return self.sha256 or self.kept_sha256()


def _read_table(path):
    with path.open(newline="") as file:
        return tuple(
            File(size=int(row.pop("bytes") or 0) or None, sha256=row.pop("sha256") or None, **row)
            for row in csv.DictReader(file)
        )


FILES = _read_table(Path(__file__).with_name("released.csv"))


def names():
    """The names of the files, in the order of the table."""
    return list(dict.fromkeys(file.name for file in FILES))


def find(path):
    """Return the Path of a user's file, downloaded if it is missing but released.

    path: a released file is found by its bare name, or by its place seen from here or from the repository
    (`ckpt/DDIM20_router.pt`). A user's own file in that place is returned too, with a warning.
    Raises UserError if there is no such file or it cannot be downloaded.
    """
    path = Path(path)
    for file in FILES:
        place = None if file.hub else os.path.realpath(file.path)
        if path.exists() and place == os.path.realpath(path):
            try:
                check(file)
            except UserError as error:
                print(f"warning: {path} is used, but it is not the released file: {error}", file=sys.stderr)
        elif not path.exists() and (str(path) == file.name or place in map(os.path.realpath, (path, ROOT / path))):
            return fetch(file.name)
    if not path.exists():
        raise UserError(f"no such file: {path} (python download.py --list shows the files that can be downloaded)")
    return path


def fetch_vae(kind):
    """Return the folder of a VAE, "ema" or "mse", downloaded into the cache of the Hugging Face Hub if missing."""
    return fetch(f"sd-vae-ft-{kind}")


def fetch(name, mirror=None):
    """Return the Path of a released file (for a VAE: of its folder), downloaded if missing, and checked.

    mirror: URL of a folder that has the files by their names (except the VAEs); None is $L2C_MIRROR, if set.
    Raises UserError if the file is unknown, cannot be downloaded, or is not the released one (it is left alone).
    """
    files = [file for file in FILES if file.name == name]
    if not files:
        raise UserError(f"unknown file {name}: choose from {', '.join(names())}")
    for file in files:
        if not file.exists():
            _download(file, mirror or os.environ.get("L2C_MIRROR"))
        check(file)
    return files[0].path if len(files) == 1 else files[0].path.parent


def check(file, force=False):
    """Compare an existing file with the table and return its SHA-256; force: hash it even if it has not changed.

    Raises UserError if it is not the released file or cannot be read; it is left alone.
    """
    path = file.path
    # The Hub's cache holds links; a new download would link the same wrong content again, so all of it has to go.
    away = path.parents[2] if file.hub else path
    way_out = f"it was left as it is; move {away} away, then python download.py {file.name}"
    if not path.is_file():
        raise UserError(f"{path} exists but is not a file: {way_out}")
    try:
        stat, kept = path.stat(), file.kept_sha256()
        if file.size not in (None, stat.st_size):
            raise UserError(f"{path} has {stat.st_size} bytes, the released file has {file.size}: {way_out}")
        expected = file.expected_sha256()
        if kept and kept == expected and file.kept.stat().st_mtime_ns == stat.st_mtime_ns and not force:
            return kept
        actual = sha256_of_file(path)
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename or path}: {error.strerror}; make it readable or move it"
        ) from error
    if expected not in (None, actual):
        source = "the released file has" if file.sha256 else f"{file.kept} says"
        raise UserError(f"{path} has SHA-256 {actual}, {source} {expected}: {way_out}")
    _keep(file, actual, stat)
    return actual


def _keep(file, sha256, stat):
    """Write the hash of a file with this stat. If that is impossible, the file is hashed at each use."""
    first = not file.kept.is_file()
    try:
        with atomic_write(file.kept) as part:
            part.write_text(f"{sha256}  {file.path.name}\n")  # the format of sha256sum
            os.utime(part, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        place = f"kept in {file.kept}"
    except UserError as error:
        place = f"not kept: {error}"
    if first and not file.sha256:
        print(f"{file.name}: no SHA-256 is published; this file has {sha256}, {place}", flush=True)


def _download(file, mirror):
    """Download a file to its place. Raises UserError with the URL and the place if that fails."""
    from huggingface_hub import constants, hf_hub_download

    if mirror and not MIRROR.fullmatch(mirror):
        raise UserError(f"L2C_MIRROR is {mirror}, not {MIRROR_RULE}")
    url = f"{mirror.rstrip('/')}/{file.name}" if mirror and not file.hub else file.url
    try:
        if constants.HF_HUB_OFFLINE:
            raise DownloadError("HF_HUB_OFFLINE is set")
        print(f"downloading {url} ({amount(file.size)}, licence: {file.licence}) to {file.path}", flush=True)
        if file.hub:
            repo, revision, filename = file.hub
            fetching.check_room(file.path, file.size)
            fetching.call_hub(hf_hub_download, repo, filename, revision=revision)
        else:
            sha256 = fetching.fetch(url, file.path, file.size, file.expected_sha256())
            if sha256:
                _keep(file, sha256, file.path.stat())
    except DownloadError as error:
        way_out = f"download {'it' if url == file.url else file.url} elsewhere and put it at {file.path}"
        if not file.sha256 and file.kept.is_file():
            way_out += f", or move {file.kept} away to accept a new version"
        raise UserError(f"cannot download {url} ({error}): {way_out}") from error
