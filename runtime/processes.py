"""The processes of a job: one alone, or those that torchrun started, which tell each other little, by Gloo."""

import contextlib
import os
import time
import uuid
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from runtime.errors import UserError
from runtime.memory import out_of_memory


def _agent():
    """Names the torchrun that started this process: it lives on when it restarts them, and no two are alike."""
    stat = Path(f"/proc/{os.getppid()}/stat")
    started = stat.read_text().rpartition(")")[2].split()[19] if stat.exists() else ""
    return f"{os.uname().nodename} {os.getppid()} {started}".strip()


class Processes:
    """This process among its job's: `rank` of `size`, `local` on its machine; 0 of 1 without torchrun.

    launch: tells a restart by torchrun from another start of the same command; None without torchrun.
    """

    PATIENCE = 600  # seconds for all processes to arrive, which torchrun starts together

    def __init__(self):
        self.rank, self.size, self.local_rank = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        self.launch = _agent() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def is_main(self):
        return self.rank == 0

    def connect(self):
        """Meets the others, for messages of plain values and of tensors on the CPU."""
        if self.size > 1:
            # Hours, since others may wait for a download or for the slowest; one that dies is torchrun's to find.
            timeout = timedelta(hours=12)
            with self.exchange():
                store, _, _ = next(rendezvous("env://", timeout=timeout))
                store = self._meet(store)
                # Also where there are GPUs: no message is larger than some kB, and who waits for a process that died
                # learns it from Gloo at once, where NCCL would wait on.
                dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=timeout)

    @contextlib.contextmanager
    def exchange(self):
        """In this block only messages are exchanged. Raises UserError where that fails: another process is gone."""
        try:
            yield
        except RuntimeError as error:  # the distributed engine's own errors are such, too
            if out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"process {self.rank} lost the others ({reason}): one of them has ended, or cannot be reached"
            ) from error

    def _meet(self, store):
        """The part of `store` that belongs to the processes which are there now, once they all are.

        torchrun keeps its store over a restart, and with it the addresses of processes that are dead. So the first
        process draws a name for each start, and answers those who call it by that name.
        """
        me, since = uuid.uuid4().hex, time.monotonic()
        if self.is_main:
            name, missing = me, set(range(1, self.size))
            store.set("start", name)
        else:
            name, missing = None, {0}
        while missing:
            if self.is_main:
                for rank in [rank for rank in missing if store.check([f"{name} {rank}"])]:
                    store.set(f"{name} {rank} answer", store.get(f"{name} {rank}"))
                    missing.remove(rank)
            elif store.check(["start"]):
                if (now := store.get("start").decode()) != name:  # at first, or an older start's was there before
                    name = now
                    store.set(f"{name} {self.rank}", me)
                elif store.check([answer := f"{name} {self.rank} answer"]) and store.get(answer).decode() == me:
                    missing.clear()
            if time.monotonic() - since > self.PATIENCE:
                names = ", ".join(map(str, sorted(missing)))
                raise UserError(
                    f"process {self.rank} has waited {self.PATIENCE} s for {names}: start all again; with "
                    "several machines and --max-restarts torchrun needs --rdzv_backend=c10d"
                )
            time.sleep(0.02)
        return dist.PrefixStore(name, store)

    def disconnect(self):
        """Leaves the group, where there is one."""
        if self.size > 1:
            dist.destroy_process_group()

    def run_everywhere(self, function, local_main_first=False):
        """What `function` returns here, after it ended everywhere; a UserError anywhere is raised in all, said by one.

        in_turn: the first process of each machine runs it before the others (it may fetch files).
        """
        result = message = None

        def attempt():
            nonlocal result, message
            try:
                result = function()
            except UserError as error:
                message = str(error)

        later = local_main_first and self.local_rank > 0
        if not later:
            attempt()
        if local_main_first:
            self._raise_first(self.gather(message))
        if later:
            attempt()
        self._raise_first(self.gather(message))
        return result

    def _raise_first(self, messages):
        """Raises the first text of `messages` that is not None."""
        for message in messages:
            if message is not None:
                raise self.error(message)

    def run_on_main(self, function):
        """What `function` returns in the first process, for all. Its UserError is raised in all, said by one."""
        result = [self.run_everywhere(lambda: function() if self.is_main else None)]
        if self.size > 1:
            with self.exchange():
                dist.broadcast_object_list(result)
        return result[0]

    def error(self, message):
        """A UserError that every process raises and the first one says."""
        error = UserError(message)
        error.printed_by_main = not self.is_main
        return error

    def gather(self, value):
        """The list of every process's `value`, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with self.exchange():
            dist.all_gather_object(values, value)
        return values
