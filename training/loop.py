"""The updates of a training, one after another: signals, the log, checkpoints, Weights & Biases."""

import contextlib
import os
import signal
import time

from tqdm import tqdm

from runtime.devices import peak_memory
from runtime.errors import UserError
from training.batches import load_batches, skipped_names
from training.images import check_skipped


class Output:
    """Where the main process writes: the `RunFolder`, and a run of Weights & Biases or None.

    keep: newest checkpoints to keep, None for all. extra: what a checkpoint holds beside the trainer's state.
    On other ranks `run` is None, and nothing is written.
    """

    def __init__(self, run, keep, extra, wandb_run=None):
        self.run, self.keep, self.extra, self.wandb_run = run, keep, extra, wandb_run

    def save(self, trainer):
        """Write a checkpoint."""
        if self.run is None:
            return
        state = trainer.state_dict() | self.extra
        heatmap = self.run.save(trainer.router, state, trainer.config.threshold, self.keep).with_suffix(".png")
        if self.wandb_run and heatmap.exists():
            import wandb

            self.wandb_run.log({"heatmap": wandb.Image(str(heatmap))}, step=trainer.updates_done)

    def log(self, line):
        """Write a dict of figures as a line of the log."""
        if self.run is None:
            return
        self.run.log(line)
        if self.wandb_run:
            scalars = {name: value for name, value in line.items() if not isinstance(value, dict | list)}
            self.wandb_run.log(scalars, step=line["step"])


def run_updates(trainer, loader, output, log_every, ckpt_every):
    """Make all updates that are left; return whether a signal stopped them before.

    After an error, of this rank or of one that has ended, the last complete update is saved before it is raised.
    """
    config, is_main = trainer.config, trainer.processes.is_main
    unread, stopped, clock = [], False, time.perf_counter()
    logged = trainer.updates_done  # in this launch, since `clock`
    with (
        caught_signals() as signals,
        tqdm(total=config.updates, initial=logged, unit="update", disable=None if is_main else True) as bar,
    ):
        try:
            for batch in load_batches(loader) if logged < config.updates else ():
                unread += skipped_names(batch["skipped"])
                stopped = trainer.update(batch, stop=bool(signals))
                bar.update()
                update = trainer.updates_done
                done = stopped or update == config.updates
                log_now, save_now = done or update % log_every == 0, done or update % ckpt_every == 0
                if log_now or save_now:
                    share_skipped(trainer, unread, len(loader.dataset), bar)
                    unread = []
                if log_now:
                    line = trainer.report() | {
                        "epoch": loader.batch_sampler.epoch(update - 1),
                        "images_per_second": (update - logged) * config.batch_size / (time.perf_counter() - clock),
                        "memory_bytes": peak_memory(trainer.device),
                    }
                    output.log(line)
                    if is_main:
                        bar.write(describe(line))
                    trainer.start_window()
                    logged, clock = update, time.perf_counter()
                if save_now:
                    output.save(trainer)
                if done:
                    break
        except (UserError, RuntimeError):
            # If saving fails too, for example on a full disk, the first error is the one to report.
            with contextlib.suppress(UserError):
                output.save(trainer)
            raise
    return stopped


@contextlib.contextmanager
def caught_signals():
    """Yield a list that SIGINT and SIGTERM append to, instead of stopping the program: all ranks stop together later.

    `Trainer.update` tells the other ranks, so that all stop after the same update.
    """
    signals = []
    handlers = {s: signal.signal(s, lambda number, _: signals.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def share_skipped(trainer, unread, total, bar):
    """Collect the names of unreadable images from all ranks, and print the new ones.

    Raises UserError if they are more than 1 % of `total`; then they are not kept, so that a training whose files were
    replaced can continue.
    """
    processes = trainer.processes
    names = {name for names in processes.gather(unread) for name in names} - trainer.skipped
    for name in sorted(names) if processes.is_main else ():
        bar.write(f"skipped {name}")
    processes.run_everywhere(lambda: check_skipped(trainer.skipped | names, total))
    trainer.skipped |= names


def describe(line):
    """Format a line of the log for the terminal."""
    layers = line["cached"] + line["non_zero"]
    return (
        f"update {line['step']} epoch {line['epoch']}: loss {line['loss']:.3e} mse {line['mse']:.3e} "
        f"l1 {line['l1']:.2f} x {line['l1_weight']:.2e} cached {line['cached']}/{layers} "
        f"({line['cached_share']:.1%} of all) {line['multiply_adds'] / 1e9:.4g} G multiply-adds "
        f"bound {line['speedup_bound']:.3f} {line['images_per_second']:.1f} images/s "
        f"{line['memory_bytes'] / 2**30:.1f} GiB"
    )


def start_wandb(folder, flags, run_id=None):
    """Start or resume a run of Weights & Biases in `folder`; offline without an account or network."""
    import wandb

    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
    settings = dict(project="learning-to-cache", name=folder.name, dir=folder, config=flags, id=run_id, resume="allow")
    try:
        return wandb.init(**settings, mode=mode)
    except wandb.Error as error:
        print(f"Weights & Biases cannot be reached ({error}): logging offline")
        return wandb.init(**settings, mode="offline")


def finish_wandb(run):
    """End a run of Weights & Biases, and print how to send it if it is offline."""
    import shlex

    run.finish()
    if run.settings.mode == "offline":
        print(f"Weights & Biases: offline; send it with: wandb sync {shlex.quote(run.settings.sync_dir)}")
