"""Time and peak memory of one update of router training: as the original implementation does it, and as we do.

    python -m benchmarks.train_step --model DiT-B/2 --record benchmarks/results/train-b2-cpu.json
    python -m benchmarks.train_step --table

An update is one draw: noise to step i, fill the cache there, a DDIM step, teacher and student at i-1, backward, AdamW.
Weights, latents, labels and noise are random: the work does not depend on their values. No variant runs the VAE.

Times: all variants in turn in one process, from the same router and inputs, after a warm-up update of each; a ratio is
the median over the rounds. Memory: two updates of one variant in a fresh process. On a CPU the peak is that of the
whole process, and "above the base" leaves out its peak before it made the model (Python, PyTorch's libraries). On a GPU
the peak is that of the tensors, and the base is 0.
"""

import statistics

from benchmarks import common
from benchmarks.original import original_loss
from runtime import cli

VARIANTS = {
    "original": "original: model not frozen, gradient through the teacher",
    "ours": "ours",
    "bf16": "ours, bf16",
    "checkpointing": "ours, checkpointing",
    "compiled": "ours, compiled",
}
SEED = 0
STEPS, L1, LR = 20, 5e-6, 1e-3  # as published for DiT-XL/2; an update takes as long with others


def parse_args(argv=None):
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="DiT-S/2", help="size and patch, as DiT-XL/2; its weights are random")
    parser.add_argument("--batch-size", type=cli.positive, default=8, help="images of the one draw of an update")
    parser.add_argument("--repeats", type=cli.positive, default=3, help="timed updates of each variant")
    cli.add_device_argument(parser)
    parser.add_argument("--compile", action="store_true", help="also measure with torch.compile of the blocks")
    return parser.parse_args(argv)


def load_models(names, load):
    """{name: the frozen DiT of that variant}; load() makes a DiT. All variants but bf16 share their weights."""
    from runtime import devices

    # bf16 first, so that the float32 weights that it was made from are freed before others are made.
    models = {"bf16": devices.set_precision(load(), "bf16")} if "bf16" in names else {}
    others = [name for name in names if name != "bf16"]
    if others:
        # TF32 on a GPU, as in train_router.py, also for the original.
        dit = devices.set_precision(load(), "tf32")
        models |= {name: common.share_weights(dit) for name in others}
    if "checkpointing" in models:
        models["checkpointing"].grad_checkpointing = True
    if "compiled" in models:
        devices.compile_blocks(models["compiled"].blocks)
    return models


class Updates:
    """The variants `names` of an update, ready to run: models, routers with their optimizers, and the inputs."""

    def __init__(self, spec, batch_size, device, names):
        import torch

        from diffusion import create_diffusion
        from pretrained.loading import load_dit
        from router import Router

        self.models = load_models(names, lambda: load_dit(spec, device, random_seed=SEED))
        self.diffusion = create_diffusion(STEPS)
        self.routers, self.optimizers = {}, {}
        dit = self.models[names[0]]
        for name in names:
            generator = torch.Generator().manual_seed(SEED)  # the same initial scores for all
            self.routers[name] = Router(STEPS, dit.depth, generator).to(device)
            self.optimizers[name] = torch.optim.AdamW(self.routers[name].parameters(), lr=LR, weight_decay=0)
        self.row = Router.trained_steps(STEPS)[STEPS // 4]
        generator = torch.Generator().manual_seed(SEED)
        shape = batch_size, dit.in_channels, dit.input_size, dit.input_size
        self.x_start, self.noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
        self.y = torch.randint(dit.num_classes, shape[:1], generator=generator).to(device)

    def run(self, name):
        """One update of the variant `name`."""
        from router import router_loss

        dit, router, optimizer = self.models[name], self.routers[name], self.optimizers[name]
        loss = original_loss if name == "original" else router_loss
        # The variants share parameters. The fixed positions have no gradient in the original either. The other
        # gradients stay and add up: the original's optimizer holds the router alone, so nothing clears them.
        dit.requires_grad_(name == "original")
        dit.pos_embed.requires_grad_(False)
        optimizer.zero_grad(set_to_none=True)
        scores = router(self.row)
        error = loss(dit, self.diffusion, scores, self.row + 1, self.x_start, self.y, self.noise)
        (error.mean() + L1 * scores.sum()).backward()
        optimizer.step()
        router.clamp_()


def measure_memory(spec, args, name):
    """Bytes of this process before the model is made ("base") and at the peak of two updates ("peak").

    Of the tensors on a GPU, else the resident set. The process must be a fresh one.
    """
    from runtime.devices import peak_memory, pick_device

    device = pick_device(args.device)
    base = peak_memory(device)
    updates = Updates(spec, args.batch_size, device, [name])
    for _ in range(2):  # the second update finds the gradients that the first left
        updates.run(name)
    return {"base": base, "peak": peak_memory(device)}


def measure(args):
    """Figures of all variants, with the ratios to the original."""
    from pretrained.spec import model_spec
    from runtime.devices import pick_device

    spec = model_spec(args.model)
    names = [name for name in VARIANTS if name != "compiled" or args.compile]
    memory = {name: common.run_alone(measure_memory, spec, args, name) for name in names}
    device = pick_device(args.device)
    updates = Updates(spec, args.batch_size, device, names)
    seconds = common.time_in_turn({name: lambda name=name: updates.run(name) for name in names}, args.repeats, device)
    above = {name: memory[name]["peak"] - memory[name]["base"] for name in names}
    return {
        "batch": args.batch_size,
        "seconds": seconds,
        "time_ratio": {name: common.median_ratio(seconds[name], seconds["original"]) for name in names},
        "images_per_second": {name: args.batch_size / statistics.median(seconds[name]) for name in names},
        "memory_bytes": memory,
        "peak_ratio": {name: memory[name]["peak"] / memory["original"]["peak"] for name in names},
        "above_base_ratio": {name: above[name] / above["original"] for name in names},
    }


def table(records):
    """A Markdown table with a row for each variant of each record; all ratios are to the original's."""
    head = ["model, batch, device", "update", "seconds", "ratio", "images/s", "peak GiB", "ratio"]
    rows = []
    for record in records:
        where = f"{record['flags']['model']}, {record['batch']}, {record['device']}"
        for name, seconds in record["seconds"].items():
            memory = record["memory_bytes"][name]
            rate = f"{record['time_ratio'][name]:.3f}", f"{record['images_per_second'][name]:.3g}"
            peak = f"{memory['peak'] / 2**30:.2f}", f"{record['peak_ratio'][name]:.3f}"
            above = f"{(memory['peak'] - memory['base']) / 2**30:.2f}", f"{record['above_base_ratio'][name]:.3f}"
            rows.append([where, VARIANTS[name], f"{statistics.median(seconds):.3g}", *rate, *peak, *above])
    return common.markdown(rows, [*head, "above the base GiB", "ratio"])


def main(args):
    common.run_benchmark(args, "train-*", measure, table=table)


if __name__ == "__main__":
    cli.run(main, parse_args())
