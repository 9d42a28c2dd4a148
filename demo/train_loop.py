"""What the three training programs of the demo share: the images in memory, and a loop that resumes."""

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
MODEL_FOLDER = HERE / "output" / "fashion_mnist"  # not ckpt/: a trial does not replace the shipped model


def parser(description, name, updates, batch_size):
    """A parser with the flags that the three programs have in common."""
    result = cli.ArgumentParser(description=description)
    work = HERE / "output" / f"{name}.pt"
    result.add_argument("--data", type=Path, default=HERE / "data", help="folder that demo/fashion_mnist.py wrote")
    result.add_argument("--steps", type=cli.positive, default=updates, help="updates in all, earlier launches included")
    result.add_argument("--batch-size", type=cli.positive, default=batch_size, help="images an update")
    result.add_argument("--work", type=Path, default=work, help="checkpoint, resumed if present, written every minute")
    result.add_argument("--seed", type=cli.seed, default=0, help="seed of weights and batches")
    cli.add_device_argument(result)
    return result


def load_split(data, split):
    """All images of a split, uint8 (M, 3, 32, 32), and labels int64 (M,), in the order of the file names."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import PILToTensor

    if not (data / split).is_dir():
        raise UserError(f"no such folder: {data / split}; make it with `python -m demo.fashion_mnist`")
    folder = ImageFolder(str(data / split), transform=PILToTensor())
    loader = torch.utils.data.DataLoader(folder, batch_size=1000)
    images, labels = zip(*tqdm(loader, desc=f"reading {split}", disable=None))
    return torch.cat(images), torch.cat(labels)


def normalise(images):
    """uint8 images -> float32 in [-1, 1], same shape."""
    return images.float() / 127.5 - 1


def learning_rate(update, updates):
    """Linear warm-up over 1 % of the updates to 1e-3, constant, linear to 0 over the last 30 %."""
    return 1e-3 * min(1, (update + 1) / (0.01 * updates), (updates - update) / (0.3 * updates))


def autocast(device):
    """Matrix products in bfloat16, weights in float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def train(loss_of_batch, optimizer, generator, *, updates, work, after=lambda: None, **state):
    """Train until there were `updates` updates; returns the mean of the last 200 losses, None without an update.

    loss_of_batch: draws a batch with `generator` and returns its loss, a 0-d tensor. after: called after each update.
    Saves to and resumes from the file `work`: the optimizer, the generator, torch's own generators, and `state`,
    objects with a state_dict.
    A resumed run draws what an unbroken run would. Ctrl-C and SIGTERM write a checkpoint first.
    """
    state = {"optimizer": optimizer, **state}
    own_generators = [torch.default_generator]  # dropout draws from these
    if (device := optimizer.param_groups[0]["params"][0].device).type == "cuda":
        own_generators.append(torch.cuda.default_generators[device.index])
    done = 0
    if work.exists():
        saved = load_tensors(work)
        for name, item in state.items():
            item.load_state_dict(saved[name])
        generator.set_state(saved["generator"])
        for own, before in zip(own_generators, saved.get("own_generators", ())):
            own.set_state(before)
        done = saved["step"]
        print(f"continuing {work} at update {done}", flush=True)

    stop = []
    previous = {s: signal.signal(s, lambda *_: stop.append(True)) for s in (signal.SIGTERM, signal.SIGINT)}
    losses, saved_at = [], time.monotonic()
    bar = tqdm(total=updates, initial=done, mininterval=1, disable=None)
    while done < updates and not stop:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, updates)
        loss = loss_of_batch()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        after()
        done += 1
        bar.update()
        losses = losses[-199:] + [loss.detach()]
        if done % 200 == 0:
            bar.write(f"update {done} loss {torch.stack(losses).mean():.4f}", file=sys.stderr)
        if time.monotonic() - saved_at > 60 or done == updates or stop:
            checkpoint = {name: item.state_dict() for name, item in state.items()}
            checkpoint |= {"generator": generator.get_state(), "step": done}
            checkpoint |= {"own_generators": [own.get_state() for own in own_generators]}
            with atomic_write(work) as part:
                torch.save(checkpoint, part)
            saved_at = time.monotonic()
    bar.close()
    for s, handler in previous.items():
        signal.signal(s, handler)
    if stop:
        raise KeyboardInterrupt
    return torch.stack(losses).mean().item() if losses else None
