"""Arrays in .npz files that may be larger than memory: written and read in parts. Imports no torch."""

import contextlib
import os
import zipfile
from math import prod

import numpy as np


def write_npz(file, **arrays):
    """Write an uncompressed .npz to `file`, a path or a file open for writing. Equal arrays give equal bytes.

    arrays: name to an array, or to (shape, dtype, parts); parts is an iterable of arrays that follow one another in
    memory order, and only one of them is held at a time.
    Raises ValueError if the parts do not have that dtype or together that shape.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, value in arrays.items():
            shape, dtype, parts = value if isinstance(value, tuple) else (value.shape, value.dtype, [value])
            dtype, written = np.dtype(dtype), 0
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
            # A name instead of a ZipInfo would add the present date.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for part in parts:
                    if part.dtype != dtype:
                        raise ValueError(f"a part of {name} is {part.dtype}, not {dtype}")
                    member.write(np.ascontiguousarray(part).data)
                    written += part.size
            if written != prod(shape):
                raise ValueError(f"the parts of {name} have {written} values, but shape {shape} has {prod(shape)}")


def read_header(path, name):
    """Shape and dtype of the array `name` of the .npz at `path`. Raises as `read_parts`."""
    with _opened(path, name) as (_, shape, dtype):
        return shape, dtype


def read_parts(path, name, rows):
    """Yield the array `name` of the .npz at `path`, `rows` entries of its first axis at a time.

    Raises what zipfile and NumPy raise if the file is damaged; the checksum is compared after the last part.
    """
    with _opened(path, name) as (member, shape, dtype):
        for start in range(0, shape[0], rows):
            part = (min(rows, shape[0] - start), *shape[1:])
            size = prod(part) * dtype.itemsize
            data = member.read(size)
            if len(data) != size:
                raise ValueError(f"{name} of {path} is cut off")
            yield np.frombuffer(data, dtype).reshape(part)


def read_arrays(path, names):
    """Read those of `names` that the .npz at `path` holds: a dict of arrays, and the names of all its arrays.

    Raises what zipfile and NumPy raise if the file is damaged, before memory is taken for values that it does not have.
    """
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.filename.removesuffix(".npy") in names:
                with archive.open(info) as member:
                    _read_header(path, info, member)
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in names if name in arrays.files}, arrays.files


@contextlib.contextmanager
def _opened(path, name):
    """Yield the open file of an array in C order, at its first value, and the array's shape and dtype."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        shape, fortran_order, dtype = _read_header(path, archive.getinfo(f"{name}.npy"), member)
        if fortran_order or not shape:
            raise ValueError(f"{name} of {path} is not an array in C order")
        yield member, shape, dtype


def _read_header(path, info, member):
    """Shape, order and dtype of the array in `member`. Raises ValueError if the file has too few bytes for it."""
    # Deflate expands a byte to at most 1032.
    if info.file_size > os.path.getsize(path) * (1 if info.compress_type == zipfile.ZIP_STORED else 1032):
        raise ValueError(f"{info.filename} of {path} is cut off: its header claims more bytes than the file has")
    version = np.lib.format.read_magic(member)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"{info.filename} of {path} has version {version}, not 1.0 or 2.0")
    shape, fortran_order, dtype = read[version](member)
    if dtype.hasobject:
        raise ValueError(f"{info.filename} of {path} is not an array of plain values")
    if min(shape, default=0) < 0 or prod(shape) * dtype.itemsize != info.file_size - member.tell():
        raise ValueError(f"{info.filename} of {path} is cut off, or not an array {shape}")
    return shape, fortran_order, dtype
