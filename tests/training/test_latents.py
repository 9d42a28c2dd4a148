import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import plain_images

from pretrained.loading import load_vae
from pretrained.spec import model_spec
from runtime.errors import UserError
from training import latents
from training.batches import encode
from training.images import ImageSource
from training.latents import LatentSource, extract_latents, finish_latents, prepare_latents


@pytest.fixture
def spec(model_folder):
    return model_spec(ckpt=str(model_folder))


@pytest.fixture
def make(spec, image_folder, tmp_path):
    """Extract the latents of a folder of images; returns the images, the VAE, the skipped images and the folder."""

    def make(images=image_folder):
        vae, images, folder = load_vae(spec, torch.device("cpu")), ImageSource(images, spec), tmp_path / "latents"
        prepare_latents(images, spec, folder, "name")
        extract_latents(images, vae, spec, folder, batch_size=3)
        return images, vae, finish_latents(images, folder), folder

    return make


def test_latents_are_the_moments_of_both_flips_in_half_precision(spec, make, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 6)
    images, vae, skipped, folder = make()
    source = LatentSource(folder, spec, "name")
    assert len(source) == 16 and len(list(folder.glob("0*.npy"))) == 3 and skipped == []
    for index in (0, 5, 6, 15):
        for flip in (False, True):
            x, label, _ = images.load(index, flip)
            moments, same, _ = source.load(index, flip)
            assert label == same
            torch.testing.assert_close(moments, encode(vae, x[None])[0], rtol=1e-3, atol=1e-3)
    assert not torch.equal(source.load(0, False)[0], source.load(0, True)[0])
    assert source.fingerprint() == images.fingerprint()
    shutil.rmtree(folder)
    monkeypatch.setattr(latents, "SHARD", 20)  # other files of the same names
    make()
    assert torch.equal(LatentSource(folder, spec, "name").load(15, True)[0], moments)


def test_an_unreadable_image_is_replaced_as_in_a_folder_of_images(spec, make, tmp_path):
    plain_images(tmp_path / "damaged", 200)
    (tmp_path / "damaged" / "class0" / "035.png").write_bytes(b"")  # the eighth
    images, _, skipped, folder = make(tmp_path / "damaged")
    assert len(skipped) == 1 and "035.png" in skipped[0]
    source = LatentSource(folder, spec, "name")
    assert torch.equal(source.load(7)[0], source.load(8)[0]) and source.load(7)[1] == images.load(7)[1]


def test_each_unreadable_image_counts_once_and_a_mended_one_no_more(spec, make, tmp_path):
    plain_images(tmp_path / "damaged", 200)
    paths = sorted((tmp_path / "damaged" / "class0").iterdir())[3:5]  # one after another, 1 % of all
    whole = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_bytes(b"")
    *_, skipped, folder = make(tmp_path / "damaged")
    assert len(skipped) == 2
    for path, content in zip(paths, whole):
        path.write_bytes(content)
    (folder / "000000.npy").unlink()
    assert make(tmp_path / "damaged")[2] == []


@pytest.mark.parametrize("name", ["vae", "image_size", "num_classes", "flips", "images", "files"])
def test_a_manifest_without_an_entry_is_refused(spec, make, name):
    *_, folder = make()
    about = json.loads((folder / "latents.json").read_text())
    del about[name]
    (folder / "latents.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=f"is no folder of latents \\('{name}'\\): write one with --extract-latents"):
        LatentSource(folder, spec, "name")


@pytest.mark.parametrize("shape", [(16, 2, 8, 2, 2), (16, 2, 4, 4, 4), (16, 2, 8, 4), (16, 1, 8, 4, 4), ()])
def test_a_shard_of_another_shape_is_named(spec, make, shape):
    *_, folder = make()
    np.save(folder / "000000.npy", np.zeros(shape, np.float16))
    with pytest.raises(UserError, match="000000.npy cannot be read .*remove it and extract"):
        LatentSource(folder, spec, "name").load(3)


@pytest.mark.parametrize("content", [b"", b"PK\3\4"])
def test_damaged_labels_of_latents_are_refused(spec, make, content):
    *_, folder = make()
    (folder / "labels.npy").write_bytes(content)
    with pytest.raises(UserError, match="is no folder of latents"):
        LatentSource(folder, spec, "name")


def test_a_stopped_extraction_continues_and_keeps_its_shards(spec, make, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 6)
    *_, folder = make()
    (folder / "000001.npy").unlink()
    (folder / "labels.npy").unlink()
    kept = (folder / "000000.npy").stat().st_mtime_ns
    with pytest.raises(UserError, match="--extract-latents"):
        LatentSource(folder, spec, "name")
    make()
    assert (folder / "000000.npy").stat().st_mtime_ns == kept and len(LatentSource(folder, spec, "name")) == 16
    (folder / "000001.npy").unlink()
    with pytest.raises(UserError, match="not complete"):
        LatentSource(folder, spec, "name")


def test_latents_of_another_model_or_data_are_refused(spec, make, image_folder, tmp_path):
    images, *_, folder = make()
    other_spec = replace(spec, image_size=16, config=spec.config | {"num_classes": 6})
    with pytest.raises(UserError, match="different in vae, image_size, num_classes"):
        LatentSource(folder, other_spec, "other")
    shutil.copytree(image_folder, tmp_path / "other")
    (tmp_path / "other" / "class1" / "001.png").rename(tmp_path / "other" / "class2" / "001.png")
    with pytest.raises(UserError, match="different in files"):
        prepare_latents(ImageSource(tmp_path / "other", spec), spec, folder, "name")
    with pytest.raises(UserError, match="holds other files"):
        prepare_latents(images, spec, tmp_path / "other", "name")
    about = json.loads((folder / "latents.json").read_text())
    (folder / "latents.json").write_text(json.dumps(about | {"num_classes": 3}))
    with pytest.raises(UserError, match="labels outside 0 to 2"):
        LatentSource(folder, spec, "name")


def test_latents_have_the_labels_of_the_images(spec, make, tmp_path):
    for k, name in enumerate("edcba"):
        plain_images(tmp_path / "plain", 5)
        (tmp_path / "named").mkdir(exist_ok=True)
        (tmp_path / "plain" / f"class{k}").rename(tmp_path / "named" / name.upper())
    images, *_, folder = make(tmp_path / "named")
    assert LatentSource(folder, spec, "name").labels.tolist() == [label for _, label in images.files] == [0, 1, 2, 3, 4]
