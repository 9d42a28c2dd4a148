"""Why DBCache's FID is below that of the full run: what it changes, and runs that change one of these things alone.

    python -m benchmarks.peers_study --record benchmarks/results/peers-study-cpu.json      # 11 minutes of one core
    python -m benchmarks.peers_study --table

500 samples of each run, the first of the noise of `benchmarks.peers`, whose packages it needs; 20 steps unless a run
says otherwise. "Forecast" is every third step with a forecast of order 2: it is close to the full run and takes a third
of its time. docs/peers.md says what the runs show.
"""

import tempfile
from functools import partial
from pathlib import Path

from benchmarks import common, peer_setups, peers, table
from runtime import cli

STEPS = 20
COLUMNS = ("FID", "sFID", "Inception Score", "precision", "recall")  # of the metrics of evaluator.py


def parse_args(argv=None):
    parser = common.parser(__doc__)
    parser.add_argument("--samples", type=cli.positive, default=500, help="of each run")
    return parser.parse_args(argv)


def one(_):
    return 1.0


class Study(peers.Bench):
    """Runs of the shipped model in the loop of DiTPipeline."""

    def __init__(self, samples):
        super().__init__()
        self.samples = samples

    def pipeline(self, base, steps):
        """A pipeline: "full", "dbcache", "taylorseer" (DBCache with it), "forecast", or with a `Schedule`."""
        from schedule import Schedule

        pipe = peer_setups.make_pipeline(self.dit, self.vae)
        if base == "forecast":
            base = Schedule.every_nth(steps, self.dit.depth, 3).with_order(2)
        if base == "dbcache":
            peer_setups.dbcache(pipe, steps, threshold=0.15)
        elif base == "taylorseer":
            peer_setups.dbcache(pipe, steps, threshold=0.25, in_a_row=2, order=1)
        elif base != "full":
            peer_setups.ours(pipe, steps, base)
        return pipe

    def latents(self, base, steps=None, guidance=one, noise=one, interval=(0, 1)):
        """Latents (samples, C, H, W). guidance, noise: functions of the timestep, the factors of these two there."""
        import torch

        from models import Guidance

        steps = steps or STEPS
        pipe = self.pipeline(base, steps)
        predict = pipe.predict_noise

        def changed(x, t, labels, scale):
            scale = Guidance(self.spec.cfg_scale * guidance(t.item()), interval=interval)
            return predict(x, t, labels, scale) * noise(t.item())

        pipe.predict_noise = changed
        parts = []
        for first in range(0, self.samples, peers.AT_ONCE):
            some = self.noise(first, min(peers.AT_ONCE, self.samples - first))
            parts.append(pipe(some.y.tolist(), num_inference_steps=steps, latents=some.z))
        return torch.cat(parts)

    def compare_steps(self):
        """What DBCache predicts, beside the full model on the same input, and the layers that it ran.

        Returns a dict for each step that it skips in part, and bool [steps, depth, 2], the first step first. "guidance"
        and "noise" are DBCache's tensors projected onto the full model's, "image" is a ratio of standard deviations.
        """
        from models import guided

        pipe, full, rows = self.pipeline("dbcache", STEPS), self.pipeline("full", STEPS).transformer, []
        noise = self.noise(0, min(peers.AT_ONCE, self.samples))
        scale, signal = self.spec.cfg_scale, pipe.scheduler.alphas_cumprod.tolist()

        def compare(x, t, labels, _):
            how = {"timestep": t.expand(len(x)), "class_labels": labels}
            outputs = [model(x, **how).sample[:, : x.shape[1]] for model in (pipe.transformer, full)]
            directions = [output[: len(x) // 2] - output[len(x) // 2 :] for output in outputs]
            noises = [guided(output, scale) for output in outputs]
            images = [(x - (1 - signal[t]) ** 0.5 * some).std().item() for some in noises]
            rows.append(
                {
                    "timestep": t.item(),
                    "error": ((noises[0] - noises[1]).norm() / noises[1].norm()).item(),
                    "guidance": peers.projection(*directions),
                    "noise": peers.projection(*noises),
                    "image": images[0] / images[1],
                }
            )
            return noises[0]

        pipe.predict_noise = compare

        def sample(progress):
            return pipe(noise.y.tolist(), num_inference_steps=STEPS, latents=noise.z, progress=progress)

        _, ran = peer_setups.count_layers(pipe.transformer, sample, STEPS, self.dit.depth)
        return [row for row, step in zip(rows, ran) if not step.all()], ran

    def runs(self, steps, ran):
        """{name: function -> latents} of all runs. steps, ran: of `compare_steps`."""
        import torch

        from schedule import Schedule

        early = {row["timestep"]: row["guidance"] for row in steps if row["timestep"] > 1000 * peers.LATE}
        late = {row["timestep"]: row["noise"] for row in steps if row["timestep"] <= 1000 * peers.LATE}

        def of(factors, power=1):
            return lambda t: factors.get(t, 1.0) ** power

        def up_to(factor, top):
            return lambda t: factor if t <= 1000 * top else 1.0

        def like(latents, other):
            """Latents with the mean and the standard deviation of the other ones, by channel."""
            (mean, std), (other_mean, other_std) = (
                [f(x, dim=(0, 2, 3), keepdim=True) for f in (torch.mean, torch.std)] for x in (latents, other)
            )
            return (latents - mean) / std * other_std + other_mean

        full, dbcache, forecast = self.latents("full"), self.latents("dbcache"), partial(self.latents, "forecast")
        reuse = Schedule(ran.flip(0))  # step 0 runs last
        spread = (full.std() / dbcache.std()).item()
        result = {
            "full": lambda: full,
            "DBCache": lambda: dbcache,
            "forecast": forecast,
            "forecast, guidance times DBCache's ratios before t = 0.5": partial(forecast, guidance=of(early)),
            "forecast, no guidance above t = 0.78": partial(forecast, interval=(0, 0.78)),
            "forecast, no guidance above t = 0.58": partial(forecast, interval=(0, 0.58)),
            "DBCache, latents with mean and std of the full run": partial(like, dbcache, full),
            "full, latents with mean and std of DBCache": partial(like, full, dbcache),
            f"DBCache, latents times {spread:.2f} (the std of the full run)": lambda: dbcache * spread,
            f"full, latents times {1 / spread:.2f} (the std of DBCache)": lambda: full / spread,
            "forecast, noise times DBCache's ratios from t = 0.5 on": partial(forecast, noise=of(late)),
            "DBCache, noise divided by these ratios": partial(self.latents, "dbcache", noise=of(late, -1)),
        }
        for factor, top in ((0.97, 0.5), (0.95, 0.5), (0.99, 1), (0.98, 1), (0.96, 1), (0.94, 1)):
            where = f" from t = {top} on" if top < 1 else ""
            result[f"forecast, noise times {factor}{where}"] = partial(forecast, noise=up_to(factor, top))
        return result | {
            "plain reuse of the layers that DBCache skips": partial(self.latents, reuse),
            "DBCache with TaylorSeer": partial(self.latents, "taylorseer"),
            "forecast, 50 steps": partial(forecast, steps=50),
            "forecast, 50 steps, noise times 0.98": partial(forecast, steps=50, noise=up_to(0.98, 1)),
        }

    def judge(self, latents):
        """Metrics of the images of latents, the mean and the deviation of their pixels, the variance of the latents."""
        import numpy as np

        from sampling import decode

        images = np.concatenate([decode(self.vae, part).numpy() for part in latents.split(peers.AT_ONCE)])
        labels = self.noise(0, len(images)).labels.numpy()
        with tempfile.TemporaryDirectory() as folder:
            npz = Path(folder) / "images.npz"
            np.savez(npz, arr_0=images, labels=labels)
            quality = table.judge(npz)
        pixels = [images.mean().item(), images.std().item()]
        return quality | {"pixels": pixels, "variance": latents.var().item()}


def measure(args):
    study = Study(args.samples)
    steps, ran = study.compare_steps()
    runs = {name: study.judge(run()) for name, run in study.runs(steps, ran).items()}
    return {"ran": ran.flatten(1).float().mean(1).tolist(), "steps": steps, "runs": runs}


def rows_of_steps(record):
    heads = {"error": "error of the noise, relative", "guidance": "guidance direction, ratio"}
    heads |= {"noise": "predicted noise, ratio", "image": "std of the predicted image, ratio"}
    return [
        {"timestep": step["timestep"]} | {head: f"{step[name]:.3f}" for name, head in heads.items()}
        for step in record["steps"]
    ]


def rows_of_runs(record):
    rows = []
    for name, run in record["runs"].items():
        metrics = {label: f"{run['metrics'][label.lower().replace(' ', '_')]:.3f}" for label in COLUMNS}
        pixels = {"std of pixels": f"{run['pixels'][1]:.1f}", "variance of latents": f"{run['variance']:.3f}"}
        rows.append({"run": name} | metrics | {"class accuracy": f"{run['class_accuracy']:.1%}"} | pixels)
    return rows


def tables(records):
    """Two Markdown tables of each record."""
    return "\n\n".join(common.markdown(rows(r)) for r in records for rows in (rows_of_steps, rows_of_runs))


def main(args):
    common.run_benchmark(args, "peers-study-*", measure, table=tables)


if __name__ == "__main__":
    cli.run(main, parse_args())
