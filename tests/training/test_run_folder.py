from pathlib import Path

import pytest
import torch

from router import Router
from runtime.errors import UserError
from training.run_folder import RunFolder, open_run, read_log

STATE = dict.fromkeys(["l1_weight", "skipped", "launch", "wandb"])
STATE |= dict.fromkeys(["opt", "window", "args", "identity"], {})


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(RunFolder, "PATIENCE", 0.1)


def save(run, update, keep=None, **state):
    return run.save(Router(4, 3), STATE | {"step": update} | state, 0.1, keep)


def open_any(folder, resume, accepts=None, launch=None):
    resume = resume if resume in (None, "auto") else str(resume)
    return open_run(folder, "x", resume, accepts, lambda saved: None, launch)


def test_a_run_is_locked_and_a_new_owner_removes_half_written_files(tmp_path):
    run = RunFolder.new(tmp_path, "x")
    part = run.checkpoints / ".last.pt.abc.part"
    part.touch()
    with pytest.raises(UserError, match="is in use"):
        RunFolder(run.folder)
    del run
    RunFolder(tmp_path / "000-x")
    assert not part.exists()


def test_the_newest_checkpoints_and_a_copy_of_the_last_are_kept(tmp_path):
    run = RunFolder.new(tmp_path, "x")
    assert save(run, 0) == run.last
    for update in (5, 10, 15, 20):
        path = save(run, update, keep=2)
    assert path.name == "0000020.pt"
    names = ["0000015.png", "0000015.pt", "0000020.png", "0000020.pt", "last.pt"]
    assert sorted(p.name for p in run.checkpoints.iterdir()) == names
    assert torch.load(run.last, weights_only=True)["step"] == 20


def test_the_log_is_read_up_to_an_update_without_a_half_written_line(tmp_path):
    run = RunFolder.new(tmp_path, "x")
    for update in (10, 20, 30):
        run.log({"step": update})
    with run.metrics.open("a") as file:
        file.write('{"step": 4')
    run.set_log(read_log(run.folder, 25))
    run.log({"step": 21})
    assert [line["step"] for line in read_log(run.folder)] == [10, 20, 21]


def test_the_newest_checkpoint_continues_in_place_and_an_older_one_in_a_new_folder(tmp_path):
    run = RunFolder.new(tmp_path, "x")
    old, new, folder = save(run, 10), save(run, 20), run.folder
    del run
    for resume in (folder, new, folder / "checkpoints" / "last.pt"):
        RunFolder(folder).set_log([{"step": update} for update in (5, 15, 25)])
        run, saved = open_any(tmp_path, resume)
        assert run.folder == folder and saved["step"] == 20
        assert [line["step"] for line in read_log(folder)] == [5, 15]
        del run
    (tmp_path / "elsewhere.pt").write_bytes(new.read_bytes())
    for resume, name, update, log in ((old, "001-x", 10, [5]), (tmp_path / "elsewhere.pt", "002-x", 20, [])):
        run, saved = open_any(tmp_path, resume)
        assert run.folder.name == name and saved["step"] == update
        assert [line["step"] for line in read_log(run.folder)] == log


def test_two_runs_that_start_at_once_get_folders_of_their_own(tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def after_another(self, *args, **kwargs):
        if self.name == "000-x" and not self.exists():
            mkdir(self)
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", after_another)
    assert RunFolder.new(tmp_path, "x").folder.name == "001-x"


def test_an_old_checkpoint_continues_elsewhere_even_if_the_last_is_damaged(tmp_path):
    run = RunFolder.new(tmp_path, "x")
    old, new, folder = save(run, 10), save(run, 20), run.folder
    run.last.write_bytes(new.read_bytes()[:500])
    del run
    run, saved = open_any(tmp_path, old)
    assert run.folder.name == "001-x" and saved["step"] == 10
    assert open_any(tmp_path, new)[0].folder == folder


def test_a_damaged_log_does_not_stop_a_run(tmp_path):
    run = RunFolder.new(tmp_path, "x")
    run.metrics.write_bytes(b'{"step": 10}\n\xff\xfe\n12\n{"step": "x"}\n{}\n{"step": 20}\n')
    assert read_log(run.folder) == [{"step": 10}, {"step": 20}]


def test_auto_finds_the_newest_free_run_that_fits(tmp_path):
    for kind in ("a", "b", "a", "b"):
        save(RunFolder.new(tmp_path, "x"), 3, kind=kind, launch=kind)
    (RunFolder.new(tmp_path, "x").checkpoints / "last.pt").write_bytes(b"cut off")
    runs = []
    for name in ("002-x", "000-x", "005-x"):
        run, saved = open_any(tmp_path, "auto", lambda saved: saved["kind"] == "a")
        assert run.folder.name == name and bool(saved) == (name != "005-x")
        runs.append(run)
    # After a restart by torchrun, the run of this launch continues, whatever --resume is.
    assert open_any(tmp_path, None, lambda saved: True, launch="b")[0].folder.name == "003-x"


def test_a_branch_is_another_run_of_wandb(tmp_path):
    run = RunFolder.new(tmp_path, "x")
    old, folder = save(run, 10, wandb="abc"), run.folder
    save(run, 20, wandb="abc")

    branch, saved = open_any(tmp_path, old)  # while the older run is locked
    assert saved["wandb"] is None and branch.folder.name == "001-x"
    del run
    assert open_any(tmp_path, folder)[1]["wandb"] == "abc"


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    Router(4, 3).save(tmp_path / "bare.pt")
    Router(4, 3).save(tmp_path / "odd.pt", step=1, **(STATE | {"args": None}))
    wrong = {"bare.pt": "no checkpoint", "odd.pt": "no checkpoint", "no.pt": "no such", "": "last.pt"}
    for name, words in wrong.items():
        with pytest.raises(UserError, match=words):
            open_any(tmp_path, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare.pt", "odd.pt"]
