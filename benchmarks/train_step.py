"""Time and peak memory of one update of router training: as the original implementation does it, and as we do.

    python -m benchmarks.train_step --model DiT-B/2 --record benchmarks/results/train-b2-cpu.json
    python -m benchmarks.train_step --table          # the table of the records there are

An update is one draw: noise to step i, fill the cache there, a DDIM step, teacher and student at i-1, backward, AdamW.
Weights, latents, labels and noise are random: the work of an update does not depend on their values. The latents are
given, so no VAE runs, in no variant. All variants start from the same router and see the same inputs.

Times: all variants in turn in one process, after a warm-up update of each; a ratio is the median over the rounds.
Memory: two updates of one variant in a fresh process of its own. On a CPU the peak is that of the whole process, and
"above the base" leaves out what it held before it made the model (Python, PyTorch's libraries). On a GPU it is what
tensors took, for which the base is 0.
"""

from pathlib import Path

from benchmarks.common import markdown, read_records
from benchmarks.original import original_loss
from runtime import cli

ROOT = Path(__file__).resolve().parent.parent


VARIANTS = {
    "original": "original: model not frozen, gradient through the teacher",
    "ours": "ours",
    "bf16": "ours, bf16",
    "checkpointing": "ours, checkpointing",
    "compiled": "ours, compiled",
}
SEED = 0
L1, LR = 5e-6, 1e-3  # as published for DiT-XL/2 at 20 steps; an update takes as long with others


def parse_args(argv=None):
    parser = cli.ArgumentParser(description="Time and peak memory of one update of router training.")
    parser.add_argument("--model", default="DiT-S/2", help="size and patch, as DiT-XL/2; its weights are random")
    parser.add_argument("--image-size", type=int, choices=[256, 512], default=256, help="pixels a side")
    parser.add_argument("--batch-size", type=cli.positive, default=8, help="images of the one draw of an update")
    parser.add_argument("--num-sampling-steps", type=cli.router_steps, default=20, help="denoising steps")
    parser.add_argument("--repeats", type=cli.positive, default=3, help="timed updates of each variant")
    cli.add_device_argument(parser)
    parser.add_argument("--compile", action="store_true", help="also with torch.compile of the blocks")
    cli.add_record_argument(parser)
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table of results/train-*.json")
    return parser.parse_args(argv)


def load_models(names, load):
    """{name: the frozen DiT of that variant}; `load` makes one. One set of weights serves all but bf16."""
    import copy

    from runtime import devices

    # First, so that the float32 weights it came from are gone before others are made.
    models = {"bf16": devices.set_precision(load(), "bf16")} if "bf16" in names else {}
    rest = [name for name in names if name != "bf16"]
    if rest:
        # As train_router.py: TF32 where a GPU has it, in the original's variant too.
        dit = devices.set_precision(load(), "tf32")
        for name in rest:
            models[name] = copy.deepcopy(dit, {id(parameter): parameter for parameter in dit.parameters()})
    if "checkpointing" in models:
        models["checkpointing"].grad_checkpointing = True
    if "compiled" in models:
        devices.compile_blocks(models["compiled"].blocks)
    return models


class Updates:
    """The variants `names` of an update, ready to run: models, routers with their optimizers, one set of inputs."""

    def __init__(self, args, device, names):
        import torch

        from diffusion import create_diffusion
        from pretrained.loading import load_dit
        from pretrained.spec import model_spec
        from router import Router

        spec = model_spec(args.model, args.image_size)
        self.device = device
        self.models = load_models(names, lambda: load_dit(spec, device, random_seed=SEED))
        self.diffusion = create_diffusion(args.num_sampling_steps)
        self.routers, self.optimizers = {}, {}
        dit = self.models[names[0]]
        for name in names:
            generator = torch.Generator().manual_seed(SEED)  # the same initial scores for all
            self.routers[name] = Router(self.diffusion.steps, dit.depth, generator).to(device)
            self.optimizers[name] = torch.optim.AdamW(self.routers[name].parameters(), lr=LR, weight_decay=0)
        rows = Router.trained_steps(self.diffusion.steps)
        self.row = rows[len(rows) // 2]
        generator = torch.Generator().manual_seed(SEED)
        shape = args.batch_size, dit.in_channels, dit.input_size, dit.input_size
        self.x_start, self.noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
        self.y = torch.randint(dit.num_classes, shape[:1], generator=generator).to(device)

    def run(self, name):
        """One update of the variant `name`. Returns its seconds."""
        import time

        from router import router_loss
        from runtime import devices

        dit, router, optimizer = self.models[name], self.routers[name], self.optimizers[name]
        loss = original_loss if name == "original" else router_loss
        # The parameters are shared; the fixed positions have no gradient in the original either. What gradients are
        # there stay: the original's optimizer holds the router alone, so nobody clears the others, they add up.
        dit.requires_grad_(name == "original")
        dit.pos_embed.requires_grad_(False)
        devices.synchronize(self.device)
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        scores = router(self.row)
        error = loss(dit, self.diffusion, scores, self.row + 1, self.x_start, self.y, self.noise)
        (error.mean() + L1 * scores.sum()).backward()
        optimizer.step()
        router.clamp_()
        devices.synchronize(self.device)
        return time.perf_counter() - start


def measure_memory(args, name):
    """Bytes before the model is made ("base") and at the peak of two updates ("peak"), of this process.

    What tensors took on a GPU; else the resident set. The process must be a fresh one.
    """
    from runtime import devices

    device = devices.pick_device(args.device)
    base = devices.peak_memory(device)
    updates = Updates(args, device, [name])
    for _ in range(2):  # the second finds the gradients that the first left
        updates.run(name)
    return {"base": base, "peak": devices.peak_memory(device)}


def measure_times(args, device, names):
    """Seconds of `args.repeats` updates of each variant, {name: [...]}, in turn."""
    updates = Updates(args, device, names)
    seconds = {name: [] for name in names}
    for repeat in range(args.repeats + 1):
        for name in names:  # in turn, so that a machine that slows down slows all
            elapsed = updates.run(name)
            if repeat:  # the first update warms up
                seconds[name].append(elapsed)
    return seconds


def figures(seconds, memory, batch):
    """What was measured, with the ratios to the original, as a dict for JSON; batch: images of an update."""
    import statistics

    def above(name):
        return memory[name]["peak"] - memory[name]["base"]

    return {
        "batch": batch,
        "seconds": seconds,
        # Neighbouring updates share the state of the machine: the median of their ratios.
        "time_ratio": {
            name: statistics.median(ours / original for ours, original in zip(seconds[name], seconds["original"]))
            for name in seconds
        },
        "images_per_second": {name: batch / statistics.median(seconds[name]) for name in seconds},
        "memory_bytes": memory,
        "peak_ratio": {name: memory[name]["peak"] / memory["original"]["peak"] for name in memory},
        "above_base_ratio": {name: above(name) / above("original") for name in memory},
    }


def table(records):
    """The Markdown text of records that --record wrote: a line a variant, all ratios to the original's."""
    import statistics

    head = ["model, batch, device", "update", "seconds", "ratio", "images/s", "peak GiB", "ratio"]
    head += ["above the base GiB", "ratio"]
    rows = []
    for record in records:
        where = f"{record['flags']['model']}, {record['batch']}, {record['device']}"
        for name, seconds in record["seconds"].items():
            memory = record["memory_bytes"][name]
            rows.append(
                [
                    where,
                    VARIANTS[name],
                    f"{statistics.median(seconds):.3g}",
                    f"{record['time_ratio'][name]:.3f}",
                    f"{record['images_per_second'][name]:.3g}",
                    f"{memory['peak'] / 2**30:.2f}",
                    f"{record['peak_ratio'][name]:.3f}",
                    f"{(memory['peak'] - memory['base']) / 2**30:.2f}",
                    f"{record['above_base_ratio'][name]:.3f}",
                ]
            )
    return markdown(head, rows)


def main(args):
    if args.table:
        print(table(read_records("train-*")))
        return

    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from pretrained.spec import model_spec
    from runtime import devices, records
    from runtime.files import check_writable

    device = devices.pick_device(args.device)
    model_spec(args.model, args.image_size)  # an unknown name is refused here
    if args.record:
        check_writable(args.record)
    names = [name for name in VARIANTS if name != "compiled" or args.compile]
    memory = {}
    for name in names:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            memory[name] = pool.submit(measure_memory, args, name).result()
    measured = figures(measure_times(args, device, names), memory, args.batch_size)
    print(table([{"flags": vars(args), "device": devices.device_name(device), **measured}]))
    if args.record:
        records.write_record(args.record, vars(args), device, measured)


if __name__ == "__main__":
    cli.run(main, parse_args())
