"""The user's files: written whole or not at all, read without running what is in them.

What is wrong with a file is raised as `UserError`, which the programs print as one line (`cli.py`).
"""

import contextlib
import os
import tempfile
import warnings
import zipfile
from pathlib import Path

from runtime.errors import UserError
from runtime.memory import out_of_memory

# It can only be asked for by setting it, which threads must not do at the same time.
UMASK = os.umask(0)
os.umask(UMASK)


def _temporary_beside(path):
    """An empty temporary file in the folder of `path`, which is made if needed. Raises UserError where it cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise FileExistsError(17, "it is there and is no file", str(path))
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another place") from error
    os.close(handle)
    return Path(name)


def check_writable(path):
    """Raises UserError where `path` could not be written, before work is spent on what goes there."""
    _temporary_beside(Path(path).resolve()).unlink()


@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path beside `path`, which becomes `path` when the block ends without an error.

    Whatever interrupts the block, `path` is either what it was or complete. Missing folders are made.
    Raises UserError where the place cannot be written; whatever else the block raises must not be an OSError.
    """
    path = Path(path).resolve()  # what a link points to is written, the link stays
    part = _temporary_beside(path)
    try:
        yield part
        # mkstemp makes files that only their owner reads; what we leave follows the user's umask.
        part.chmod(0o666 & ~UMASK)
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; nothing was left there") from error
    finally:
        part.unlink(missing_ok=True)


def lock_file(path, patience):
    """A lock on the file at `path`, which the system drops with this process, even one that is killed.

    patience: seconds to wait where another process holds it, then None is returned; -1 waits for ever.
    Raises OSError where there can be none.
    """
    import errno

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
    if isinstance(lock, SoftFileLock):  # what newer versions fall back to; it would outlive a process that is killed
        lock.release()
        raise OSError(errno.ENOLCK, "its file system has no locks")
    return lock


def load_tensors(path, allow=()):
    """What `torch.save` or safetensors wrote to `path`, on the CPU: tensors, plain types and `allow`ed classes.

    Raises UserError where there is no such file, it is cut off, says to hold more than its bytes, does not fit into
    memory, or holds anything else (it is not run).
    """
    import pickle

    import torch
    from safetensors.torch import load

    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            # Not mapped: a map of a file that is cut off later kills the process.
            return load(path.read_bytes())
        size = path.stat().st_size
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(member.file_size for member in archive.infolist()) > size:  # torch.save does not compress
                    raise ValueError("its parts are larger than the file")
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(allow)):
            warnings.simplefilter("ignore")  # about unusual pickles: our one line says it
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        _check_tensors(loaded, size)
        return loaded
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not a checkpoint of tensors, or holds objects that could run code; it was not loaded: "
            "take the file from its source again, or save its tensors alone"
        ) from error
    except Exception as error:  # what a damaged stream makes the unpickler raise is anything
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"cannot read {path}: {error.strerror}; make it readable, or name another") from error
        if out_of_memory(error):
            raise UserError(f"{path} needs more memory than there is: it is damaged, or too large for here") from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read ({reason}): it is cut off or no checkpoint; fetch it again") from error


def _check_tensors(loaded, size):
    """Raises ValueError where a tensor in nested dicts, lists and tuples is more than so many bytes, or is not plain.

    A view of few bytes may be of any shape, and what is computed from it takes the memory of that.
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
