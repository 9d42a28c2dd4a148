"""image_sets.py: what is read equals what NumPy and Pillow wrote; what cannot be used is refused in one line."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from evaluation.evaluation_set import ImageChecks, open_evaluation_set, save_statistics
from runtime.errors import UserError


def pixels(count, height=6, width=5, dtype=np.uint8):
    return np.random.default_rng(count).integers(0, 256, (count, height, width, 3)).astype(dtype)


def write_pngs(folder, images):
    for k, image in enumerate(images):
        path = folder / f"{k % 2}" / f"{k:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("rows", [1, 4, 9])
def test_images_come_in_batches_and_in_their_order(tmp_path, save, dtype, rows):
    given = pixels(9, dtype=dtype)
    save(tmp_path / "a.npz", arr_0=given, labels=np.arange(9))
    images = open_evaluation_set(tmp_path / "a.npz")
    assert (images.count, images.size, images.dtype, images.stored) == (9, (6, 5), dtype, {})
    batches = list(images.batches(rows))
    assert [len(batch) for batch in batches] == [min(rows, 9 - start) for start in range(0, 9, rows)]
    assert np.array_equal(np.concatenate(batches), given)


def test_a_folder_of_pngs_is_read_by_name_through_all_its_folders(tmp_path):
    given = pixels(5)
    write_pngs(tmp_path / "set", given)
    (tmp_path / "set" / "notes.txt").write_text("not an image")
    images = open_evaluation_set(tmp_path / "set")
    assert (images.count, images.size) == (5, (6, 5))
    assert np.array_equal(np.concatenate(list(images.batches(2))), given[[0, 2, 4, 1, 3]])


def test_grey_pngs_and_such_with_transparency_become_rgb(tmp_path):
    Image.new("L", (4, 4), 7).save(tmp_path / "a.png")
    Image.new("RGBA", (4, 4), (1, 2, 3, 0)).save(tmp_path / "b.png")
    (batch,) = open_evaluation_set(tmp_path).batches(2)
    assert batch[:, 0, 0].tolist() == [[7, 7, 7], [1, 2, 3]]


def test_statistics_are_stored_and_found_beside_images_or_alone(tmp_path):
    random = np.random.default_rng(0)
    shapes = {"mu": (3,), "sigma": (3, 3), "mu_s": (2,), "sigma_s": (2, 2), "pool": (7, 3)}
    arrays = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    save_statistics(tmp_path / "a.npz", arrays, {"graph": "f00", "images": 70, "image_size": (8, 8)})
    images = open_evaluation_set(tmp_path / "a.npz")
    assert images.count is None and images.about == {"graph": "f00", "images": 70, "image_size": [8, 8]}
    assert images.stored.keys() == arrays.keys()
    assert all(np.array_equal(images.stored[name], array) for name, array in arrays.items())
    # As the published reference has them.
    np.savez(tmp_path / "b.npz", mu=arrays["mu"], sigma=arrays["sigma"], mu_clip=np.zeros(5), arr_0=pixels(4))
    images = open_evaluation_set(tmp_path / "b.npz")
    assert images.count == 4 and images.stored.keys() == {"mu", "sigma"} and images.about == {}


def test_features_of_some_images_are_kept_evenly_spaced(tmp_path):
    arrays = dict.fromkeys(("mu", "sigma", "mu_s", "sigma_s"), np.zeros(1)) | {"pool": np.arange(10)[:, None]}
    for keep, expected in ((4, [0, 3, 6, 9]), (10, range(10)), (11, range(10)), (None, range(10)), (1, [0])):
        save_statistics(tmp_path / "a.npz", arrays, {}, keep)
        assert np.load(tmp_path / "a.npz")["pool"][:, 0].tolist() == list(expected)


def test_copies_are_the_same_set_and_other_images_are_not(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=pixels(3))
    np.savez(tmp_path / "c.npz", arr_0=255 - pixels(3))
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes())
    write_pngs(tmp_path / "d", pixels(3))
    a, b, c, d = (open_evaluation_set(tmp_path / name) for name in ("a.npz", "b.npz", "c.npz", "d"))
    assert a.is_same(a) and a.is_same(b) and d.is_same(open_evaluation_set(tmp_path / "d"))
    assert not a.is_same(c) and not a.is_same(d)
    assert a.sha256() == b.sha256() != c.sha256()


def refused(path, *words):
    with pytest.raises(UserError) as error:
        for _ in open_evaluation_set(path).batches(2):
            pass
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_what_is_no_set_of_images_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    refused(tmp_path / "none.npz", "No such file")
    path.write_bytes(b"")
    refused(path, "no .npz")
    path.write_text("text")
    refused(path, "no .npz")
    np.save(tmp_path / "b.npy", pixels(3))
    refused(tmp_path / "b.npy", "no .npz")
    np.savez(path, images=pixels(3))
    refused(path, "arr_0", "it has images")
    np.savez(path)
    refused(path, "it has nothing")
    for wrong in (pixels(3)[0], pixels(3)[..., :1], pixels(3).transpose(0, 3, 1, 2), pixels(3)[:0], np.uint8(3)):
        np.savez(path, arr_0=wrong)
        refused(path, "arr_0")
    np.savez(path, arr_0=pixels(3, dtype=np.int64))
    refused(path, "int64", "uint8")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no .png")


def test_objects_are_not_unpickled(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    for name in ("arr_0", "mu", "about"):
        np.savez(tmp_path / "a.npz", **{"arr_0": pixels(2), name: np.array([Hostile()])})
        refused(tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()


def test_a_cut_or_changed_npz_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=pixels(50))
    whole = path.read_bytes()
    for length in (10, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:length])
        refused(path, "cut off")
    path.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    refused(path, "CRC")
    np.save(tmp_path / "b.npy", pixels(5))
    with zipfile.ZipFile(path, "w") as archive:  # which is whole, where the array is not
        archive.writestr("arr_0.npy", (tmp_path / "b.npy").read_bytes()[:-7])
    refused(path, "cut off")


def test_pngs_that_are_damaged_or_of_another_size_are_named(tmp_path):
    write_pngs(tmp_path / "set", pixels(4))
    path = tmp_path / "set" / "1" / "003.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="003.png is no picture"):
        list(open_evaluation_set(tmp_path / "set").batches(3))
    Image.new("RGB", (5, 7)).save(path)
    with pytest.raises(UserError, match=r"003.png is 5x7 pixels, 000.png is 5x6"):
        list(open_evaluation_set(tmp_path / "set").batches(3))


def doubts(folder, images):
    np.savez(folder / "a.npz", arr_0=images)
    opened = open_evaluation_set(folder / "a.npz")
    found = ImageChecks(opened)
    for batch in opened.batches(2):
        found.look(batch)
    return found.texts()


def test_ordinary_images_raise_no_doubt(tmp_path):
    assert doubts(tmp_path, pixels(5)) == []


def test_images_of_one_colour_are_counted_and_the_first_is_named(tmp_path):
    images = pixels(5)
    images[[1, 4]] = [1, 2, 3]
    (text,) = doubts(tmp_path, images)
    assert "2 of 5" in text and "number 1 first" in text


@pytest.mark.parametrize("change, expected", [(lambda x: x / 255, "from 0"), (lambda x: x / 127.5 - 1, "mean nothing")])
def test_float_images_in_another_range_are_doubted(tmp_path, change, expected):
    images = pixels(5)
    images[0, 0, 0] = 0
    (text,) = doubts(tmp_path, change(images.astype(np.float32)))
    assert "float32" in text and "mean nothing" in text and expected in text


def test_float_images_from_0_to_255_are_mentioned(tmp_path):
    (text,) = doubts(tmp_path, pixels(5).astype(np.float64))
    assert "float64" in text and "uint8" in text and "mean nothing" not in text


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_images_that_are_not_finite_are_refused_by_number(tmp_path, value):
    images = pixels(5, dtype=np.float32)
    images[3, 1, 1, 1] = value
    with pytest.raises(UserError, match="image 3 "):
        doubts(tmp_path, images)
