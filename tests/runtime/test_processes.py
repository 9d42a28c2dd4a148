"""How the ranks of a job find each other, and how a refusal reaches the user exactly once."""

import threading

import pytest
import torch.distributed as dist
from conftest import run

from runtime.errors import UserError
from runtime.processes import Processes


def process(rank, size, monkeypatch):
    """The `Processes` of a process with this rank."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))
    return Processes()


def meet(processes, store):
    """Let all `processes` meet at once and read what each of them wrote. Returns the errors by rank."""
    errors = {}

    def join(member):
        try:
            part = member._meet(store)
            part.set(f"of {member.rank}", "here")
            for rank in range(member.size):
                part.get(f"of {rank}")  # waits for it
        except Exception as error:
            errors[member.rank] = error

    threads = [threading.Thread(target=join, args=(member,), daemon=True) for member in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return errors


def test_each_start_meets_in_its_own_part_of_the_store(monkeypatch):
    store, names = dist.HashStore(), []
    for size in (3, 2, 4):  # the second and third as after restarts by torchrun
        assert meet([process(rank, size, monkeypatch) for rank in range(size)], store) == {}
        names.append(store.get("start"))
    assert len(set(names)) == 3


def test_a_rank_that_comes_early_does_not_join_the_older_start(monkeypatch):
    store = dist.HashStore()
    members = [process(rank, 2, monkeypatch) for rank in range(2)]
    assert meet(members, store) == {}
    older = store.get("start")
    early = threading.Thread(target=meet, args=([members[1]], store))
    early.start()
    early.join(0.3)
    assert early.is_alive()  # rank 0 of its start is missing
    members[0]._meet(store).set("of 0", "here")
    early.join(120)
    assert not early.is_alive() and store.get("start") != older


def test_a_rank_that_waits_in_vain_names_the_missing_ones(monkeypatch):
    monkeypatch.setattr(Processes, "PATIENCE", 0.2)
    for rank, missing in ((0, "1, 2"), (1, "0")):
        error = meet([process(rank, 3, monkeypatch)], dist.HashStore())[rank]
        assert isinstance(error, UserError) and f"process {rank} has waited 0.2 s for {missing}:" in str(error)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "program, flags, line",
    [
        ("tests/runtime/refusing.py", ["flags"], "error: refused"),
        ("tests/runtime/refusing.py", ["files"], "error: refused"),
        pytest.param("tests/runtime/refusing.py", ["flags of the other ranks"], "error: refused by rank 1", marks=SLOW),
        pytest.param("sample_ddp.py", ["--device", "tpu"], "error: device 'tpu' cannot", marks=SLOW),
        pytest.param("train_router.py", ["--device", "tpu", "--data-path", "."], "error: device 'tpu'", marks=SLOW),
    ],
)
def test_a_refusal_under_torchrun_is_printed_once(program, flags, line, tmp_path):
    result = run(program, *flags, cwd=tmp_path, processes=3 if "other" in flags[0] else 2)
    assert result.returncode == 1
    assert (result.stdout + result.stderr).count("error: ") == (result.stdout + result.stderr).count(line) == 1
