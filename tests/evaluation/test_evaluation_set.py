"""Evaluation sets against what NumPy and Pillow wrote; damaged sets are refused in one line."""

import json
import zipfile

import numpy as np
import pytest
from conftest import DATA, write_pngs
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


@pytest.mark.parametrize(
    "about", [{"images": "many"}, {"images": True}, {"image_size": 5}, {"image_size": [8, "8"]}, {"graph": ["a"]}, [1]]
)
def test_statistics_about_something_else_are_refused(tmp_path, about):
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), sigma=np.eye(3), about=json.dumps(about))
    assert_refused(tmp_path / "a.npz", "cannot be read")


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


@pytest.mark.parametrize("count, side", [(3, 6), (9, 6), (5, 8)])
def test_an_npz_that_is_replaced_while_it_is_open_is_refused(tmp_path, count, side):
    np.savez(tmp_path / "a.npz", arr_0=pixels(5))
    images = open_evaluation_set(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", arr_0=pixels(count, height=side))
    with pytest.raises(UserError, match="a.npz cannot be read .it has changed since it was opened"):
        list(images.batches(2))


@pytest.mark.parametrize(
    "values", [np.array([["a", "b"]]), np.ones((4, 2), complex), np.ones((4, 2), bool), np.ones((4, 2), np.longdouble)]
)
def test_statistics_that_are_no_numbers_are_refused(tmp_path, values):
    np.savez(tmp_path / "a.npz", pool=values)
    assert_refused(tmp_path / "a.npz", "its pool is", "not numbers of up to 64 bits")


def test_statistics_and_features_may_have_any_byte_order(tmp_path):
    values = np.random.default_rng(0).random((4, 3))
    for dtype in (">f4", "<f8"):
        np.savez(tmp_path / "statistics.npz", pool=values.astype(dtype))
        np.savez(tmp_path / "features.npz", values.astype(dtype))
        for name in ("statistics.npz", "features.npz"):
            pool = open_evaluation_set(tmp_path / name).stored["pool"]
            assert pool.dtype.isnative and np.allclose(pool, values, atol=1e-7)


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


def images_of(path):
    opened = open_evaluation_set(path)
    return np.concatenate(list(opened.batches(4))), opened.doubts


def test_a_folder_is_counted_as_a_user_counts_it(tmp_path):
    given = pixels(6)
    for folder in ("plain", "set", "elsewhere"):
        write_pngs(tmp_path / folder, given)
    expected, doubts = images_of(tmp_path / "plain")
    assert doubts == []
    folder = tmp_path / "set"
    (folder / "class1" / "001.png").rename(folder / "class1" / "001.PNG")
    (folder / "class2").rename(tmp_path / "elsewhere" / "moved")
    (folder / "class2").symlink_to("../elsewhere/moved")
    (folder / "class3" / "003.png").unlink()
    (folder / "class3" / "003.png").symlink_to("../../elsewhere/class3/003.png")
    found, doubts = images_of(folder)
    assert np.array_equal(found, expected) and doubts == []
    (folder / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (5, 6)).save(folder / ".ipynb_checkpoints" / "0-checkpoint.png")
    (folder / "class0" / "._000.png").write_bytes(b"Mac OS X")
    (folder / "class0" / "up").symlink_to("..")
    (folder / "labels.json").write_text("{}")
    found, (doubt,) = images_of(folder)
    assert np.array_equal(found, expected)
    for word in ("hidden entries: 2, the first is .ipynb_checkpoints", "labels.json", "class0/up"):
        assert word in doubt


def test_other_formats_are_read_and_doubted_if_they_change_pixels(tmp_path):
    given = pixels(4)
    endings = ["png", "bmp", "tiff", "webp"]
    for k, ending in enumerate(endings):
        Image.fromarray(given[k]).save(tmp_path / f"{k}.{ending}", lossless=True)
    found, (doubt,) = images_of(tmp_path)
    assert np.array_equal(found, given) and "1 BMP and 1 PNG and 1 TIFF and 1 WEBP images: what WEBP lost" in doubt
    (tmp_path / "3.webp").rename(tmp_path.parent / "away.webp")
    assert images_of(tmp_path)[1] == [f"{tmp_path} holds 1 BMP and 1 PNG and 1 TIFF images"]
    Image.fromarray(given[0]).save(tmp_path / "0.jpg")
    *_, doubt = images_of(tmp_path)[1]
    assert doubt == f"2 images differ only in their ending, as {tmp_path / '0.jpg'} and 0.png: all are used"


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "set.npz").touch()
    assert_refused(tmp_path, "no .png or other pictures", "an .npz", "the first is set.npz")


@pytest.mark.parametrize("name", ["damaged.avif", "bomb.png"])
def test_damaged_and_enormous_pictures_are_refused_with_the_reason(tmp_path, name):
    if name == "damaged.avif":
        (tmp_path / name).write_bytes((DATA / name).read_bytes())
    else:
        Image.new("1", (20000, 20000)).save(tmp_path / name)
    assert_refused(tmp_path, f"{name} is not a picture that can be read (")


def test_a_picture_of_16_bits_is_read_as_in_training(tmp_path):
    Image.fromarray((pixels(1)[0, ..., 0].astype(np.uint16)) * 257).save(tmp_path / "x.png")
    assert np.array_equal(images_of(tmp_path)[0][..., 1], pixels(1)[..., 0])


def test_uint8_images_that_were_not_scaled_are_doubted(tmp_path):
    real = pixels(6)
    unit, signed = real / 255, real / 127.5 - 1
    signed[0, 0, 0] = 1, -1, 0
    wrong = {
        "0, 1": [unit.astype(np.uint8), np.round(unit).astype(np.uint8)],
        "0, 1, 255": [signed.astype(np.int8).astype(np.uint8), np.round(signed).astype(np.int8).astype(np.uint8)],
        "from 126 to 128": [(signed + 127.5).astype(np.uint8)],
        "from 7 to 7": [np.full_like(real, 7)],
    }
    for words, sets in wrong.items():
        for images in sets:
            text = doubts(tmp_path, images)[0]
            assert words in text and "the metrics mean nothing" in text and "uint8" in text
    for images in (real, (real > 100) * np.uint8(255), real // 16, np.where(real > 250, 254, real)):
        assert doubts(tmp_path, images) == []


def test_a_folder_of_unscaled_pictures_is_doubted_too(tmp_path):
    write_pngs(tmp_path, np.round(pixels(6) / 255).astype(np.uint8))
    opened = open_evaluation_set(tmp_path)
    checks = ImageChecks(opened)
    for batch in opened.batches(4):
        checks.add(batch)
    assert "mean nothing" in checks.doubts()[0]
