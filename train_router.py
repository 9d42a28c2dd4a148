"""Train a router: for every step of a sampler, which layers of a frozen DiT may reuse their last output.

    torchrun --nnodes=1 --nproc_per_node=8 --master_port 12345 train_router.py --model DiT-XL/2 \\
        --data-path PATH_TO_IMAGENET_TRAIN --global-batch-size 64 --image-size 256 --ckpt-every 1000 --l1 5e-6 --lr 0.01
    python train_router.py --preset xl2-20 --data-path PATH_TO_IMAGENET_TRAIN --resume auto
    python train_router.py --preset fashion-20

The same training on any number of processes: each update draws --draws-per-step steps of the sampler, each for its
own part of the batch, and the processes share the batch. What is random follows the seed and the sample's number.
Source: Ma et al. 2024, arXiv:2406.01733, sec. 3.3.
"""

import contextlib
import math
import os

from runtime import cli
from training.presets import PRESETS, describe_presets

# What a router depends on, beside the model and the data: --resume auto continues a run with the same.
DETERMINING = (
    "num_sampling_steps global_batch_size draws_per_step global_seed l1 lr ste_threshold target_cached dtype".split()
)


def parse_args(argv=None):
    parser = cli.ArgumentParser(description=__doc__, epilog=describe_presets())
    parser.add_argument(
        "--preset", choices=PRESETS, metavar="NAME", help="sets flags as in the table below; any that is given wins"
    )
    cli.add_model_arguments(parser, vae="ema")
    data = parser.add_argument_group("data")
    data.add_argument("--data-path", metavar="DIR", help="folder of images, a folder a class")
    data.add_argument("--latents", metavar="DIR", help="what --extract-latents wrote, instead of --data-path")
    data.add_argument("--extract-latents", metavar="DIR", help="encode --data-path into this folder, then end")
    data.add_argument(
        "--num-workers",
        metavar="N",
        type=cli.non_negative_int,
        default=4,
        help="data loading processes of each process, at most the cores",
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--num-sampling-steps",
        metavar="N",
        type=cli.router_steps,
        default=20,
        help="denoising steps of the sampler the router is for",
    )
    training.add_argument(
        "--l1",
        metavar="WEIGHT",
        type=cli.non_negative,
        default=5e-6,
        help="weight of the sum of scores: more caches more; with --target-cached the weight to start from",
    )
    training.add_argument(
        "--target-cached",
        type=cli.share,
        metavar="SHARE",
        help="share of all layers, at all steps, to cache at --thres: finds the weight of --l1 while training",
    )
    cli.add_threshold_argument(training)
    training.add_argument("--lr", type=cli.non_negative, default=1e-3, help="learning rate of AdamW")
    training.add_argument(
        "--max-steps",
        metavar="N",
        type=cli.positive,
        default=20000,
        help="updates; published 20000, for 50 sampling steps 40000",
    )
    training.add_argument(
        "--epochs",
        metavar="N",
        type=cli.positive,
        help="stop after so many passes over the data; without it --max-steps alone decides",
    )
    training.add_argument(
        "--global-batch-size",
        metavar="N",
        type=cli.positive,
        default=64,
        help="images an update, all processes together",
    )
    training.add_argument(
        "--draws-per-step",
        metavar="N",
        type=cli.positive,
        default=8,
        help="sampler steps drawn an update, each for its part of the batch; whatever the number of processes",
    )
    training.add_argument(
        "--ste-threshold",
        metavar="SCORE",
        type=cli.fraction,
        help="harden the scores at this threshold in the forward pass (straight-through)",
    )
    training.add_argument(
        "--global-seed", type=cli.seed, default=0, help="of the initial scores, the draws, the data order, the noise"
    )
    speed = cli.add_precision_arguments(
        parser, ["fp32", "tf32", "bf16"], default="tf32"
    )  # fp16: its loss needs scaling
    speed.add_argument(
        "--grad-checkpointing", action="store_true", help="less memory, more time: blocks run again to get gradients"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--results-dir", metavar="DIR", default="results", help="each run makes NNN-MODEL/ in it")
    output.add_argument(
        "--resume",
        metavar="PATH|auto",
        help="continue a run's folder or checkpoint, up to --max-steps; auto: the newest run like this one, if any",
    )
    output.add_argument(
        "--ckpt-every", metavar="N", type=cli.positive, default=1000, help="updates between checkpoints"
    )
    output.add_argument(
        "--keep", metavar="N", type=cli.positive, help="newest checkpoints that stay; without it all do"
    )
    output.add_argument(
        "--log-every", metavar="N", type=cli.positive, default=100, help="updates between lines of the log"
    )
    output.add_argument(
        "--wandb", action="store_true", help="log to Weights & Biases; offline where there is no account"
    )
    given, _ = parser.parse_known_args(argv)
    if given.preset:
        parser.set_defaults(**PRESETS[given.preset][0])
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser, args):
    """Refuses what does not go together, with the numbers that would."""
    world, batch, draws = int(os.environ.get("WORLD_SIZE", 1)), args.global_batch_size, args.draws_per_step
    if args.latents and args.data_path == parser.get_default("data_path"):
        args.data_path = None  # the preset's
    if args.extract_latents and (args.latents or not args.data_path):
        parser.error("--extract-latents needs --data-path, and no --latents")
    if bool(args.latents) == bool(args.data_path):
        parser.error("name a folder of images with --data-path, or one of latents with --latents")
    if args.extract_latents:
        return  # what follows is about training
    if batch % draws:
        fits = f"--global-batch-size {-(-batch // draws) * draws}"
        others = [str(d) for d in range(1, batch + 1) if batch % d == 0]
        parser.error(
            f"--global-batch-size {batch} does not divide among --draws-per-step {draws}: "
            f"pass {fits}, or one of {', '.join(others)} draws"
        )
    if batch % world:
        # A multiple of the draws, so that what is proposed is not refused in turn.
        step = math.lcm(world, draws)
        parser.error(
            f"--global-batch-size {batch} does not divide among {world} processes: pass {-(-batch // step) * step}"
        )
    if args.target_cached and not 0.01 <= args.thres <= 0.99:
        parser.error(
            f"--target-cached with --thres {args.thres}: scores lie between 0.007 and 0.993, pass 0.01 to 0.99"
        )
    if args.target_cached and not (args.l1 and args.lr):
        parser.error("--target-cached starts from --l1 and moves with --lr: pass both above 0")
    cached_at_most = (args.num_sampling_steps // 2) / args.num_sampling_steps
    if args.target_cached and args.target_cached > cached_at_most:
        parser.error(
            f"--target-cached {args.target_cached} is more than {cached_at_most:.3f}, all layers of every second step: "
            "pass less"
        )


def check_continues(saved, args, updates, dit, identity):
    """Raises UserError where the checkpoint `saved` is of another model or step count, or has all `updates`."""
    from runtime.errors import UserError

    steps, depth = len(saved["routers"]), len(saved["routers"]["0.prob"]) // 2
    if steps != args.num_sampling_steps:
        raise UserError(
            f"--resume {args.resume} is a router for {steps} steps, not {args.num_sampling_steps}: "
            f"pass --num-sampling-steps {steps}, or train anew without --resume"
        )
    if depth != dit.depth or saved["identity"]["model"] != identity["model"]:
        raise UserError(
            f"--resume {args.resume} was trained on another model ({depth} blocks; this one has {dit.depth}): "
            "name that model, or train anew without --resume"
        )
    if saved["step"] >= updates:
        raise UserError(
            f"--resume {args.resume} has {saved['step']} updates already, of {updates}: pass a larger --max-steps"
            + (" and --epochs" if args.epochs else "")
        )


def prepare(args, processes, device):
    """The model's spec, its DiT (None for --extract-latents), its VAE, the data, and the VAE's fingerprint."""
    from pretrained.loading import load_dit, load_vae
    from pretrained.spec import model_spec
    from runtime.hashes import fingerprint
    from training.sources import ImageSource, LatentSource

    spec = processes.run_everywhere(
        lambda: model_spec(args.model, args.image_size, args.num_classes, args.vae, args.ckpt), local_main_first=True
    )
    source = processes.run_everywhere(lambda: ImageSource(args.data_path, spec)) if args.data_path else None

    def load():
        # What is missing is fetched; a wrong --ckpt is found before that.
        dit = None if args.extract_latents else load_dit(spec, device)
        return dit, load_vae(spec, device)

    dit, vae = processes.run_everywhere(load, local_main_first=True)
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    identity = {"vae": fingerprint(vae, config)}
    source = source or processes.run_everywhere(lambda: LatentSource(args.latents, spec, identity["vae"]))
    if dit:
        if len(source) < args.global_batch_size:
            raise processes.error(
                f"{args.data_path or args.latents} has {len(source)} images, fewer than --global-batch-size "
                f"{args.global_batch_size}"
            )
        size = spec.name if spec.registered else ""  # a folder's name says nothing
        identity |= {"model": fingerprint(dit, {"size": size, **spec.config}), "data": source.fingerprint()}
    return spec, dit, vae, source, identity


def main(args):
    import json
    from importlib.metadata import version

    from diffusion import create_diffusion
    from runtime import devices
    from runtime.files import atomic_write
    from runtime.processes import Processes
    from training.batches import BatchSampler
    from training.run_folder import RunFolder, open_run
    from training.trainer import Trainer

    processes = Processes()
    processes.connect()
    device = processes.run_everywhere(lambda: devices.pick_device(args.device, processes))
    devices.make_deterministic(device)  # so that a resumed run ends where the unbroken one does
    spec, dit, vae, source, identity = prepare(args, processes, device)
    if args.extract_latents:
        return extract(args, source, vae, spec, identity["vae"], processes)

    updates = args.max_steps
    if args.epochs:
        updates = min(updates, args.epochs * (len(source) // args.global_batch_size))

    def like_this(saved):
        names = [*DETERMINING, "max_steps", "epochs", "thres"] if args.target_cached else DETERMINING
        same = all(saved["args"].get(name) == getattr(args, name) for name in names)
        return same and saved["identity"] == identity and saved["step"] <= updates

    run = None

    def open_folder():
        nonlocal run
        saved = None
        if processes.launch:
            # After a restart (torchrun's --max-restarts) what this launch began goes on, whatever its --resume was.
            run, saved = RunFolder.newest(args.results_dir, lambda s: s["launch"] == processes.launch and like_this(s))
            lines = run.history(saved["step"]) if run else []
        if saved is None:
            check = lambda saved: check_continues(saved, args, updates, dit, identity)  # noqa: E731
            run, saved, lines = open_run(args.results_dir, spec.name, args.resume, like_this, check)
        run.set_history(lines)
        return saved

    saved = processes.run_on_main(open_folder)
    dit = devices.set_precision(dit, args.dtype)
    dit.grad_checkpointing = args.grad_checkpointing
    if args.compile:
        processes.run_everywhere(lambda: devices.compile_blocks(dit.blocks))
    batches = BatchSampler(
        len(source),
        args.global_batch_size,
        args.global_seed,
        processes.rank,
        processes.size,
        saved["step"] if saved else 0,
        args.epochs,
    )
    diffusion = create_diffusion(args.num_sampling_steps)
    training = Trainer(dit, vae, diffusion, args, updates, processes, batches.part)
    if saved:
        training.load_state_dict(saved)
    if processes.is_main:
        with atomic_write(run.folder / "args.json") as part:
            versions = {name: version(name) for name in ("torch", "diffusers", "numpy")}
            part.write_text(json.dumps({"args": vars(args), "versions": versions}, indent=2) + "\n")
        introduce(args, run, source, training, saved, identity)
    log = start_wandb(args, run.folder, saved and saved["wandb"]) if args.wandb and processes.is_main else None
    kept = {"args": vars(args), "identity": identity, "launch": processes.launch}
    kept["wandb"] = log.id if log else saved and saved["wandb"]

    def save():
        """A checkpoint, by the first process."""
        if not processes.is_main:
            return
        path = run.save(training.router, args.keep, args.thres, **training.state_dict(), **kept)
        if log and path.with_suffix(".png").exists():
            import wandb

            log.log({"heatmap": wandb.Image(str(path.with_suffix(".png")))}, step=training.step)

    if processes.is_main and not run.last.exists():
        save()  # so that a restart finds the run
    told = train(args, processes, training, source, batches, spec.horizontal_flip, run, save, log)
    if processes.is_main:
        conclude(args, spec, run, training, log)
    processes.disconnect()
    if told:
        raise KeyboardInterrupt


def introduce(args, run, source, training, saved, identity):
    """Says what is trained, and where it goes on."""
    rows, size, layers = len(training.trained), training.processes.size, 2 * training.dit.depth
    message = 4 * (min(args.draws_per_step, rows) * layers + args.draws_per_step + 2)
    print(
        f"{run.folder}: {len(source)} images, {rows} trained steps of {layers} layers; an update draws "
        f"{args.draws_per_step} steps, each for {training.draw_size} images; processes: {size}"
        + (f", exchanging at most {message:,} bytes an update" if size > 1 else "")
    )
    if saved is None:
        if args.resume == "auto":
            print(f"--resume auto: no run in {args.results_dir} is like this one, so it starts anew")
        return
    print(f"continues at update {training.step} of {training.updates}")
    for name in DETERMINING:
        was, now = saved["args"].get(name), getattr(args, name)
        if was != now:
            print(f"note: --{name.replace('_', '-')} was {was} in that run, now it is {now}")
    for name in ("data", "vae"):
        if saved["identity"][name] != identity[name]:
            print(f"note: that run was trained with other {'images' if name == 'data' else 'weights of the VAE'}")


def train(args, processes, training, source, batches, flips, run, save, log):
    """All updates that are left, with checkpoints and reports. Returns whether the process was told to stop."""
    import signal
    import time

    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from runtime import devices
    from runtime.errors import UserError
    from training.batches import TrainingSamples, ignore_signals, loaded, names_in
    from training.sources import check_skipped

    dit, device = training.dit, training.device
    shape = (dit.in_channels, dit.input_size, dit.input_size)
    loader = DataLoader(
        TrainingSamples(source, args.global_seed, shape, dit.num_classes, dit.y_embedder.dropout_prob, flips),
        batch_sampler=batches,
        num_workers=min(args.num_workers, os.cpu_count() or 1),
        worker_init_fn=ignore_signals,
        pin_memory=device.type == "cuda",
    )
    # A process that is told to stop says so with its gradients, so that all stop after the same update.
    stop = []
    handlers = {s: signal.signal(s, lambda *_: stop.append(True)) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(
        total=training.updates, initial=training.step, unit="update", disable=None if processes.is_main else True
    )
    told, unread, since, timed = False, [], time.perf_counter(), training.step
    try:
        for batch in loaded(loader) if training.step < training.updates else ():
            unread += names_in(batch["skipped"])
            told = training.update(batch, bool(stop))
            step = training.step
            bar.update()
            done = told or step == training.updates
            reports, saves = done or step % args.log_every == 0, done or step % args.ckpt_every == 0
            if reports or saves:
                names = {name for names in processes.gather(unread) for name in names} - training.skipped
                for name in sorted(names) if processes.is_main else ():
                    bar.write(f"skipped {name}")
                # Before they are kept, so that who replaces the files can go on.
                processes.run_everywhere(lambda names=names: check_skipped(training.skipped | names, source))
                training.skipped |= names
                unread = []
            if reports and processes.is_main:
                line = training.report() | {
                    "epoch": batches.epoch(step - 1),
                    "images_per_second": (step - timed) * args.global_batch_size / (time.perf_counter() - since),
                    "memory_bytes": devices.peak_memory(device),
                }
                run.log(line)
                bar.write(describe(line))
                if log:
                    log.log({k: v for k, v in line.items() if not isinstance(v, dict | list)}, step=step)
            if reports:
                training.new_window()
                since, timed = time.perf_counter(), step
            if saves:
                save()
            if done:
                break
    except (UserError, RuntimeError):
        # Of this process, or (a message that fails) of one that is gone: the last update that all made is kept. Where
        # that fails too, as on a full disk, the first fault is the one to tell.
        with contextlib.suppress(UserError):
            save()
        raise
    finally:
        bar.close()
        for s, handler in handlers.items():
            signal.signal(s, handler)
    return told


def conclude(args, spec, run, training, log):
    """The pictures, and what to do next."""
    import shlex

    path = (run.numbered() or [run.last])[-1]
    if log:
        log.finish()
        if log.settings.mode == "offline":
            print(f"Weights & Biases: offline; send it with: wandb sync {shlex.quote(log.settings.sync_dir)}")
    if training.step < training.updates:
        print(f"router: {path}; continue with the same command and --resume {shlex.quote(str(run.folder))}")
        return
    run.save_pictures(training.router, args.thres)
    share = training.router.schedule(args.thres).cached_share()
    if args.target_cached and abs(share - args.target_cached) > 0.01:
        print(f"note: {share:.1%} cached, not the {args.target_cached:.1%} asked for: give it more updates")
    print(f"router: {path}; how it came about: {run.folder / 'router.gif'}")
    print(f"sample with it: {sample_command(args, spec.registered, path)}")


def extract(args, images, vae, spec, vae_fingerprint, processes):
    """--extract-latents: encodes all images once, each process its share of the files."""
    import shlex

    from training.latents import extract_latents, finish_latents, prepare_latents

    folder, workers = args.extract_latents, min(args.num_workers, os.cpu_count() or 1)
    processes.run_on_main(lambda: prepare_latents(images, spec, folder, vae_fingerprint))
    rank, size = processes.rank, processes.size
    processes.run_everywhere(lambda: extract_latents(images, vae, spec, folder, rank, size, workers))
    skipped = processes.run_on_main(lambda: finish_latents(images, folder))
    if processes.is_main:
        for name in skipped:
            print(f"skipped {name}")
        print(f"latents: {folder}; train with --latents {shlex.quote(folder)} instead of --data-path")
    processes.disconnect()


def describe(line):
    """A line of the log for the eye."""
    layers = line["cached"] + line["non_zero"]
    return (
        f"update {line['step']} epoch {line['epoch']}: loss {line['loss']:.3e} mse {line['mse']:.3e} "
        f"l1 {line['l1']:.2f} x {line['l1_weight']:.2e} cached {line['cached']}/{layers} "
        f"({line['cached_share']:.1%} of all) {line['multiply_adds'] / 1e9:.4g} G multiply-adds "
        f"bound {line['speedup_bound']:.3f} {line['images_per_second']:.1f} images/s "
        f"{line['memory_bytes'] / 2**30:.1f} GiB"
    )


def sample_command(args, registered, path):
    """What a user types to sample with the router at `path`; registered: as in `ModelSpec`."""
    import shlex

    model = ["--ckpt", args.ckpt] if args.ckpt else []
    if registered:
        model += ["--model", args.model, "--image-size", args.image_size, "--num-classes", args.num_classes]
    command = ["python", "sample.py", *model, "--num-sampling-steps", args.num_sampling_steps, "--ddim-sample"]
    command += ["--accelerate-method", "dynamiclayer", "--path", path, "--thres", args.thres]
    return shlex.join(map(str, command))


def start_wandb(args, folder, run_id=None):
    """A run of Weights & Biases in `folder`; offline without an account or a network, so that nothing asks for one."""
    import wandb

    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
    settings = dict(project="learning-to-cache", name=folder.name, dir=folder, config=vars(args), id=run_id)
    try:
        return wandb.init(**settings, resume="allow", mode=mode)
    except wandb.Error as error:
        print(f"Weights & Biases cannot be reached ({error}): logging offline")
        return wandb.init(**settings, resume="allow", mode="offline")


if __name__ == "__main__":
    cli.run(main, parse_args(), memory_hint="a smaller --global-batch-size, or --grad-checkpointing")
