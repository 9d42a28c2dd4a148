"""Files of the user: written whole or not at all, and read without running code from them."""

import contextlib
import errno
import os
import re
import secrets
import stat
import warnings
import zipfile
from pathlib import Path

from runtime.errors import UserError, first_line
from runtime.memory import out_of_memory


def _temporary_beside(path):
    """Make an empty temporary file in the folder of `path`, and that folder; return its path.

    It is called .NAME.NUMBER.part. NAME is cut off if that would have more than 255 bytes. The file can be read and
    written by those who could read and write the one at `path`, if there is one.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = None
        with contextlib.suppress(FileNotFoundError):
            mode = path.stat().st_mode  # also raises OSError if the name is too long
            if not stat.S_ISREG(mode):
                raise FileExistsError(errno.EEXIST, "it exists and is not a file", str(path))
            if not os.access(path, os.W_OK):  # a rename would replace it
                raise PermissionError(errno.EACCES, "it is write-protected", str(path))
        ending = f".{secrets.token_hex(4)}.part"
        name = os.fsdecode(os.fsencode(path.name)[: 255 - 1 - len(ending)])
        part = path.with_name(f".{name}{ending}")
        file = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)  # less the user's umask
        if mode is not None:
            with contextlib.suppress(OSError):  # a file system without permissions
                os.fchmod(file, mode & 0o777 | 0o600)
        os.close(file)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another place") from error
    return part


def check_writable(path):
    """Raise UserError if `path` cannot be written; for use before the work whose result goes there."""
    _temporary_beside(Path(os.path.realpath(path))).unlink()


def check_outputs(outputs, inputs):
    """Raise UserError if a file to be written cannot be, or is also read, or written by another flag; before the work.

    Nor may it replace the config.json of a model. outputs, inputs: {flag: its path, or None}.
    """
    flags = {os.path.realpath(path): flag for flag, path in inputs.items() if path}
    for flag, path in outputs.items():
        if path:
            check_writable(path)
            if os.path.basename(path) == "config.json" and os.path.exists(path):
                raise UserError(f"{flag} {path} would replace a file that describes a model: name another one")
            other = flags.setdefault(os.path.realpath(path), flag)
            if other != flag:
                raise UserError(f"{flag} {path} is the file of {other} too: name another one")


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path` that replaces `path` if the block ends without an error.

    Whatever interrupts the block, `path` is either complete or as before. Missing folders are made. Raises UserError
    if the file cannot be written: every OSError of the block counts as that.
    """
    path = Path(os.path.realpath(path))  # a link stays, its target is written
    part = _temporary_beside(path)
    try:
        yield part
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; nothing was left there") from error
    finally:
        part.unlink(missing_ok=True)


def lock_file(path, patience):
    """Lock the file at `path`; the system releases the lock when this process ends, even if it is killed.

    patience: seconds to wait for another process that holds it; -1 waits for ever. Returns the lock, or None after that
    time. Raises OSError if the file cannot be locked.
    """
    from filelock import FileLock, SoftFileLock, Timeout

    lock = FileLock(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lock.acquire(timeout=patience)
    except Timeout:
        return None
    except NotImplementedError as error:
        raise OSError(errno.ENOLCK, "its file system has no locks") from error
    if isinstance(lock, SoftFileLock):  # the fallback of newer versions would outlive a killed process
        lock.release()
        raise OSError(errno.ENOLCK, "its file system has no locks")
    return lock


# What lies in the place of a checkpoint if a download went wrong: {first bytes: what it is, and the way out}.
IMPOSTORS = {
    b"version https://git-lfs": "is a Git LFS pointer and not the file itself: run git lfs pull, or download the file",
    b"<": "is a web page (HTML or XML) and no checkpoint: download the file itself",
    b"{": "is JSON and no checkpoint: name the file of the weights",
    b"\x1f\x8b": "is compressed with gzip: unpack it",
}


def load_tensors(path, allow=()):
    """Load a file of `torch.save` or safetensors on the CPU: tensors, plain types and the classes in `allow`.

    Safetensors are known by their content, whatever the name. Training scripts also save objects of NumPy and pathlib:
    scalars become Python's numbers, arrays and paths become objects without a value.
    Raises UserError if the file is missing, cut off, claims more bytes than it has, does not fit into memory, or holds
    any other object (which is not run).
    """
    import pickle

    import torch
    from safetensors.torch import load

    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file in it")
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
        if head[8:9] == b"{":
            return load(path.read_bytes())  # not mapped: if a mapped file is cut off later, the process dies
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(member.file_size for member in archive.infolist()) > size:  # torch.save does not compress
                    raise ValueError("its parts are larger than the file")
        else:
            _refuse_impostor(path, head)
        with warnings.catch_warnings(), torch.serialization.safe_globals([*allow, *_stand_ins()]):
            warnings.simplefilter("ignore")  # about unusual pickles, which our message covers
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        _check_tensors(loaded, size)
        return loaded
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise UserError(
                f"{path} holds {refused[1]}, which could run code, so it was not loaded: save only the tensors of a "
                "file that you trust, with torch.save(model.state_dict(), FILE)"
            ) from error
        raise UserError(
            f"{path} is not a checkpoint of tensors, or holds objects that could run code; it was not loaded: "
            "get the file from its source again, or save only its tensors"
        ) from error
    except Exception as error:  # damaged bytes make the unpickler raise anything
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"cannot read {path}: {error.strerror}; make it readable, or name another") from error
        if out_of_memory(error):
            raise UserError(f"{path} needs more memory than there is: it is damaged, or too large") from error
        reason = f"{path} cannot be read ({first_line(error)})"
        raise UserError(f"{reason}: it is cut off or no checkpoint; fetch it again") from error


def _refuse_impostor(path, head):
    """Raise UserError if the first bytes of a file show what it is instead of a checkpoint."""
    if not head:
        raise UserError(f"{path} is empty: fetch it again")
    for first, text in IMPOSTORS.items():
        if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(first):
            raise UserError(f"{path} {text}")


class _Inert:
    """Takes the place of an object whose value nobody needs."""

    def __init__(self, *values):
        self.values = values

    def __setstate__(self, state):
        self.state = state


def _number(dtype, content):
    """The Python value of a pickled NumPy scalar, without NumPy's unpickling: its types can claim any size."""
    import numpy as np

    (code, *_), (_, order, *_) = dtype.values, dtype.state
    if not re.fullmatch(r"[biufcUS]\d+", code):
        raise ValueError(f"it holds a NumPy scalar of type {code}")
    return np.frombuffer(content, order + code)[0].item()


def _stand_ins():
    """What the unpickler may use in place of classes and functions of others, as (stand-in, name) for safe_globals."""
    names = {"numpy.dtype": _Inert, "numpy.ndarray": _Inert, "torch.torch_version.TorchVersion": _Inert}
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # of NumPy 1 and 2
        names |= {f"{module}.scalar": _number, f"{module}._reconstruct": _Inert}
    for module in ("pathlib", "pathlib._local"):  # the second is Python 3.13's
        names |= {f"{module}.{kind}{system}Path": _Inert for kind in ("", "Pure") for system in ("Posix", "Windows")}
    return [(stand_in, name) for name, stand_in in names.items()]


def named_tensors(loaded):
    """The tensors in nested dicts by their names, joined by dots: {"ema": {"x": ...}} has "ema.x"."""
    import torch

    found, waiting, seen = {}, [("", loaded)], set()
    for name, value in waiting:  # grows
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict) and id(value) not in seen:
            seen.add(id(value))
            waiting += [(f"{name}.{key}" if name else key, part) for key, part in value.items() if isinstance(key, str)]
    return found


def mismatch(found, expected):
    """Describe how the tensors of a file differ from the expected ones, both {name: shape}; "" if they do not."""
    kinds = {
        "missing tensors": [name for name in expected if name not in found],
        "unknown tensors": [name for name in found if name not in expected],
        "tensors of another shape": [
            f"{name} {tuple(found[name])} and not {tuple(expected[name])}"
            for name in expected
            if name in found and found[name] != expected[name]
        ],
    }
    first = {kind: names[0] + (" first" if len(names) > 1 else "") for kind, names in kinds.items() if names}
    return ", ".join(f"{kind}: {len(kinds[kind])} ({first[kind]})" for kind in first)


def _check_tensors(loaded, size):
    """Raise ValueError if a tensor in nested dicts, lists and tuples has more than `size` bytes, or is not plain.

    A view of a few bytes can have any shape, and results computed from it take the memory of that shape.
    """
    import torch

    waiting, seen = [loaded], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise ValueError("it holds a tensor that is sparse, quantised or without values")
            if value.numel() * value.element_size() > size:
                raise ValueError(f"it holds a tensor {tuple(value.shape)}, of more bytes than the file")
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
