import numpy as np
import pytest
import torch
from conftest import plain_images
from PIL import Image

from pretrained.spec import model_spec
from runtime.pictures import load_image
from training.batches import TrainingSamples, skipped_names
from training.images import ImageSource, center_crop


@pytest.fixture
def spec(model_folder):
    return model_spec(ckpt=str(model_folder))


def test_the_middle_square_is_cropped_and_scaled():
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 30:70] = 200  # exactly the middle square
    image[:, :30], image[:, 70:] = 50, 90
    square = np.asarray(center_crop(Image.fromarray(image), 10))
    assert square.shape == (10, 10, 3) and (square[:, 1:-1] == 200).all()
    same = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    assert np.array_equal(center_crop(same, 8), same)
    assert center_crop(Image.new("L", (9, 31)), 8).size == (8, 8)


def test_pictures_of_all_modes_become_rgb(tmp_path):
    grey, black, alpha = (np.full((8, 8), value, np.uint8) for value in (100, 155, 30))
    pictures = {
        "grey.jpg": Image.fromarray(grey),
        "alpha.png": Image.fromarray(np.dstack([grey, grey, grey, alpha])),
        "grey-alpha.png": Image.fromarray(np.dstack([grey, alpha])),
        "16-bit.png": Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)),
        "palette.gif": Image.fromarray(np.dstack([grey] * 3)).quantize(4),
        "cmyk.jpg": Image.merge("CMYK", [Image.fromarray(x) for x in (black, black, black, 0 * grey)]),
    }
    for name, image in pictures.items():
        image.save(tmp_path / name)
        loaded = load_image(tmp_path / name)
        assert loaded.mode == "RGB" and np.abs(np.asarray(loaded).astype(int) - 100).max() <= 2, name


def test_an_unreadable_image_is_replaced_by_the_next_of_its_class_and_named(spec, tmp_path):
    plain_images(tmp_path, 200)
    broken = tmp_path / "class0" / "035.png"
    broken.write_bytes(broken.read_bytes()[:45])
    images = ImageSource(tmp_path, spec)
    x, label, skipped = images.load(7)
    assert torch.equal(x, images.load(8)[0]) and label == 0
    torch.testing.assert_close(x, torch.full((3, 8, 8), 40 / 127.5 - 1))
    assert skipped.count("\n") == 0 and str(broken) in skipped
    assert skipped_names([TrainingSamples(images, 0, (4, 4, 4), 5, 0.0, False)[0, 7]["skipped"], ""]) == [skipped]
    (tmp_path / "class0" / "195.png").write_bytes(b"")  # the last of its class
    assert torch.equal(images.load(39)[0], images.load(0)[0])
