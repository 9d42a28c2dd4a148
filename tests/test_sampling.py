from collections import deque
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, random_dit
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import sampling
from diffusion import create_diffusion
from models import apply_layer, guided, remember
from pretrained.loading import load_dit
from pretrained.spec import model_spec
from router import Router, router_loss
from runtime import devices
from runtime.cuda_graphs import GraphedFunction
from runtime.errors import UserError
from runtime.noise import ImageNoise
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


@pytest.mark.parametrize("rows", [1, 17, 10**6])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_each_step_has_its_own_modulations_however_many_steps_are_computed_at_once(rows, scale, monkeypatch):
    """Against the model called with each step's timestep; 17 rows with guidance are four steps, then two."""
    monkeypatch.setattr(sampling, "MODULATION_ROWS", rows)
    dit, diffusion, z, y = setup()
    t = torch.as_tensor(diffusion.timestep_map)
    labels = torch.cat([y, torch.full_like(y, dit.num_classes)])

    def plain(x, i):
        if scale == 1.0:
            return dit(x, t[i].expand(2), y)
        return guided(dit(x[:2].repeat(2, 1, 1, 1), t[i].expand(4), labels), scale)

    expected = diffusion.ddim_loop(plain, z if scale == 1.0 else torch.cat([z, z]))[:2]
    torch.testing.assert_close(
        sampling.sample_latents(dit, diffusion, z, y, scale), expected, rtol=1e-4, atol=1e-5 * expected.abs().max()
    )


@pytest.mark.parametrize("labels", [[3], [0, 0, 7], [1, 10] * 6, list(range(9, -1, -1))])
@pytest.mark.parametrize("guidance", [False, True])
def test_modulations_are_computed_once_for_the_null_class_and_at_most_once_for_each_of_few_classes(labels, guidance):
    dit = SimpleNamespace(num_classes=10, label_dropout=0.1)
    distinct, rows = sampling._distinct_labels(dit, torch.tensor(labels), guidance)
    assert distinct[rows].tolist() == labels + [10] * (len(labels) * guidance)
    assert len(distinct) == min(len(labels) + guidance, 11)


@pytest.mark.parametrize("ancestral", [False, True])
def test_a_recorded_trajectory_is_that_of_its_arguments_and_its_results_stay(ancestral):
    """On a CPU, whose recording is the function on the same static tensors as a CUDA graph's."""
    dit, diffusion, z, y = setup()
    schedule = random_schedule(6, 3).with_order(2)
    recorded = sampling.CudaGraphSampler(dit, diffusion, 2.0, schedule, ancestral)
    results = []
    for seed, labels in ((0, y), (1, y + 2)):
        draws = [torch.Generator().manual_seed(seed) for _ in range(2)]
        noise = [lambda x, g=g: torch.randn(x.shape, generator=g) for g in draws]
        expected = sampling.sample_latents(dit, diffusion, z + seed, labels, 2.0, schedule, ancestral, noise[0])
        results.append((recorded(z + seed, labels, noise[1]), expected))
    assert all(torch.equal(result, expected) for result, expected in results)
    assert not torch.equal(*(result for result, _ in results))


@pytest.mark.parametrize("order", [1, 2])
def test_forecasts_are_exact_for_outputs_that_are_polynomials_of_the_step(order):
    """A layer whose output at step i is a polynomial of i, with gaps of 1 to 4 steps between the computed ones."""
    steps, degrees = 30, torch.arange(order + 1, dtype=torch.float64)
    coefficients = torch.randn(order + 1, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    compute = torch.zeros(steps, 1, 2, dtype=torch.bool)
    compute[[29, 28, 25, 23, 19, 18, 14, 10, 7]] = True
    rows, slot, forecasts = Schedule(compute, order).rows(), deque(maxlen=order + 1), 0
    for i in range(steps - 1, -1, -1):
        exact = (coefficients * (i / steps) ** degrees.reshape(-1, 1, 1, 1)).sum(0)
        x, gate = torch.ones(2, 3, 4, dtype=torch.float64), torch.full((2, 1, 4), 0.5, dtype=torch.float64)
        added, output = apply_layer(x, gate, lambda exact=exact: exact, rows[i][0][0], slot)
        remember(slot, rows[i][0][0], output)
        if i < 25:  # two, then three outputs are there
            torch.testing.assert_close(added, x + gate * exact, rtol=1e-9, atol=1e-9)
            forecasts += output is None
    assert forecasts == 19


@pytest.mark.parametrize("order, steps", [(1, 10), (2, 10)])
def test_a_trajectory_with_forecasts_is_that_of_outputs_extrapolated_by_numpy(order, steps):
    """Against hooks that replace a reused output by NumPy's polynomial through the last computed ones."""
    dit, diffusion, z, y = setup(steps)
    compute = random_schedule(steps, 3).compute
    compute[[2, 3, 6]] = False
    expected, computed, step = random_dit(), {}, [None]

    def replace(layer, k):
        def hook(module, inputs, output):
            i = step[0]
            if compute[i][k // 2][k % 2]:
                computed[k] = [(i, output.double().numpy()), *computed.get(k, [])][: order + 1]
                return None
            nodes, values = zip(*computed[k])
            shape = values[0].shape
            fit = np.polyfit(nodes, np.stack(values).reshape(len(nodes), -1), len(nodes) - 1)
            return torch.from_numpy(sum(c * float(i) ** p for p, c in enumerate(fit[::-1])).reshape(shape)).float()

        layer.register_forward_hook(hook)

    for l, block in enumerate(expected.blocks):
        replace(block.attn, 2 * l)
        replace(block.mlp, 2 * l + 1)
    labels, t = torch.cat([y, torch.full_like(y, 5)]), diffusion.timesteps(y.device)

    def denoise(x, i):
        step[0] = i
        return guided(expected(x[:2].repeat(2, 1, 1, 1), t[i].expand(4), labels), 2.0)

    with torch.no_grad():
        latents = diffusion.ddim_loop(denoise, torch.cat([z, z]))[:2]
    actual = sampling.sample_latents(dit, diffusion, z, y, 2.0, Schedule(compute, order))
    assert (actual - latents).abs().max() < 2e-4 * latents.abs().max()
    plain = sampling.sample_latents(dit, diffusion, z, y, 2.0, Schedule(compute))
    assert (plain - latents).abs().max() > 1e-2 * latents.abs().max()


@pytest.mark.parametrize("steps, plain, forecast", [(50, 1.5e-4, 1.5e-5), (20, 5e-4, 1e-4)])
def test_a_forecast_takes_most_of_the_error_of_the_shipped_routers(steps, plain, forecast):
    spec = model_spec(ckpt=str(ROOT / "ckpt" / "fashion_mnist"))
    dit, diffusion = load_dit(spec, "cpu"), create_diffusion(steps)
    noise = ImageNoise(777, range(8), (4, 8, 8), 10, torch.device("cpu"), True)
    router = Router.load(ROOT / "ckpt" / "fashion_mnist" / f"DDIM{steps}_router.pt").schedule(0.1)
    full, reused, forecasted = (
        sampling.sample_latents(dit, diffusion, noise.z, noise.y, 2.0, schedule)
        for schedule in (None, router, router.with_order(2))
    )
    assert (reused - full).square().mean() > plain and (forecasted - full).square().mean() < forecast


def test_a_function_is_recorded_once_for_each_shape():
    calls = []
    recorded = GraphedFunction(lambda x: calls.append(x.data_ptr()) or x + 1)
    for n in (2, 3, 2):
        assert torch.equal(recorded(torch.full((n,), 5.0)), torch.full((n,), 6.0))
    # The third call has the tensor of the first.
    assert calls[0] == calls[2] != calls[1]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_compiled_blocks_are_four_graphs_without_breaks_and_compute_the_same(order):
    """Of two schedules with blocks that reuse neither layer, either, and both, and of none, on many gaps."""
    dit, diffusion, z, y = setup(12)
    compute = torch.ones(12, 3, 2, dtype=torch.bool)
    compute[0] = torch.tensor([[True, False], [False, True], [False, False]])
    compute[3] = torch.tensor([[False, False], [True, True], [True, False]])
    compute[[2, 5, 6, 9, 10]] = False
    other = random_schedule(12, 3)
    compiled = random_dit()
    torch._dynamo.reset()
    counters.clear()
    devices.compile_blocks(compiled.blocks)
    for schedule in (Schedule(compute, order), other.with_order(order), None):
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
    assert output.dtype == torch.float32 and {slot[0].dtype for slots in cache for slot in slots} == {torch.bfloat16}
    assert sum(slot[0].nbytes for slots in cache for slot in slots) == dit.cache_bytes(2, torch.bfloat16)
    latents = sampling.sample_latents(dit, diffusion, z, y, 2.0)
    assert latents.dtype == torch.float32
    assert 0 < (latents - full).norm() < 0.1 * full.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("ancestral", [False, True])
def test_nothing_waits_for_a_gpu(ancestral, graphs):
    dit, diffusion, z, y = setup()
    dit, z, y = dit.to("cuda"), z.to("cuda"), y.to("cuda")
    sample = sampling.make_sampler(dit, diffusion, 2.0, random_schedule(6, 3), ancestral, cuda_graphs=graphs)
    sample(z, y)  # what happens once: tables are copied, a graph is recorded
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(z, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
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


def test_ancestral_sampling_follows_the_noise_it_is_given():
    dit, diffusion, z, y = setup()

    def draw(seed):
        noise = torch.Generator().manual_seed(seed)

        def randn_like(x):
            return torch.randn(x.shape, generator=noise)

        return sampling.sample_latents(dit, diffusion, z, y, 2.0, ancestral=True, randn_like=randn_like)

    assert torch.equal(draw(1), draw(1))
    assert not torch.allclose(draw(1), draw(2))


def test_a_schedule_for_another_sampler_is_refused():
    dit, diffusion, z, y = setup()
    for schedule in (Schedule.full(5, 3), Schedule.full(6, 2)):
        with pytest.raises(ValueError, match="the sampler runs 6 steps of 3 blocks"):
            sampling.sample_latents(dit, diffusion, z, y, 2.0, schedule)


def test_trajectories_leave_nothing_behind():
    """Two in a row on one model equal those on two fresh models."""
    used, diffusion, z, y = setup()
    for seed in (1, 2):
        schedule = random_schedule(6, 3, seed)
        expected = sampling.sample_latents(random_dit(), diffusion, z + seed, y, 2.0, schedule)
        assert torch.equal(sampling.sample_latents(used, diffusion, z + seed, y, 2.0, schedule), expected)


class Mixer(torch.nn.Module):
    """The smallest model with the interface that CONTRIBUTING.md describes: two linear layers a block, no DiT."""

    depth, in_channels, out_channels, input_size, num_classes, label_dropout = 2, 4, 8, 4, 5, 0.1

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2 * self.depth))
        self.condition_of = torch.nn.Linear(2, 4)
        self.ran = 0

    def empty_cache(self, order=0):
        return [[deque(maxlen=order + 1) for _ in range(2)] for _ in range(self.depth)]

    def condition(self, t, y):
        return self.condition_of(torch.stack([t / 1000, y.expand(t.shape) / 5], dim=-1))

    def modulations(self, c):
        return [c]

    def denoise(self, x, modulations, compute=None, cache=None):
        x = x.permute(0, 2, 3, 1) + modulations[0][:, None, None]
        for n, layer in enumerate(self.layers):
            l, k = divmod(n, 2)
            slot = deque(maxlen=1) if cache is None else cache[l][k]
            run = True if compute is None else compute[l][k]
            x, output = apply_layer(x, torch.ones(()), partial(self.run, layer, x), run, slot)
            remember(slot, run, output)
        return torch.cat([x, x], dim=-1).permute(0, 3, 1, 2)

    def run(self, layer, x):
        self.ran += 1
        return torch.tanh(layer(x))

    def forward(self, x, t, y, compute=None, cache=None):
        return self.denoise(x, self.modulations(self.condition(t, y)), compute, cache)


def test_any_model_with_the_documented_interface_is_sampled_and_trained():
    model, schedule = Mixer().requires_grad_(False), random_schedule(6, 2)
    _, diffusion, z, y = setup()
    latents = sampling.sample_latents(model, diffusion, z, y, 2.0, schedule, ancestral=True)
    assert latents.isfinite().all() and model.ran == schedule.compute.sum() < schedule.compute.numel()
    forecast = sampling.sample_latents(model, diffusion, z, y, 2.0, schedule.with_order(1))
    assert forecast.isfinite().all()
    scores = torch.full((2, 2), 0.5, requires_grad=True)
    router_loss(model, diffusion, scores, 3, z, y, z.flip(0)).sum().backward()
    assert scores.grad.all()


class Given:
    """A VAE whose decoder returns its input."""

    dtype = torch.float32
    config = SimpleNamespace(scaling_factor=0.5, block_out_channels=(1,), shift_factor=None)

    @staticmethod
    def decode(latents):
        return SimpleNamespace(sample=latents.clone())


def test_decoding_quantises_every_level_as_published(monkeypatch):
    """Against the formula in double precision: clamp(127.5 x + 128, 0, 255), truncated; one image at a time."""
    monkeypatch.setattr(sampling, "DECODE_PIXELS", 64 * 64)
    x = torch.linspace(-1.1, 1.1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    x = torch.cat([x, x.flip(1)])
    expected = np.clip(127.5 * x.double().numpy() + 128, 0, 255)
    safe = np.abs(expected - np.round(expected)) > 1e-4  # float32 cannot fall on the other side
    images = sampling.decode(Given, 0.5 * x)
    assert (images.dtype, images.shape) == (torch.uint8, (2, 64, 64, 3))
    got = images.permute(0, 3, 1, 2).numpy()
    assert safe.mean() > 0.9 and np.array_equal(got[safe], np.floor(expected)[safe])
    assert set(np.unique(got)) == set(range(256))


def test_a_vae_that_shifts_decodes_unshifted_latents(monkeypatch):
    """diffusers' pipelines of such a VAE (SD 3, Flux): latents = (z - shift) * scale."""
    z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = sampling.decode(Given, z * 0.5)
    monkeypatch.setattr(Given.config, "shift_factor", 0.25)
    assert torch.equal(sampling.decode(Given, (z - 0.25) * 0.5), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_and_named(value, monkeypatch):
    monkeypatch.setattr(sampling, "DECODE_PIXELS", 16)  # one image at a time
    latents = torch.zeros(3, 3, 4, 4)
    latents[1, 2, 3, 0] = value
    with pytest.raises(UserError, match="latents of image 1 are not finite.* --cfg-scale"):
        sampling.decode(Given, latents)

    class Broken(Given):
        @staticmethod
        def decode(latents):
            return SimpleNamespace(sample=latents.masked_fill(latents == 1, value))

    with pytest.raises(UserError, match="VAE decodes image 2 to .*not finite"):
        sampling.decode(Broken, torch.tensor([0.0, 0.0, 0.5]).reshape(3, 1, 1, 1).expand(3, 3, 4, 4))
