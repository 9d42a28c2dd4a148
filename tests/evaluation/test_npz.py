"""npz.py against NumPy's own reader and writer."""

import io
import zipfile

import numpy as np
import pytest

from evaluation.npz import read_arrays, read_parts, write_npz


def arrays():
    random = np.random.default_rng(0)
    return {
        "arr_0": random.integers(0, 256, (11, 3, 3, 2), dtype=np.uint8),
        "labels": random.integers(0, 9, 11),
        "scores": random.standard_normal((2, 5), dtype=np.float32).T,  # not contiguous
        "manifest": np.array('{"text": "é"}'),
    }


def test_numpy_reads_what_is_written_whole_or_in_parts(tmp_path):
    given = arrays()
    parts = given["arr_0"].shape, np.uint8, (given["arr_0"][i : i + 4] for i in range(0, 11, 4))
    write_npz(tmp_path / "a.npz", **(given | {"arr_0": parts}))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as read:
        assert read.files == list(given)
        for name, value in given.items():
            assert read[name].dtype == value.dtype and np.array_equal(read[name], value)
    assert all(info.compress_type == zipfile.ZIP_STORED for info in zipfile.ZipFile(tmp_path / "a.npz").infolist())


def test_equal_arrays_make_equal_files():
    one, two = io.BytesIO(), io.BytesIO()
    write_npz(one, **arrays())
    write_npz(two, **arrays())
    assert one.getvalue() == two.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, write_npz])
@pytest.mark.parametrize("rows", [1, 4, 11, 100])
def test_parts_are_the_array_whoever_wrote_it(tmp_path, save, rows):
    given = arrays()["arr_0"]
    save(tmp_path / "a.npz", arr_0=given)
    parts = list(read_parts(tmp_path / "a.npz", "arr_0", rows))
    assert [len(part) for part in parts] == [min(rows, 11 - i) for i in range(0, 11, rows)]
    assert np.array_equal(np.concatenate(parts), given)


@pytest.mark.parametrize("parts", [[np.zeros((2, 3))], [np.zeros((4, 3))] * 2, [np.zeros((4, 3), np.float32)]])
def test_parts_that_are_not_what_was_said_are_an_error(parts):
    with pytest.raises(ValueError, match="part"):
        write_npz(io.BytesIO(), a=((4, 3), np.float64, parts))


def test_a_changed_byte_anywhere_in_an_array_is_found(tmp_path):
    write_npz(tmp_path / "a.npz", arr_0=arrays()["arr_0"])
    whole = (tmp_path / "a.npz").read_bytes()
    data = whole.index(arrays()["arr_0"].tobytes())
    for at in (data, data + 100, data + 197):
        (tmp_path / "b.npz").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(zipfile.BadZipFile):
            list(read_parts(tmp_path / "b.npz", "arr_0", 4))


def test_objects_and_other_orders_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", objects=np.array([print]), columns=np.asfortranarray(np.ones((2, 3))))
    for name in ("objects", "columns"):
        with pytest.raises(ValueError, match=name):
            list(read_parts(tmp_path / "a.npz", name, 1))


def with_header(path, shape, values, size=None, descr="<f8"):
    """An .npz whose one array says to have that shape; size: what the archive says of its bytes."""
    made = io.BytesIO()
    np.lib.format.write_array_header_1_0(made, {"descr": descr, "fortran_order": False, "shape": shape})
    start = made.tell()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mu.npy", made.getvalue() + np.zeros(values).tobytes())
    if size:
        content = bytearray(path.read_bytes())
        at = content.index(b"PK\1\2") + 20
        content[at : at + 8] = 2 * (start + size).to_bytes(4, "little")
        path.write_bytes(content)


def test_a_header_that_says_more_than_there_is_is_refused_before_memory_is_taken(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    monkeypatch.setattr(np, "load", None)  # which would take it
    for shape in ((1 << 40,), (-2, -3), (2, 2), ()):
        with_header(path, shape, 6)
        for read in (lambda: read_arrays(path, ["mu"]), lambda: list(read_parts(path, "mu", 4))):
            with pytest.raises(ValueError, match="mu"):
                read()
    with_header(path, (6,), 6, descr="|O")
    for read in (lambda: read_arrays(path, ["mu"]), lambda: list(read_parts(path, "mu", 4))):
        with pytest.raises(ValueError, match="plain values"):
            read()
    with_header(path, (1 << 28,), 6, size=8 << 28)
    with pytest.raises(ValueError, match="claims more bytes than the file has"):
        next(read_parts(path, "mu", 1 << 28))
