"""Files of the user: written whole or not at all, and read without running code from them."""

import contextlib
import errno
import os
import secrets
import warnings
import zipfile
from pathlib import Path

from runtime.errors import UserError, first_line
from runtime.memory import out_of_memory


def _temporary_beside(path):
    """Make an empty temporary file in the folder of `path`, and that folder; return its path."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise FileExistsError(errno.EEXIST, "it exists and is not a file", str(path))
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # less the user's umask
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another place") from error
    return part


def check_writable(path):
    """Raise UserError if `path` cannot be written; for use before the work whose result goes there."""
    _temporary_beside(Path(path).resolve()).unlink()


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path` that replaces `path` if the block ends without an error.

    Whatever interrupts the block, `path` is either complete or as before. Missing folders are made. Raises UserError
    if the file cannot be written: every OSError of the block counts as that.
    """
    path = Path(path).resolve()  # a link stays, its target is written
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


def load_tensors(path, allow=()):
    """Load a file of `torch.save` or safetensors on the CPU: tensors, plain types and the classes in `allow`.

    Raises UserError if the file is missing, cut off, claims more bytes than it has, does not fit into memory, or holds
    any other object (which is not run).
    """
    import pickle

    import torch
    from safetensors.torch import load

    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            return load(path.read_bytes())  # not mapped: if a mapped file is cut off later, the process dies
        size = path.stat().st_size
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(member.file_size for member in archive.infolist()) > size:  # torch.save does not compress
                    raise ValueError("its parts are larger than the file")
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(allow)):
            warnings.simplefilter("ignore")  # about unusual pickles, which our message covers
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        _check_tensors(loaded, size)
        return loaded
    except pickle.UnpicklingError as error:
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
