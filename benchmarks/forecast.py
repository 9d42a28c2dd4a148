"""Speed of plans beside their bounds, the error of their latents, and the ways to add a forecast.

    python -m benchmarks.forecast --num-sampling-steps 50 --images 64
    python -m benchmarks.forecast --num-sampling-steps 20 --images 64
    python -m benchmarks.forecast --sums
    python -m benchmarks.forecast --table

All rows run in turn in one process from the same noise, with guidance. The plans are that of the shipped router, every
2nd, 3rd and 4th step, and the shipped learned plans for this number of steps; where none are shipped, those for 50
steps are moved to the nearest timesteps (`Schedule.with_steps`). "Error" is the mean squared error of the latents
against the full run. --sums times one step that reuses all layers of the shipped model, beside a full one.
"""

import statistics
from functools import partial

from benchmarks import common
from runtime import cli

THRESHOLD = 0.1


def parse_args(argv=None):
    parser = common.parser(__doc__)
    parser.add_argument("--num-sampling-steps", type=cli.sampling_steps, default=50, help="denoising steps")
    parser.add_argument("--images", type=cli.positive, default=64, help="images of a batch; guidance doubles it")
    parser.add_argument("--orders", type=int, nargs="+", choices=[0, 1, 2], default=[0, 1, 2], help="of the forecasts")
    parser.add_argument("--repeats", type=cli.positive, default=3, help="rounds, after a warm-up")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the blocks")
    parser.add_argument("--sums", action="store_true", help="time the ways to add a forecast instead")
    cli.add_device_argument(parser)
    return parser.parse_args(argv)


def plans(steps, depth, orders):
    """The schedules of a run by name."""
    from router import Router
    from schedule import Schedule

    router = common.SHIPPED / f"DDIM{steps}_router.pt"
    found = {"router": Router.load(router).schedule(THRESHOLD)} if router.exists() else {}
    found |= {f"every {n}": Schedule.every_nth(steps, depth, n) for n in (2, 3, 4)}
    found = {f"{name}, order {order}": plan.with_order(order) for name, plan in found.items() for order in orders}
    learned = sorted(common.SHIPPED.glob(f"DDIM{steps}_*x.json"))
    moved = "" if learned else "for 50 at "
    for path in learned or sorted(common.SHIPPED.glob("DDIM50_*x.json")):
        plan = Schedule.load(path)
        found[f"learned {moved}{path.stem.partition('_')[2]}"] = plan.with_steps(steps) if moved else plan
    return found


def measure(args):
    import torch

    from diffusion import create_diffusion
    from pretrained.loading import load_dit
    from pretrained.spec import model_spec
    from runtime import devices
    from runtime.noise import ImageNoise
    from sampling import sample_latents

    device = devices.pick_device(args.device)
    spec = model_spec(ckpt=str(common.SHIPPED))
    dit = load_dit(spec, device)
    if args.sums:
        return {"sums": measure_sums(dit, 2 * args.images, args.repeats, device)}
    if args.compile:
        devices.compile_blocks(dit.blocks)
    shape = dit.in_channels, dit.input_size, dit.input_size
    noise = ImageNoise(777, range(args.images), shape, dit.num_classes, device, balanced=True)
    schedules = {"full": None} | plans(args.num_sampling_steps, dit.depth, args.orders)
    latents, samplers = {}, {}
    for name, schedule in schedules.items():

        def sample(name=name, schedule=schedule):
            diffusion = create_diffusion(args.num_sampling_steps)
            latents[name] = sample_latents(dit, diffusion, noise.z, noise.y, spec.cfg_scale, schedule)

        samplers[name] = sample
    seconds = common.time_in_turn(samplers, args.repeats, device)
    costs, rows = dit.multiply_adds(), {}
    for name, schedule in schedules.items():
        error = torch.square(latents[name] - latents["full"]).mean().item()
        speedup = common.median_ratio(seconds["full"], seconds[name])
        bound = schedule.speedup_bound(costs) if schedule else 1.0
        rows[name] = {"seconds": seconds[name], "speedup": speedup, "bound": bound, "error": error}
    return {"rows": rows}


def measure_sums(dit, samples, repeats, device):
    """Seconds of a full step and of steps that reuse all layers in several ways, {name: [...]}."""
    import torch

    t, y = torch.full((samples,), 500, device=device), torch.arange(samples, device=device) % dit.num_classes
    x = torch.randn(samples, dit.in_channels, dit.input_size, dit.input_size, device=device)
    weights = (7 / 3, -5 / 3, 1 / 3)
    with torch.inference_mode():
        modulations, tokens = dit.modulations(dit.condition(t, y)), dit.pos_embed.shape[1:]
        caches = {order: dit.empty_cache(order) for order in (0, 1, 2)}
        for order, cache in caches.items():
            for slot in (slot for block in cache for slot in block):
                slot.extend(torch.randn(samples, *tokens, device=device) for _ in range(order + 1))
        gates = [m.unsqueeze(2)[:, 3 * k + 2] for m in modulations[:-1] for k in (0, 1)]
        slots = [slot for block in caches[2] for slot in block]
        added = [torch.randn(samples, *tokens, device=device) for _ in weights]

        def ends(function):
            stream = dit.x_embedder(x).contiguous() + dit.pos_embed
            return dit.final_layer(function(stream), modulations[-1])

        def strided(_):
            stream = dit.x_embedder(x) + dit.pos_embed  # as the convolution returns it: channels before tokens
            for gate, slot in zip(gates, slots):
                stream = torch.addcmul(stream, gate, slot[0])
            return stream

        def sum_first(stream):
            for gate, slot in zip(gates, slots):
                forecast = sum(weight * output for weight, output in zip(weights, slot))
                stream = torch.addcmul(stream, gate, forecast)
            return stream

        def new_memory(stream):
            for gate, slot in zip(gates, slots):
                for weight, output in zip(weights, slot):
                    stream = torch.addcmul(stream, gate * weight, output)
            return stream

        def whole_step(stream):
            for weight, output in zip(weights, added):
                stream = stream.add_(output, alpha=weight)
            return stream

        def reuse(order):
            row = [[False if order == 0 else weights[: order + 1]] * 2] * dit.depth
            return partial(dit.denoise, x, modulations, row, caches[order])

        ways = {
            "full step": partial(dit.denoise, x, modulations),
            "order 0": reuse(0),
            "order 0, stream as the convolution returns it": partial(ends, strided),
            "order 1": reuse(1),
            "order 2": reuse(2),
            "order 2, each sum into new memory": partial(ends, new_memory),
            "order 2, forecast first, then the gate": partial(ends, sum_first),
            "order 2 of what the whole step adds": partial(ends, whole_step),
        }
        return common.time_in_turn(ways, 5 * repeats, device)


def table(records):
    """Markdown tables of the records."""
    texts = []
    for record in records:
        if "sums" in record:
            full = statistics.median(record["sums"]["full step"])
            medians = {name: statistics.median(seconds) for name, seconds in record["sums"].items()}
            rows = [
                {"step": n, "ms": f"{1e3 * s:.2f}", "of a full step": f"{s / full:.1%}"} for n, s in medians.items()
            ]
        else:
            rows = [
                {
                    "steps": record["flags"]["num_sampling_steps"],
                    "images": record["flags"]["images"],
                    "plan": name,
                    "seconds": f"{statistics.median(row['seconds']):.3f}",
                    "speed-up": f"{row['speedup']:.3f}",
                    "bound": f"{row['bound']:.3f}",
                    "of the bound": f"{row['speedup'] / row['bound']:.1%}",
                    "error": f"{row['error']:.1e}",
                }
                for name, row in record["rows"].items()
            ]
        texts.append(common.markdown(rows))
    return "\n\n".join(texts)


def main(args):
    common.run_benchmark(args, "forecast-*", measure, table=table)


if __name__ == "__main__":
    cli.run(main, parse_args())
