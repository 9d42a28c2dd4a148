"""Our VAE against diffusers' AutoencoderKL: the same names, settings and bits."""

import json

import pytest
import torch
from conftest import random_vae
from diffusers import AutoencoderKL

from pretrained import autoencoder
from pretrained.loading import load_vae
from pretrained.spec import model_spec
from runtime.hashes import fingerprint


def blocks(levels):
    return {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}


CONFIGS = {
    "defaults": {},
    "three levels": {**blocks(3), "block_out_channels": [8, 16, 16], "norm_num_groups": 4, "layers_per_block": 2},
    "without attention": {"mid_block_add_attention": False, "block_out_channels": [32], "shift_factor": 0.25},
    "16 channels": {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16, "act_fn": "swish"},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("images", [1, 65])  # diffusers treats 64 and more in another way
def test_it_computes_what_diffusers_computes(config, images):
    assert autoencoder.fits(config)
    torch.manual_seed(0)
    theirs, ours = AutoencoderKL.from_config(config).eval(), autoencoder.AutoencoderKL(config).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())  # the order is part of fingerprints
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(images, 3, 16, 16) * 2 - 1
    with torch.inference_mode():
        moments = theirs.encode(x).latent_dist.parameters
        assert moments.std() > 1e-3 and torch.equal(ours.encode(x).latent_dist.parameters, moments)
        z = moments.chunk(2, 1)[0]
        assert torch.equal(ours.decode(z).sample, theirs.decode(z).sample)
    settings = [{k: v for k, v in vae.config.items() if not k.startswith("_")} for vae in (ours, theirs)]
    assert json.dumps(settings[0], sort_keys=True) == json.dumps(settings[1], sort_keys=True)
    assert fingerprint(ours, settings[0]) == fingerprint(theirs, settings[1])


@pytest.mark.parametrize(
    "change",
    [
        {"act_fn": "gelu"},
        {"norm_type": "spatial"},
        {"down_block_types": ["AttnDownEncoderBlock2D"]},
        {"up_block_types": ["UpDecoderBlock2D"] * 2},
        {"block_out_channels": [48]},  # 32 groups
        {"block_out_channels": []},
        {"latent_channels": "4"},
        {"layers_per_block": 0},
        {"norm_num_groups": True},
        {"use_quant_conv": 1},
        {"sample_size": [32, 32]},
    ],
)
def test_other_settings_are_left_to_diffusers(change):
    assert autoencoder.fits({"_class_name": "AutoencoderKL"}) and not autoencoder.fits(change)


def test_load_vae_takes_diffusers_for_what_ours_has_not(model_folder, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model_folder.iterdir():
        if path.name != "vae":
            (folder / path.name).symlink_to(path)
    random_vae().save_pretrained(folder / "vae")
    assert isinstance(load_vae(model_spec(ckpt=str(folder)), "cpu"), autoencoder.AutoencoderKL)
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"act_fn": "gelu"}))
    assert isinstance(load_vae(model_spec(ckpt=str(folder)), "cpu"), AutoencoderKL)
