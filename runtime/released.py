"""The released files: where each is, how large, which SHA-256, under which licence; fetched and checked when used."""

import errno
import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from runtime import fetching
from runtime.errors import UserError
from runtime.fetching import amount
from runtime.files import atomic_write

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)  # its faults, not the network's
ROOT = Path(__file__).resolve().parent.parent  # destinations are relative to it
PLAIN = re.compile(r"(?!\.+$)[\w.+-]+", re.ASCII)  # the name of a file or folder that leads nowhere else
# Without a user or a query; after the host anything printable but # and ?.
MIRROR = re.compile(r'https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?(/[!"$->@-~]*)?', re.ASCII)
MIRROR_RULE = "give the address of a folder, as http://HOST/FOLDER or https://HOST/FOLDER"


@dataclass(frozen=True)
class File:
    """One file from outside. `name` is what a user types; the two files of a VAE share theirs.

    size: bytes, or None where nobody states it.    sha256: 64 hex digits, or None.
    folder: where it lies under ROOT; or, for a file in the cache of the Hugging Face Hub,
    hub: its repository, revision (a full commit, so what comes cannot change) and file name there.
    Raises ValueError where one of them could lead to another place than below ROOT or that cache.
    """

    name: str
    url: str
    size: int | None
    sha256: str | None
    licence: str
    folder: str = ""
    hub: tuple[str, str, str] | None = None

    def __post_init__(self):
        parts = [self.name]
        for path in [*([self.folder] if self.folder else []), *(self.hub or [])]:
            parts += path.split("/")
        for part in parts:
            if not PLAIN.fullmatch(part):
                raise ValueError(f"{part!r}, for file {self.name!r}, is no plain name: use letters, digits and _.+-")

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
    def pin(self):
        """The file beside it that keeps the SHA-256 of its first use, where none is published."""
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
    (`ckpt/DDIM20_router.pt`). A file of one's own in that place is returned too, after a line that says so.
    Raises UserError where there is no such file or it cannot be fetched.
    """
    path = Path(path)
    if path.exists():
        for file in FILES:
            if not file.hub and file.path.resolve() == path.resolve():
                try:
                    check(file)
                except UserError as error:
                    print(f"warning: {path} is used, but it is not the released file: {error}", file=sys.stderr)
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


def fetch(name, mirror=None):
    """The Path of a file of the table (of a VAE, its folder), fetched where it is missing, checked as said above.

    mirror: the URL of a folder that has the files by their names (the VAEs not), instead of their own sources; None
    is $L2C_MIRROR, where that is set.
    Raises UserError where the name is unknown, the file cannot be fetched, what came is not the file of the table,
    or a file that was there is not (it is left alone).
    """
    files = _files(name)
    for file in files:
        if not is_there(file):
            from huggingface_hub import constants

            if constants.HF_HUB_OFFLINE:
                raise _cannot_fetch(file, file.url, "HF_HUB_OFFLINE is set, so nobody is asked")
            if file.hub:
                _fetch_from_hub(file)
            else:
                _fetch_from_url(file, mirror)
        check(file)
    return files[0].path if len(files) == 1 else files[0].path.parent


def check(file, hashed=False):
    """Compares a file that is there with the table, and returns its SHA-256.

    hashed: compute it even where it is remembered, with the size and time that the file still has.
    Raises UserError where the size or the SHA-256 is another, or the file cannot be read; it is left alone.
    """
    path = file.path
    # The Hub's cache holds links; a new fetch would link the same wrong content again, so all of it has to go.
    away = path.parents[2] if file.hub else path
    way_out = f"it was left as it is; move {away} away, then python download.py {file.name}"
    if not path.is_file():
        raise UserError(f"{path} is there but is not a file: {way_out}")
    expected = expected_sha256(file)
    try:
        stat = path.stat()
        if file.size not in (None, stat.st_size):
            raise UserError(f"{path} has {stat.st_size} bytes, the released file has {file.size}: {way_out}")
        actual = known = _memory().get(str(path), {}).get(_state(stat))
        if hashed or known is None or known != expected:
            digest = hashlib.sha256()
            with path.open("rb") as opened:
                while block := opened.read(fetching.BLOCK):
                    digest.update(block)
            actual = digest.hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; make it readable, or move it away") from error
    if expected not in (None, actual):
        source = "the released file has" if file.sha256 else f"{file.pin} says"
        raise UserError(f"{path} has SHA-256 {actual}, {source} {expected}: {way_out}")
    if actual != known:
        _remember(path, stat, actual)
    if expected is None:
        _pin(file, actual)
    return actual


def _files(name):
    """The files a name stands for; raises UserError where there are none."""
    files = [file for file in FILES if file.name == name]
    if not files:
        raise UserError(f"nothing is known of a file {name}: the names are {', '.join(names())}")
    return files


def is_there(file):
    # A link that points nowhere is something of the user's, too.
    return os.path.lexists(file.path)


def expected_sha256(file):
    """The published SHA-256, else that of the first use, else None. Raises UserError where it cannot be read."""
    if file.sha256:
        return file.sha256
    try:
        written = file.pin.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file.pin} ({error}): make it readable, or move it away") from error
    match = re.match(r"[0-9a-f]{64}\b", written)
    if not match:
        raise UserError(f"{file.pin} does not start with a SHA-256 (64 hex digits): move it away")
    return match[0]


def _pin(file, actual):
    """Keeps the SHA-256 of a file for which none is published, to be compared from now on."""
    try:
        with atomic_write(file.pin) as part:
            part.write_text(f"{actual}  {file.name}\n")  # as `sha256sum -c` reads it
        kept = f"kept in {file.pin}"
    except UserError as error:
        kept = f"not kept: {error}"
    print(f"{file.name}: no SHA-256 is published; this one has {actual}, {kept}", flush=True)


def _memory_file():
    return ROOT / "pretrained_models" / ".hashed.json"


def _memory():
    """What was hashed: {path: {size and time: SHA-256}}; empty where that is lost, so that all is hashed again."""
    try:
        memory = json.loads(_memory_file().read_text())
        return memory if all(isinstance(entry, dict) for entry in memory.values()) else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _state(stat):
    return f"{stat.st_size} bytes, {stat.st_mtime_ns} ns"


def _remember(path, stat, sha256):
    """Spares the next uses of a file the time to hash it."""
    try:
        with atomic_write(_memory_file()) as part:
            part.write_text(json.dumps(_memory() | {str(path): {_state(stat): sha256}}, indent=1))
    except UserError:
        pass  # it cannot be written: the file is hashed at each use


def _fetch_from_hub(file):
    _begin(file, file.url)
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
        if isinstance(error, OSError) and error.errno in DISK:
            raise UserError(
                f"cannot write {error.filename or file.path}: {error.strerror}; make room, or make it writable, or set "
                "HF_HOME to another folder; then the same command goes on"
            ) from error
        raise _cannot_fetch(file, file.url, fetching.reason(error.__cause__ or error)) from error
    finally:
        logging.set_verbosity(verbosity)


def _fetch_from_url(file, mirror):
    mirror = mirror or os.environ.get("L2C_MIRROR")
    if mirror and not MIRROR.fullmatch(mirror):
        raise UserError(f"L2C_MIRROR is {mirror}: {MIRROR_RULE}")
    url = f"{mirror.rstrip('/')}/{file.name}" if mirror else file.url
    path, expected = file.path, expected_sha256(file)
    with fetching.alone(path) as part:
        if is_there(file):
            return  # another process has brought it
        _begin(file, url)
        try:
            actual = fetching.fetch(url, path, part, file.size, expected)
        except fetching.Rejected as error:
            if file.sha256:
                raise _cannot_fetch(file, url, error) from error
            raise UserError(
                f"{url} sends another file than at first ({error}): to take it, move {file.pin} away"
            ) from error
        except fetching.Failed as error:
            raise _cannot_fetch(file, url, error) from error
        if actual:  # else something else lies there by now
            _remember(path, path.stat(), actual)
            if expected is None:
                _pin(file, actual)


def _cannot_fetch(file, url, reason):
    elsewhere = "it" if url == file.url else file.url
    return UserError(f"cannot fetch {url} ({reason}): download {elsewhere} elsewhere and put it at {file.path}")


def _begin(file, url):
    """Says what will be fetched. Raises UserError where there is no room for it."""
    (free,) = fetching.room({file.path: to_come(file)}).values()
    print(
        f"fetching {url} ({amount(file.size)}, licence: {file.licence}) to {shown(file.path)} ({amount(free)} free)",
        flush=True,
    )


def to_come(file):
    """Bytes, as far as they are known."""
    return max((file.size or 0) - fetching.begun(file.path), 0)


def shown(path):
    """The path, seen from the repository where it lies in it."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
