import pytest
import torch

from router import Router
from runtime.errors import UserError
from training.run_folder import RunFolder, open_run


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(RunFolder, "PATIENCE", 0.1)


STATE = dict.fromkeys(["l1_weight", "skipped", "launch", "wandb"]) | dict.fromkeys(
    ["opt", "window", "args", "identity"], {}
)


def fits(saved):
    """Every checkpoint does."""


def save(run, step, **state):
    return run.save(Router(4, 3), None, 0.1, step=step, **(STATE | state))


def test_runs_are_numbered_and_named(tmp_path):
    names = [RunFolder.new(tmp_path / "results", "DiT-S/2").folder.name for _ in range(2)]
    assert names == ["000-DiT-S-2", "001-DiT-S-2"]
    (tmp_path / "results" / "notes").mkdir()
    assert RunFolder.new(tmp_path / "results", "x").folder.name == "002-x"
    (tmp_path / "results" / "999-x").mkdir()
    assert [RunFolder.new(tmp_path / "results", "x").folder.name for _ in range(2)] == ["1000-x", "1001-x"]


def test_a_run_is_held_by_one_at_a_time(tmp_path):
    run = RunFolder.new(tmp_path, "x")
    with pytest.raises(UserError, match="is in use"):
        RunFolder(run.folder)
    del run
    RunFolder(tmp_path / "000-x")


def test_checkpoints_keep_the_newest_and_last(tmp_path):
    run = RunFolder.new(tmp_path, "x")
    assert save(run, 0) == run.last
    for step in (5, 10, 15, 20):
        path = run.save(Router(4, 3), 2, 0.1, step=step, **STATE)
    assert path.name == "0000020.pt"
    assert sorted(p.name for p in run.checkpoints.iterdir()) == [
        "0000015.png",
        "0000015.pt",
        "0000020.png",
        "0000020.pt",
        "last.pt",
    ]
    assert torch.load(run.last, weights_only=True)["step"] == 20


def test_the_log_is_cut_to_a_step_and_survives_a_half_written_line(tmp_path):
    run = RunFolder.new(tmp_path, "x")
    for step in (10, 20, 30):
        run.log({"step": step})
    with run.metrics.open("a") as file:
        file.write('{"step": 4')
    assert [line["step"] for line in run.history(25)] == [10, 20]
    run.set_history(run.history(25))
    run.log({"step": 21})
    assert [line["step"] for line in run.history(100)] == [10, 20, 21]


def test_a_folder_or_its_newest_checkpoint_goes_on_in_place_and_an_older_one_in_a_new_folder(tmp_path):
    run = RunFolder.new(tmp_path, "x")
    old, new = save(run, 10), save(run, 20)
    for step in (5, 15, 25):
        run.log({"step": step})
    folder = run.folder
    del run
    for resume in (folder, new, folder / "checkpoints" / "last.pt"):
        run, saved, lines = open_run(tmp_path, "x", str(resume), None, fits)
        assert run.folder == folder and saved["step"] == 20 and [line["step"] for line in lines] == [5, 15]
        del run
    run, saved, lines = open_run(tmp_path, "x", str(old), None, fits)
    assert run.folder.name == "001-x" and saved["step"] == 10 and [line["step"] for line in lines] == [5]
    (tmp_path / "elsewhere.pt").write_bytes(new.read_bytes())
    run, saved, lines = open_run(tmp_path, "x", str(tmp_path / "elsewhere.pt"), None, fits)
    assert run.folder.name == "002-x" and saved["step"] == 20 and not lines


def test_auto_finds_the_newest_run_that_fits_and_is_free(tmp_path):
    for kind in ("a", "b", "a", "b"):
        save(RunFolder.new(tmp_path, "x"), 3, kind=kind)
    (RunFolder.new(tmp_path, "x").checkpoints / "last.pt").write_bytes(b"cut off")
    run, saved, _ = open_run(tmp_path, "x", "auto", lambda saved: saved["kind"] == "a", fits)
    assert run.folder.name == "002-x" and saved["step"] == 3
    other, _, _ = open_run(tmp_path, "x", "auto", lambda saved: saved["kind"] == "a", fits)
    assert other.folder.name == "000-x"
    new, saved, lines = open_run(tmp_path, "x", "auto", lambda saved: False, fits)
    assert new.folder.name == "005-x" and saved is None and lines == []


def test_a_branch_is_another_run_for_wandb_and_leaves_nothing_where_it_is_refused(tmp_path):
    run = RunFolder.new(tmp_path, "x")
    old = save(run, 10, wandb="abc")
    save(run, 20, wandb="abc")

    def misfit(saved):
        raise UserError("of another model")

    with pytest.raises(UserError, match="another model"):
        open_run(tmp_path, "x", str(old), None, misfit)
    assert [p.name for p in tmp_path.iterdir()] == ["000-x"]
    # The branch reads the older run, which may still be held.
    branch, saved, _ = open_run(tmp_path, "x", str(old), None, fits)
    assert saved["wandb"] is None and branch.folder.name == "001-x"
    folder = run.folder
    del run
    assert open_run(tmp_path, "x", str(folder), None, fits)[1]["wandb"] == "abc"


def test_what_a_killed_process_was_writing_goes(tmp_path):
    run = RunFolder.new(tmp_path, "x")
    part = run.checkpoints / ".last.pt.abc.part"
    part.touch()
    folder = run.folder
    del run
    RunFolder(folder)
    assert not part.exists()


def test_a_damaged_last_checkpoint_does_not_bar_a_good_one(tmp_path):
    run = RunFolder.new(tmp_path, "x")
    good, folder = save(run, 10), run.folder
    run.last.write_bytes(b"cut off")
    del run
    run, saved, _ = open_run(tmp_path, "x", str(good), None, fits)
    assert run.folder == folder and saved["step"] == 10


def test_a_run_without_a_log_has_pictures_too(tmp_path):
    run = RunFolder.new(tmp_path, "x")
    run.save_pictures(Router(4, 3), 0.1)
    assert (run.folder / "router.gif").exists() and (run.folder / "router.png").exists()


def test_what_cannot_be_continued_is_refused(tmp_path):
    Router(4, 3).save(tmp_path / "bare.pt")
    Router(4, 3).save(tmp_path / "odd.pt", step=1, **(STATE | {"args": None}))
    with pytest.raises(UserError, match="cannot be continued"):
        open_run(tmp_path, "x", str(tmp_path / "odd.pt"), None, fits)
    (tmp_path / "odd.pt").unlink()
    with pytest.raises(UserError, match="cannot be continued"):
        open_run(tmp_path, "x", str(tmp_path / "bare.pt"), None, fits)
    with pytest.raises(UserError, match="no such file"):
        open_run(tmp_path, "x", str(tmp_path / "none.pt"), None, fits)
    with pytest.raises(UserError, match="last.pt"):
        open_run(tmp_path, "x", str(tmp_path), None, fits)
    assert [p.name for p in tmp_path.iterdir()] == ["bare.pt"]
