"""Train a router: for every step of a sampler, which layers of a frozen DiT may reuse their last output.

    torchrun --nnodes=1 --nproc_per_node=8 --master_port 12345 train_router.py --model DiT-XL/2 \\
        --data-path PATH_TO_IMAGENET_TRAIN --global-batch-size 64 --image-size 256 --ckpt-every 1000 --l1 5e-6 --lr 0.01
    python train_router.py --ckpt ckpt/fashion_mnist --data-path demo/data/train \\
        --global-batch-size 32 --l1 1e-4 --lr 0.1 --max-steps 600

Without torchrun it is one process. Each process draws a step of its own for its part of the batch.
Source: Ma et al. 2024, arXiv:2406.01733, sec. 3.3.
"""

import cli


def parse_args(argv=None):
    parser = cli.ArgumentParser(description="Train a router over the layers of a frozen DiT.")
    parser.add_argument("--data-path", required=True, help="folder of images, a folder a class")
    parser.add_argument("--results-dir", default="results", help="each run makes NNN-MODEL/ in it")
    cli.add_model_arguments(parser, vae="ema")
    parser.add_argument(
        "--epochs",
        type=cli.positive,
        help="stop after so many passes over the data; without it --max-steps alone decides",
    )
    parser.add_argument(
        "--global-batch-size", type=cli.positive, default=64, help="images an update, all processes together"
    )
    parser.add_argument(
        "--global-seed", type=cli.seed, default=0, help="of the initial scores, the draws, the data order"
    )
    parser.add_argument(
        "--num-workers",
        type=cli.not_negative_int,
        default=4,
        help="data loading processes of each process, at most the cores",
    )
    parser.add_argument("--log-every", type=cli.positive, default=100, help="updates between lines of the log")
    parser.add_argument("--ckpt-every", type=cli.positive, default=1000, help="updates between checkpoints")
    parser.add_argument(
        "--resume", metavar="CHECKPOINT", help="continue from what this program wrote, up to --max-steps"
    )
    parser.add_argument(
        "--wandb", action="store_true", help="log to Weights & Biases; offline where there is no account"
    )
    parser.add_argument(
        "--num-sampling-steps",
        type=cli.router_steps,
        default=20,
        help="denoising steps of the sampler the router is for",
    )
    parser.add_argument(
        "--l1", type=cli.not_negative, default=5e-6, help="weight of the sum of scores: more caches more"
    )
    parser.add_argument("--lr", type=cli.not_negative, default=1e-3, help="learning rate of AdamW")
    parser.add_argument(
        "--max-steps", type=cli.positive, default=20000, help="updates; published 20000, for 50 sampling steps 40000"
    )
    parser.add_argument(
        "--ste-threshold",
        type=cli.fraction,
        help="harden the scores at this threshold in the forward pass (straight-through)",
    )
    return parser.parse_args(argv)


def center_crop(image, size):
    """A PIL image of any size -> size x size pixels: the middle square, as the released models were trained.

    Halved with a box filter while twice as large as needed, then scaled bicubically (Dhariwal and Nichol 2021).
    """
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def load_image(path):
    """The picture at `path`, decoded. Raises UserError where it is damaged."""
    from PIL import Image

    from files import UserError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for broken PNG chunks
        raise UserError(f"{path} is no whole picture: replace or remove it") from error


def open_data(path, spec):
    """The ImageFolder at `path`, images float32 (3, S, S) in [-1, 1]. Raises UserError where it is not usable."""
    from functools import partial
    from pathlib import Path

    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    from files import UserError

    if not Path(path).is_dir():
        raise UserError(f"no such folder: {path}; --data-path names a folder of images, a folder a class")
    flip = [transforms.RandomHorizontalFlip()] if spec.horizontal_flip else []
    transform = transforms.Compose(
        [
            partial(center_crop, size=spec.image_size),
            *flip,
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    try:
        data = ImageFolder(path, transform=transform, loader=load_image)
    except FileNotFoundError as error:
        raise UserError(f"{path} has no images, a folder a class: {str(error).splitlines()[0]}") from error
    if len(data.classes) != spec.num_classes:
        # Labels are the alphabetical order of the folders, so a part of them would be labelled wrongly.
        raise UserError(
            f"{path} has {len(data.classes)} classes, the model {spec.num_classes}: name the model's own data"
        )
    return data


def new_run_folder(results_dir, name):
    """Makes results_dir/NNN-name/checkpoints with the first free number; returns results_dir/NNN-name."""
    from pathlib import Path

    from files import UserError

    try:
        Path(results_dir).mkdir(parents=True, exist_ok=True)
        numbers = [
            int(p.name[:3]) for p in Path(results_dir).iterdir() if p.name[:3].isdecimal() and p.name[3:4] == "-"
        ]
        folder = Path(results_dir) / f"{max(numbers, default=-1) + 1:03d}-{name.replace('/', '-')}"
        (folder / "checkpoints").mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write into {results_dir}: {error.strerror}; name another --results-dir") from error
    return folder


def main(args):
    import argparse
    import os
    import signal
    import time
    from itertools import count, islice

    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader
    from torch.utils.data.distributed import DistributedSampler
    from tqdm import tqdm

    import sampling
    from diffusion import create_diffusion
    from files import UserError, load_tensors
    from router import Router, router_loss

    # A process of torchrun's, or a world of one.
    rank, world, local = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if args.global_batch_size % world:
        fits = args.global_batch_size // world * world or world
        raise UserError(
            f"--global-batch-size {args.global_batch_size} does not divide among {world} processes: pass {fits}"
        )
    batch_size = args.global_batch_size // world
    cuda = args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())
    device = sampling.pick_device(f"cuda:{local}" if cuda and world > 1 else args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = True
    spec = sampling.model_spec(args.model, args.image_size, args.num_classes, args.vae, args.ckpt)
    data = open_data(args.data_path, spec)
    if len(data) < args.global_batch_size:
        raise UserError(
            f"{args.data_path} has {len(data)} images, fewer than --global-batch-size {args.global_batch_size}"
        )
    resumed = load_tensors(args.resume, allow=[argparse.Namespace]) if args.resume else None

    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if world > 1 and local:
        dist.barrier()  # the first process of a machine fetches what is missing, the others find it
    dit = sampling.load_dit(spec, device)
    vae = sampling.load_vae(spec, device)
    if world > 1 and not local:
        dist.barrier()

    # The same initial scores everywhere.
    torch.manual_seed(args.global_seed)
    router = Router(args.num_sampling_steps, dit.depth).to(device)
    if args.resume:
        start = Router.load(args.resume)
        start.check_fits(args.resume, args.num_sampling_steps, dit.depth)
        router.load_state_dict(start.state_dict())
    diffusion = create_diffusion(args.num_sampling_steps)
    optimizer = torch.optim.AdamW(router.parameters(), lr=args.lr, weight_decay=0)
    first = 0
    if resumed:
        try:
            optimizer.load_state_dict(resumed["opt"])
            first = int(resumed["step"])
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"{args.resume} cannot be continued ({error}): name a checkpoint of this program"
            ) from error
        for group in optimizer.param_groups:
            group["lr"] = args.lr
        if first >= args.max_steps:
            raise UserError(f"{args.resume} has {first} updates already: pass a --max-steps above that")
    # Rows that no process drew keep a gradient of None, and AdamW passes over them.
    scores_of = DistributedDataParallel(router, find_unused_parameters=True) if world > 1 else router
    sampler = DistributedSampler(data, world, rank, seed=args.global_seed, drop_last=True)
    workers = min(args.num_workers, os.cpu_count() or 1)
    loader = DataLoader(
        data,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        worker_init_fn=ignore_interrupts,
        drop_last=True,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )
    trained = list(router.trained_steps(args.num_sampling_steps))
    # Each process draws for itself; a continued run does not draw again what it drew before.
    stream = (args.global_seed + 1) * 2**20 + first * world + rank
    torch.manual_seed(stream)
    draws = torch.Generator().manual_seed(stream)

    folder = log = None
    if rank == 0:
        folder = new_run_folder(args.results_dir, spec.name)
        log = start_wandb(args, folder) if args.wandb else None
        print(
            f"{folder}: {len(data)} images, {len(trained)} trained steps of {2 * dit.depth} layers, processes: {world}",
            flush=True,
        )
        if args.resume:
            print(f"continues {args.resume} at update {first}, with new draws", flush=True)

    def save(step):
        path = folder / "checkpoints" / f"{step:07d}.pt"
        router.save(path, opt=optimizer.state_dict(), step=step, args=vars(args))
        return path

    def batches():
        """(epoch, images, labels) from the first update on until the epochs are over."""
        skip = first % len(loader)
        for epoch in count(first // len(loader)):
            if epoch == args.epochs:
                return
            sampler.set_epoch(epoch)
            for images, labels in islice(loader, skip, None):
                yield epoch, images, labels
            skip = 0

    # One process finishes its update, saves and leaves; several cannot stop at the same update, torchrun ends them.
    stop = []
    handlers = {
        s: signal.signal(s, lambda *_: stop.append(True)) for s in (signal.SIGINT, signal.SIGTERM) if world == 1
    }
    bar = tqdm(total=args.max_steps, initial=first, disable=None if rank == 0 else True)
    sums, logged, since, step, path = torch.zeros(2, device=device), first, time.perf_counter(), first, None
    for epoch, images, labels in batches():
        with torch.no_grad():
            x_start = vae.encode(images.to(device)).latent_dist.sample().mul_(vae.config.scaling_factor)
            y = dit.y_embedder.drop(labels.to(device))
        i = trained[int(torch.randint(len(trained), (), generator=draws))] + 1
        scores = scores_of(i - 1)
        mse = router_loss(dit, diffusion, scores, i, x_start, y, torch.randn_like(x_start), args.ste_threshold).mean()
        l1 = scores.sum()
        optimizer.zero_grad(set_to_none=True)
        (mse + args.l1 * l1).backward()
        optimizer.step()
        router.clamp_()
        step += 1
        bar.update()
        sums += torch.stack([mse.detach(), l1.detach()])

        done = step == args.max_steps or bool(stop)
        if done or step % args.log_every == 0:
            if world > 1:
                dist.all_reduce(sums)
            mse_mean, l1_mean = (sums / ((step - logged) * world)).tolist()
            rate = (step - logged) * args.global_batch_size / (time.perf_counter() - since)
            if rank == 0:
                above = sum(int((router(i).detach() > 0.1).sum()) for i in trained)
                loss = mse_mean + args.l1 * l1_mean
                bar.write(
                    f"update {step} epoch {epoch}: loss {loss:.3e} mse {mse_mean:.3e} l1 {l1_mean:.2f} "
                    f"scores above 0.1: {above}/{2 * dit.depth * len(trained)} {rate:.1f} images/s"
                )
                if log:
                    values = {"loss": loss, "mse": mse_mean, "l1": l1_mean, "non_zero": above, "images/s": rate}
                    log.log(values, step=step)
            sums.zero_()
            logged, since = step, time.perf_counter()
        path = None
        if rank == 0 and (done or step % args.ckpt_every == 0):
            path = save(step)
        if done:
            break
    bar.close()
    for s, handler in handlers.items():
        signal.signal(s, handler)
    if rank == 0:
        path = path or save(step)
        if log:
            log.finish()
        print(f"router: {path}" + (f"; continue with --resume {path}" if step < args.max_steps else ""))
    if world > 1:
        dist.destroy_process_group()
    if stop:
        raise KeyboardInterrupt


def ignore_interrupts(worker):
    """Ctrl-C reaches the data loading processes too; theirs to end is the main process."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


def start_wandb(args, folder):
    """A run of Weights & Biases in `folder`; offline without an account, so that nothing asks for one."""
    import os

    import wandb

    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
    return wandb.init(project="learning-to-cache", name=folder.name, dir=folder, config=vars(args), mode=mode)


if __name__ == "__main__":
    cli.run(main, parse_args())
