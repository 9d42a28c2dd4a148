import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import DATA, plain_images
from PIL import Image
from torchvision.datasets import ImageFolder

from pretrained.spec import model_spec
from runtime.errors import UserError
from runtime.pictures import load_image
from training.batches import TrainingSamples, skipped_names
from training.images import ImageSource, center_crop, order_classes


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
    with pytest.raises(ValueError, match="1x60000 pixels are too narrow"):
        center_crop(Image.new("L", (1, 60000)), 256)


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


def test_a_damaged_avif_and_an_enormous_image_are_replaced_and_named(spec, tmp_path):
    plain_images(tmp_path, 200)
    (tmp_path / "class2" / "000.jpg").write_bytes((DATA / "damaged.avif").read_bytes())
    Image.new("1", (20000, 20000)).save(tmp_path / "class3" / "000.png")
    images = ImageSource(tmp_path, spec)
    for label, name in ((2, "000.jpg"), (3, "000.png")):
        start = images.starts[label]
        x, _, skipped = images.load(start)
        assert torch.equal(x, images.load(start + 1)[0]) and name in skipped and "\n" not in skipped


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)


def test_images_and_labels_are_those_of_imagefolder(spec, tmp_path):
    synsets = ["n01440764", "n01443537", "n02113023", "n13044778", "n09835506"]
    for k, synset in enumerate(synsets):
        write(tmp_path / "data" / synset, "10.png", "2.PNG", f"{k}/z.jpg", f"{k}/a.jpeg", "a b/é.bmp", "a/b.webp")
    (tmp_path / "data" / "n13044778" / "linked").symlink_to("../n01440764/0")
    folder = f"{tmp_path}/data"
    assert ImageSource(folder, spec).files == ImageFolder(folder).samples
    assert ImageSource(folder + "/", spec).files == ImageFolder(folder + "/").samples
    assert ImageSource(folder, spec).notes == []


def test_a_folder_has_one_fingerprint_however_its_path_is_written(spec, tmp_path, monkeypatch):
    plain_images(tmp_path / "data", 20)
    names = sorted(f"class{k % 5}/{k:03d}.png {k % 5}" for k in range(20))
    expected = hashlib.sha256("\n".join(names).encode()).hexdigest()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "data", f"{tmp_path}/data/", "data", "./data", "~/data", "~/data/"):
        assert ImageSource(folder, spec).fingerprint() == expected, folder


FASHION = "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle-boot".split()
PETS = ["Egyptian cat, Felis silvestris", "Pug, pug-dog", "hen"]


@pytest.mark.parametrize(
    "class_names, folders",
    [
        (FASHION, FASHION),
        (FASHION, "T-Shirt Trouser PULLOVER dress coat Sandal shirt sneaker bag Ankle_Boot".split()),
        (FASHION, [name.replace("-", " ") for name in FASHION]),
        (FASHION, [f"{label}_{name}" for label, name in enumerate(FASHION)]),  # of demo/fashion_mnist.py
        (FASHION, [f"{label + 1:02d}. {name}" for label, name in enumerate(FASHION)]),
        (FASHION, [f"{9 - label}_{name}" for label, name in enumerate(FASHION)]),  # the name wins
        (FASHION, [str(label) for label in range(10)]),
        (FASHION, [f"class{label}" for label in range(10)]),
        (PETS, ["egyptian_cat", "pug-dog", "Hen"]),
        (PETS, ["Egyptian cat, Felis silvestris", "pug", "hen"]),
        (["C", "C++", "C#"], ["C", "C++", "C#"]),
        (["caf\u00e9", "bar"], ["cafe\u0301", "bar"]),  # as macOS writes it
        (["crane", "crane", "hen"], ["n02012849", "n03126707", "n99999999"]),  # two classes of ImageNet
        (None, [str(label) for label in range(12)]),
        (None, [f"{label:04d}" for label in range(12)]),
        (None, [f"class{label}" for label in range(12)]),
        (None, [f"{label}_{name}" for label, name in enumerate([*FASHION, "hat", "belt"])]),
        (None, [f"{name}-{label}" for label, name in enumerate(FASHION)]),
        (None, [f"{label:02d}" for label in range(1, 13)]),
        (None, ["737-200", "747-400", "757-200", "A310"]),
        (None, ["n00000002", "n00000010", "n01440764"]),
        (None, ["Audi 2012", "BMW 2010", "Fiat 2011"]),
        (None, ["apple", "banana", "cherry"]),
    ],
)
def test_folder_names_that_tell_labels_give_them(class_names, folders):
    assert order_classes("data", sorted(folders), class_names) == folders


@pytest.mark.parametrize(
    "class_names, folders, words",
    [
        (FASHION, [*FASHION[:9], "boot"], "folder boot is named as none of the model's classes"),
        (FASHION, [*FASHION, "hat"], "folder hat is named as none"),
        (FASHION, FASHION[:9], "has 9 classes, the model 10: there is no folder for ankle-boot"),
        (FASHION, [*FASHION[:9], "T-Shirt"], "folders .* are both named as the class t-shirt"),
        (["crane", "crane", "hen"], ["crane", "hen"], "folder crane is named as several"),
        (None, [str(label) for label in range(1, 13)], r"not from 0 to 11.* \(1, 10, ...\): name each by its label"),
        (None, ["5", "50", "6"], "not from 0 to 2"),
        (None, [f"class{label}" for label in range(1, 13)], "not from 0 to 11"),
        (None, [f"{label}_{name}" for label, name in enumerate(FASHION, 1)], "not from 0 to 9"),
    ],
)
def test_folder_names_that_contradict_their_labels_are_refused(class_names, folders, words):
    with pytest.raises(UserError, match=words):
        order_classes("data", folders, class_names)


def test_a_wrong_folder_is_named_or_left_out(spec, tmp_path):
    write(tmp_path, *(f"{name}/{k}.png" for name in "abcde" for k in range(4)))
    plain = ImageSource(tmp_path, spec)
    write(tmp_path, ".ipynb_checkpoints/0.png", "a/._0.png")
    (tmp_path / "a" / "loop").symlink_to("..")
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "classes.txt").touch()
    noted = ImageSource(tmp_path, spec)
    assert noted.files == plain.files and len(noted) == 20 and noted.fingerprint() == plain.fingerprint()
    (note,) = noted.notes
    assert "hidden entries: 2, the first is .ipynb_checkpoints" in note and "classes.txt" in note and "a/loop" in note
    write(tmp_path, "x.png")
    assert "in no subfolder: 1, the first is" in ImageSource(tmp_path, spec).notes[1]
    (tmp_path / "lost+found").mkdir()
    with pytest.raises(UserError, match=r"lost\+found holds no images"):
        ImageSource(tmp_path, spec)
    write(tmp_path, "lost+found/0.png")
    with pytest.raises(UserError, match=r"the folder lost\+found is named as none of the model's classes"):
        ImageSource(tmp_path, spec)
    write(tmp_path / "deep" / "train", *(f"{name}/0.png" for name in "abcde"))
    write(tmp_path / "deep" / "val", *(f"{name}/0.png" for name in "abcde"))
    with pytest.raises(UserError, match="has 2 classes, the model 5: .* not train, val$"):
        ImageSource(tmp_path / "deep", spec)
    write(tmp_path / "flat", "0.png")
    with pytest.raises(UserError, match="has no images in a subfolder per class: .* in no subfolder: 1"):
        ImageSource(tmp_path / "flat", spec)


def test_class_names_label_the_images(spec, tmp_path):
    named = replace(spec, class_names=("trouser", "bag", "coat", "ankle boot", "dress"))
    write(tmp_path, *(f"{name}/0.png" for name in ("Ankle-Boot", "bag", "coat", "dress", "trouser")))
    source = ImageSource(tmp_path, named)
    assert [path.split("/")[-2] for path, _ in source.files] == ["trouser", "bag", "coat", "Ankle-Boot", "dress"]
    assert [source.load(k)[1] for k in range(5)] == [0, 1, 2, 3, 4]
    assert source.notes == [f"{tmp_path}: the names of its folders give their labels: trouser has label 0"]
    assert ImageSource(tmp_path, replace(spec, class_names=None)).notes == []
    for class_names, notes in (
        (("ankle-boot", "bag", "coat", "dress", "trouser"), 0),
        (("hose", "a", "b", "c", "d"), 1),
    ):
        source = ImageSource(tmp_path, replace(spec, class_names=class_names))
        assert len(source.notes) == notes and source.files[0][0].endswith("Ankle-Boot/0.png")


def test_a_name_with_a_line_break_counts_as_one_skipped_image(tmp_path, spec):
    plain_images(tmp_path, 250)
    damaged = tmp_path / "class0" / "a\nb\u2028c.png"
    damaged.write_bytes(b"no picture")
    source = ImageSource(tmp_path, spec)
    (index,) = (k for k, (path, _) in enumerate(source.files) if path == str(damaged))
    _, _, skipped = source.load(index)
    assert len(skipped_names([skipped])) == 1 and "a b c.png" in skipped
