import hashlib
import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, fork, random_dit
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import sampling
from diffusion import create_diffusion
from pretrained.loading import load_dit, load_vae
from pretrained.spec import model_spec
from router import Router
from runtime import devices
from runtime.cuda_graphs import GraphedFunction
from runtime.errors import UserError
from runtime.hashes import fingerprint
from runtime.noise import ImageNoise
from runtime.pictures import psnr, save_picture
from schedule import Schedule


def setup(steps=6, n=2):
    dit = random_dit()
    z = torch.randn(n, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    return dit, create_diffusion(steps), z, torch.arange(n)


def random_schedule(steps, depth, seed=0):
    torch.manual_seed(seed)
    return Router(steps, depth).schedule(0.5)


class NoDeviceRead(TorchDispatchMode):
    """Raises where a value leaves a tensor for Python, or a tensor moves between devices or is made from one."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "lift_fresh", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        moved = func.overloadpacket.__name__ == "_to_copy" and (kwargs or {}).get("device") is not None
        if moved or func.overloadpacket.__name__ in self.FORBIDDEN:
            raise AssertionError(f"{func} inside the denoising loop")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ancestral", [False, True])
def test_nothing_is_read_from_the_device_inside_the_denoising_loop(ancestral):
    dit, diffusion, z, y = setup()
    denoise = sampling.make_denoiser(dit, diffusion, y, 2.0, random_schedule(6, 3))
    loop = diffusion.ancestral_loop if ancestral else diffusion.ddim_loop
    with NoDeviceRead():
        loop(denoise, torch.cat([z, z]))


@pytest.mark.parametrize("ancestral", [False, True])
def test_the_loop_runs_on_a_device_that_holds_no_values(ancestral):
    """On `meta`, whatever would read a value or copy it to the host raises."""
    dit, diffusion, z, y = setup()
    dit, z, y = dit.to("meta"), z.to("meta"), y.to("meta")
    denoise = sampling.make_denoiser(dit, diffusion, y, 2.0, random_schedule(6, 3))
    loop = diffusion.ancestral_loop if ancestral else diffusion.ddim_loop
    assert loop(denoise, torch.cat([z, z])).shape == (4, 4, 4, 4)
    for read in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy):
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            read(z[0, 0, 0, 0])


@pytest.mark.parametrize(
    "read", [lambda x, i: x[0, 0, 0, 0].item(), lambda x, i: torch.tensor([i]), lambda x, i: x.to("meta")]
)
def test_that_check_sees_a_device_read(read):
    _, diffusion, z, _ = setup()

    def denoise(x, i):
        read(x, i)
        return torch.cat([x, x], dim=1)

    with pytest.raises(AssertionError, match="inside the denoising loop"), NoDeviceRead():
        diffusion.ddim_loop(denoise, z)


def test_a_schedule_that_computes_all_equals_no_cache_bit_for_bit():
    dit, diffusion, z, y = setup()
    full = sampling.sample_latents(dit, diffusion, z, y, 2.0, Schedule.full(6, 3))
    assert torch.equal(full, sampling.sample_latents(dit, diffusion, z, y, 2.0))


def test_a_schedule_changes_the_result_and_the_count_of_layers_that_run(monkeypatch):
    dit, diffusion, z, y = setup()
    schedule, calls = random_schedule(6, 3), []
    full = sampling.sample_latents(dit, diffusion, z, y, 2.0)
    for block in dit.blocks:
        for layer in (block.attn, block.mlp):
            layer.register_forward_hook(lambda *_: calls.append(1))
    assert not torch.allclose(full, sampling.sample_latents(dit, diffusion, z, y, 2.0, schedule), rtol=1e-3)
    assert len(calls) == schedule.compute.sum() < schedule.compute.numel()


@pytest.mark.parametrize("together", [1, 17, 10**6])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_step_has_its_own_modulation_however_many_are_computed_together(together, scale, monkeypatch):
    """Against the model called with each step's timestep; 17 are four steps of two samples with guidance, then two."""
    monkeypatch.setattr(sampling, "MODULATED", together)
    dit, diffusion, z, y = setup()
    t = torch.as_tensor(diffusion.timestep_map)
    labels = torch.cat([y, torch.full_like(y, dit.num_classes)])

    def plain(x, i):
        if scale == 1.0:
            return dit(x, t[i].expand(2), y)
        return dit.forward_with_cfg(x, t[i].expand(4), labels, scale)

    expected = diffusion.ddim_loop(plain, z if scale == 1.0 else torch.cat([z, z]))[:2]
    torch.testing.assert_close(
        sampling.sample_latents(dit, diffusion, z, y, scale), expected, rtol=1e-4, atol=1e-5 * expected.abs().max()
    )


@pytest.mark.parametrize("ancestral", [False, True])
def test_a_recorded_trajectory_is_that_of_its_arguments_and_its_results_stay(ancestral):
    """On a CPU, whose recording is the function on the same static tensors as a CUDA graph's."""
    dit, diffusion, z, y = setup()
    schedule = random_schedule(6, 3)
    recorded = sampling.CudaGraphSampler(dit, diffusion, 2.0, schedule, ancestral)
    results = []
    for seed, labels in ((0, y), (1, y + 2)):
        draws = [torch.Generator().manual_seed(seed) for _ in range(2)]
        noise = [lambda x, g=g: torch.randn(x.shape, generator=g) for g in draws]
        expected = sampling.sample_latents(dit, diffusion, z + seed, labels, 2.0, schedule, ancestral, noise[0])
        results.append((recorded(z + seed, labels, noise[1]), expected))
    assert all(torch.equal(result, expected) for result, expected in results)
    assert not torch.equal(*(result for result, _ in results))


def test_a_function_is_recorded_once_for_each_shape():
    calls = []
    recorded = GraphedFunction(lambda x: calls.append(x.data_ptr()) or x + 1)
    for n in (2, 3, 2):
        assert torch.equal(recorded(torch.full((n,), 5.0)), torch.full((n,), 6.0))
    # The third call has the tensor of the first.
    assert calls[0] == calls[2] != calls[1]


def test_compiled_blocks_are_four_graphs_without_breaks_and_compute_the_same():
    """Of two schedules with blocks that reuse neither layer, either, and both, and of none."""
    dit, diffusion, z, y = setup()
    compute = torch.ones(6, 3, 2, dtype=torch.bool)
    compute[0] = torch.tensor([[True, False], [False, True], [False, False]])
    compute[3] = torch.tensor([[False, False], [True, True], [True, False]])
    other = random_schedule(6, 3)
    compiled = random_dit()
    torch._dynamo.reset()
    counters.clear()
    devices.compile_blocks(compiled.blocks)
    for schedule in (Schedule(compute), other, None):
        expected = sampling.sample_latents(dit, diffusion, z, y, 2.0, schedule)
        actual = sampling.sample_latents(compiled, diffusion, z, y, 2.0, schedule)
        assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]


def test_several_precisions_and_sizes_compile_in_one_process():
    """Each takes four graphs, and torch by itself gives up at eight."""
    _, diffusion, z, y = setup()
    torch._dynamo.reset()
    counters.clear()
    for k, dtype in enumerate(("fp32", "bf16", "fp16"), 1):
        compiled = devices.set_precision(random_dit(), dtype)
        devices.compile_blocks(compiled.blocks, backend="eager")
        for images in (2, 1):
            latents = sampling.sample_latents(compiled, diffusion, z[:images], y[:images], 2.0, random_schedule(6, 3))
            assert latents.isfinite().all()
        assert counters["stats"]["unique_graphs"] >= 4 * k


def test_half_precision_keeps_the_cache_and_not_the_state():
    dit, diffusion, z, y = setup()
    full = sampling.sample_latents(dit, diffusion, z, y, 2.0)
    dit = devices.set_precision(dit, "bf16")
    cache = dit.empty_cache()
    output = dit(z, torch.tensor([10, 10]), y, cache=cache)
    assert output.dtype == torch.float32 and {slot.dtype for slots in cache for slot in slots} == {torch.bfloat16}
    assert sum(slot.nbytes for slots in cache for slot in slots) == dit.cache_bytes(2, torch.bfloat16)
    latents = sampling.sample_latents(dit, diffusion, z, y, 2.0)
    assert latents.dtype == torch.float32
    assert 0 < (latents - full).norm() < 0.1 * full.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("ancestral", [False, True])
def test_nothing_waits_for_a_gpu(ancestral, graphs):
    dit, diffusion, z, y = setup()
    dit, z, y = dit.to("cuda"), z.to("cuda"), y.to("cuda")
    plan = diffusion, 2.0, random_schedule(6, 3), ancestral
    if graphs:
        sample = sampling.CudaGraphSampler(dit, *plan)
    else:
        sample = lambda z, y: sampling.sample_latents(dit, plan[0], z, y, *plan[1:])  # noqa: E731
    sample(z, y)  # what happens once: tables are copied, a graph is recorded
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(z, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_graph_computes_what_it_recorded_on_a_gpu():
    dit, diffusion, z, y = setup()
    dit, z, y = dit.to("cuda"), z.to("cuda"), y.to("cuda")
    schedule = random_schedule(6, 3)
    recorded = sampling.CudaGraphSampler(devices.set_precision(dit, "fp32"), diffusion, 2.0, schedule)
    for noise, labels in ((z, y), (z + 1, y + 2)):
        expected = sampling.sample_latents(dit, diffusion, noise, labels, 2.0, schedule)
        torch.testing.assert_close(recorded(noise, labels), expected, rtol=1e-5, atol=1e-3)


def test_guidance_of_one_equals_the_plain_conditional_model():
    dit, diffusion, z, y = setup()
    t = torch.as_tensor(diffusion.timestep_map)
    plain = diffusion.ddim_loop(lambda x, i: dit(x, t[i].expand(2), y), z)
    torch.testing.assert_close(sampling.sample_latents(dit, diffusion, z, y, 1.0), plain, rtol=1e-5, atol=1e-3)
    # The doubled batch at a scale next to 1 must come to the same.
    torch.testing.assert_close(sampling.sample_latents(dit, diffusion, z, y, 1 + 1e-7), plain, rtol=1e-4, atol=1e-4)


def test_what_a_model_was_not_trained_for_is_refused():
    _, diffusion, z, y = setup()
    one_class_more, no_variance = random_dit(class_dropout_prob=0.0), random_dit(learn_sigma=False)
    with pytest.raises(UserError, match="guidance of 2.0 needs a null class.*--cfg-scale 1"):
        sampling.sample_latents(one_class_more, diffusion, z, y, 2.0)
    with pytest.raises(UserError, match="--p-sample needs a model that predicts variances"):
        sampling.sample_latents(no_variance, diffusion, z, y, 1.0, ancestral=True)
    assert sampling.sample_latents(one_class_more, diffusion, z, y, 1.0, ancestral=True).isfinite().all()
    assert sampling.sample_latents(no_variance, diffusion, z, y, 2.0).isfinite().all()


def test_each_image_is_independent_of_its_batch():
    dit, diffusion, z, y = setup(n=3)
    schedule = random_schedule(6, 3)
    together = sampling.sample_latents(dit, diffusion, z, y, 2.0, schedule)
    alone = sampling.sample_latents(dit, diffusion, z[1:2], y[1:2], 2.0, schedule)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)


def test_odd_step_counts_sample():
    dit, diffusion, z, y = setup(steps=5)
    assert sampling.sample_latents(dit, diffusion, z, y, 2.0, random_schedule(5, 3)).isfinite().all()


def test_ancestral_sampling_follows_the_noise_it_is_given():
    dit, diffusion, z, y = setup()

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        randn_like = lambda x: torch.randn(x.shape, generator=generator)  # noqa: E731
        return sampling.sample_latents(dit, diffusion, z, y, 2.0, ancestral=True, randn_like=randn_like)

    assert torch.equal(draw(1), draw(1))
    assert not torch.allclose(draw(1), draw(2))


def drawn(indices, **more):
    """The labels, the first noise and two further ones of the images `indices`."""
    draws = ImageNoise(3, indices, (4, 2, 2), 5, torch.device("cpu"), **more)
    assert torch.equal(draws.y, draws.labels)
    return draws.y, draws.z, draws.randn_like(draws.z), draws.randn_like(torch.cat([draws.z, draws.z]))


def test_an_image_draws_the_same_in_every_batch():
    y, z, first, second = drawn(range(10))
    assert torch.equal(second[:10], second[10:])  # both halves of a guidance batch
    for indices in ([7], [9, 2], range(4, 10)):
        y_again, z_again, first_again, second_again = drawn(indices)
        rows = list(indices)
        assert torch.equal(y_again, y[rows]) and torch.equal(z_again, z[rows])
        assert torch.equal(first_again, first[rows]) and torch.equal(second_again[: len(rows)], second[rows])


def test_draws_are_uniform_labels_and_independent_normal_noise():
    y, z, first, second = drawn(range(4000))
    counts = torch.bincount(y, minlength=5)
    assert counts.sum() == 4000 and ((counts - 800).abs() < 5 * 800**0.5).all()
    noise = torch.stack([z, first, second[:4000]]).flatten(2).double()
    assert noise.mean().abs() < 5 / noise.numel() ** 0.5 and (noise.var() - 1).abs() < 5 * (2 / noise.numel()) ** 0.5
    correlation = torch.corrcoef(noise.permute(0, 2, 1).flatten(0, 1))
    assert (correlation - torch.eye(48)).abs().max() < 6 / 4000**0.5
    other = ImageNoise(4, range(4000), (4, 2, 2), 5, torch.device("cpu"))
    assert (other.z * z).mean().abs() < 5 / z.numel() ** 0.5


def test_balanced_labels_take_turns_and_leave_the_noise_as_it_is():
    y, *noise = drawn(range(3, 15), balanced=True)
    assert y.tolist() == [3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert all(torch.equal(a, b) for a, b in zip(noise, drawn(range(3, 15))[1:]))


def test_a_schedule_for_another_sampler_is_refused():
    dit, diffusion, z, y = setup()
    for schedule in (Schedule.full(5, 3), Schedule.full(6, 2)):
        with pytest.raises(ValueError, match="the sampler runs 6 steps of 3 blocks"):
            sampling.sample_latents(dit, diffusion, z, y, 2.0, schedule)


TRAJECTORIES = """
import sys
import torch
torch.set_num_threads(1)
from test_sampling import digests
print(*digests({seeds}))
"""


def digests(seeds):
    """SHA-256 of the latents of one trajectory a seed, all of the same model and diffusion."""
    dit, diffusion, _, y = setup()
    for seed in seeds:
        schedule = random_schedule(6, 3, seed)
        z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
        latents = sampling.sample_latents(dit, diffusion, z, y, 2.0, schedule)
        yield hashlib.sha256(latents.numpy().tobytes()).hexdigest()


def test_two_trajectories_in_a_row_equal_two_fresh_processes(tmp_path):
    def process(*seeds):
        script = tmp_path / "trajectories.py"
        script.write_text(TRAJECTORIES.format(root=str(ROOT), tests=str(ROOT / "tests"), seeds=seeds))
        result = fork(script, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return result.stdout.split()

    one, two = process(1), process(2)
    assert one != two
    assert process(1, 2) == one + two


def test_pixels_are_rounded_clamped_and_channels_last(monkeypatch):
    class Identity:
        dtype = torch.float32

        class config:
            scaling_factor = 0.5
            block_out_channels = (1,)

        @staticmethod
        def decode(latents):
            return type("Decoded", (), {"sample": latents})

    latents = torch.tensor([-1.2, -1.0, 0.0, 1.0, 9.0]).reshape(1, 1, 1, 5).repeat(2, 3, 1, 1) * 0.5
    latents[1, 2] = 0.5 * (10 / 127.5 - 1)
    monkeypatch.setattr(sampling, "DECODE_PIXELS", 5)  # one image at a time
    images = sampling.decode(Identity, latents)
    assert (images.dtype, images.shape) == (torch.uint8, (2, 1, 5, 3))
    assert images[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert images[1, 0, :, 2].tolist() == [10] * 5


def test_every_level_is_quantised_as_published():
    """Against the formula in double precision: clamp(127.5 x + 128, 0, 255), cut."""

    class Given:
        dtype = torch.float32

        class config:
            scaling_factor = 1.0
            block_out_channels = (1,)

        @staticmethod
        def decode(latents):
            return type("Decoded", (), {"sample": latents.clone()})

    x = torch.linspace(-1.1, 1.1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    expected = np.clip(127.5 * x.double().numpy() + 128, 0, 255)
    safe = np.abs(expected - np.round(expected)) > 1e-4  # where float32 cannot fall on the other side
    got = sampling.decode(Given, x).permute(0, 3, 1, 2).numpy()
    assert safe.mean() > 0.9 and np.array_equal(got[safe], np.floor(expected)[safe])
    assert set(np.unique(got)) == set(range(256))


def test_the_hash_of_a_model_follows_every_weight_and_its_configuration():
    one, config = random_dit(), {"depth": 3}
    first = fingerprint(one, config)
    assert first == fingerprint(random_dit(), config) and len(first) == 64
    assert first != fingerprint(one, {"depth": 4})
    one.blocks[1].mlp.fc2.weight[5, 7] += 1e-6
    assert first != fingerprint(one, config)


def test_guidance_is_what_was_asked_then_what_the_folder_recommends_then_the_published(model_folder):
    folder, name = model_spec(ckpt=str(model_folder)), model_spec("DiT-S/8")
    assert folder.guidance(None, 1.5) == 2.0 and folder.guidance(0.0, 1.5) == 0.0
    assert name.guidance(None, 1.5) == 1.5 and name.guidance(3.0, 1.5) == 3.0


def test_psnr_of_a_known_error():
    a = torch.zeros(4, 4, dtype=torch.uint8)
    assert psnr(a, a + 1, 255) == pytest.approx(48.1308, abs=1e-3)  # 20 log10(255)
    assert psnr(a, a, 255) == float("inf")


def test_a_model_folder_needs_no_other_flag(model_folder):
    spec = model_spec(ckpt=str(model_folder))
    assert (spec.name, spec.image_size, spec.num_classes, spec.cfg_scale) == ("tiny", 8, 5, 2.0)
    assert spec.default_labels == [0, 1, 2, 3, 4]
    dit = load_dit(spec, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(dit.state_dict().values(), random_dit().state_dict().values()))
    images = sampling.decode(load_vae(spec, "cpu"), torch.randn(3, 4, 4, 4))
    assert images.shape == (3, 8, 8, 3)


def test_the_released_model_shows_the_eight_published_classes():
    spec = model_spec()
    assert spec.default_labels == [207, 992, 387, 974, 142, 979, 417, 279]
    assert spec.weights == "DiT-XL-2-256x256.pt"
    assert model_spec(image_size=512).config["input_size"] == 64


def test_weights_load_from_every_kind_of_file(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.setitem(sampling.DiT_models, "DiT-tiny/2", lambda **config: random_dit(**config))
    state = random_dit(input_size=32, seed=4).state_dict()
    torch.save(state, tmp_path / "released.pt")
    torch.save({"ema": state, "model": {}, "opt": {}}, tmp_path / "training.pt")
    save_file(state, tmp_path / "weights.safetensors")
    for path in tmp_path.iterdir():
        spec = model_spec("DiT-tiny/2", 256, 5, ckpt=str(path))
        loaded = load_dit(spec, "cpu").state_dict()
        assert all(torch.equal(loaded[name], state[name]) for name in state), path


def test_random_weights_come_from_the_seed_and_do_not_output_zero(model_folder):
    spec = model_spec(ckpt=str(model_folder))
    a, b, c = (load_dit(spec, "cpu", random_seed=seed) for seed in (1, 1, 2))
    x, t, y = torch.randn(1, 4, 4, 4), torch.tensor([5]), torch.tensor([0])
    assert a(x, t, y).any()
    assert torch.equal(a(x, t, y), b(x, t, y))
    assert not torch.allclose(a(x, t, y), c(x, t, y))


@pytest.mark.parametrize(
    "config",
    ["{", "[]", "{}", '{"model": 3, "image_size": 8, "vae": "vae"}', '{"model": {}, "image_size": 8}']
    + [f'{{"model": {{}}, "image_size": 8, "vae": "vae", "cfg_scale": {scale}}}' for scale in ("NaN", "-Infinity")],
)
def test_a_folder_with_a_damaged_configuration_is_refused(tmp_path, config):
    (tmp_path / "dit.safetensors").touch()
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match="config.json"):
        model_spec(ckpt=str(tmp_path))


def test_a_folder_with_unknown_arguments_or_other_weights_is_refused(model_folder, tmp_path):
    config = json.loads((model_folder / "config.json").read_text())
    (tmp_path / "dit.safetensors").write_bytes((model_folder / "dit.safetensors").read_bytes())
    for change, words in (
        ({"depht": 3}, "depht"),
        ({"depth": 4}, "does not fit"),
        ({"patch_size": 3}, "multiple"),
        ({"num_heads": 0}, "num_heads 0 is not a positive"),
        ({"num_classes": "10"}, "num_classes '10' is not a positive"),
        ({"frequency_shift": 128}, "frequency_shift 128 is neither 0 nor 1"),
        ({"mlp_norm_eps": "x"}, "mlp_norm_eps 'x' is not a positive number"),
        ({"mlp_norm_eps": math.inf}, "mlp_norm_eps inf is not a positive number"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {"model": config["model"] | change}))
        with pytest.raises(UserError, match=words):
            load_dit(model_spec(ckpt=str(tmp_path)), "cpu")


def test_a_damaged_vae_or_one_of_another_model_is_refused(model_folder, tmp_path):
    import shutil

    shutil.copytree(model_folder, tmp_path / "m")
    folder = tmp_path / "m"
    config = json.loads((folder / "vae" / "config.json").read_text())
    model = json.loads((folder / "config.json").read_text())
    for change, words in (({"latent_channels": 3}, "cannot be read"), ({"block_out_channels": 3}, "cannot be read")):
        (folder / "vae" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=words):
            load_vae(model_spec(ckpt=str(folder)), "cpu")
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps(model | {"image_size": 16}))
    with pytest.raises(UserError, match="2 pixels to a cell"):
        load_vae(model_spec(ckpt=str(folder)), "cpu")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(UserError, match="cannot be read"):
        load_vae(model_spec(ckpt=str(folder)), "cpu")


def test_each_group_of_a_picture_starts_a_new_row(tmp_path):
    import numpy as np
    from PIL import Image

    dark, grey = torch.zeros(3, 96, 96, 3, dtype=torch.uint8), torch.full((1, 96, 96, 3), 100, dtype=torch.uint8)
    save_picture([dark, grey], tmp_path / "x.png", columns=2)
    cells = np.asarray(Image.open(tmp_path / "x.png"))[50::98, 50::98, 0]
    assert cells.tolist() == [[0, 0], [0, 255], [100, 255]]


def test_models_without_released_weights_ask_for_a_checkpoint():
    for spec in (model_spec("DiT-S/2"), model_spec(num_classes=7)):
        with pytest.raises(UserError, match="--ckpt"):
            load_dit(spec, "cpu")
    with pytest.raises(UserError, match="unknown model"):
        model_spec("DiT-XXL/2")
