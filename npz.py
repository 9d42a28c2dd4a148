"""Arrays in .npz files that may be larger than memory: written from parts, read in parts. Knows no torch."""

import zipfile
from math import prod

import numpy as np


def write_npz(file, **arrays):
    """Writes an uncompressed .npz to `file`, a path or a file open for writing.

    arrays: name to an array, or to (shape, dtype, parts) whose parts, an iterable of arrays, make it up one after the
    other; no more than one of them is held. The same arrays make the same bytes.
    Raises ValueError where the parts are not what shape and dtype say.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, value in arrays.items():
            shape, dtype, parts = value if isinstance(value, tuple) else (value.shape, value.dtype, [value])
            dtype = np.dtype(dtype)
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
            # A ZipInfo of its own has a fixed date.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                written = 0
                for part in parts:
                    if part.dtype != dtype:
                        raise ValueError(f"a part of {name} is {part.dtype}, not {dtype}")
                    member.write(np.ascontiguousarray(part).data)
                    written += part.size
            if written != prod(shape):
                raise ValueError(f"the parts of {name} have {written} values, {prod(shape)} belong to {shape}")


def read_header(path, name):
    """Shape and dtype of the array `name` of the .npz at `path`; what it raises is as for `read_parts`."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        return _read_header(path, name, member)


def read_parts(path, name, rows):
    """The array `name` of the .npz at `path`, `rows` of its first axis at a time; a generator of arrays.

    Raises what zipfile and NumPy raise where the file is damaged; its checksum is looked at with the last part.
    """
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        shape, dtype = _read_header(path, name, member)
        for start in range(0, shape[0], rows):
            part = (min(rows, shape[0] - start), *shape[1:])
            size = prod(part) * dtype.itemsize
            data = member.read(size)
            if len(data) != size:
                raise ValueError(f"{name} of {path} is cut off")
            yield np.frombuffer(data, dtype).reshape(part)


def _read_header(path, name, member):
    version = np.lib.format.read_magic(member)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran_order, dtype = read[version](member)
    if fortran_order or dtype.hasobject or not shape:
        raise ValueError(f"{name} of {path} is not an array of plain values in C order")
    return shape, dtype
