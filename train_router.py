"""Train a router: for every step of a sampler, which layers of a frozen DiT may reuse their last output.

    torchrun --nnodes=1 --nproc_per_node=8 --master_port 12345 train_router.py --model DiT-XL/2 \\
        --data-path PATH_TO_IMAGENET_TRAIN --global-batch-size 64 --image-size 256 --ckpt-every 1000 --l1 5e-6 --lr 0.01
    python train_router.py --preset xl2-20 --data-path PATH_TO_IMAGENET_TRAIN --resume auto
    python train_router.py --preset fashion-20
    python train_router.py --ckpt ckpt/fashion_mnist --num-sampling-steps 50 --target-speedup 2 3 4

Any number of processes does the same training: they share the batch of each update, which draws --draws-per-step steps
of the sampler, each for its own part of the batch. All randomness depends on the seed and the sample's number alone.
Source: Ma et al. 2024, arXiv:2406.01733, sec. 3.3.

With --target-speedup it trains no router and needs no images: it learns plans, files of a schedule, in which each layer
may be reused at any step, with forecasts. It searches for those that move the final latents least.
"""

import math

from runtime import cli
from runtime.ranks import number_or
from training.presets import PRESETS, describe_presets

# The flags that determine a router, beside the model and the data: --resume auto continues a run with the same.
DETERMINING = "num_sampling_steps global_batch_size draws_per_step global_seed l1 lr dtype".split()
DETERMINING += ["ste_threshold", "target_cached", "forecast"]
DETERMINING_TARGET = [*DETERMINING, "max_steps", "epochs", "thres"]  # with --target-cached
NOT_WITH_PLANS = "preset data_path latents extract_latents num_workers l1 target_cached thres lr max_steps".split()
NOT_WITH_PLANS += "epochs global_batch_size draws_per_step ste_threshold ckpt_every keep log_every wandb".split()
NOT_WITH_PLANS += ["compile", "grad_checkpointing", "vae"]
WITH_EXTRACTION = "preset model vae image_size num_classes ckpt data_path extract_latents num_workers device".split()
# Processes must be given the same flags. Of these, places on a machine, it only matters whether they are given.
PLACES = "data_path latents extract_latents ckpt vae results_dir resume".split()
OWN = "preset device num_workers".split()  # and these may differ
CFG_SCALE = 1.5  # as published for FID


def parse_args(argv=None):
    parser = cli.ArgumentParser(description=__doc__, epilog=describe_presets())
    parser.add_argument("--preset", choices=PRESETS, metavar="NAME", help="set flags as in the table below; others win")
    cli.add_model_arguments(parser, vae="ema")
    add_data_arguments(parser.add_argument_group("data"))
    add_training_arguments(parser.add_argument_group("training"))
    add_plan_arguments(parser.add_argument_group("plans instead of a router"))
    speed = cli.add_precision_arguments(parser, ["fp32", "tf32", "bf16"], default="tf32")  # no fp16: loss scaling
    speed.add_argument("--grad-checkpointing", action="store_true", help="less memory, slower: run blocks again")
    add_output_arguments(parser.add_argument_group("output"))
    given, _ = parser.parse_known_args(argv)
    if given.preset:
        parser.set_defaults(**PRESETS[given.preset][0])
    args = parser.parse_args(argv)
    if check_plan_arguments(parser, args):
        return args
    check_data_arguments(parser, args)
    if not args.extract_latents:
        check_training_arguments(parser, args)
    elif unused := given_flags(parser, args, [name for name in vars(args) if name not in WITH_EXTRACTION]):
        parser.error(f"--extract-latents encodes images and trains no router: leave out {unused}")
    return args


def add_data_arguments(group):
    add = group.add_argument
    add("--data-path", metavar="DIR", help="folder with one subfolder of images per class")
    add("--latents", metavar="DIR", help="folder written by --extract-latents, instead of --data-path")
    add("--extract-latents", metavar="DIR", help="encode --data-path into this folder and stop")
    add("--num-workers", metavar="N", type=cli.non_negative_int, default=4, help="data loading workers per process")


def add_training_arguments(group):
    add = group.add_argument
    add("--num-sampling-steps", metavar="N", type=cli.router_steps, default=20, help="denoising steps of the sampler")
    add("--l1", metavar="WEIGHT", type=cli.non_negative, default=5e-6, help="L1 weight; larger caches more layers")
    target = "share of all layers, at all steps, to cache at --thres: adjusts the L1 weight, starting from --l1"
    add("--target-cached", metavar="SHARE", type=cli.share, help=target)
    cli.add_threshold_argument(group)
    add("--lr", type=cli.non_negative, default=1e-3, help="learning rate of AdamW")
    add("--max-steps", metavar="N", type=cli.positive, default=20000, help="updates; published for 50 steps: 40000")
    add("--epochs", metavar="N", type=cli.positive, help="stop after N passes over the data, if before --max-steps")
    add("--global-batch-size", metavar="N", type=cli.positive, default=64, help="images per update, on all processes")
    draws = "sampler steps drawn per update, each for its part of the batch, for any number of processes"
    add("--draws-per-step", metavar="N", type=cli.positive, default=8, help=draws)
    straight_through = "harden the scores at this threshold in the forward pass (straight-through)"
    add("--ste-threshold", metavar="SCORE", type=cli.fraction, help=straight_through)
    order = "reuse the last output (0), or forecast it from the last two (1) or three (2); default: 0, for plans 2"
    add("--forecast", type=int, choices=[0, 1, 2], help=order)
    add("--global-seed", type=cli.seed, default=0, help="seed of the initial scores, draws, data order and noise")


def add_plan_arguments(group):
    add, speedup = group.add_argument, cli.number(float, lambda value: 1 <= value < math.inf, "a number of at least 1")
    target = "learn a plan for each of these speed-ups, in multiply-adds, over running all layers; needs no images"
    add("--target-speedup", metavar="X", type=speedup, nargs="+", help=target)
    cli.add_guidance_arguments(group, CFG_SCALE)


def add_output_arguments(group):
    add = group.add_argument
    add("--results-dir", metavar="DIR", default="results", help="folder in which each run makes NNN-MODEL")
    resume = "run's folder or checkpoint to continue; auto: the newest run with the same flags and data, if any"
    add("--resume", metavar="PATH|auto", help=resume)
    add("--ckpt-every", metavar="N", type=cli.positive, default=1000, help="updates between checkpoints")
    add("--keep", metavar="N", type=cli.positive, help="keep the newest N checkpoints; default: all")
    add("--log-every", metavar="N", type=cli.positive, default=100, help="updates between lines of the log")
    add("--wandb", action="store_true", help="log to Weights & Biases, offline if there is no account")


def given_flags(parser, args, names):
    """List, for a message, those of `names` whose values are neither the defaults nor those of the preset."""
    given = [name for name in names if getattr(args, name) != parser.get_default(name)]
    return ", ".join(f"--{name.replace('_', '-')}" for name in given)


def check_plan_arguments(parser, args):
    """Refuse what does not go with --target-speedup or needs it; return whether plans are to be learned."""
    if not args.target_speedup:
        if given := given_flags(parser, args, ["cfg_scale", "cfg_channels", "cfg_interval"]):
            parser.error(f"{given} is for plans: add --target-speedup, or leave it out")
        args.forecast = args.forecast or None  # 0 is the default of a router, and earlier checkpoints have no entry
        return False
    cli.check_guidance_arguments(parser, args)
    if unused := given_flags(parser, args, NOT_WITH_PLANS):
        parser.error(f"--target-speedup learns plans and trains no router: leave out {unused}")
    if (number_or("WORLD_SIZE", 1) or 1) > 1:
        parser.error("--target-speedup runs in one process: start it with python, without torchrun")
    return True


def check_data_arguments(parser, args):
    if args.latents and args.data_path == parser.get_default("data_path"):
        args.data_path = None  # that of a preset
    if args.extract_latents and (args.latents or not args.data_path):
        parser.error("--extract-latents needs --data-path, and no --latents")
    if bool(args.latents) == bool(args.data_path):
        parser.error("pass a folder of images with --data-path, or one of latents with --latents")


def check_training_arguments(parser, args):
    """Refuse what does not go together, and name values that do."""
    batch, draws, world_size = args.global_batch_size, args.draws_per_step, number_or("WORLD_SIZE", 1) or 1
    unit = math.lcm(draws, world_size)
    if batch % unit:
        parser.error(
            f"--global-batch-size {batch} does not divide among {draws} draws (--draws-per-step) and {world_size} "
            f"processes: pass {-(-batch // unit) * unit}"
        )
    target, largest = args.target_cached, (args.num_sampling_steps // 2) / args.num_sampling_steps
    if target and not 0.01 <= args.thres <= 0.99:
        parser.error(f"--target-cached with --thres {args.thres}: scores are 0.007 to 0.993, pass 0.01 to 0.99")
    if target and not (args.l1 and args.lr):
        parser.error("--target-cached starts from --l1 and moves with --lr: pass both above 0")
    if target and target > largest:
        parser.error(f"--target-cached {target} exceeds {largest:.3f}, all layers of every other step: pass less")


def main(args):
    from runtime import devices
    from runtime.processes import Processes

    processes = Processes()
    processes.connect()
    flags = {name: bool(value) if name in PLACES else value for name, value in vars(args).items() if name not in OWN}
    processes.check_equal({f"--{name.replace('_', '-')}": value for name, value in flags.items()})
    device = processes.run_everywhere(lambda: devices.pick_device(args.device, processes))
    devices.make_deterministic(device)  # so that a resumed run ends like an uninterrupted one
    if args.target_speedup:
        return learn(args, device)
    stopped = (extract if args.extract_latents else train)(args, processes, device)
    processes.disconnect()
    if stopped:
        raise KeyboardInterrupt


def learn(args, device):
    """--target-speedup: learn plans."""
    from pretrained.loading import load_dit
    from pretrained.spec import model_spec
    from runtime import devices
    from runtime.hashes import fingerprint
    from sampling import check_interval, check_sampler
    from training.plan_run import learn_plans

    spec = model_spec(args.model, args.image_size, args.num_classes, args.vae, args.ckpt)
    dit = load_dit(spec, device)
    diffusion = spec.make_process(args.num_sampling_steps)
    cfg_scale = spec.guidance(args.cfg_scale, CFG_SCALE, args.cfg_channels, args.cfg_interval)
    check_sampler(dit, cfg_scale, ancestral=False)
    check_interval(diffusion, cfg_scale)
    identity = fingerprint(dit, spec.settings)
    dit = devices.set_precision(dit, args.dtype)
    learn_plans(args, spec, dit, diffusion, cfg_scale, identity)


def load(args, processes, device):
    """Load the `ModelSpec`, the DiT (None for --extract-latents), the VAE, and the source of training data.

    Also returns the fingerprints {"vae", "model", "data"} that a run must share to be continued.
    """
    from pretrained.loading import load_dit, load_vae
    from pretrained.spec import model_spec
    from runtime.hashes import fingerprint
    from training.images import ImageSource
    from training.latents import LatentSource

    spec = processes.run_everywhere(
        lambda: model_spec(args.model, args.image_size, args.num_classes, args.vae, args.ckpt), local_main_first=True
    )
    source = processes.run_everywhere(lambda: ImageSource(args.data_path, spec)) if args.data_path else None
    if source and processes.is_main:
        for note in source.notes:
            print(f"note: {note}")

    def load_models():
        dit = None if args.extract_latents else load_dit(spec, device)  # first: a wrong --ckpt downloads no VAE
        return dit, load_vae(spec, device)

    dit, vae = processes.run_everywhere(load_models, local_main_first=True)
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    identity = {"vae": fingerprint(vae, config)}
    source = source or processes.run_everywhere(lambda: LatentSource(args.latents, spec, identity["vae"]))
    if dit:
        size = spec.name if spec.registered else ""  # the name of a folder is no property of the model
        identity |= {"model": fingerprint(dit, {"size": size, **spec.settings}), "data": source.fingerprint()}
    processes.check_equal(identity)
    return spec, dit, vae, source, identity


def extract(args, processes, device):
    """--extract-latents: encode all images, each rank its share of the shards."""
    import shlex

    from training.latents import extract_latents, finish_latents, prepare_latents

    folder = args.extract_latents
    spec, _, vae, images, identity = load(args, processes, device)
    processes.run_on_main(lambda: prepare_latents(images, spec, folder, identity["vae"]))
    processes.run_everywhere(
        lambda: extract_latents(images, vae, spec, folder, processes.rank, processes.size, args.num_workers)
    )
    skipped = processes.run_on_main(lambda: finish_latents(images, folder))
    if processes.is_main:
        for name in skipped:
            print(f"skipped {name}")
        print(f"latents: {folder}; train with --latents {shlex.quote(folder)} instead of --data-path")


def train(args, processes, device):
    """Start or continue a training; return whether a signal stopped it."""
    from training.batches import TrainingSamples, make_loader
    from training.loop import Output, run_updates, start_wandb, wandb_mode

    if args.wandb:
        processes.run_on_main(wandb_mode)  # a wrong one is refused before the models are loaded
    spec, dit, vae, source, identity = load(args, processes, device)
    if len(source) < args.global_batch_size:
        raise processes.error(
            f"--global-batch-size {args.global_batch_size} exceeds the {len(source)} images of the data: pass less"
        )
    updates = min(args.max_steps, (args.epochs or math.inf) * (len(source) // args.global_batch_size))
    run, saved = open_run_on_main(args, processes, spec, dit, updates, identity)
    trainer, batches = make_trainer(args, processes, spec, dit, vae, len(source), updates, saved)

    wandb_run, wandb_id = None, saved and saved["wandb"]
    if processes.is_main:
        introduce(args, run, len(source), processes.size, trainer, saved, identity)
        if args.wandb:
            wandb_run = start_wandb(run.folder, vars(args), wandb_id)
            wandb_id = wandb_run.id
    extra = {"args": vars(args), "identity": identity, "launch": processes.launch, "wandb": wandb_id}
    output = Output(run, args.keep, extra, wandb_run)
    if processes.is_main and not run.last.exists():
        output.save(trainer)  # so that a restart finds the run
    shape = (dit.in_channels, dit.input_size, dit.input_size)
    samples = TrainingSamples(source, args.global_seed, shape, dit.num_classes, dit.label_dropout, spec.horizontal_flip)
    loader = make_loader(samples, batches, args.num_workers, device)
    stopped = run_updates(trainer, loader, output, args.log_every, args.ckpt_every)
    output.finish()
    if processes.is_main:
        conclude(args, spec, run, trainer)
    return stopped


def open_run_on_main(args, processes, spec, dit, updates, identity):
    """Open the run's folder on the main process (None on other ranks); return it and the checkpoint to continue."""
    from training.run_folder import open_run

    def accepts(saved):
        names = DETERMINING_TARGET if args.target_cached else DETERMINING
        same_flags = all(saved["args"].get(name) == getattr(args, name) for name in names)
        return same_flags and saved["identity"] == identity and saved["step"] <= updates

    def check(saved):
        check_continues(saved, args, updates, dit.depth, identity)

    run = None

    def open_folder():
        nonlocal run
        run, saved = open_run(args.results_dir, spec.name, args.resume, accepts, check, processes.launch)
        return saved

    saved = processes.run_on_main(open_folder)
    return run, saved


def check_continues(saved, args, updates, depth, identity):
    """Raise UserError if a checkpoint is of another model or step count, or has made all `updates`."""
    from runtime.errors import UserError

    saved_steps, saved_depth = len(saved["routers"]), len(saved["routers"]["0.prob"]) // 2
    if saved_steps != args.num_sampling_steps:
        problem = f"is a router for {saved_steps} steps: pass --num-sampling-steps {saved_steps}"
    elif saved_depth != depth or saved["identity"]["model"] != identity["model"]:
        problem = f"was trained on another model, of {saved_depth} blocks (this one has {depth}): pass that model"
    elif saved["step"] >= updates:
        problem = f"has {saved['step']} of {updates} updates already: pass a larger --max-steps"
        problem += " and --epochs" if args.epochs else ""
    else:
        return
    raise UserError(f"--resume {args.resume} {problem}, or leave out --resume to start a new run")


def make_trainer(args, processes, spec, dit, vae, images, updates, saved):
    """Make the `Trainer`, restored from the checkpoint `saved` if there is one, and its `BatchSampler`."""
    from runtime import devices
    from training.batches import BatchSampler
    from training.trainer import Trainer, TrainingConfig

    config = TrainingConfig(
        updates=updates,
        batch_size=args.global_batch_size,
        draws=args.draws_per_step,
        seed=args.global_seed,
        lr=args.lr,
        l1_weight=args.l1,
        threshold=args.thres,
        ste_threshold=args.ste_threshold,
        target_cached=args.target_cached,
        order=args.forecast or 0,
    )
    first_update, rank, size = saved["step"] if saved else 0, processes.rank, processes.size
    batches = BatchSampler(images, config.batch_size, config.seed, rank, size, first_update, args.epochs)
    dit = devices.set_precision(dit, args.dtype)
    dit.grad_checkpointing = args.grad_checkpointing
    if args.compile:
        processes.run_everywhere(lambda: devices.compile_blocks(dit.blocks))
    trainer = Trainer(dit, vae, spec.make_process(args.num_sampling_steps), config, processes, batches.part)
    if saved:
        trainer.load_state_dict(saved)
    return trainer, batches


def introduce(args, run, images, processes, trainer, saved, identity):
    """Write args.json, and print what is trained and from where it continues."""
    run.save_args(vars(args))
    print(
        f"{run.folder}: {images} images, {len(trainer.trained_steps)} trained steps of {2 * trainer.dit.depth} layers; "
        f"an update draws {args.draws_per_step} steps, each for {trainer.draw_size} images; processes: {processes}"
    )
    if saved is None:
        if args.resume == "auto":
            print(f"--resume auto: no run in {args.results_dir} has these flags, model and data, so a new one starts")
        return
    print(f"continues at update {trainer.updates_done} of {trainer.config.updates}")
    for name in DETERMINING:
        before, now = saved["args"].get(name), getattr(args, name)
        if before != now:
            print(f"note: --{name.replace('_', '-')} was {before} in that run, now it is {now}")
    for name, meaning in (("data", "images"), ("vae", "weights of the VAE")):
        if saved["identity"][name] != identity[name]:
            print(f"note: that run was trained with other {meaning}")


def conclude(args, spec, run, trainer):
    """Draw the pictures, and print what to do next."""
    import shlex

    from training.run_folder import sampling_command

    path = (run.numbered() or [run.last])[-1]
    if trainer.updates_done < trainer.config.updates:
        print(f"router: {path}; continue with the same command and --resume {shlex.quote(str(run.folder))}")
        return
    run.save_pictures(trainer.router, args.thres)
    share = trainer.router.schedule(args.thres).cached_share()
    if args.target_cached and abs(share - args.target_cached) > 0.01:
        print(f"note: {share:.1%} cached, not the {args.target_cached:.1%} of --target-cached: pass more --max-steps")
    print(f"router: {path}; how it developed: {run.folder / 'router.gif'}")
    router = ["--accelerate-method", "dynamiclayer", "--path", path, "--thres", args.thres]
    router += ["--forecast", args.forecast] if args.forecast else []
    print(f"sample with it: {sampling_command(args, spec, *router)}")


if __name__ == "__main__":
    cli.run(main, parse_args(), memory_hint="a smaller --global-batch-size, or --grad-checkpointing")
