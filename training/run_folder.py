"""A training's folder: checkpoints, log and pictures, and finding it again after whatever stopped it.

NNN-MODEL/args.json                 the flags and versions of the last start
NNN-MODEL/metrics.jsonl             a line of figures every --log-every updates
NNN-MODEL/checkpoints/NNNNNNN.pt    a router file that can be continued, with a heatmap .png; last.pt is the newest
NNN-MODEL/router.png, router.gif    the final scores, and how they came about
"""

import json
import math
from pathlib import Path

import torch

from router import Router
from runtime.errors import UserError
from runtime.files import atomic_write, load_tensors, lock_file
from training.plots import save_animation, save_heatmap


class RunFolder:
    """The folder of one training, held by this process until it ends, however it ends.

    Raises UserError where another process holds it, for longer than the data loading processes of one that was
    killed live on (they look for it every 5 s, and may have inherited its lock).
    """

    PATIENCE = 10.0  # seconds

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
        """Makes results_dir/NNN-name with the first free number. Raises UserError where that cannot be written."""
        try:
            Path(results_dir).mkdir(parents=True, exist_ok=True)
            number = max(map(_number, Path(results_dir).iterdir()), default=-1) + 1
            while (folder := Path(results_dir) / f"{number:03d}-{name.replace('/', '-')}").exists():
                number += 1  # another start was faster
            (folder / "checkpoints").mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot write into {results_dir}: {error.strerror}; name another --results-dir") from error
        return cls(folder)

    @classmethod
    def newest(cls, results_dir, accepts):
        """The newest run of results_dir that nobody holds and whose last checkpoint `accepts`, and that checkpoint.

        None, None where there is none.
        """
        folders = [p for p in Path(results_dir).glob("*-*/") if _number(p) >= 0]
        for folder in sorted(folders, key=_number, reverse=True):
            try:
                if accepts(read_checkpoint(folder / "checkpoints" / "last.pt")):
                    run = cls(folder)
                    return run, read_checkpoint(run.last)
            except UserError:
                continue
        return None, None

    def save(self, router, keep, threshold, *, step, **state):
        """Writes the checkpoint of `step` and last.pt, each whole or not at all; keeps the newest `keep` (None: all).

        Returns its path. The heatmap beside it marks what is reused at `threshold`. Step 0 is last.pt alone.
        """
        path = self.checkpoints / f"{step:07d}.pt" if step else self.last
        for place in dict.fromkeys((path, self.last)):
            router.save(place, step=step, **state)
        if step:
            save_heatmap({f"{self.folder.name}, update {step}": router.scores()}, threshold, path.with_suffix(".png"))
        for old in self.numbered()[: -keep if keep else 0]:
            old.with_suffix(".png").unlink(missing_ok=True)
            old.unlink()
        return path

    def numbered(self):
        """The checkpoints by number, the newest last; without last.pt."""
        return sorted(p for p in self.checkpoints.glob("*.pt") if p.stem.isdecimal())

    def save_pictures(self, router, threshold):
        """Writes router.png, the scores of `router`, and router.gif, from the first line of the log to the last."""
        save_heatmap({self.folder.name: router.scores()}, threshold, self.folder / "router.png")
        history = frames(self.history(math.inf), router.steps)
        save_animation(history or [("final", router.scores())], threshold, self.folder / "router.gif")

    def history(self, step):
        """`read_history` of this run."""
        return read_history(self.folder, step)

    def set_history(self, lines):
        """Makes `lines` all of metrics.jsonl."""
        with atomic_write(self.metrics) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def log(self, line):
        """Adds a dict to metrics.jsonl. Raises UserError where that cannot be written."""
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.metrics}: {error.strerror}; the same with --resume goes on") from error


def frames(lines, steps):
    """What `save_animation` shows of lines of a log: titles and scores [steps, depth, 2] of a router for `steps`."""
    pairs = []
    for line in lines:
        trained = torch.tensor(line["scores"]).unflatten(1, (-1, 2))
        scores = torch.ones(steps, *trained.shape[1:])
        scores[list(Router.trained_steps(steps))] = trained
        pairs.append((f"update {line['step']}: {line['cached_share']:.1%} of all layers cached", scores))
    return pairs


def _number(path):
    number, dash, _ = path.name.partition("-")
    return int(number) if dash and number.isdecimal() else -1


def read_checkpoint(path):
    """What `Run.save` wrote. Raises UserError where the file is missing, damaged, or a router that cannot go on."""
    import argparse

    saved = load_tensors(path, allow=[argparse.Namespace])
    needed = {"routers", "opt", "step", "l1_weight", "window", "skipped", "args", "identity", "launch", "wandb"}
    dicts = ("routers", "opt", "window", "args", "identity")
    fits = isinstance(saved, dict) and needed <= saved.keys() and all(isinstance(saved[name], dict) for name in dicts)
    if not (fits and isinstance(saved["step"], int)):
        raise UserError(f"{path} cannot be continued: name a checkpoint of this program, or a run's folder")
    Router.from_state(path, saved["routers"])
    return saved


def open_run(results_dir, name, resume, accepts, check):
    """The `RunFolder` to write into, the checkpoint to continue from or None, and the lines of its log so far.

    resume: None starts anew; "auto" continues the newest run whose checkpoint `accepts`, if there is one;
    a run's folder continues there; so does its newest checkpoint, while an older one, or one from elsewhere, starts
    a new folder: nothing is overwritten. check: raises UserError where a checkpoint that was named does not fit.
    """
    if resume is None:
        return RunFolder.new(results_dir, name), None, []
    if resume == "auto":
        run, saved = RunFolder.newest(results_dir, accepts)
        return (run, saved, run.history(saved["step"])) if run else (RunFolder.new(results_dir, name), None, [])
    path = Path(resume)
    if path.is_dir():
        path = path / "checkpoints" / "last.pt"
    saved = read_checkpoint(path)
    check(saved)
    beside = path.parent / "last.pt"
    of_a_run = path.parent.name == "checkpoints" and beside.is_file()
    if of_a_run and saved["step"] >= _last_step(beside):
        run = RunFolder(path.parent.parent)
        # Whoever held the folder a moment ago may have saved once more.
        if _last_step(run.last) > saved["step"]:
            saved = read_checkpoint(run.last)
        return run, saved, run.history(saved["step"])
    run = RunFolder.new(results_dir, name)
    # A branch is a run of its own for Weights & Biases too.
    return run, saved | {"wandb": None}, read_history(path.parent.parent, saved["step"]) if of_a_run else []


def _last_step(path):
    """The step of the checkpoint at `path`; -1 where it is damaged."""
    try:
        return read_checkpoint(path)["step"]
    except UserError:
        return -1


def read_history(folder, step):
    """The lines of a run's metrics.jsonl up to `step`, as dicts; what a kill left half written is no line."""
    metrics, lines = Path(folder) / "metrics.jsonl", []
    for text in metrics.read_text().splitlines() if metrics.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return [line for line in lines if line["step"] <= step]
