"""The work of a GPU on fake CUDA tensors, without a GPU.

A fake tensor has a shape, a type and a device, but no values. These tests see whether tensors of two devices meet,
whether the CPU waits for a value, and whether a CUDA graph could capture the work. They see no results.
"""

import contextlib
import copy
import logging
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, random_dit, random_vae
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import sampling
from diffusion import FlowMatching, GaussianDiffusion, create_diffusion
from evaluation import inception, metrics, writer
from models import Blend, Guidance
from router import Router, router_loss
from runtime import devices
from schedule import Schedule
from training import trainer

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)  # not the default device of a process
STEPS = 6


class OnlyGpu(TorchDispatchMode):
    """Fails if an operation reads or makes a tensor that is not on `GPU`: a CUDA graph could not capture it.

    operations: the names of those that ran.
    """

    def __init__(self):
        super().__init__()
        self.operations = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.operations.add(operation.overloadpacket.__name__)
        results = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, results)):
            if isinstance(leaf, torch.Tensor) and leaf.device != GPU:
                raise AssertionError(f"{operation} uses a tensor on {leaf.device}")
        return results


class Driver(threading.local):
    """Stands in for the functions of torch.cuda that need a driver.

    It knows which device is current in each thread, and which stream of each device.
    """

    def __init__(self):
        self.index, self.streams = 0, {}

    def get(self, device=None):
        return self.index if device is None else torch.device(device).index

    @contextlib.contextmanager
    def device(self, device):
        before, self.index = self.index, self.get(device)
        yield
        self.index = before

    def Stream(self, device=None):
        return Stream(self.get(device))

    def current_stream(self, device=None):
        index = self.get(device)
        return self.streams.setdefault(index, self.Stream(f"cuda:{index}"))

    @contextlib.contextmanager
    def stream(self, stream):
        if stream is None:  # changes nothing
            yield
            return
        with self.device(f"cuda:{stream.index}"):
            before, self.streams[stream.index] = self.current_stream(), stream
            yield
            self.streams[stream.index] = before

    def Event(self, enable_timing=False):
        return Event(self)

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: None)

    @contextlib.contextmanager
    def graph(self, graph, stream=None, capture_error_mode="global"):
        # Without a stream torch takes one of the device that was current at the first capture.
        with self.stream(stream or self.Stream("cuda:0")), OnlyGpu():
            assert self.index == GPU.index, f"the work of {GPU} is captured on cuda:{self.index}"
            yield

    def set_device(self, device):
        self.index = self.get(device)

    def synchronize(self, device=None):
        assert self.get(device) == GPU.index, f"waits for cuda:{self.get(device)}, and the work is on {GPU}"


class Stream:
    """A stream of the device with this index."""

    def __init__(self, index):
        self.index = index

    def wait_stream(self, other):
        assert other.index == self.index == GPU.index, "a stream of another device than the work"


class Event:
    """An event of torch.cuda: the stream that recorded it, if any."""

    def __init__(self, driver):
        self.driver, self.index = driver, None

    def record(self, stream=None):
        self.index = (stream or self.driver.current_stream()).index

    def synchronize(self):
        assert self.index == GPU.index

    def elapsed_time(self, end):
        assert self.index == end.index == GPU.index, "times are of another device than the work"
        return 1.0


@pytest.fixture(scope="module")
def vae():
    return random_vae().requires_grad_(False)


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    """The `Driver` of a test; the test itself runs in the fake mode."""
    driver = Driver()
    for name in "device Stream current_stream stream Event CUDAGraph graph set_device synchronize".split():
        monkeypatch.setattr(torch.cuda, name, getattr(driver, name))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    for name in ("rows", "oldest_reads"):  # a plan stays on the CPU, but the fake mode lets no tensor be read
        read = getattr(Schedule, name)
        monkeypatch.setattr(Schedule, name, lambda plan, read=read: real(read, plan))
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to keeps no real tensors
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield driver
    torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.fixture
def reads(monkeypatch):
    """The shapes of the tensors on `GPU` whose values were read, each of which is a wait; all values are 1."""
    found = []

    def read_as(read):
        def method(tensor):
            if tensor.device == GPU:
                found.append(tuple(tensor.shape))
            return read(tensor)

        return method

    readings = {
        "item": lambda tensor: 1.0,
        "__bool__": lambda tensor: True,
        "tolist": lambda tensor: [1.0] * len(tensor),
    }
    for name, read in readings.items():
        monkeypatch.setattr(FakeTensor, name, read_as(read), raising=False)
    return found


def real(function, *args):
    """The result of a function that runs outside the fake mode."""
    with _disable_current_modes():
        return function(*args)


def inputs(count=3):
    """Noise and labels on `GPU`."""
    return torch.empty(count, 4, 4, 4, device=GPU), torch.zeros(count, dtype=torch.long, device=GPU)


def load(dtype, **config):
    """A small DiT on `GPU`."""
    return real(lambda: devices.set_precision(random_dit(**config), dtype)).to(GPU)


PLANS = {
    "full": lambda: None,
    "router": lambda: Router(STEPS, 3).schedule(0.5),
    "line": lambda: Schedule.every_nth(STEPS, 3, 3).with_order(1),
    "parabola": lambda: Router(STEPS, 3).schedule(0.5).with_order(2),
    "compiled": lambda: Router(STEPS, 3).schedule(0.5).with_order(2),
}


def assert_stays_on_the_gpu(dit, plan, process=None, guidance=2.0, **how):
    """The first run may copy tables to the GPU and capture a graph; the second uses the GPU alone."""
    process, (z, y) = process or create_diffusion(STEPS), inputs()
    sample = sampling.make_sampler(dit, process, guidance, plan, **how)
    sample(z, y)
    with OnlyGpu() as gpu:
        latents = sample(z, y)
    assert (latents.device, latents.dtype, latents.shape) == (GPU, torch.float32, z.shape)
    return gpu.operations


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("dtype, name", [("tf32", "full"), *(("bf16", plan) for plan in PLANS)])
def test_sampling_stays_on_the_gpu_and_can_be_captured(dtype, name, cuda_graphs, monkeypatch):
    if name == "compiled":  # compiling needs a GPU, but what the blocks get from the loop does not
        monkeypatch.setattr(devices, "are_compiled", lambda blocks: True)
    assert_stays_on_the_gpu(load(dtype), real(PLANS[name]), cuda_graphs=cuda_graphs)


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("sampler", ["heun", "sde"])
def test_a_flow_with_guidance_in_an_interval_stays_on_the_gpu(sampler, cuda_graphs):
    plan, guidance = real(Schedule.every_nth, STEPS, 3, 2), Guidance(2.0, interval=(0.0, 0.5))
    assert_stays_on_the_gpu(load("bf16"), plan, FlowMatching(STEPS, sampler), guidance, cuda_graphs=cuda_graphs)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_ancestral_sampling_stays_on_the_gpu(cuda_graphs):
    assert_stays_on_the_gpu(load("tf32"), real(PLANS["router"]), ancestral=True, cuda_graphs=cuda_graphs)


SWITCHES = {"gelu": "_addmm_activation", "fp8": "_scaled_mm"}  # and the operation that each brings


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("name", SWITCHES)
def test_what_the_experimental_switches_bring_stays_on_the_gpu(name, cuda_graphs):
    dit = load("bf16", hidden_size=32)  # products in float8 need multiples of 16
    assert not assert_stays_on_the_gpu(dit, None) & set(SWITCHES.values())
    devices.speed_up_blocks(dit.blocks, [name])
    operations = assert_stays_on_the_gpu(dit, real(PLANS["parabola"]), cuda_graphs=cuda_graphs)
    assert cuda_graphs or operations & set(SWITCHES.values()) == {SWITCHES[name]}


def test_the_gelu_in_the_first_product_is_left_out_with_gradients_and_kept_by_the_compiler():
    dit, x = load("bf16"), torch.empty(2, 4, 24, device=GPU, dtype=torch.bfloat16)
    devices.speed_up_blocks(dit.blocks, ["gelu"])
    for gradients in True, False:
        with OnlyGpu() as gpu, torch.set_grad_enabled(gradients):
            assert dit.blocks[0].mlp(x).shape == x.shape
        assert ("gelu" in gpu.operations, "_addmm_activation" in gpu.operations) == (gradients, not gradients)
    assert torch.ops.aten._addmm_activation.default not in select_decomp_table()  # or inductor would split it again


def test_a_learned_plan_can_be_captured():
    plan = real(Schedule.load, ROOT / "ckpt" / "fashion_mnist" / "DDIM50_3x.json")
    dit, diffusion, (z, y) = load("bf16", depth=plan.depth), create_diffusion(plan.steps), inputs()
    diffusion.timesteps(GPU)  # copied once
    with OnlyGpu():
        assert sampling.sample_latents(dit, diffusion, z, y, 2.0, plan).device == GPU


@pytest.mark.parametrize(
    "dtype, experimental, expected",
    [("tf32", [], "fp32"), ("fp16", [], "fp16"), ("bf16", [], "fp32"), ("bf16", ["vae-fp16"], "fp16")],
)
def test_a_vae_decodes_on_the_gpu(dtype, experimental, expected, vae, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    vae = real(devices.speed_up_vae, real(copy.deepcopy, vae), GPU, dtype, experimental).to(GPU)
    (z, _), weight = inputs(), vae.decoder.conv_in.weight
    assert weight.dtype == devices.DTYPES[expected] and weight.is_contiguous(memory_format=torch.channels_last)
    with OnlyGpu():
        images, finite = sampling.decode_unchecked(vae, z)
    assert (images.device, images.dtype, images.shape) == (GPU, torch.uint8, (3, 8, 8, 3))
    assert (finite.device, finite.shape) == (GPU, (3, 2))
    assert caplog.records == []  # each process would print them at its start


def test_decoding_and_copying_run_on_a_stream_of_the_device_of_the_model(driver, vae, monkeypatch):
    vae, written, streams, decode = real(copy.deepcopy, vae).to(GPU), [], [], sampling.decode_unchecked

    def decode_unchecked(*args):
        streams.append(driver.current_stream())
        return decode(*args)

    def write(start, images, labels):
        written.append((start, images.shape))

    def sample(start, stop):
        return torch.empty(stop - start + 1, 4, 4, 4, device=GPU), torch.empty(stop - start + 1)

    monkeypatch.setattr(sampling, "decode_unchecked", decode_unchecked)
    monkeypatch.setattr(torch.Tensor, "numpy", lambda images: images)
    monkeypatch.setattr(sampling, "check_finite", lambda finite, start: None)
    made = writer.SampleWriter(sample, vae, write, GPU)
    made.run([(0, 4), (4, 6)])
    assert written == [(0, (4, 8, 8, 3)), (4, (2, 8, 8, 3))]
    assert {stream.index for stream in streams} == {GPU.index} and driver.current_stream(GPU) not in streams
    assert made.seconds["sampling"] == made.seconds["decoding"] == 0.002  # two batches, each a millisecond


@pytest.mark.parametrize("dtype, order", [("tf32", 0), ("bf16", 2)])
def test_the_loss_of_a_router_stays_on_the_gpu(dtype, order):
    dit, diffusion, (x, y) = load(dtype), create_diffusion(STEPS), inputs()
    diffusion.timesteps(GPU)  # copied once
    router = real(Router, STEPS, 3).to(GPU)
    with OnlyGpu():
        loss = router_loss(dit, diffusion, router(2), 3, x, y, x, order=order)
    assert (loss.device, loss.dtype, loss.shape) == (GPU, torch.float32, (3,)) and loss.requires_grad


def test_the_gradient_of_a_blend_stays_on_the_gpu():
    # The engine of autograd needs a driver, so our own function is called without it.
    grad, score = torch.empty(3, 4, 24, device=GPU, dtype=torch.bfloat16), torch.empty((), device=GPU)
    context = SimpleNamespace(saved_tensors=(grad, score), needs_input_grad=(False, True, True))
    with OnlyGpu():
        _, fresh, compute = Blend.backward(context, grad)
    assert fresh.dtype == torch.bfloat16 and compute.dtype == torch.float32


def test_an_update_reads_from_the_gpu_once(reads, vae, monkeypatch):
    vae, dit = real(copy.deepcopy, vae).to(GPU), load("tf32")
    config = trainer.TrainingConfig(100, batch_size=4, draws=2, seed=0, lr=0.01, l1_weight=1e-3, threshold=0.1)
    monkeypatch.setattr(Router, "__init__", lambda *a, init=Router.__init__: real(init, *a))
    alone = SimpleNamespace(size=1, error=RuntimeError)
    updates = trainer.Trainer(dit, vae, create_diffusion(STEPS), config, alone, range(4))

    def backward(loss):
        assert loss.device == GPU
        for row in updates.router.parameters():
            row.grad = torch.zeros_like(row)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    batch = {"images": torch.empty(4, 3, 8, 8), "y": torch.zeros(4, dtype=torch.long), "skipped": [""] * 4}
    batch |= {name: torch.empty(4, 4, 4, 4) for name in ("posterior_noise", "noise")}
    assert updates.update(batch)
    assert reads == [(2 + 1 + 1 + 1,)]  # the errors of two draws, the L1 term, the wish to stop, the norm
    assert {row.device for row in updates.router.parameters()} == {GPU}


def test_gradients_travel_between_cpus(monkeypatch):
    sent, small = [], real(Router, STEPS, 3).to(GPU)
    monkeypatch.setattr(trainer.dist, "all_reduce", lambda message: sent.append((message.device, len(message))))
    processes = SimpleNamespace(exchange=contextlib.nullcontext)
    values, size = trainer.reduce_gradients(small, [0, 2], torch.zeros(5, device=GPU), processes)
    assert sent == [(CPU, 2 * 6 + 5)] and size == 4 * (2 * 6 + 5)
    assert {values.device, *(small.routers[i].prob.grad.device for i in (0, 2))} == {GPU}


def test_the_network_of_the_metrics_stays_on_the_gpu(reads):
    graph = inception.Graph(ROOT / "ckpt" / "fashion_mnist" / "classifier.pb", GPU)
    images = torch.zeros(2, 28, 28, 3, dtype=torch.uint8, device=GPU)
    with OnlyGpu():
        pool, spatial = graph.features(images)
        probabilities = graph.probabilities(pool)
    assert (pool.device, spatial.device, probabilities.device) == (GPU,) * 3
    assert reads == [(), ()]  # whether each output is finite
    assert len(graph.features(images.cpu())[0]) == 2  # as the evaluator has them


def test_precision_and_recall_stay_on_the_gpu(reads):
    points = np.zeros((5, 6), np.float32)
    assert metrics.precision_recall(points, points, dtype="fp32", device=GPU, tile=4) == (1, 1)
    assert reads == [(), ()]
    metrics.precision_recall(points, points, dtype="fp16", device=GPU, tile=4)
    assert len(reads) == 2 + 2 + 12  # also whether each tile of distances overflows in float16


# Tests of these tests: faults that a GPU would show must be seen here.


def copy_each_time(monkeypatch):
    monkeypatch.setattr(
        GaussianDiffusion, "timesteps", lambda self, device: torch.from_numpy(self.timestep_map).to(device)
    )


def read_in_each_step(monkeypatch):
    step = GaussianDiffusion.ddim_step
    monkeypatch.setattr(GaussianDiffusion, "ddim_step", lambda self, x, *a: step(self, x * x.amax().item(), *a))


def leave_a_tensor_on_the_cpu(monkeypatch):
    step = GaussianDiffusion.ddim_step
    monkeypatch.setattr(GaussianDiffusion, "ddim_step", lambda self, x, *a: step(self, x + torch.ones(4, 4), *a))


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize(
    "fault, error",
    [
        (copy_each_time, "uses a tensor on cpu"),
        (read_in_each_step, "aten._local_scalar_dense"),
        (leave_a_tensor_on_the_cpu, "cuda:1.*cpu"),
    ],
)
def test_a_fault_of_the_loop_is_seen(fault, error, cuda_graphs, monkeypatch):
    fault(monkeypatch)
    with pytest.raises((AssertionError, DataDependentOutputException, RuntimeError), match=error):
        assert_stays_on_the_gpu(load("tf32"), None, cuda_graphs=cuda_graphs)


def test_a_scale_on_the_cpu_is_seen():
    dit = load("bf16", hidden_size=32)
    devices.speed_up_blocks(dit.blocks, ["fp8"])
    linear = dit.blocks[1].mlp.fc1
    linear.scale = torch.ones(linear.scale.shape)
    with pytest.raises((AssertionError, RuntimeError), match="cuda:1.*cpu|tensor on cpu"):
        assert_stays_on_the_gpu(dit, None)


def test_a_stream_of_another_device_is_seen(driver, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())  # the process stays on cuda:0
    with pytest.raises(AssertionError, match="another device"):
        assert_stays_on_the_gpu(load("tf32"), None, cuda_graphs=True)
