"""The folder of a training run: checkpoints, log and pictures, and how to find and continue it.

NNN-MODEL/args.json                 flags and versions of the last launch
NNN-MODEL/metrics.jsonl             a line of figures every --log-every updates
NNN-MODEL/checkpoints/NNNNNNN.pt    a router file from which training can continue, and a heatmap .png;
                                    last.pt is a copy of the newest
NNN-MODEL/router.png, router.gif    the final scores, and how they developed
"""

import argparse
import contextlib
import json
import math
import shlex
from importlib.metadata import version
from pathlib import Path

import torch

from router import Router
from runtime.errors import UserError
from runtime.files import atomic_write, load_tensors, lock_file
from training.plots import save_animation, save_heatmap
from training.trainer import is_state


class RunFolder:
    """The folder of one training run, locked until this process ends.

    Raises UserError if another process holds the lock.
    """

    # Seconds. Data loading workers inherit the lock, and notice only after up to 5 s that their parent was killed.
    PATIENCE = 10.0

    def __init__(self, folder):
        self.folder = Path(folder)
        self.checkpoints = self.folder / "checkpoints"
        self.last = self.checkpoints / "last.pt"
        self.metrics = self.folder / "metrics.jsonl"
        try:
            self._lock = lock_file(self.folder / ".lock", self.PATIENCE)
        except OSError as error:
            raise UserError(f"cannot write into {folder}: {error.strerror}; continue a copy of it") from error
        if not self._lock:
            raise UserError(f"{folder} is in use: wait for that training, or stop it with Ctrl-C")
        for part in self.checkpoints.glob(".*.part"):  # what a killed process was writing
            part.unlink()

    @classmethod
    def new(cls, results_dir, name):
        """Make results_dir/NNN-name with the first free number. Raises UserError if it cannot be written."""
        try:
            Path(results_dir).mkdir(parents=True, exist_ok=True)
            number = max(map(_number, Path(results_dir).iterdir()), default=-1) + 1
            while True:
                folder = Path(results_dir) / f"{number:03d}-{name.replace('/', '-')}"
                try:
                    folder.mkdir()
                    break
                except FileExistsError:  # another launch has just made it
                    number += 1
            (folder / "checkpoints").mkdir()
        except OSError as error:
            raise UserError(f"cannot write into {results_dir}: {error.strerror}; pass another --results-dir") from error
        return cls(folder)

    @classmethod
    def newest(cls, results_dir, file, read, accepts, quiet=False):
        """Return the newest run whose checkpoint `accepts`, and that checkpoint; None, None if there is none.

        Only folders with checkpoints/`file` count. read: loads the checkpoint of a folder; if it raises UserError, the
        folder is skipped, with a note unless `quiet`. Raises UserError if another process holds the lock of the run: a
        new run would train the same twice.
        """
        folders = [path.parent.parent for path in Path(results_dir).glob(f"*-*/checkpoints/{file}")]
        for folder in sorted((f for f in folders if _number(f) >= 0), key=_number, reverse=True):
            try:
                saved = read(folder)
            except UserError as error:
                if not quiet:
                    print(f"note: {folder} is skipped: {error}")
                continue
            if accepts(saved):  # before the lock is tried: runs of other flags may be in use
                run = cls(folder)
                return run, read(folder)  # again: the process that held the lock may have saved
        return None, None

    def save_args(self, args):
        """Write args.json: the flags of this launch, a dict, and the versions of the libraries."""
        versions = {name: version(name) for name in ("torch", "diffusers", "numpy")}
        with atomic_write(self.folder / "args.json") as part:
            part.write_text(json.dumps({"args": args, "versions": versions}, indent=2) + "\n")

    def save(self, router, state, threshold, keep=None):
        """Write a checkpoint of `router` and `state`, and last.pt; delete all but the newest `keep`; return its path.

        The heatmap beside it marks the layers that are reused at `threshold`. Update 0 is written as last.pt alone.
        """
        update = state["step"]
        path = self.checkpoints / f"{update:07d}.pt" if update else self.last
        for destination in dict.fromkeys((path, self.last)):
            router.save(destination, **state)
        if update:
            title = f"{self.folder.name}, update {update}"
            save_heatmap({title: router.scores()}, threshold, path.with_suffix(".png"))
        for old in self.numbered()[: -keep if keep else 0]:
            old.with_suffix(".png").unlink(missing_ok=True)
            old.unlink()
        return path

    def numbered(self):
        """Return the paths of the numbered checkpoints, the newest last."""
        return _numbered(self.checkpoints)

    def save_pictures(self, router, threshold):
        """Write router.png, the scores of `router`, and router.gif, the scores in the log."""
        save_heatmap({self.folder.name: router.scores()}, threshold, self.folder / "router.png")
        logged = frames(read_log(self.folder), router.steps)
        save_animation(logged or [("final", router.scores())], threshold, self.folder / "router.gif")

    def set_log(self, lines):
        """Replace metrics.jsonl by `lines`."""
        with atomic_write(self.metrics) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def log(self, line):
        """Append a dict to metrics.jsonl. Raises UserError if that cannot be written."""
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.metrics}: {error.strerror}; continue with --resume") from error


def open_run(results_dir, name, resume, accepts, check, launch=None):
    """Return the `RunFolder` to write into, its log cut to the checkpoint to continue, and the checkpoint or None.

    resume: None makes a new run; "auto" continues the newest run whose checkpoint `accepts`, if any; a run's folder or
    newest checkpoint continues there; an older checkpoint, or one from elsewhere, continues in a new folder, so that
    nothing is overwritten. check: raises UserError if the named checkpoint does not fit.
    launch: of `Processes`; a run that this launch began is continued after a restart, whatever `resume` is.
    """

    def is_own(saved):
        return saved["launch"] == launch and accepts(saved)

    run = saved = None
    if launch:
        run, saved = RunFolder.newest(results_dir, "last.pt", read_newest, is_own, quiet=True)
    if run is None and resume == "auto":
        run, saved = RunFolder.newest(results_dir, "last.pt", read_newest, accepts)
    if run is not None:
        lines = read_log(run.folder, saved["step"])
    elif resume in (None, "auto"):
        run, lines = RunFolder.new(results_dir, name), []
    else:
        run, saved, lines = _open_named(results_dir, name, Path(resume), check)
    run.set_log(lines)
    return run, saved


def _open_named(results_dir, name, path, check):
    if path.is_dir():
        saved, path = read_newest(path), path / "checkpoints" / "last.pt"
    else:
        saved = read_checkpoint(path)
    check(saved)
    folder, last = path.parent.parent, path.parent / "last.pt"
    in_run = path.parent.name == "checkpoints" and last.is_file()
    if in_run and saved["step"] >= _update_of(folder):
        run = RunFolder(folder)
        if _update_of(folder) > saved["step"]:  # the process that held the lock has just saved again
            saved = read_newest(folder)
        return run, saved, read_log(folder, saved["step"])
    run = RunFolder.new(results_dir, name)
    # A branch is a separate run for Weights & Biases too.
    return run, saved | {"wandb": None}, read_log(folder, saved["step"]) if in_run else []


def read_checkpoint(path):
    """Load what `RunFolder.save` wrote.

    Raises UserError if the file is missing, damaged, incomplete, or a bare router file.
    """
    saved = load_tensors(path, allow=[argparse.Namespace])
    needed = {"routers", "opt", "step", "l1_weight", "window", "skipped", "args", "identity", "launch", "wandb"}
    dicts = ("routers", "opt", "window", "args", "identity")
    fits = isinstance(saved, dict) and needed <= saved.keys() and all(isinstance(saved[name], dict) for name in dicts)
    if not (fits and is_state(saved) and {"vae", "model", "data"} <= saved["identity"].keys()):
        raise UserError(
            f"{path} is no checkpoint to continue from, or incomplete: pass another one of train_router.py, or a run's "
            "folder"
        )
    Router.from_state(path, saved["routers"])
    return saved


def read_newest(folder):
    """Load last.pt of a run's folder, or the newest readable of the numbered checkpoints if last.pt is not readable.

    Raises the UserError about last.pt if there is none.
    """
    checkpoints = Path(folder) / "checkpoints"
    try:
        return read_checkpoint(checkpoints / "last.pt")
    except UserError:
        for path in reversed(_numbered(checkpoints)):
            with contextlib.suppress(UserError):
                return read_checkpoint(path)
        raise


def read_log(folder, last_update=math.inf):
    """Return the lines of a run's metrics.jsonl up to `last_update`, as dicts with at least a "step"."""
    metrics, lines = Path(folder) / "metrics.jsonl", []
    for text in metrics.read_text(errors="replace").splitlines() if metrics.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    lines = [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]
    return [line for line in lines if line["step"] <= last_update]


def frames(lines, steps):
    """Turn lines of a log into frames for `save_animation`: titles and scores [steps, depth, 2].

    A line without such scores, of a damaged or edited log, gives no frame.
    """
    pairs = []
    for line in lines:
        with contextlib.suppress(LookupError, TypeError, ValueError, RuntimeError):
            trained = torch.tensor(line["scores"]).unflatten(1, (-1, 2))
            scores = torch.ones(steps, *trained.shape[1:])
            scores[list(Router.trained_steps(steps))] = trained
            pairs.append((f"update {line['step']}: {line['cached_share']:.1%} of all layers cached", scores))
    return pairs


def sampling_command(args, spec, *more):
    """Return the command that samples with the model and the steps of a run; more: its other words."""
    model = ["--ckpt", args.ckpt] if args.ckpt else []
    if spec.registered:
        model += ["--model", args.model, "--image-size", args.image_size, "--num-classes", args.num_classes]
    command = ["python", "sample.py", *model, "--num-sampling-steps", args.num_sampling_steps]
    command += ["--ddim-sample"] if spec.process == "diffusion" else ["--sampler", spec.sampler()]
    return shlex.join(map(str, [*command, *more]))


def _numbered(checkpoints):
    return sorted(p for p in checkpoints.glob("*.pt") if p.stem.isdecimal())


def _update_of(folder):
    """Return the number of updates that the newest readable checkpoint of a run's folder has made, -1 without one."""
    try:
        return read_newest(folder)["step"]
    except UserError:
        return -1


def _number(folder):
    """Return the number NNN of a run's folder, -1 if it has none."""
    number, dash, _ = folder.name.partition("-")
    return int(number) if dash and number.isdecimal() else -1
