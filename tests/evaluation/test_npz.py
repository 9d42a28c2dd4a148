"""Reading and writing .npz files in parts, against NumPy's own reader and writer."""

import io
import zipfile

import numpy as np
import pytest

from evaluation.npz import read_arrays, read_parts, write_npz

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "arr_0": RANDOM.integers(0, 256, (11, 3, 3, 2), dtype=np.uint8),
    "labels": RANDOM.integers(0, 9, 11),
    "scores": RANDOM.standard_normal((2, 5), dtype=np.float32).T,  # not contiguous
    "manifest": np.array('{"text": "é"}'),
}


def test_numpy_reads_arrays_that_were_written_whole_or_in_parts(tmp_path):
    parts = ARRAYS["arr_0"].shape, np.uint8, (ARRAYS["arr_0"][i : i + 4] for i in range(0, 11, 4))
    write_npz(tmp_path / "parts.npz", **(ARRAYS | {"arr_0": parts}))
    write_npz(tmp_path / "whole.npz", **ARRAYS)
    with np.load(tmp_path / "parts.npz", allow_pickle=False) as read:
        assert read.files == list(ARRAYS)
        for name, value in ARRAYS.items():
            assert read[name].dtype == value.dtype and np.array_equal(read[name], value)
    assert (tmp_path / "parts.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


@pytest.mark.parametrize("parts", [[np.zeros((2, 3))], [np.zeros((4, 3))] * 2, [np.zeros((4, 3), np.float32)]])
def test_parts_of_another_shape_or_dtype_are_refused(parts):
    with pytest.raises(ValueError, match="part"):
        write_npz(io.BytesIO(), a=((4, 3), np.float64, parts))


@pytest.mark.parametrize(
    "header, claimed, words",
    [
        *[({"shape": shape}, None, "mu") for shape in ((1 << 40,), (-2, -3), (2, 2), ())],
        ({"descr": "|O"}, None, "plain values"),
        ({"shape": (1 << 28,)}, 8 << 28, "claims more bytes than the file has"),
    ],
)
def test_a_wrong_header_is_refused_before_memory_is_taken(tmp_path, monkeypatch, header, claimed, words):
    """An .npz of six numbers with another header; claimed: the bytes of values that the archive claims to have."""
    path, made = tmp_path / "a.npz", io.BytesIO()
    np.lib.format.write_array_header_1_0(made, {"descr": "<f8", "fortran_order": False, "shape": (6,)} | header)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mu.npy", made.getvalue() + bytes(48))
    if claimed:
        content = bytearray(path.read_bytes())
        at = content.index(b"PK\1\2") + 20
        content[at : at + 8] = 2 * (made.tell() + claimed).to_bytes(4, "little")
        path.write_bytes(content)
    monkeypatch.setattr(np, "load", None)  # it would take the memory
    for read in (lambda: read_arrays(path, ["mu"]), lambda: next(read_parts(path, "mu", 1 << 28))):
        with pytest.raises(ValueError, match=words):
            read()


def test_an_array_in_fortran_order_has_no_parts(tmp_path):
    np.savez(tmp_path / "a.npz", columns=np.asfortranarray(np.ones((2, 3))))
    with pytest.raises(ValueError, match="C order"):
        list(read_parts(tmp_path / "a.npz", "columns", 1))
