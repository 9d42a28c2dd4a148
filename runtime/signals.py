"""SIGINT (Ctrl-C) and SIGTERM: how they end a program, and processes that end with the one that started them."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time

SAME = 0.25  # seconds in which two signals count as one: `timeout` sends SIGTERM twice
GRACE = 3.0  # seconds from the second signal until the process is ended


@contextlib.contextmanager
def sigterm_interrupts():
    """In this block SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that work can end in order.

    Do not wait for other ranks in the block: such a wait ignores signals that Python handles.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def second_signal_ends():
    """In this block a second SIGINT or SIGTERM ends the process with code 130 after `GRACE` seconds, come what may.

    Python runs signal handlers between two instructions of the main thread, so not while a file system, a thread or
    another process keeps that waiting. A thread counts the signals instead. Call it in the main thread.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_end_at_second_signal, args=(reader,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


def _end_at_second_signal(reader):
    """Read the numbers of the signals that arrive from a pipe, until it is closed or a second signal has come."""
    first = None
    with open(reader, "rb", buffering=0) as signals:
        while number := signals.read(1):
            if number[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            first = first or time.monotonic()
            if time.monotonic() - first >= SAME:
                break
        else:
            return
        time.sleep(GRACE)  # Python would print an error about a third signal if nobody held the pipe open
        program = os.path.basename(sys.argv[0])
        with contextlib.suppress(OSError):  # whoever reads standard error has gone
            os.write(2, f"\n{program}: ended by a second signal\n".encode(errors="replace"))
        os._exit(130)


@contextlib.contextmanager
def caught_signals():
    """Yield a list to which the first SIGINT or SIGTERM is appended; a second one raises KeyboardInterrupt.

    All ranks can then stop after the same update (`Trainer.update`).
    """
    signals = []

    def handle(number, _):
        now = time.monotonic()
        if signals and now - signals[0] >= SAME:
            raise KeyboardInterrupt
        signals.append(now)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent(*_):
    """Make this child process, a daemon, ignore Ctrl-C and SIGTERM, and end in silence when its parent does.

    Ctrl-C, `timeout` and Slurm reach all processes of a program, and the parent decides when its children end.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _print_unless_parent_left
    if sys.platform == "linux":  # elsewhere a killed parent is noticed between two tasks
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _print_unless_parent_left(kind, error, traceback):
    """Print an error as Python does, unless a connection was closed.

    A parent that is interrupted while it fetches a tensor closes its connection to the thread of the child that hands
    the tensor over (`multiprocessing.resource_sharer`), and that thread would print a traceback.
    """
    if not isinstance(error, (EOFError, OSError)):
        sys.__excepthook__(kind, error, traceback)
