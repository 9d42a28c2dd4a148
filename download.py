"""Every file that comes from outside: where it is, how large, which SHA-256, under which licence.

    python download.py                          fetches all that is not there yet (8 GB, and one file of unknown size)
    python download.py DiT-XL-2-256x256.pt sd-vae-ft-ema
    python download.py --list                   what is there
    python download.py --check                  hashes all that is there

A file gets its name once its size and SHA-256 are right; until then, and after any fault, nothing is there.
(The VAEs lie in the cache of the Hugging Face Hub, whose client writes them: checked before use, and refused if wrong.)
A file that is there and is wrong is refused and left alone: it is the user's.

When a file is used its size is checked, and its SHA-256 too unless it has more than `HASHED_AT_EACH_USE` bytes
(the DiT weights and reference batches, seconds each): those are hashed when they are fetched and by --check.
Where no SHA-256 is published, that of the first fetch is kept in `<file>.sha256` and compared from then on.
"""

import contextlib
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import cli
from files import UserError, written_whole

ROOT = Path(__file__).resolve().parent  # destinations are relative to it
TIMEOUT = 60  # seconds without a byte
BLOCK = 1 << 20  # bytes read, hashed and written at a time
HASHED_AT_EACH_USE = 400_000_000  # bytes, so that the VAEs count: the Hub's client compares sizes only


@dataclass(frozen=True)
class File:
    """One file from outside. `name` is what a user types; the two files of a VAE share theirs.

    size: bytes, or None where nobody states it.    sha256: 64 hex digits, or None.
    folder: where it lies under ROOT; or, for a file in the cache of the Hugging Face Hub,
    hub: its repository, revision (a full commit, so what comes cannot change) and file name there.
    """

    name: str
    url: str
    size: int | None
    sha256: str | None
    licence: str
    folder: str = ""
    hub: tuple[str, str, str] | None = None

    @property
    def path(self):
        """Where the file is to be."""
        if self.hub is None:
            return ROOT / self.folder / self.name
        from huggingface_hub import constants

        repo, revision, filename = self.hub
        cached = "models--" + repo.replace("/", "--")
        return Path(constants.HF_HUB_CACHE, cached, "snapshots", revision, filename)

    @property
    def remembered(self):
        """The file beside it that keeps the SHA-256 of the first fetch, where none is published."""
        return self.path.with_name(self.path.name + ".sha256")


def _dit(resolution, size, sha256):
    name = f"DiT-XL-2-{resolution}x{resolution}.pt"
    url = f"https://dl.fbaipublicfiles.com/DiT/models/{name}"
    return File(name, url, size, sha256, "CC-BY-NC 4.0", "pretrained_models")


def _router(steps, size, sha256):
    name = f"DDIM{steps}_router.pt"
    commit = "d6cc7817842e1353b8d902af263bab030b8478da"
    url = f"https://raw.githubusercontent.com/horseee/learning-to-cache/{commit}/DiT/ckpt/{name}"
    return File(name, url, size, sha256, "not stated", "ckpt")


def _vae(kind, revision, filename, size, sha256):
    name = f"sd-vae-ft-{kind}"
    repo = f"stabilityai/{name}"
    url = f"https://huggingface.co/{repo}/resolve/{revision}/{filename}"
    return File(name, url, size, sha256, "MIT", hub=(repo, revision, filename))


def _evaluation(place, size, sha256):
    url = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/{place}"
    return File(place.rpartition("/")[2], url, size, sha256, "not stated", "pretrained_models")


_EMA = "f04b2c4b98319346dad8c65879f680b1997b204a"
_MSE = "31f26fdeee1355a5c34592e401dd41e45d25a493"
_CONFIG = (547, "92d3dfb746fca211a2c9e019e285f8597412211728dce3c5bcf4eda0f2d62e7e")  # the same for both VAEs

FILES = (
    _dit(256, 2_700_611_775, "9ec1876e4c03471bca126663a30e2d1b20610b6d2f87850a39a36f25cc685521"),
    _dit(512, None, None),
    _router(20, 24_064, "c3134cfe7a69e31f188ac3d8ace7f6b586db92daa30c99f17e46d3f24e7408c7"),
    _router(50, 58_744, "fd83c172f77ad71f8695d5972497d1a4d113119e0e0415861812ca8eea9f60b2"),
    _vae("ema", _EMA, "config.json", *_CONFIG),
    _vae(
        "ema",
        _EMA,
        "diffusion_pytorch_model.safetensors",
        334_643_276,
        "32db726da04f06c1b6b14c0043ce115cc87a501482945c5add89a40d838fcb46",
    ),
    _vae("mse", _MSE, "config.json", *_CONFIG),
    _vae(
        "mse",
        _MSE,
        "diffusion_pytorch_model.safetensors",
        334_643_276,
        "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
    ),
    _evaluation(
        "classify_image_graph_def.pb", 95_673_916, "009d6814d1bc560d4e7b236e170e9b2d5ca6f4b57bd8037f6db05776204415c6"
    ),
    _evaluation(
        "imagenet/256/VIRTUAL_imagenet256_labeled.npz",
        2_037_122_530,
        "b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758",
    ),
    _evaluation("imagenet/512/VIRTUAL_imagenet512.npz", None, None),
)


def names():
    """What can be fetched, by name, in the order of the table."""
    return list(dict.fromkeys(file.name for file in FILES))


def find(path):
    """The Path of a user's file: as it is where it exists, fetched where it is missing but in the table.

    A file of the table is meant by its bare name, or by its destination seen from here or from the repository
    (`ckpt/DDIM20_router.pt`). A file of one's own in that place is returned unchecked.
    Raises UserError where there is no such file or it cannot be fetched.
    """
    path = Path(path)
    if path.exists():
        return path
    places = {path.resolve(), (ROOT / path).resolve()}
    for name in names():
        if str(path) == name or (path.name == name and any(f.path.resolve() in places for f in _files(name))):
            return fetch(name)
    raise UserError(f"no such file: {path} (python download.py --list names the files that can be fetched)")


def fetch_vae(kind):
    """The folder (Path) of a VAE, "ema" or "mse", for diffusers' AutoencoderKL.from_pretrained.

    Fetched into the cache of the Hugging Face Hub where needed, so HF_HOME and HF_HUB_OFFLINE work.
    Raises UserError as `fetch`.
    """
    return fetch(f"sd-vae-ft-{kind}")


def fetch(name):
    """The Path of a file of the table (of a VAE, its folder), fetched where it is missing, checked as said above.

    Raises UserError where the name is unknown, the file cannot be fetched, what came is not the file of the table
    (nothing is left of it outside the Hub's cache), or a file that was there is not (it is left alone).
    """
    paths = [_fetch_from_hub(file) if file.hub else _fetch_from_url(file) for file in _files(name)]
    return paths[0] if len(paths) == 1 else paths[0].parent


def check(file, hashed=False):
    """Compares a file that is there with the table. Returns its SHA-256 where that was computed, else None.

    hashed: compute it whatever the size.
    Raises UserError where the size or the SHA-256 is another, or the file cannot be read; it is left alone.
    """
    path = file.path
    # The Hub's cache holds links; a new fetch would link the same wrong content again, so all of it has to go.
    away = path.parents[2] if file.hub else path
    way_out = f"it was left as it is; move {away} away, then python download.py {file.name}"
    if not path.is_file():
        raise UserError(f"{path} is there but is not a file: {way_out}")
    try:
        size = path.stat().st_size
        if file.size not in (None, size):
            raise UserError(f"{path} has {size} bytes, the released file has {file.size}: {way_out}")
        if size > HASHED_AT_EACH_USE and not hashed:
            return None
        digest = hashlib.sha256()
        with path.open("rb") as opened:
            while block := opened.read(BLOCK):
                digest.update(block)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; make it readable, or move it away") from error
    actual, expected = digest.hexdigest(), _expected_sha256(file)
    if expected not in (None, actual):
        source = "the released file has" if file.sha256 else f"{file.remembered} says"
        raise UserError(f"{path} has SHA-256 {actual}, {source} {expected}: {way_out}")
    return actual


def _files(name):
    """The files a name stands for; raises UserError where there are none."""
    files = [file for file in FILES if file.name == name]
    if not files:
        raise UserError(f"nothing is known of a file {name}: the names are {', '.join(names())}")
    return files


def _is_there(file):
    # A link that points nowhere is something of the user's, too.
    return os.path.lexists(file.path)


def _expected_sha256(file):
    """The published SHA-256, else that of the first fetch, else None. Raises UserError where it cannot be read."""
    if file.sha256:
        return file.sha256
    try:
        written = file.remembered.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file.remembered} ({error}): make it readable, or move it away") from error
    match = re.match(r"[0-9a-f]{64}\b", written)
    if not match:
        raise UserError(f"{file.remembered} does not start with a SHA-256 (64 hex digits): move it away")
    return match[0]


def _fetch_from_hub(file):
    if _is_there(file):
        check(file)
        return file.path
    _announce(file)
    import huggingface_hub
    from huggingface_hub.utils import logging

    repo, revision, filename = file.hub
    # The client tries again for half a minute and logs each time; we say it once, when it has given up.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        huggingface_hub.hf_hub_download(repo, filename, revision=revision)
    except Exception as error:
        # The client lets through what its transports raise, and these share no class of their own;
        # the cause of its own "not in the cache" is what went wrong.
        raise _cannot_fetch(file, error.__cause__ or error) from error
    finally:
        logging.set_verbosity(verbosity)
    check(file, hashed=True)
    return file.path


def _fetch_from_url(file):
    path = file.path
    if _is_there(file):
        check(file)
        return path
    _announce(file)
    with written_whole(path) as part:
        actual = _stream(file, part)
        if _is_there(file):
            # It came from elsewhere in the meantime: replace it only by the same.
            check(file, hashed=True)
        if _expected_sha256(file) is None:
            with written_whole(file.remembered) as memory:
                memory.write_text(f"{actual}  {file.name}\n")  # as `sha256sum -c` reads it
            print(f"{file.name}: no SHA-256 is published; what came has {actual}, kept in {file.remembered}")
    return path


def _stream(file, part):
    """Writes what `file.url` sends to the path `part` and returns its SHA-256.

    Raises UserError where it is not all of the file, or another.
    """
    digest, received = hashlib.sha256(), 0
    expected = _expected_sha256(file)
    from tqdm import tqdm

    with _network(file):
        request = urllib.request.Request(file.url, headers={"User-Agent": "learning-to-cache-dit"})
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    with response:
        offered = response.length  # None where the server does not say
        size = file.size or offered
        if size is None:
            raise _cannot_fetch(file, "the server does not say how large it is, so a cut would go unseen")
        if offered not in (None, size):
            raise _cannot_fetch(file, f"the server offers {offered} bytes, the released file has {size}")
        # disable=None: a bar on a terminal, nothing in a log
        bar = tqdm(total=size, desc=file.name, unit="B", unit_scale=True, disable=None)
        with part.open("wb") as written, bar:
            while received <= size:
                with _network(file):
                    block = response.read(BLOCK)
                if not block:
                    break
                written.write(block)
                digest.update(block)
                received += len(block)
                bar.update(len(block))
    if received != size:
        raise _cannot_fetch(file, f"{received} bytes came where {size} belong")
    actual = digest.hexdigest()
    if expected not in (None, actual):
        if file.sha256:
            raise _cannot_fetch(file, f"what came has SHA-256 {actual}, the released file has {expected}")
        raise UserError(
            f"{file.url} sends a file with SHA-256 {actual}, {file.remembered} says {expected}; it was not kept: "
            f"move {file.remembered} away to accept it"
        )
    return actual


@contextlib.contextmanager
def _network(file):
    """Turns faults of the network into a UserError, before `written_whole` takes an OSError for one of the disk."""
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        raise _cannot_fetch(file, error) from error


def _cannot_fetch(file, reason):
    if type(reason) is urllib.error.URLError:
        reason = reason.reason  # its own text wraps this one in brackets
    if isinstance(reason, BaseException):
        reason = str(reason).strip().partition("\n")[0] or type(reason).__name__
    return UserError(f"cannot fetch {file.url} ({reason}): download it elsewhere and put it at {file.path}")


def _announce(file):
    print(f"fetching {file.url} ({_amount(file.size)}, licence: {file.licence}) to {_shown(file.path)}", flush=True)


def _amount(size):
    """Bytes as a person reads them, in powers of 1000."""
    if size is None:
        return "size unknown"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} B"


def _shown(path):
    """The path, seen from the repository where it lies in it."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def parse_args(argv=None):
    parser = cli.ArgumentParser(
        description=__doc__,
        positional="[NAME ...]",
        epilog=f"NAME is one of: {', '.join(names())}.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", default="all", help="files to fetch, list or check")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="show each file, and whether it is there; fetch nothing")
    action.add_argument("--check", action="store_true", help="hash the files that are there; fetch nothing")
    args = parser.parse_args(argv)
    args.names = names() if args.names == "all" else list(dict.fromkeys(args.names))
    unknown = [name for name in args.names if name not in names()]
    if unknown:
        parser.error(f"unknown NAME {', '.join(unknown)}: choose from {', '.join(names())}")
    return args


def main(args):
    chosen = [file for file in FILES if file.name in args.names]
    if args.list:
        print_list(chosen)
    elif args.check:
        check_all(chosen)
    else:
        absent = [file for file in chosen if not _is_there(file)]
        known = sum(file.size or 0 for file in absent)
        unknown = sum(file.size is None for file in absent)
        print(f"to fetch: {len(absent)} of {len(chosen)} files, {_amount(known)}", end="")
        print(f" and {unknown} of unknown size (see --list)" if unknown else "", flush=True)
        for name in args.names:
            print(f"{name}: {_shown(fetch(name))}", flush=True)


def print_list(chosen):
    """Prints a table of the files; looks at their sizes only."""
    rows = [("name", "size", "there", "licence", "destination")]
    for file in chosen:
        there = "no"
        if _is_there(file):
            right = file.path.is_file() and file.size in (None, file.path.stat().st_size)
            there = "yes" if right else "wrong"
        rows.append((file.name, _amount(file.size), there, file.licence, str(_shown(file.path))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def check_all(chosen):
    """Hashes the files that are there, one line each. Raises UserError where any is wrong, after all were seen."""
    faults = []
    for file in chosen:
        shown = _shown(file.path)
        if not _is_there(file):
            print(f"{shown}: not there")
            continue
        try:
            actual = check(file, hashed=True)
        except UserError as error:
            faults.append(str(error))
            print(f"{shown}: wrong", flush=True)
        else:
            verdict = "right" if _expected_sha256(file) else "no SHA-256 known to compare with"
            print(f"{shown}: {verdict}, SHA-256 {actual}", flush=True)
    if faults:
        raise UserError("; ".join(faults))


if __name__ == "__main__":
    cli.run(main, parse_args())
