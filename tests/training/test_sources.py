import json
import shutil

import numpy as np
import pytest
import torch
from conftest import plain_images
from PIL import Image

from pretrained.loading import load_vae
from pretrained.spec import model_spec
from runtime.errors import UserError
from runtime.hashes import fingerprint
from runtime.noise import random_stream
from runtime.pictures import load_image
from training import sources
from training.batches import BatchSampler, TrainingSamples, draw_steps, encode, names_in, sample_posterior
from training.latents import extract_latents, finish_latents, prepare_latents
from training.sources import ImageSource, LatentSource, center_crop, check_skipped


@pytest.fixture
def spec(model_folder):
    return model_spec(ckpt=str(model_folder))


def test_streams_differ_in_purpose_seed_and_number_and_repeat():
    keys = [("order", 0, 0), ("draws", 0, 0), ("samples", 0, 0), ("draws", 1, 0), ("draws", 0, 1), ("draws", 1, 1)]
    first = [random_stream(*key).random() for key in keys]
    assert len(set(first)) == len(keys)
    assert first == [random_stream(*key).random() for key in keys]
    assert random_stream("samples", 0, 2**40).random() != random_stream("samples", 0, 2**40 + 1).random()


def test_draws_are_uniform_and_independent():
    drawn = np.array([draw_steps(3, update, 8, 10) for update in range(2000)])
    # 16,000 draws of ten steps: each 1600 times, standard deviation 38.
    assert np.abs(np.bincount(drawn.ravel(), minlength=10) - 1600).max() < 160
    # Two draws of an update agree in a tenth of the updates, standard deviation 13.
    assert abs((drawn[:, 0] == drawn[:, 1]).sum() - 200) < 60


def test_an_epoch_shows_every_image_once_in_a_new_order_each_time():
    batches = [[index for _, index in keys] for keys in BatchSampler(12, 4, seed=0, epochs=2)]
    epochs = np.array(batches).reshape(2, 12)
    assert len(batches) == 6
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert epochs[0].tolist() != epochs[1].tolist()


@pytest.mark.parametrize("world", [2, 3, 6])
def test_the_processes_share_the_batches_of_one_and_a_late_start_goes_on(world):
    alone = list(BatchSampler(20, 6, seed=5, epochs=3))
    shared = [list(BatchSampler(20, 6, 5, rank, world, epochs=3)) for rank in range(world)]
    assert alone == [sum(parts, []) for parts in zip(*shared)]
    assert list(BatchSampler(20, 6, seed=5, first=4, epochs=3)) == alone[4:]
    assert [k for keys in alone for k, _ in keys] == list(range(9 * 6))


def test_a_sample_is_the_same_in_any_worker_and_another_k_is_another(spec, image_folder):
    samples = TrainingSamples(ImageSource(image_folder, spec), 0, (4, 4, 4), 5, 0.5, True)
    again = TrainingSamples(ImageSource(image_folder, spec), 0, (4, 4, 4), 5, 0.5, True)
    keys = [(k, 3) for k in range(40)]
    loader = torch.utils.data.DataLoader(again, batch_sampler=[keys[:20], keys[20:]], num_workers=2)
    first, second = loader
    for k in (0, 19):
        assert all(np.array_equal(samples[keys[k]][name], first[name][k]) for name in ("images", "y", "noise"))
    assert not torch.equal(first["noise"][0], first["noise"][1])
    assert not torch.equal(first["noise"], first["posterior_noise"])
    both = torch.cat([first["images"], second["images"]])
    mirrored = sum(torch.equal(x, both[0].flip(-1)) for x in both)
    assert {x.numpy().tobytes() for x in both} == {both[0].numpy().tobytes(), both[0].flip(-1).numpy().tobytes()}
    assert 8 < mirrored < 32  # half of 40
    dropped = (torch.cat([first["y"], second["y"]]) == 5).sum()
    assert 8 < dropped < 32


def test_without_flips_and_dropout_nothing_is_mirrored_or_dropped(spec, image_folder):
    samples = TrainingSamples(ImageSource(image_folder, spec), 0, (4, 4, 4), 5, 0.0, False)
    assert all(
        torch.equal(samples[k, 3]["images"], samples[0, 3]["images"]) and samples[k, 3]["y"] == 0 for k in range(20)
    )


def test_the_middle_square_is_cut_and_scaled():
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 30:70] = 200  # exactly the middle square
    image[:, :30], image[:, 70:] = 50, 90
    square = np.asarray(center_crop(Image.fromarray(image), 10))
    assert square.shape == (10, 10, 3)
    assert (square[:, 1:-1] == 200).all()
    same = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    assert np.array_equal(center_crop(same, 8), same)
    assert center_crop(Image.new("L", (9, 31)), 8).size == (8, 8)


def grey(value):
    return np.full((8, 8), value, np.uint8)


@pytest.mark.parametrize(
    "name, image",
    [
        ("grey.png", Image.fromarray(grey(100))),
        ("grey.jpg", Image.fromarray(grey(100))),
        ("alpha.png", Image.fromarray(np.dstack([grey(100)] * 3 + [grey(30)]))),
        ("grey-alpha.png", Image.fromarray(np.dstack([grey(100), grey(30)]))),
        ("16-bit.png", Image.fromarray(np.full((8, 8), 100 * 257, np.uint16))),
        ("palette.png", Image.fromarray(np.dstack([grey(100)] * 3)).quantize(4)),
        ("palette.gif", Image.fromarray(np.dstack([grey(100)] * 3)).quantize(4)),
        ("cmyk.jpg", Image.merge("CMYK", [Image.fromarray(grey(v)) for v in (155, 155, 155, 0)])),
        ("one-bit.png", Image.fromarray(grey(255)).convert("1")),
    ],
)
def test_pictures_of_all_modes_become_rgb(tmp_path, name, image):
    image.save(tmp_path / name)
    loaded = load_image(tmp_path / name)
    assert loaded.mode == "RGB"
    expected = 255 if name == "one-bit.png" else 100
    assert np.abs(np.asarray(loaded).astype(int) - expected).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 2), (64, 3)])
def test_tiny_and_narrow_pictures_load(tmp_path, spec, size):
    for k in range(5):
        (tmp_path / f"c{k}").mkdir()
        Image.new("RGB", size, (10 * k, 0, 0)).save(tmp_path / f"c{k}" / "a.png")
    x, label, skipped = ImageSource(tmp_path, spec).load(4)
    assert x.shape == (3, 8, 8) and label == 4 and not skipped
    torch.testing.assert_close(x[0], torch.full((8, 8), 40 / 127.5 - 1))


@pytest.fixture
def many(tmp_path, image_folder):
    """200 images, of which 100 a damaged one would be 1 %; the 8th file is cut off."""
    folder = tmp_path / "many"
    plain_images(folder, 200)
    broken = folder / "class0" / "035.png"
    broken.write_bytes(broken.read_bytes()[:45])
    return folder, broken


def test_an_unreadable_image_gives_way_to_the_next_and_is_named(spec, many):
    folder, broken = many
    images = ImageSource(folder, spec)
    assert images.files[7][0] == str(broken)
    x, label, skipped = images.load(7)
    assert torch.equal(x, images.load(8)[0]) and label == 0
    last = images.load(39)[0]  # the last of its class gives way to the first
    (folder / "class0" / "195.png").write_bytes(b"")
    broken.write_bytes((folder / "class0" / "030.png").read_bytes())
    assert not torch.equal(images.load(39)[0], last) and torch.equal(images.load(39)[0], images.load(0)[0])
    broken.write_bytes(b"")
    assert len(skipped) == 1 and str(broken) in skipped[0]
    named = TrainingSamples(images, 0, (4, 4, 4), 5, 0.0, False)[0, 7]["skipped"]
    assert names_in([named, ""]) == images.load(7)[2]


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_more_than_one_percent_unreadable_is_an_error(spec, many, content):
    folder, broken = many
    check_skipped(["a", "b"], ImageSource(folder, spec))
    for k in (40, 45):  # right behind it: three in a row of 200
        (folder / "class0" / f"{k:03d}.png").write_bytes(content)
    with pytest.raises(UserError, match="3 of 200 images cannot be read, more than 1 %"):
        ImageSource(folder, spec).load(7)
    for path in sorted((folder / "class1").iterdir())[1:]:
        path.unlink()
    (folder / "class1" / "001.png").write_bytes(content)
    with pytest.raises(UserError, match="no image of class 1 can be read"):
        ImageSource(folder, spec).load(40)


def make_latents(spec, image_folder, folder):
    vae = load_vae(spec, torch.device("cpu"))
    images, name = ImageSource(image_folder, spec), fingerprint(vae, {})
    prepare_latents(images, spec, folder, name)
    extract_latents(images, vae, spec, folder, batch_size=3)
    assert finish_latents(images, folder) == []
    return images, vae, name


def test_latents_are_the_moments_of_both_flips_to_half_precision(spec, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SHARD", 6)
    images, vae, name = make_latents(spec, image_folder, tmp_path / "latents")
    latents = LatentSource(tmp_path / "latents", spec, name)
    assert len(latents) == 16 and len(list((tmp_path / "latents").glob("0*.npy"))) == 3
    for index in (0, 5, 6, 15):
        for flip in (False, True):
            x, label, _ = images.load(index, flip)
            moments, same, _ = latents.load(index, flip)
            assert label == same
            torch.testing.assert_close(moments, encode(vae, x[None])[0], rtol=1e-3, atol=1e-3)
    assert not torch.equal(latents.load(0, False)[0], latents.load(0, True)[0])
    assert latents.fingerprint() == images.fingerprint()


def test_latents_take_the_place_of_an_unreadable_image_as_images_do(spec, many, tmp_path):
    folder, broken = many
    vae, images = load_vae(spec, torch.device("cpu")), ImageSource(folder, spec)
    prepare_latents(images, spec, tmp_path / "latents", "name")
    extract_latents(images, vae, spec, tmp_path / "latents")
    skipped = finish_latents(images, tmp_path / "latents")
    assert len(skipped) == 1 and str(broken) in skipped[0]
    latents = LatentSource(tmp_path / "latents", spec, "name")
    assert torch.equal(latents.load(7)[0], latents.load(8)[0]) and latents.load(7)[1] == images.load(7)[1]


def test_a_folder_of_other_files_takes_no_latents_and_lost_labels_come_back(spec, image_folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "labels.npy").write_bytes(b"mine")
    with pytest.raises(UserError, match="holds other files"):
        prepare_latents(ImageSource(image_folder, spec), spec, tmp_path / "mine", "name")
    assert (tmp_path / "mine" / "labels.npy").read_bytes() == b"mine"
    _, _, name = make_latents(spec, image_folder, tmp_path / "latents")
    (tmp_path / "latents" / "labels.npy").unlink()
    make_latents(spec, image_folder, tmp_path / "latents")
    assert len(LatentSource(tmp_path / "latents", spec, name)) == 16


def test_a_posterior_sample_has_the_moments_it_was_given():
    moments = torch.cat([torch.full((2000, 4, 2, 2), 3.0), torch.full((2000, 4, 2, 2), 2 * np.log(0.5))], dim=1)
    noise = torch.randn(2000, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    x = sample_posterior(moments, noise, 0.5)
    assert x.mean().item() == pytest.approx(1.5, abs=0.01) and x.std().item() == pytest.approx(0.25, abs=0.01)


def test_a_stopped_extraction_keeps_its_files_and_makes_the_rest(spec, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SHARD", 6)
    folder = tmp_path / "latents"
    _, _, name = make_latents(spec, image_folder, folder)
    (folder / "000001.npy").unlink()
    kept = (folder / "000000.npy").stat().st_mtime_ns
    with pytest.raises(UserError, match="not complete"):
        LatentSource(folder, spec, name)
    make_latents(spec, image_folder, folder)
    assert (folder / "000000.npy").stat().st_mtime_ns == kept and len(LatentSource(folder, spec, name)) == 16


def test_latents_of_another_vae_size_or_data_are_refused(spec, image_folder, tmp_path):
    from dataclasses import replace

    folder = tmp_path / "latents"
    images, _, name = make_latents(spec, image_folder, folder)
    with pytest.raises(UserError, match="another VAE"):
        LatentSource(folder, spec, "0" * 64)
    with pytest.raises(UserError, match="image_size 8, model tiny 16"):
        LatentSource(folder, replace(spec, image_size=16), name)
    with pytest.raises(UserError, match="different in vae"):
        prepare_latents(images, spec, folder, "0" * 64)
    shutil.copytree(image_folder, tmp_path / "other")
    (tmp_path / "other" / "class1" / "1.png").rename(tmp_path / "other" / "class2" / "1.png")
    with pytest.raises(UserError, match="different in files"):
        prepare_latents(ImageSource(tmp_path / "other", spec), spec, folder, name)
    about = json.loads((folder / "latents.json").read_text())
    (folder / "latents.json").write_text(json.dumps(about | {"flips": False}))
    with pytest.raises(UserError, match="no mirrored images"):
        LatentSource(folder, spec, name)
    with pytest.raises(UserError, match="--extract-latents"):
        LatentSource(tmp_path, spec, name)
