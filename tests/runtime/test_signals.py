"""A second signal ends a program whatever it waits for; children end with the process that started them.

The programs wait for a named pipe that nobody writes, as for a file on a dead server.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, start, write_pngs

from runtime.signals import SAME, caught_signals

TRAINING = "--num-sampling-steps 4 --global-batch-size 4 --draws-per-step 2 --data-path images"
EVALUATION = f"images images --graph {ROOT / 'ckpt' / 'fashion_mnist' / 'classifier.pb'}"


@pytest.fixture
def images(image_folder, tmp_path):
    """A folder of images, one of which never arrives."""
    import numpy as np

    random = np.random.default_rng(0)
    write_pngs(tmp_path / "images", [random.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(16)])
    path = tmp_path / "images" / "class2" / "002.png"
    path.unlink()
    os.mkfifo(path)
    return tmp_path


def start_and_wait(program, flags, model, cwd):
    """Start a program; return it when it or a child waits for the pipe, as far as that can be seen."""
    model = ["--ckpt", model] if program == "train_router.py" else []
    process = start(program, *model, *flags.split(), cwd=cwd)
    deadline = time.monotonic() + 60  # some kernels do not tell
    while time.monotonic() < deadline and not is_waiting(process.pid):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    return process


def is_waiting(pid):
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children()]
        threads = [thread for p in processes for thread in Path(f"/proc/{p.pid}/task").iterdir()]
        return any("wait_for_partner" in (thread / "wchan").read_text() for thread in threads)
    except (psutil.Error, OSError):  # one of them has just ended
        return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "program, flags",
    [
        ("train_router.py", TRAINING),
        ("train_router.py", f"{TRAINING} --num-workers 0"),
        ("train_router.py", "--data-path images --extract-latents latents"),
        ("evaluator.py", EVALUATION),
    ],
)
def test_a_second_signal_ends_a_read_that_blocks(program, flags, number, images, model_folder):
    with start_and_wait(program, flags, model_folder, images) as process:
        children = psutil.Process(process.pid).children()
        process.send_signal(number)
        time.sleep(2 * SAME)
        if process.poll() is None:
            process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode in (130, -number) and "Traceback" not in err, err
    assert psutil.wait_procs(children, timeout=60)[1] == []


@pytest.mark.slow
def test_children_end_with_a_killed_program_even_if_a_read_blocks(images, model_folder):
    with start_and_wait("train_router.py", TRAINING, model_folder, images) as process:
        children = psutil.Process(process.pid).children()
        assert children
        process.kill()
    assert psutil.wait_procs(children, timeout=60)[1] == []


def test_a_second_signal_ends_a_program_whose_standard_error_nobody_reads(tmp_path):
    program = """
import os, signal, sys, time
from runtime import signals
signals.GRACE = 0
signal.signal(signal.SIGINT, lambda *_: None)
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 2)
with signals.second_signal_ends():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(2 * signals.SAME)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert result.returncode == 130


def test_more_signals_than_two_print_nothing_more():
    program = """
import os, signal, sys, time
from runtime import signals
signals.GRACE = 1
signal.signal(signal.SIGINT, lambda *_: None)
with signals.second_signal_ends():
    for _ in range(4):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.2 * signals.SAME)
    time.sleep(60)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (130, "\n-c: ended by a second signal\n")


def test_a_child_says_nothing_when_its_parent_leaves_while_it_fetches_a_tensor():
    program = """
import multiprocessing.connection, sys
from multiprocessing import resource_sharer
from runtime.signals import end_with_parent
end_with_parent()
address, key = resource_sharer.DupFd(0)._id
connection = multiprocessing.connection.SocketClient(address)
connection.recv_bytes()  # the challenge
connection.close()
resource_sharer.stop()  # waits for the thread
try:
    raise ValueError("another")  # is printed
except ValueError:
    sys.excepthook(*sys.exc_info())
"""
    result = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.returncode == 0
    assert result.stderr.count("Traceback") == result.stderr.count("ValueError: another") == 1, result.stderr


def test_signals_at_the_same_time_count_as_one_and_a_later_one_interrupts():
    """`timeout` sends SIGTERM to its child and to the group of processes."""
    with pytest.raises(KeyboardInterrupt), caught_signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals
        signals[0] -= SAME
        os.kill(os.getpid(), signal.SIGINT)
