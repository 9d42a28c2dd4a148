"""The updates of a training, one after another: signals, the log, checkpoints, Weights & Biases."""

import contextlib
import inspect
import os
import shlex
import sys
import time
from pathlib import Path

from tqdm import tqdm

from runtime.devices import peak_memory
from runtime.errors import UserError, first_line
from runtime.signals import caught_signals
from training.batches import load_batches, skipped_names
from training.images import check_skipped


class Output:
    """Where a training writes: its `RunFolder`, None on ranks that write nothing, and maybe Weights & Biases.

    keep: newest checkpoints to keep, None for all. extra: what a checkpoint holds beside the trainer's state.
    """

    def __init__(self, run, keep, extra, wandb_run=None):
        self.run, self.keep, self.extra, self.wandb_run = run, keep, extra, wandb_run

    def save(self, trainer):
        if self.run is None:
            return
        state = trainer.state_dict() | self.extra
        heatmap = self.run.save(trainer.router, state, trainer.config.threshold, self.keep).with_suffix(".png")
        if self.wandb_run and heatmap.exists():
            self.wandb_run.log({"heatmap": heatmap}, trainer.updates_done)

    def finish(self):
        if self.wandb_run:
            self.wandb_run.finish()

    def log(self, line):
        if self.run is None:
            return
        self.run.log(line)
        if self.wandb_run:
            scalars = {name: value for name, value in line.items() if not isinstance(value, dict | list)}
            self.wandb_run.log(scalars, line["step"])


def run_updates(trainer, loader, output, log_every, ckpt_every):
    """Make all updates that are left; return whether a signal stopped them before.

    An error of this rank, or of one that has ended, is raised after the last complete update is saved; so is the
    KeyboardInterrupt of a second signal.
    """
    config, is_main = trainer.config, trainer.processes.is_main
    skipped, stopped, logged, clock = [], False, trainer.updates_done, time.perf_counter()
    bar = tqdm(total=config.updates, initial=logged, unit="update", disable=None if is_main else True)
    with caught_signals() as signals, bar:
        try:
            for batch in load_batches(loader) if logged < config.updates else ():
                skipped += skipped_names(batch["skipped"])
                stopped = trainer.update(batch, stop=bool(signals))
                bar.update()
                update = trainer.updates_done
                done = stopped or update == config.updates
                log_now, save_now = done or update % log_every == 0, done or update % ckpt_every == 0
                if log_now or save_now:
                    share_skipped(trainer, skipped, len(loader.dataset), bar)
                    skipped = []
                if log_now:
                    line = trainer.report() | {
                        "epoch": loader.batch_sampler.epoch(update - 1),
                        "images_per_second": (update - logged) * config.batch_size / (time.perf_counter() - clock),
                        "memory_bytes": peak_memory(trainer.device),
                    }
                    output.log(line)
                    trainer.start_window()
                    logged, clock = update, time.perf_counter()
                if save_now:
                    output.save(trainer)
                if log_now and is_main:
                    bar.write(describe(line))
                if done:
                    break
        except (UserError, RuntimeError, OSError, KeyboardInterrupt):
            # If saving fails too, for example on a full disk, the first error is the one to report.
            with contextlib.suppress(UserError):
                if trainer.between_updates:  # else the last checkpoint stays
                    output.save(trainer)
            raise
    return stopped


def share_skipped(trainer, skipped, total, bar):
    """Add the names of unreadable images on all ranks to the trainer's, and print the new ones.

    Raises UserError if they are more than 1 % of `total`; the new ones are not added, so that a training can continue
    after the files were replaced.
    """
    processes = trainer.processes
    new = set().union(*processes.gather(skipped)) - trainer.skipped
    for name in sorted(new) if processes.is_main else ():
        bar.write(f"skipped {name}")
    processes.run_everywhere(lambda: check_skipped(trainer.skipped | new, total))
    trainer.skipped |= new


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


class WandbRun:
    """A run of Weights & Biases. If it fails, it ends with one line, and the training goes on without it."""

    def __init__(self, run):
        self.run, self.id = run, run.id

    def log(self, values, step):
        """Log numbers, and pictures by their Path."""
        import wandb

        def log(run):
            images = {name: wandb.Image(str(value)) for name, value in values.items() if isinstance(value, Path)}
            run.log(values | images, step=step)

        self._call(log)

    def finish(self):
        """End the run; print how to send it if it is offline."""

        def finish(run):
            run.finish()
            if run.settings.mode == "offline":
                folder = shlex.quote(run.settings.sync_dir)
                print(f"Weights & Biases: offline; send it with: wandb sync {folder}")

        self._call(finish)

    def _call(self, function):
        if self.run is None:
            return
        try:
            function(self.run)
        except Exception as error:
            self.run = None
            reason = f"Weights & Biases has failed ({first_line(error)})"
            print(f"warning: {reason}: the training goes on without it", file=sys.stderr)
            import wandb

            with contextlib.suppress(Exception):
                wandb.teardown()  # it would try again at exit, with a traceback


def wandb_mode():
    """Return the mode of a run of Weights & Biases: WANDB_MODE, or offline without an account.

    Raises UserError if Weights & Biases refuses an environment variable.
    """
    given = os.environ.get("WANDB_MODE") or None
    modes = {None: None, "dryrun": "offline", "run": "online"}  # of older versions
    mode = modes.get(given, given)
    if mode not in (None, "online", "offline", "disabled", "shared"):
        raise UserError(f"WANDB_MODE is {given!r}: set it to online, offline or disabled, or unset it")
    if not given:
        os.environ.pop("WANDB_MODE", None)  # Weights & Biases refuses an empty one
    with wandb_errors():
        import wandb

        wandb.setup()  # reads the environment
        return mode or ("online" if _has_account(wandb) else "offline")


def _has_account(wandb):
    try:
        if "prompt" in inspect.signature(wandb.login).parameters:  # since 0.28; it deprecates the other way
            return wandb.login(prompt=False, verify=False)
        return bool(wandb.api.api_key)
    except wandb.errors.AuthenticationError:
        return True  # wandb.init tells what is wrong with the key


@contextlib.contextmanager
def wandb_errors():
    """Turn an error of Weights & Biases in this block into a UserError that names its setting."""
    try:
        yield
    except Exception as error:
        reason = first_line(error)
        if hasattr(error, "errors"):  # pydantic's text has several lines
            wrong = [f"{'_'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors()]
            reason = "; ".join(wrong)
        way_out = "set the WANDB_ variable right, or leave out --wandb"
        raise UserError(f"Weights & Biases cannot start ({reason}): {way_out}") from error


def start_wandb(folder, flags, run_id=None):
    """Start or resume a `WandbRun` in `folder`; offline without an account or network.

    Raises UserError if Weights & Biases refuses an environment variable.
    """
    mode = wandb_mode()
    import wandb

    settings = dict(project="learning-to-cache", name=folder.name, dir=folder, config=flags, id=run_id, resume="allow")
    if mode != "offline":
        try:
            return WandbRun(wandb.init(**settings, mode=mode))
        except Exception as error:
            print(f"Weights & Biases cannot be reached ({first_line(error)}): logging offline")
    with wandb_errors():
        return WandbRun(wandb.init(**settings, mode="offline"))
