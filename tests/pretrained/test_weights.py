"""State dicts from the files of others, and folders of the Hugging Face Hub."""

import argparse
import fnmatch
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import random_dit
from safetensors.torch import load_file, save_file
from small_models import Hostile, load, refusal, same, save_pipeline

from pretrained.diffusers_layout import WEIGHTS
from pretrained.spec import model_spec
from pretrained.weights import find_model_folder, load_state_dict_of
from runtime import released

SAFE, PICKLED = WEIGHTS
STATE = {"x_embedder.weight": torch.arange(6.0).reshape(2, 3), "y": torch.ones(2, dtype=torch.float16)}
OTHER = {"y": torch.zeros(1)}


def prefixed(prefix):
    return {prefix + key: value for key, value in STATE.items()}


@pytest.mark.parametrize(
    "checkpoint",
    [
        STATE,
        {"model": OTHER, "ema": STATE, "opt": {"lr": 1e-4}, "args": argparse.Namespace(model="DiT-XL/2")},
        {"model": STATE, "ema": None},
        {"ema": prefixed("module."), "model": OTHER},
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        {"model": prefixed("_orig_mod.module.")},
    ],
    ids=lambda checkpoint: " ".join(checkpoint),
)
def test_checkpoints_give_their_averaged_weights_without_prefixes(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "x.pt")
    assert same(load_state_dict_of(str(tmp_path / "x.pt")), STATE)


def test_compiled_and_distributed_models_give_their_weights(tmp_path):
    dit = random_dit()
    module = torch.nn.Module()  # as DistributedDataParallel holds a model
    module.module = torch.compile(dit)
    torch.save(module.state_dict(), tmp_path / "x.pt")
    assert same(load_state_dict_of(tmp_path / "x.pt"), dit.state_dict())


def test_released_names_are_fetched_and_safetensors_read(tmp_path, monkeypatch):
    save_file(STATE, tmp_path / "x.safetensors")
    monkeypatch.setattr(released, "find", {"DiT-XL-2-256x256.pt": tmp_path / "x.safetensors"}.get)
    assert same(load_state_dict_of("DiT-XL-2-256x256.pt"), STATE)


@pytest.mark.parametrize(
    "content",
    [
        {},
        [torch.ones(1)],
        torch.ones(1),
        torch.ones(2),
        {"epoch": 3},
        {"ema": {}},
        {1: OTHER["y"]},
        {"model": {"y": "z"}},
    ],
    ids=str,
)
def test_files_without_a_state_dict_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    message = refusal(load_state_dict_of, tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in message and "state_dict()" in message


@pytest.mark.parametrize("name", ["x.pt", PICKLED])
def test_code_in_a_file_is_not_run(tmp_path, name):
    torch.save({"ema": STATE, "args": Hostile(tmp_path / "ran")}, tmp_path / name)
    assert str(tmp_path / name) in refusal(load_state_dict_of, tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["x.pt", SAFE])
def test_files_that_were_cut_off_are_refused(tmp_path, name):
    (save_file if name == SAFE else torch.save)(STATE, tmp_path / name)
    os.truncate(tmp_path / name, 100)
    assert str(tmp_path / name) in refusal(load_state_dict_of, tmp_path / name)


@pytest.mark.parametrize("pickled", [False, True])
def test_only_the_needed_files_of_a_hub_model_are_fetched(tmp_path, monkeypatch, pickled):
    hub, cache = save_pipeline(tmp_path / "hub"), tmp_path / "cache"
    for part in ("transformer", "vae"):
        torch.save(load_file(hub / part / SAFE), hub / part / PICKLED)
        if pickled:
            (hub / part / SAFE).unlink()
    (hub / "picture.png").write_bytes(b"")

    def snapshot_download(name, allow_patterns):
        assert name == "someone/theirs"
        for file in (path for path in hub.rglob("*") if path.is_file()):
            copy = cache / file.relative_to(hub)
            if any(fnmatch.fnmatch(str(file.relative_to(hub)), pattern) for pattern in allow_patterns):
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    spec = model_spec(ckpt="someone/theirs")
    assert (spec.name, spec.vae) == ("theirs", str(cache / "vae"))
    weights = PICKLED if pickled else SAFE
    parts = {f"{part}/{file}" for part in ("transformer", "vae") for file in ("config.json", weights)}
    fetched = {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}
    assert fetched == parts | {"model_index.json"}
    assert same(load("someone/theirs").state_dict(), load(hub).state_dict())


def test_a_hub_model_is_read_from_the_cache_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--theirs"
    folder = save_pipeline(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert find_model_folder("someone/theirs") == folder
    message = refusal(find_model_folder, "someone/missing")
    assert "someone/missing" in message and "download it elsewhere" in message


@pytest.mark.parametrize("name", ["no/such/folder", "gone.pt", "ckpt/gone.safetensors", "ckpt/gone.bin", "../gone"])
def test_a_path_that_is_no_hub_name_is_not_looked_up_on_the_hub(name):
    assert find_model_folder(name) == Path(name)
    assert f"no such file: {name}" in refusal(load, name)
