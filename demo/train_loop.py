"""What the three training programs of the demo share: the images in memory, and a loop that can die at any time."""

import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from runtime import cli
from runtime.errors import UserError
from runtime.files import atomic_write, load_tensors

HERE = Path(__file__).resolve().parent
MODEL_FOLDER = HERE / "work" / "fashion_mnist"  # not ckpt/: a trial does not replace what is shipped


def add_arguments(parser, name, steps, batch_size=128):
    """The flags that the three programs have in common."""
    parser.add_argument("--data", type=Path, default=HERE / "data", help="folder that demo/fashion_mnist.py wrote")
    parser.add_argument(
        "--steps", type=cli.positive, default=steps, help="updates in all, those of earlier starts included"
    )
    parser.add_argument("--batch-size", type=cli.positive, default=batch_size, help="images an update")
    parser.add_argument("--lr", type=cli.finite, default=1e-3, help="peak learning rate")
    parser.add_argument(
        "--work",
        type=Path,
        default=HERE / "work" / f"{name}.pt",
        help="checkpoint to continue from if it is there, and to write every minute",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile; faster, needs a C++ compiler")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of weights and batches")
    cli.add_device_argument(parser)


def load_split(data, split):
    """All images of a split, uint8 (M, 3, 32, 32), and labels int64 (M,), in the order of the file names."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import PILToTensor

    if not (data / split).is_dir():
        raise UserError(f"no such folder: {data / split}; make it with `python -m demo.fashion_mnist`")
    folder = ImageFolder(str(data / split), transform=PILToTensor())
    loader = torch.utils.data.DataLoader(folder, batch_size=1000)
    parts = list(tqdm(loader, desc=f"reading {split}", disable=None))
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def normalise(images):
    """uint8 images -> float32 in [-1, 1], same shape."""
    return images.float() / 127.5 - 1


def learning_rate(step, steps, peak):
    """Linear warm-up over 1 % of the updates, constant, linear to 0 over the last 30 %."""
    return peak * min(1, (step + 1) / (0.01 * steps), (steps - step) / (0.3 * steps))


def autocast(device):
    """Matrix products in bfloat16, weights in float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def train(args, update, optimizer, generator, after=lambda: None, **state):
    """Calls update() -> loss, a 0-d tensor, until args.steps, and `after` behind each step of the optimizer.

    Saves and resumes the optimizer and all of `state`, whatever has a state_dict.
    The checkpoint holds the generator of the batches too, so a resumed run draws what an unbroken one would.
    Ctrl-C and SIGTERM write a checkpoint first. Returns the mean of the last 200 losses, None if nothing ran.
    """
    state = {"optimizer": optimizer, **state}
    step = 0
    if args.work.exists():
        saved = load_tensors(args.work)
        for name, item in state.items():
            item.load_state_dict(saved[name])
        generator.set_state(saved["generator"])
        step = saved["step"]
        print(f"continuing {args.work} at update {step}", flush=True)

    def save():
        with atomic_write(args.work) as part:
            torch.save(
                {name: item.state_dict() for name, item in state.items()}
                | {"generator": generator.get_state(), "step": step},
                part,
            )

    stop = []
    previous = {s: signal.signal(s, lambda *_: stop.append(True)) for s in (signal.SIGTERM, signal.SIGINT)}
    losses, saved_at = [], time.monotonic()
    bar = tqdm(total=args.steps, initial=step, mininterval=1, disable=None)
    log = sys.stderr.isatty()
    while step < args.steps and not stop:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        loss = update()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        after()
        step += 1
        bar.update()
        losses = losses[-199:] + [loss.detach()]
        if step % 200 == 0:
            mean = torch.stack(losses).mean().item()
            bar.set_postfix(loss=f"{mean:.4f}")
            if not log:
                print(f"update {step} loss {mean:.4f}", flush=True)
        if time.monotonic() - saved_at > 60 or step == args.steps or stop:
            save()
            saved_at = time.monotonic()
    bar.close()
    for s, handler in previous.items():
        signal.signal(s, handler)
    if stop:
        raise KeyboardInterrupt
    return torch.stack(losses).mean().item() if losses else None
