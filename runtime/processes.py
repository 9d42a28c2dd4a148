"""The processes (ranks) of one job: a single one, or those of torchrun, which exchange small messages through Gloo."""

import atexit
import concurrent.futures
import contextlib
import errno
import importlib
import os
import socket
import threading
import time
import uuid
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from runtime.errors import LostPeer, UserError, explain, first_line
from runtime.memory import out_of_memory
from runtime.ranks import find_ranks, main_address


def _torchrun_id():
    """Text that identifies the torchrun that started this process: the same after its restarts, and unique."""
    stat = Path(f"/proc/{os.getppid()}/stat")
    start_time = stat.read_text().rpartition(")")[2].split()[19] if stat.exists() else ""
    return f"{os.uname().nodename} {os.getppid()} {start_time}".strip()


def _listen(port):
    """Return a socket that listens at `port`. Raises UserError if another program does."""
    everywhere = dict(family=socket.AF_INET6, dualstack_ipv6=True) if socket.has_dualstack_ipv6() else {}
    try:
        return socket.create_server(("", port), backlog=1024, **everywhere)
    except OSError as error:
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be opened ({error.strerror})"
        raise UserError(f"port {port} {reason}: pass another --master_port, or set another MASTER_PORT") from error


class Processes:
    """This process among those of its job: `rank` of `size`, `local_rank` on its machine; 0 of 1 without torchrun.

    launch: a text that stays the same when torchrun restarts its processes and differs for a new launch; None without
    torchrun.
    """

    PATIENCE = 600  # seconds until all processes must have arrived; torchrun starts them together

    def __init__(self):
        self.rank, self.size, self.local_rank = find_ranks()
        self.launch = _torchrun_id() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def is_main(self):
        return self.rank == 0

    def connect(self):
        """Connect to the other ranks, for messages of plain values and of tensors on the CPU."""
        if self.size == 1:
            return
        # Hours, because others may wait for a download or for the slowest rank; torchrun notices a rank that died.
        timeout = timedelta(hours=12)
        # Functions of this module have the group of its import as a default value, which would keep the group alive.
        importlib.import_module("torch.distributed.nn")
        atexit.register(self.disconnect)
        with self.exchange():
            store = self._meet(self._open_store(*main_address()))
            # Gloo on GPUs too: messages are at most some kB, and Gloo reports a dead peer at once, while NCCL waits.
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=timeout)

    @contextlib.contextmanager
    def exchange(self):
        """Turn a failed message in this block into a LostPeer error."""
        try:
            yield
        except RuntimeError as error:  # errors of torch.distributed are RuntimeErrors too
            if out_of_memory(error):
                raise
            lost = f"process {self.rank} lost the others ({first_line(error)})"
            raise LostPeer(f"{lost}: one of them has ended, or cannot be reached") from error

    def _open_store(self, host, port):
        """Connect to the store at which all ranks meet; rank 0 opens it, unless torchrun has.

        Python waits first: it can be interrupted, and torch logs each try. torch waits for ever for the answer of a
        server of another kind, so it connects in a thread.
        """
        listening = None
        if self.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            listening = _listen(port)
        self._wait_for_server(host, port)
        store = concurrent.futures.Future()

        def connect():
            opened = dict(wait_for_workers=False, master_listen_fd=listening.detach()) if listening else {}
            timeout = timedelta(seconds=self.PATIENCE)
            try:
                store.set_result(dist.TCPStore(host, port, self.size, bool(listening), timeout=timeout, **opened))
            except RuntimeError as error:
                store.set_exception(error)

        threading.Thread(target=connect, daemon=True).start()
        try:
            return store.result(self.PATIENCE)
        except concurrent.futures.TimeoutError as error:
            raise UserError(self._waited(f"the answer of {host}:{port}")) from error

    def _wait_for_server(self, host, port):
        """Wait until somebody listens at the port of rank 0."""
        since = time.monotonic()
        while True:
            try:
                socket.create_connection((host, port), timeout=min(self.PATIENCE, 10)).close()
                return
            except (socket.gaierror, UnicodeError) as error:
                raise UserError(
                    f"MASTER_ADDR is {host}, which cannot be found ({error}): pass --master_addr of the first machine"
                ) from error
            except OSError as error:
                if time.monotonic() - since > self.PATIENCE:
                    problem = f"process 0 at {host}:{port} ({error.strerror or error})"
                    raise UserError(self._waited(problem)) from error
            time.sleep(0.05)

    def _waited(self, missing):
        return f"process {self.rank} has waited {self.PATIENCE} s for {missing}: start all again"

    def _meet(self, store):
        """Wait for all ranks of this start; return the part of `store` that belongs to it.

        torchrun keeps its store when it restarts the processes, with addresses of dead processes in it. So rank 0 draws
        a name for each start, and answers the ranks that use that name.
        """
        own_id, since = uuid.uuid4().hex, time.monotonic()
        if self.is_main:
            name, missing = own_id, set(range(1, self.size))
            store.set("start", name)
        else:
            name, missing = None, {0}
        while missing:
            if self.is_main:
                for rank in [rank for rank in missing if store.check([f"{name} {rank}"])]:
                    store.set(f"{name} {rank} answer", store.get(f"{name} {rank}"))
                    missing.remove(rank)
            elif store.check(["start"]):
                if (current := store.get("start").decode()) != name:  # the first name seen may be of an older start
                    name = current
                    store.set(f"{name} {self.rank}", own_id)
                elif store.check([answer := f"{name} {self.rank} answer"]) and store.get(answer).decode() == own_id:
                    missing.clear()
            if time.monotonic() - since > self.PATIENCE:
                ranks = ", ".join(map(str, sorted(missing)))
                hint = "with several machines and --max-restarts torchrun needs --rdzv_backend=c10d"
                raise UserError(f"{self._waited(ranks)}; {hint}")
            time.sleep(0.02)
        return dist.PrefixStore(name, store)

    def disconnect(self):
        """Leave the group of processes, if that is still to be done, and end its threads.

        It is done at exit too: a thread that frees a message while Python ends would abort the process.
        """
        if dist.is_initialized():
            dist.destroy_process_group()

    def run_everywhere(self, function, local_main_first=False):
        """Run on every rank and wait; a UserError on any rank is raised on all and printed once.

        local_main_first: the first rank of each machine runs before the others, since it may fetch files.
        Returns the result of this rank. An OSError is raised as a UserError.
        """
        result = None
        turns = [self.local_rank == 0, self.local_rank > 0] if local_main_first else [True]
        for my_turn in turns:
            message = None
            if my_turn:
                try:
                    result = function()
                except (UserError, OSError) as error:
                    message = explain(error)
            for text in self.gather(message):
                if text is not None:
                    raise self.error(text)
        return result

    def run_on_main(self, function):
        """Run on rank 0 and return its result on every rank; its UserError is raised on all and printed once."""
        result = [self.run_everywhere(lambda: function() if self.is_main else None)]
        if self.size > 1:
            with self.exchange():
                dist.broadcast_object_list(result)
        return result[0]

    def check_equal(self, values):
        """Raise UserError if `values`, a dict, is another one on another rank, which has other flags or files."""
        for rank, other in enumerate(self.gather(values)):
            if names := [name for name in values | other if other.get(name) != values.get(name)]:
                differ = f"process {rank} differs from process {self.rank} in {', '.join(names)}"
                raise self.error(f"{differ}: pass the same flags and files")

    def error(self, message):
        """Make a UserError that every rank raises and rank 0 prints."""
        error = UserError(message)
        error.printed_by_main = True
        return error

    def gather(self, value):
        """Return the values of all ranks, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with self.exchange():
            dist.all_gather_object(values, value)
        return values
