"""Time and memory of the search for a plan (train_router.py --target-speedup), from a few samples of one table.

    python -m benchmarks.plan_search --model DiT-XL/2 --num-sampling-steps 4 --samples 1 \\
        --record benchmarks/results/plan-search-xl2-cpu.json
    python -m benchmarks.plan_search --table

Weights are random: the work does not depend on their values. A table needs as many samples as `training.plan_run` says,
a plan at least two tables. On a CPU the peak is that of a fresh process with the model, and "above the base" leaves out
its peak before it made the model. On a GPU the peak is that of the tensors; the outputs of all steps lie on the CPU.
"""

from benchmarks import common
from runtime import cli

INTERVAL = 2  # the table is that of every second step, with forecasts of order 2


def parse_args(argv=None):
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="DiT-S/2", help="size and patch, as DiT-XL/2")
    parser.add_argument("--num-sampling-steps", type=cli.router_steps, default=4, help="steps of the plan")
    parser.add_argument("--samples", type=cli.positive, default=1, help="samples to measure")
    cli.add_device_argument(parser)
    return parser.parse_args(argv)


def measure_alone(args):
    """Seconds of the table and of sampling the same samples in full, and bytes before the model and at the peak."""
    import torch

    from diffusion import create_diffusion
    from pretrained.loading import load_dit
    from pretrained.spec import model_spec
    from runtime.devices import peak_memory, pick_device
    from schedule import Schedule
    from training.plan_run import Problem

    device = pick_device(args.device)
    base = peak_memory(device)
    dit = load_dit(model_spec(args.model), device, random_seed=0)
    problem = Problem(dit, create_diffusion(args.num_sampling_steps), 1.5, 2, seed=0, samples=args.samples)
    plan = Schedule.every_nth(args.num_sampling_steps, dit.depth, INTERVAL).with_order(2)
    _, full = common.timed(problem.sample, "table", args.samples, device=device)
    sampled = peak_memory(device)

    def tables():
        return torch.stack([problem.table(plan, batch, lambda: None) for batch in problem.batches(args.samples)]).sum(0)

    _, seconds = common.timed(tables, device=device)
    memory = {"base": base, "sampling": sampled, "peak": peak_memory(device)}
    outputs = args.num_sampling_steps * dit.cache_bytes(2, dit.pos_embed.dtype)
    return {"seconds": {"full": full, "table": seconds}, "memory_bytes": memory, "outputs_bytes_a_sample": outputs}


def measure(args):
    """The figures of `measure_alone`, for a step of a sample and in full runs."""
    figures = common.run_alone(measure_alone, args)
    a_step = figures["seconds"]["table"] / args.samples / args.num_sampling_steps
    ratio = figures["seconds"]["table"] / figures["seconds"]["full"]
    return figures | {"seconds_a_step_and_sample": a_step, "full_runs_a_sample": ratio}


def rows(record):
    """The row of a record."""
    flags, memory = record["flags"], record["memory_bytes"]
    return [
        {
            "model, steps, samples, device": f"{flags['model']}, {flags['num_sampling_steps']}, {flags['samples']}, "
            f"{record['device']}",
            "seconds a step and sample": f"{record['seconds_a_step_and_sample']:.3g}",
            "full runs a sample": f"{record['full_runs_a_sample']:.2f}",
            "peak GiB": f"{memory['peak'] / 2**30:.2f}",
            "peak of sampling GiB": f"{memory['sampling'] / 2**30:.2f}",
            "outputs of a sample MB": common.megabytes(record["outputs_bytes_a_sample"]),
        }
    ]


def main(args):
    common.run_benchmark(args, "plan-search-*", measure, rows)


if __name__ == "__main__":
    cli.run(main, parse_args())
