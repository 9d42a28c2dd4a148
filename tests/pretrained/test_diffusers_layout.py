"""Checkpoints of others: prefixes, pickles, and the layout of diffusers against diffusers' own model."""

import argparse
import fnmatch
import json
import os
import shutil
from functools import partial

import huggingface_hub
import pytest
import torch
from conftest import ROOT, assert_refused, call, random_dit, random_vae, run
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from models import DiT, DiT_models, position_table
from pretrained.diffusers_layout import WEIGHTS, dit_from_transformer, to_diffusers
from pretrained.loading import load_dit
from pretrained.spec import model_spec
from pretrained.weights import load_state_dict_of
from router import Router
from runtime import released
from runtime.errors import UserError

SAFE, PICKLED = WEIGHTS


def refused(call, *args, **kwargs):
    """The message of the UserError that the call raises."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# Files of weights.


STATE = {"x_embedder.weight": torch.arange(6.0).reshape(2, 3), "y": torch.ones(2, dtype=torch.float16)}
OTHER = {"y": torch.zeros(1)}


def same(one, two):
    return list(one) == list(two) and all(torch.equal(one[key], two[key]) for key in one)


def prefixed(prefix):
    return {prefix + key: value for key, value in STATE.items()}


@pytest.mark.parametrize(
    "checkpoint",
    [
        STATE,
        {"model": OTHER, "ema": STATE, "opt": {"lr": 1e-4}, "args": argparse.Namespace(model="DiT-XL/2")},
        {"model": STATE},
        {"model": STATE, "ema": None},
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        prefixed("_orig_mod.module."),
        {"ema": prefixed("module."), "model": OTHER},
        {"model": prefixed("_orig_mod.module.")},
    ],
    ids=lambda checkpoint: " ".join(checkpoint),
)
def test_find_model_reads(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "x.pt")
    assert same(load_state_dict_of(str(tmp_path / "x.pt")), STATE)


def test_find_model_reads_what_compiled_and_distributed_models_save(tmp_path):
    dit = random_dit()
    module = torch.nn.Module()  # as DistributedDataParallel holds a model
    module.module = torch.compile(dit)
    torch.save({"ema": torch.compile(dit).state_dict(), "model": OTHER}, tmp_path / "one.pt")
    torch.save(module.state_dict(), tmp_path / "two.pt")
    for name in ("one.pt", "two.pt"):
        assert same(load_state_dict_of(tmp_path / name), dit.state_dict())


def test_find_model_reads_safetensors(tmp_path):
    save_file(STATE, tmp_path / "x.safetensors")
    read = load_state_dict_of(tmp_path / "x.safetensors")  # in any order
    assert same({name: read[name] for name in STATE}, STATE) and len(read) == len(STATE)


def test_find_model_fetches_a_released_name(tmp_path, monkeypatch):
    torch.save(STATE, tmp_path / "x.pt")
    monkeypatch.setattr(released, "find", {"DiT-XL-2-256x256.pt": tmp_path / "x.pt"}.get)
    assert same(load_state_dict_of("DiT-XL-2-256x256.pt"), STATE)


@pytest.mark.parametrize(
    "checkpoint",
    [{}, [torch.ones(1)], torch.ones(1), {"epoch": 3}, {"ema": {}}, {1: torch.ones(1)}, {"model": {"y": "text"}}],
    ids=str,
)
def test_find_model_refuses_what_is_no_state_dict(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "x.pt")
    message = refused(load_state_dict_of, tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in message and "state_dict()" in message


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["x.pt", PICKLED])
def test_find_model_does_not_run_what_is_in_a_file(tmp_path, name):
    torch.save({"ema": STATE, "args": Hostile(tmp_path / "ran")}, tmp_path / name)
    assert str(tmp_path / name) in refused(load_state_dict_of, tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["x.pt", SAFE])
def test_find_model_refuses_a_file_that_was_cut_off(tmp_path, name):
    (save_file if name == SAFE else torch.save)(STATE, tmp_path / name)
    os.truncate(tmp_path / name, 100)
    assert str(tmp_path / name) in refused(load_state_dict_of, tmp_path / name)


def test_positions_that_a_checkpoint_leaves_out_are_the_fixed_ones(tmp_path):
    state = random_dit(input_size=32, hidden_size=384, depth=12, num_heads=6, patch_size=8, num_classes=5).state_dict()
    del state["pos_embed"]
    torch.save(state, tmp_path / "x.pt")
    spec = model_spec("DiT-S/8", 256, num_classes=5, ckpt=str(tmp_path / "x.pt"))
    assert torch.equal(load_dit(spec, "cpu").pos_embed, position_table(384, 4))


# The layout of diffusers.


def random_transformer(seed=0, **config):
    """A small DiTTransformer2DModel whose every parameter is random, the embedders alike in all blocks."""
    torch.manual_seed(seed)
    sizes = dict(num_attention_heads=2, attention_head_dim=12, out_channels=8, num_layers=3, sample_size=4)
    transformer = DiTTransformer2DModel(**(sizes | {"num_embeds_ada_norm": 5} | config)).eval().requires_grad_(False)
    for parameter in transformer.parameters():
        parameter.normal_(std=0.2)
    first = transformer.transformer_blocks[0].norm1.emb.state_dict()
    for block in transformer.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return transformer


def fixed_dit(**config):
    """`random_dit` with the fixed positions, which are all that diffusers has."""
    dit = random_dit(**config)
    dit.pos_embed.copy_(position_table(24, dit.input_size // dit.patch_size))
    return dit


def difference(dit, transformer):
    """The largest difference of the outputs of both models, in parts of the largest value."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, dit.in_channels, dit.input_size, dit.input_size, generator=generator)
    t = torch.tensor([0, 1, 333, 750, 999])
    y = torch.tensor([0, 1, 2, dit.num_classes - 1, dit.num_classes])
    with torch.no_grad():
        ours, theirs = dit(x, t, y), transformer(x, timestep=t, class_labels=y).sample
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"out_channels": None},
        {"patch_size": 4, "sample_size": 8},
        {"norm_eps": 1e-2},
        {"in_channels": 3, "out_channels": 6},
    ],
    ids=str,
)
def test_a_dit_computes_what_the_model_of_diffusers_does_that_it_is_loaded_from(tmp_path, config):
    transformer = random_transformer(**config)
    assert difference(dit_from_transformer(transformer), transformer) < 1e-5
    transformer.save_pretrained(tmp_path)
    dit = load_dit(model_spec(ckpt=str(tmp_path)), "cpu")
    assert difference(dit, transformer) < 1e-5
    assert dit.y_embedder.embedding_table.num_embeddings == 6


@pytest.mark.parametrize(
    "config",
    [{}, {"learn_sigma": False}, {"input_size": 8, "patch_size": 4}, {"frequency_shift": 1, "mlp_norm_eps": 1e-5}],
    ids=str,
)
def test_the_model_of_diffusers_computes_what_the_dit_does_that_it_is_made_from(tmp_path, config):
    dit = fixed_dit(**config)
    transformer = to_diffusers(dit)
    assert difference(dit, transformer) < 1e-5
    assert same(dit_from_transformer(transformer).state_dict(), dit.state_dict())
    transformer.save_pretrained(tmp_path)
    loaded = load_dit(model_spec(ckpt=str(tmp_path)), "cpu")
    assert same(loaded.state_dict(), dit.state_dict())
    assert difference(loaded, transformer) < 1e-5


def test_diffusers_itself_needs_one_line_to_run_a_dit_as_it_was_trained(tmp_path):
    dit = fixed_dit()
    to_diffusers(dit).save_pretrained(tmp_path)
    transformer = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert difference(dit, transformer) > 0.1
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    assert difference(dit, transformer) < 1e-5
    assert difference(dit_from_transformer(transformer), transformer) < 1e-5


def test_the_frequencies_of_diffusers_change_what_a_trained_model_predicts():
    dit = load_dit(model_spec(ckpt=str(ROOT / "ckpt" / "fashion_mnist")), "cpu")
    x, y = torch.randn(40, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 10
    t, noise = torch.full((40,), 500), []
    for shift in (0, 1):
        dit.t_embedder.frequency_shift = shift
        with torch.no_grad():
            noise.append(dit(x, t, y)[:, :4])
    own, other = noise
    assert ((own - other).square().mean() / own.square().mean()).sqrt().item() == pytest.approx(0.028, abs=5e-4)


def test_half_precision_stays_half_precision():
    assert to_diffusers(fixed_dit().to(torch.bfloat16)).dtype == torch.bfloat16
    assert {p.dtype for p in dit_from_transformer(random_transformer().to(torch.float16)).parameters()} == {
        torch.float16
    }


def test_what_diffusers_cannot_be_is_refused():
    with pytest.raises(ValueError, match="positions"):
        to_diffusers(random_dit())
    with pytest.raises(ValueError, match="wide"):
        to_diffusers(fixed_dit(mlp_ratio=2.0))
    with pytest.raises(ValueError, match="null class"):
        to_diffusers(fixed_dit(class_dropout_prob=0.0))


# Folders and Hub names, as the programs see them.


def rewrite(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def as_published(transformer):
    """Rewrites a saved transformer to how facebook/DiT-XL-2-256 keeps one."""
    config = json.loads((transformer / "config.json").read_text())
    del config["norm_eps"]
    more = {"cross_attention_dim": None, "num_vector_embeds": None, "only_cross_attention": False}
    more |= {"_class_name": "Transformer2DModel", "use_linear_projection": False}
    (transformer / "config.json").write_text(json.dumps(config | more))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A folder with a DiTPipeline of diffusers, as published, and a router for it; 8x8 pixels, five classes."""
    folder = tmp_path_factory.mktemp("pipelines") / "theirs"
    random_transformer().save_pretrained(folder / "transformer")
    as_published(folder / "transformer")
    random_vae().save_pretrained(folder / "vae")
    names = {str(k): f"{name}, another word" for k, name in enumerate(["tench", "hen", "ox", "cat", "fly"])}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", "id2label": names}))
    Router(4, 3, torch.Generator().manual_seed(0)).save(folder / "router.pt")
    return folder


@pytest.fixture
def copied(pipeline, tmp_path):
    return shutil.copytree(pipeline, tmp_path / "copied")


@pytest.fixture
def sample(tmp_path, monkeypatch, capfd):
    """Runs sample.py in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)
    common = ["--device", "cpu", "--num-sampling-steps", 4, "--ddim-sample", "--repeats", 1, "--out", "x.png"]
    return lambda ckpt, *more: call("sample.py", *common, "--ckpt", ckpt, *more, capfd=capfd)


def test_a_pipeline_folder_is_all_that_sample_needs(pipeline, sample, tmp_path):
    result = sample(pipeline, "--accelerate-method", "dynamiclayer", "--path", pipeline / "router.pt", "--thres", 0.5)
    assert result.returncode == 0, result.stderr
    assert "Classes: tench, hen, ox, cat\n" in result.stdout and (tmp_path / "x.png").exists()


def test_a_pipeline_folder_says_everything_about_its_model(pipeline):
    spec = model_spec(ckpt=str(pipeline))
    assert (spec.name, spec.image_size, spec.num_classes, spec.registered) == ("theirs", 8, 5, False)
    assert (spec.vae, spec.config["frequency_shift"], spec.config["mlp_norm_eps"]) == (str(pipeline / "vae"), 1, 1e-5)


def test_a_transformer_folder_runs_with_the_released_vae(pipeline, monkeypatch, sample):
    monkeypatch.setattr(released, "fetch_vae", lambda kind: pipeline / "vae")
    # Its cells are taken for the released VAE's, of eight pixels.
    assert_refused(sample(pipeline / "transformer"), "2 pixels to a cell", "4 cells for 32 pixels")
    spec = model_spec(ckpt=str(pipeline / "transformer"), vae="ema")
    assert (spec.name, spec.image_size, spec.vae, spec.class_names) == ("transformer", 32, "ema", None)


def test_older_pickles_are_read_where_there_are_no_safetensors(copied, pipeline, sample):
    for part in ("transformer", "vae"):
        torch.save(load_file(copied / part / SAFE), copied / part / PICKLED)
        (copied / part / SAFE).unlink()
    result = sample(copied)
    assert result.returncode == 0, result.stderr
    one, two = (
        load_state_dict_of(folder / "transformer" / name) for folder, name in ((copied, PICKLED), (pipeline, SAFE))
    )
    assert same(one, two)


def test_the_weights_of_a_folder_alone_are_a_dit_as_the_original_is(tmp_path, monkeypatch):
    monkeypatch.setitem(DiT_models, "DiT-S/8", partial(DiT, patch_size=8, hidden_size=24, depth=3, num_heads=2))
    dit = fixed_dit(input_size=32, patch_size=8)
    to_diffusers(dit).save_pretrained(tmp_path)
    spec = model_spec("DiT-S/8", 256, num_classes=5, ckpt=str(tmp_path / SAFE))
    loaded = load_dit(spec, "cpu")
    assert same(loaded.state_dict(), dit.state_dict()) and loaded.t_embedder.frequency_shift == 0


def test_sample_ddp_and_train_router_take_a_pipeline_folder(pipeline, image_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    common = ["--device", "cpu", "--ckpt", pipeline, "--num-sampling-steps", 4]
    training = ["--data-path", image_folder, "--global-batch-size", 4, "--draws-per-step", 2, "--num-workers", 0]
    result = call("train_router.py", *common, *training, "--max-steps", 1, capfd=capfd)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "results" / "000-theirs").is_dir() and f"sample.py --ckpt {pipeline} --num" in result.stdout
    result = call("sample_ddp.py", *common, "--num-fid-samples", 3, capfd=capfd)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "samples" / "theirs-size-8-cfg-1.5-seed-0-ddim-4-n-3.npz").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_type": "ada_norm_single"}, ["norm_type", "ada_norm_single"]),
        ({"activation_fn": "geglu"}, ["activation_fn", "geglu"]),
        ({"attention_bias": False}, ["attention_bias"]),
        ({"out_channels": 5}, ["out_channels is 5"]),
        ({"num_attention_heads": "two"}, ["num_attention_heads is 'two'"]),
        ({"attention_head_dim": 7}, ["hidden_size 14"]),
        ({"sample_size": None}, ["sample_size is None"]),
        ({"norm_eps": "small"}, ["norm_eps is 'small'"]),
        ({"frequency_shift": 256}, ["frequency_shift is 256"]),
        ({"num_layers": 2}, ["does not fit"]),
        ({"num_embeds_ada_norm": 7}, ["does not fit"]),
        ({"_class_name": "UNet2DModel"}, ["UNet2DModel", "DiTTransformer2DModel"]),
    ],
    ids=str,
)
def test_a_model_that_is_no_dit_is_refused_in_one_line(copied, sample, changes, words):
    rewrite(copied / "transformer" / "config.json", **changes)
    assert_refused(sample(copied), copied.name, *words)


def test_a_damaged_folder_is_refused_in_one_line(copied, sample, tmp_path):
    vae = (copied / "vae" / "config.json").read_text()
    for damaged in ("{", "[]", json.dumps({"block_out_channels": 3})):
        (copied / "vae" / "config.json").write_text(damaged)
        assert_refused(sample(copied), "vae")
    (copied / "vae" / "config.json").write_text(vae)
    state = load_file(copied / "transformer" / SAFE)

    def with_weights(state):
        save_file(state, copied / "transformer" / SAFE)
        return sample(copied)

    name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    assert_refused(with_weights(state | {name: state[name] + 1}), name, "differs")
    assert_refused(with_weights({key: value for key, value in state.items() if key != name}), name, "missing")
    assert_refused(with_weights(state | {"more": torch.ones(1)}), "more", "unknown")
    name = "transformer_blocks.1.attn1.to_k.weight"
    assert_refused(with_weights(state | {name: torch.ones(24, 23)}), SAFE)
    os.truncate(copied / "transformer" / SAFE, 1000)
    assert_refused(sample(copied), SAFE, "cut off")
    (copied / "transformer" / SAFE).unlink()
    assert_refused(sample(copied), SAFE, PICKLED)
    torch.save({"args": Hostile(tmp_path / "ran")}, copied / "transformer" / PICKLED)
    assert_refused(sample(copied), PICKLED, "was not loaded")
    assert not (tmp_path / "ran").exists()
    (copied / "transformer" / "config.json").write_text("{")
    assert_refused(sample(copied), "config.json")
    (copied / "transformer" / "config.json").unlink()
    assert_refused(sample(copied), "config.json")
    (copied / "model_index.json").write_text("[]")
    assert_refused(sample(copied), "model_index.json")


@pytest.mark.parametrize("pickled", [False, True])
def test_of_a_hub_name_only_what_is_needed_is_fetched(copied, tmp_path, monkeypatch, sample, pickled):
    for part in ("transformer", "vae"):
        torch.save(load_file(copied / part / SAFE), copied / part / PICKLED)
        if pickled:
            (copied / part / SAFE).unlink()
    (copied / "picture.png").write_bytes(b"")
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(name)
        for file in (path for path in copied.rglob("*") if path.is_file()):
            relative = str(file.relative_to(copied))
            if any(fnmatch.fnmatch(relative, pattern) for pattern in allow_patterns):
                (tmp_path / "cache" / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / "cache" / relative)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    result = sample("someone/theirs")
    assert result.returncode == 0, result.stderr
    assert asked == ["someone/theirs"] * (1 + pickled)
    there = {str(path.relative_to(tmp_path / "cache")) for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    weights = PICKLED if pickled else SAFE
    parts = {f"{part}/{file}" for part in ("transformer", "vae") for file in ("config.json", weights)}
    assert there == parts | {"model_index.json"}
    assert model_spec(ckpt="someone/theirs").name == "theirs"


def test_a_hub_name_is_read_from_the_cache_without_a_network(pipeline, tmp_path):
    repo = tmp_path / "hub" / "models--someone--theirs"
    shutil.copytree(pipeline, repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    flags = ["--device", "cpu", "--num-sampling-steps", 4, "--repeats", 1, "--out", "x.png"]
    result = run("sample.py", "--ckpt", "someone/theirs", *flags, cwd=tmp_path, HF_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr


def test_a_hub_name_that_cannot_be_fetched_is_refused_in_one_line(monkeypatch, sample):
    def snapshot_download(*args, **kwargs):
        raise ConnectionError("Name or service not known\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_refused(
        sample("someone/theirs"), "someone/theirs", "Hub (Name or service not known)", "download it elsewhere"
    )


@pytest.mark.parametrize("name", ["no/such/folder", "gone.pt", "ckpt/gone.safetensors", "ckpt/gone.bin", "../gone"])
def test_a_path_that_is_no_hub_name_is_only_looked_for_here(sample, name):
    assert_refused(sample(name), f"no such file: {name}")
