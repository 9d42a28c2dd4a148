"""The folder of a training run: checkpoints, log and pictures, and how to find and continue it.

NNN-MODEL/args.json                 flags and versions of the last launch
NNN-MODEL/metrics.jsonl             a line of figures every --log-every updates
NNN-MODEL/checkpoints/NNNNNNN.pt    a router file from which training can continue, and a heatmap .png;
                                    last.pt is a copy of the newest
NNN-MODEL/router.png, router.gif    the final scores, and how they developed
"""

import argparse
import json
import math
from pathlib import Path

import torch

from router import Router
from runtime.errors import UserError
from runtime.files import atomic_write, load_tensors, lock_file
from training.plots import save_animation, save_heatmap


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
    def newest(cls, results_dir, accepts):
        """Return the newest unused run whose last checkpoint `accepts`, and that checkpoint; None, None if none."""
        folders = [p for p in Path(results_dir).glob("*-*/") if _number(p) >= 0]
        for folder in sorted(folders, key=_number, reverse=True):
            try:
                if accepts(read_checkpoint(folder / "checkpoints" / "last.pt")):
                    run = cls(folder)
                    return run, read_checkpoint(run.last)
            except UserError:
                continue
        return None, None

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
    run = saved = None
    if launch:
        run, saved = RunFolder.newest(results_dir, lambda saved: saved["launch"] == launch and accepts(saved))
    if run is None and resume == "auto":
        run, saved = RunFolder.newest(results_dir, accepts)
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
        path = path / "checkpoints" / "last.pt"
    saved = read_checkpoint(path)
    check(saved)
    folder, last = path.parent.parent, path.parent / "last.pt"
    in_run = path.parent.name == "checkpoints" and last.is_file()
    if in_run and saved["step"] >= _update_of(last):
        run = RunFolder(folder)
        if _update_of(run.last) > saved["step"]:  # the process that held the lock has just saved again
            saved = read_checkpoint(run.last)
        return run, saved, read_log(folder, saved["step"])
    run = RunFolder.new(results_dir, name)
    # A branch is a separate run for Weights & Biases too.
    return run, saved | {"wandb": None}, read_log(folder, saved["step"]) if in_run else []


def read_checkpoint(path):
    """Load what `RunFolder.save` wrote. Raises UserError if the file is missing, damaged, or a bare router file."""
    saved = load_tensors(path, allow=[argparse.Namespace])
    needed = {"routers", "opt", "step", "l1_weight", "window", "skipped", "args", "identity", "launch", "wandb"}
    dicts = ("routers", "opt", "window", "args", "identity")
    fits = isinstance(saved, dict) and needed <= saved.keys() and all(isinstance(saved[name], dict) for name in dicts)
    if not (fits and isinstance(saved["step"], int)):
        raise UserError(f"{path} is no checkpoint to continue from: pass one of train_router.py, or a run's folder")
    Router.from_state(path, saved["routers"])
    return saved


def read_log(folder, last_update=math.inf):
    """Return the lines of a run's metrics.jsonl up to `last_update`, as dicts, without damaged ones."""
    metrics, lines = Path(folder) / "metrics.jsonl", []
    for text in metrics.read_text(errors="replace").splitlines() if metrics.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    lines = [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]
    return [line for line in lines if line["step"] <= last_update]


def frames(lines, steps):
    """Turn lines of a log into frames for `save_animation`: titles and scores [steps, depth, 2]."""
    pairs = []
    for line in lines:
        trained = torch.tensor(line["scores"]).unflatten(1, (-1, 2))
        scores = torch.ones(steps, *trained.shape[1:])
        scores[list(Router.trained_steps(steps))] = trained
        pairs.append((f"update {line['step']}: {line['cached_share']:.1%} of all layers cached", scores))
    return pairs


def _numbered(checkpoints):
    return sorted(p for p in checkpoints.glob("*.pt") if p.stem.isdecimal())


def _update_of(last):
    """Return the number of updates of a last.pt; if it is damaged, that of the newest checkpoint beside it, or -1."""
    try:
        return read_checkpoint(last)["step"]
    except UserError:
        return max((int(p.stem) for p in _numbered(last.parent)), default=-1)


def _number(folder):
    """Return the number NNN of a run's folder, -1 if it has none."""
    number, dash, _ = folder.name.partition("-")
    return int(number) if dash and number.isdecimal() else -1
