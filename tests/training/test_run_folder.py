from pathlib import Path

import pytest
import torch

from router import Router
from runtime.errors import UserError
from training.run_folder import RunFolder, frames, open_run, read_checkpoint, read_log

MOMENTS = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(6), "exp_avg_sq": torch.zeros(6)}
WINDOW = {"mse": [0.0] * 4, "draws": [0] * 4, "l1": 0.0, "updates": 0}
STATE = {"opt": {"state": {0: MOMENTS}}, "window": WINDOW, "l1_weight": 1e-3, "skipped": [], "args": {}}
STATE |= {"identity": dict.fromkeys(["vae", "model", "data"]), "launch": None, "wandb": None}


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


def test_auto_finds_the_newest_run_that_fits_though_others_are_in_use(tmp_path):
    for kind in ("a", "b", "a", "b"):
        save(RunFolder.new(tmp_path, "x"), 3, kind=kind, launch=kind)
    others = RunFolder(tmp_path / "001-x"), RunFolder(tmp_path / "003-x"), RunFolder.new(tmp_path, "x")
    run, saved = open_any(tmp_path, "auto", lambda saved: saved["kind"] == "a")
    assert run.folder.name == "002-x" and saved["step"] == 3
    run, saved = open_any(tmp_path, "auto", lambda saved: saved["kind"] == "c")
    assert run.folder.name == "005-x" and saved is None
    del others
    # After a restart by torchrun, the run of this launch continues, whatever --resume is.
    assert open_any(tmp_path, None, lambda saved: True, launch="b")[0].folder.name == "003-x"


@pytest.mark.parametrize("resume, launch", [("auto", None), (None, "a")])
def test_the_newest_run_that_fits_is_refused_while_it_is_in_use(tmp_path, resume, launch):
    """Neither an older run nor a new one would be right: it would train the same twice."""
    older, newer = (RunFolder.new(tmp_path, "x") for _ in range(2))
    for run in (older, newer):
        save(run, 3, launch=launch)
    del run, older
    with pytest.raises(UserError, match="001-x is in use"):
        open_any(tmp_path, resume, lambda saved: True, launch)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000-x", "001-x"]


def test_of_a_damaged_last_checkpoint_the_newest_readable_numbered_one_continues(tmp_path, capsys):
    run = RunFolder.new(tmp_path, "x")
    for update in (9, 10, 11):
        path = save(run, update)
        run.log({"step": update})
    folder = run.folder
    del run
    for damaged in (path, folder / "checkpoints" / "last.pt"):
        damaged.write_bytes(damaged.read_bytes()[:500])
    for resume in ("auto", folder):
        run, saved = open_any(tmp_path, resume, lambda saved: saved["step"] > 9)
        assert run.folder == folder and saved["step"] == 10
        assert [line["step"] for line in read_log(folder)] == [9, 10]
        del run
    assert "note" not in capsys.readouterr().out


def test_auto_names_a_folder_without_readable_checkpoints_once_and_skips_it(tmp_path, capsys):
    save(RunFolder.new(tmp_path, "x"), 3)
    last = RunFolder.new(tmp_path, "x").checkpoints / "last.pt"
    last.write_bytes(b"cut off")
    (RunFolder.new(tmp_path, "x").checkpoints / "search.pt").touch()  # of plans
    run, saved = open_any(tmp_path, "auto", lambda saved: True, launch="a")
    assert run.folder.name == "000-x" and saved["step"] == 3
    (note,) = capsys.readouterr().out.splitlines()
    assert note.startswith(f"note: {last.parent.parent} is skipped: {last} ")
    open_any(tmp_path, None, launch="a")
    assert capsys.readouterr().out == ""  # nothing was to be continued


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


@pytest.mark.parametrize(
    "change",
    [
        {"step": -5},
        {"step": "5"},
        {"l1_weight": "x"},
        {"skipped": 3},
        {"skipped": [3]},
        {"identity": {}},
        {"window": {}},
        {"window": WINDOW | {"mse": [0.0] * 3}},
        {"window": WINDOW | {"draws": dict.fromkeys(range(4), 0)}},
        {"window": WINDOW | {"l1": None}},
        {"opt": {}},
        {"opt": {"state": 3}},
        {"opt": {"state": {0: {}}}},
        {"opt": {"state": {"0": MOMENTS}}},
        {"opt": {"state": {4: MOMENTS}}},
        {"opt": {"state": {0: MOMENTS | {"exp_avg": torch.zeros(5)}}}},
        {"opt": {"state": {0: MOMENTS | {"step": "x"}}}},
        {"routers": {"0.prob": 3}},
    ],
    ids=str,
)
def test_an_incomplete_checkpoint_is_refused_by_its_name(tmp_path, change):
    run = RunFolder.new(tmp_path, "x")
    path = save(run, 3)
    assert read_checkpoint(path)["step"] == 3
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(UserError, match=f"{path} is no checkpoint .* or incomplete: pass another"):
        open_any(tmp_path, path)


def test_lines_of_a_log_without_scores_give_no_frame():
    whole = {"step": 2, "cached_share": 0.25, "scores": [[0.5] * 6, [0.75] * 6]}
    changes = [{"scores": None}, {"scores": []}, {"scores": [[0.5] * 6] * 3}, {"scores": "x"}, {"cached_share": "x"}]
    lines = [{"step": 1}, *(whole | change for change in changes), whole]
    ((title, scores),) = frames(lines, 4)
    assert title == "update 2: 25.0% of all layers cached"
    assert scores.shape == (4, 3, 2) and scores[:, 0, 0].tolist() == [0.5, 1, 0.75, 1]
