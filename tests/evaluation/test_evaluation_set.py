"""Evaluation sets against what NumPy and Pillow wrote; damaged sets are refused in one line."""

import zipfile

import numpy as np
import pytest
from conftest import write_pngs
from PIL import Image

from evaluation.evaluation_set import ImageChecks, open_evaluation_set, save_statistics
from runtime.errors import UserError


def pixels(count, height=6, width=5, dtype=np.uint8):
    return np.random.default_rng(count).integers(0, 256, (count, height, width, 3)).astype(dtype)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("rows", [1, 4, 9])
def test_images_come_in_batches_and_in_order(tmp_path, save, dtype, rows):
    given = pixels(9, dtype=dtype)
    save(tmp_path / "a.npz", arr_0=given, labels=np.arange(9))
    images = open_evaluation_set(tmp_path / "a.npz")
    assert (images.count, images.size, images.dtype, images.stored) == (9, (6, 5), dtype, {})
    batches = list(images.batches(rows))
    assert [len(batch) for batch in batches] == [min(rows, 9 - start) for start in range(0, 9, rows)]
    assert np.array_equal(np.concatenate(batches), given)


def test_a_folder_of_pngs_is_sorted_by_path(tmp_path):
    given = pixels(7)
    write_pngs(tmp_path / "set", given)  # in five folders
    (tmp_path / "set" / "notes.txt").write_text("not an image")
    images = open_evaluation_set(tmp_path / "set")
    assert (images.count, images.size) == (7, (6, 5))
    assert np.array_equal(np.concatenate(list(images.batches(2))), given[[0, 5, 1, 6, 2, 3, 4]])


def test_grey_and_transparent_pngs_become_rgb(tmp_path):
    Image.new("L", (4, 4), 7).save(tmp_path / "a.png")
    Image.new("RGBA", (4, 4), (1, 2, 3, 0)).save(tmp_path / "b.png")
    (batch,) = open_evaluation_set(tmp_path).batches(2)
    assert batch[:, 0, 0].tolist() == [[7, 7, 7], [1, 2, 3]]


def test_stored_statistics_are_read(tmp_path):
    random = np.random.default_rng(0)
    shapes = {"mu": (3,), "sigma": (3, 3), "mu_s": (2,), "sigma_s": (2, 2), "pool": (7, 3)}
    arrays = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    save_statistics(tmp_path / "a.npz", arrays, {"graph": "f00", "images": 70, "image_size": (8, 8)})
    images = open_evaluation_set(tmp_path / "a.npz")
    assert images.count is None and images.about == {"graph": "f00", "images": 70, "image_size": [8, 8]}
    assert images.stored.keys() == arrays.keys()
    assert all(np.array_equal(images.stored[name], array) for name, array in arrays.items())


def assert_refused(path, *words):
    with pytest.raises(UserError) as error:
        for _ in open_evaluation_set(path).batches(2):
            pass
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_files_without_images_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    assert_refused(tmp_path / "none.npz", "No such file")
    path.write_bytes(b"text")
    assert_refused(path, "not an .npz")
    np.savez(path, images=pixels(3))
    assert_refused(path, "arr_0", "it has images")
    for wrong in (pixels(3)[0], pixels(3)[..., :1], pixels(3).transpose(0, 3, 1, 2), pixels(3)[:0], np.uint8(3)):
        np.savez(path, arr_0=wrong)
        assert_refused(path, "arr_0")
    np.savez(path, arr_0=pixels(3, dtype=np.int64))
    assert_refused(path, "int64", "uint8")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", "no .png")


def test_a_cut_or_changed_npz_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=pixels(50))
    whole = path.read_bytes()
    for length in (10, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:length])
        assert_refused(path, "cut off")
    path.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    assert_refused(path, "CRC")
    np.save(tmp_path / "b.npy", pixels(5))
    with zipfile.ZipFile(path, "w") as archive:  # a complete archive of an incomplete array
        archive.writestr("arr_0.npy", (tmp_path / "b.npy").read_bytes()[:-7])
    assert_refused(path, "cut off")


def test_damaged_pngs_and_other_sizes_are_named(tmp_path):
    write_pngs(tmp_path / "set", pixels(4))
    path = tmp_path / "set" / "class3" / "003.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="003.png is not a picture"):
        list(open_evaluation_set(tmp_path / "set").batches(3))
    Image.new("RGB", (5, 7)).save(path)
    with pytest.raises(UserError, match=r"003.png is 5x7 pixels, 000.png is 5x6"):
        list(open_evaluation_set(tmp_path / "set").batches(3))


def doubts(folder, images):
    np.savez(folder / "a.npz", arr_0=images)
    opened = open_evaluation_set(folder / "a.npz")
    checks = ImageChecks(opened)
    for batch in opened.batches(2):
        checks.add(batch)
    return checks.doubts()


def test_float_images_are_doubted_by_their_range(tmp_path):
    assert doubts(tmp_path, pixels(5)) == []
    images = pixels(5, dtype=np.float32)
    for scaled, meaningless in ((images / 255, True), (images / 127.5 - 1, True), (images, False)):
        (text,) = doubts(tmp_path, scaled)
        assert "float32" in text and "uint8" in text and ("mean nothing" in text) == meaningless


def test_images_that_are_not_finite_are_refused_by_number(tmp_path):
    images = pixels(5, dtype=np.float32)
    images[3, 1, 1, 1] = np.nan
    with pytest.raises(UserError, match="image 3 "):
        doubts(tmp_path, images)
