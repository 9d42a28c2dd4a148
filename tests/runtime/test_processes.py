"""How the ranks of a job find each other, and how a refusal reaches the user exactly once."""

import os
import re
import socket
import sys
import threading
import time

import pytest
import torch.distributed as dist
from conftest import assert_refused, call, free_port, run

from runtime.errors import UserError
from runtime.processes import Processes
from runtime.ranks import Ranks, find_ranks

JOB = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC_", "SLURM_", "OMPI_", "PMI_", "MV2_")


@pytest.fixture
def job(monkeypatch):
    """A function that sets the environment variables of a job, and no others of a launcher."""

    def job(**variables):
        for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return job


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


@pytest.mark.parametrize(
    "variables, ranks",
    [
        ({}, (0, 1, 0)),
        (dict(RANK="", WORLD_SIZE="", LOCAL_RANK=" ", MASTER_PORT=""), (0, 1, 0)),
        (dict(RANK=" 1", WORLD_SIZE="3 "), (1, 3, 0)),
        (dict(RANK="9", WORLD_SIZE="16", LOCAL_RANK="1"), (9, 16, 1)),
        # A plain python in a batch script of sbatch -n 8, in the shell of salloc -n 8, and in two of srun --pty.
        (dict(SLURM_JOB_ID="7", SLURM_NTASKS="8", SLURM_NPROCS="8", SLURM_PROCID="0"), (0, 1, 0)),
        (dict(SLURM_JOB_ID="7", SLURM_NTASKS="8"), (0, 1, 0)),
        (dict(SLURM_NTASKS="8", SLURM_STEP_ID="4294967290", SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0"), (0, 1, 0)),
        (dict(SLURM_NTASKS="8", SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="8", SLURM_PTY_PORT="41613"), (0, 1, 0)),
        (dict(OMPI_COMM_WORLD_SIZE="1", PMI_SIZE="1"), (0, 1, 0)),
        # torchrun below srun and mpirun.
        (dict(RANK="3", WORLD_SIZE="4", SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="1"), (3, 4, 0)),
        (dict(RANK="0", WORLD_SIZE="1", OMPI_COMM_WORLD_SIZE="2"), (0, 1, 0)),
    ],
)
def test_the_variables_of_launchers_give_the_place_of_a_process(variables, ranks, job):
    job(**variables)
    assert find_ranks() == Ranks(*ranks)


@pytest.mark.parametrize(
    "variables, words",
    [
        (dict(WORLD_SIZE="2"), "WORLD_SIZE is 2, but RANK is not set.* torchrun"),
        (dict(RANK="1"), "RANK is 1, but WORLD_SIZE is not set.* torchrun"),
        (dict(RANK="2", WORLD_SIZE="2"), "RANK is 2, but WORLD_SIZE is 2.* torchrun"),
        (dict(RANK="1", WORLD_SIZE="1"), "RANK is 1, but WORLD_SIZE is 1.* torchrun"),
        (dict(RANK="0", WORLD_SIZE="two"), "WORLD_SIZE is 'two'.* torchrun"),
        (dict(RANK="0", WORLD_SIZE="0"), "WORLD_SIZE is 0.* torchrun"),
        (dict(RANK="-1", WORLD_SIZE="2"), "RANK is '-1'.* torchrun"),
        (dict(RANK="0.0", WORLD_SIZE="2"), "RANK is '0.0'.* torchrun"),
        (dict(RANK="0", WORLD_SIZE="9" * 5000), "WORLD_SIZE is '9.* torchrun"),
        (dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="a"), "LOCAL_RANK is 'a'.* torchrun"),
        (dict(SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="0"), "srun started 4 .*torchrun"),
        (dict(SLURM_STEP_ID="0", SLURM_NTASKS="4", SLURM_PROCID="0"), "srun started 4 .*torchrun"),
        (dict(SLURM_NTASKS="4", SLURM_PROCID="3"), "srun started 4 .*torchrun"),
        (dict(SLURM_STEP_NUM_TASKS="4", WORLD_SIZE="1"), "srun started 4 .*torchrun"),
        (dict(OMPI_COMM_WORLD_SIZE="3"), "mpirun started 3 .*torchrun"),
        (dict(PMI_SIZE="3", PMI_RANK="0"), "mpirun started 3 .*torchrun"),
    ],
)
def test_variables_that_do_not_fit_together_are_refused(variables, words, job):
    job(**variables)
    with pytest.raises(UserError, match=words):
        Processes()


@pytest.mark.parametrize(
    "variables, words",
    [
        (dict(MASTER_ADDR=""), "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        (dict(MASTER_PORT=""), "WORLD_SIZE is 2, but MASTER_PORT is not set"),
        (dict(MASTER_PORT="abc"), "MASTER_PORT is 'abc'"),
        (dict(MASTER_PORT="-1"), "MASTER_PORT is '-1'"),
        (dict(MASTER_PORT="0"), "MASTER_PORT is 0, not a port from 1 to 65535"),
        (dict(MASTER_PORT="65536"), "MASTER_PORT is 65536, not a port from 1 to 65535"),
        (dict(MASTER_ADDR="no..host", RANK="1"), "MASTER_ADDR is no..host, which cannot be found"),
        (dict(MASTER_ADDR="tcp://127.0.0.1"), "MASTER_ADDR is tcp://127.0.0.1, which cannot be found"),
    ],
)
def test_a_wrong_address_is_refused_at_once(variables, words, job):
    job(**JOB | {"MASTER_PORT": free_port()} | variables)
    with pytest.raises(UserError, match=words):
        Processes().connect()


def test_a_port_that_another_program_uses_is_refused_at_once(job):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        job(**JOB, MASTER_PORT=port)
        with pytest.raises(UserError, match=f"port {port} is in use: pass another --master_port"):
            Processes().connect()


@pytest.mark.parametrize("rank, missing", [(0, "1: start all again"), (1, "process 0 at 127.0.0.1")])
def test_a_rank_that_never_comes_is_waited_for_with_patience(rank, missing, job, monkeypatch, capfd):
    monkeypatch.setattr(Processes, "PATIENCE", 0.5)
    job(**JOB | {"RANK": rank}, MASTER_PORT=free_port())
    since = time.monotonic()
    with pytest.raises(UserError, match=f"process {rank} has waited 0.5 s for {missing}"):
        Processes().connect()
    assert time.monotonic() - since >= 0.5 and capfd.readouterr().err == ""  # torch logs failed tries


def test_a_server_that_does_not_answer_is_waited_for_with_patience(job, monkeypatch):
    monkeypatch.setattr(Processes, "PATIENCE", 0.5)
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as other:
        job(**JOB | {"RANK": "1"}, MASTER_PORT=other.getsockname()[1])
        with pytest.raises(UserError, match="process 1 has waited 0.5 s for the answer of 127.0.0.1"):
            Processes().connect()
    for thread in set(threading.enumerate()) - before:  # torch logs the end of the server, which is not for other tests
        thread.join(120)


@pytest.mark.parametrize("program", ["sample_ddp.py", "train_router.py"])
@pytest.mark.parametrize(
    "variables, words",
    [
        (dict(RANK="0", WORLD_SIZE="two"), "WORLD_SIZE is 'two'"),
        (dict(RANK="one", WORLD_SIZE="0"), "RANK is 'one'"),
        (dict(LOCAL_RANK="x"), "LOCAL_RANK is 'x'"),
        (dict(RANK="3", WORLD_SIZE="2"), "RANK is 3"),
        (dict(SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="1"), "srun started 2 processes"),
    ],
)
def test_programs_refuse_wrong_variables_in_one_line(program, variables, words, job, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    job(**variables)
    flags = ["--data-path", "."] if program == "train_router.py" else []
    assert_refused(call(program, *flags, capfd=capfd), f"{program}: error: ", words, "torchrun")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("program, flags", [("sample.py", []), ("evaluator.py", ["a.npz", "b.npz"])])
def test_programs_of_one_process_refuse_torchrun_with_several(program, flags, job, capfd):
    job(**JOB, MASTER_PORT="1", TORCHELASTIC_RUN_ID="1")
    assert_refused(call(program, *flags, capfd=capfd), "torchrun started 2 processes", "start it with python")
    job(**JOB, MASTER_PORT="1")  # in a container whose environment has them, without torchrun
    assert "torchrun" not in call(program, *flags, "--device", "tpu", capfd=capfd).stderr


SLOW = pytest.mark.slow


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's list of threads")
@pytest.mark.parametrize("end, code", [("success", 0), pytest.param("refusal", 1, marks=SLOW)])
def test_no_thread_of_gloo_is_left_when_python_ends(end, code, tmp_path):
    result = run("tests/runtime/leaving.py", end, cwd=tmp_path, processes=2)
    assert result.returncode == code, result.stderr
    assert set(re.findall(r"threads: (\d+)", result.stdout)) == {"0"}  # two ranks may print on one line


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
