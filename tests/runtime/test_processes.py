"""How the processes of a start find each other in a store that may hold what an older start left."""

import threading

import torch.distributed as dist

from runtime.errors import UserError
from runtime.processes import Processes


def process(rank, size, monkeypatch):
    """The `Processes` of a process with this rank."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))
    return Processes()


def meet(processes, store):
    """Lets all `processes` meet at once; what each wrote is what the others read. Returns the errors by rank."""
    errors = {}

    def one(member):
        try:
            part = member._meet(store)
            part.set(f"of {member.rank}", "here")
            for rank in range(member.size):
                part.get(f"of {rank}")  # waits for it
        except Exception as error:
            errors[member.rank] = error

    threads = [threading.Thread(target=one, args=(member,), daemon=True) for member in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return errors


def test_each_start_meets_in_a_part_of_its_own(monkeypatch):
    store, names = dist.HashStore(), []
    for size in (3, 2, 4):  # the second and third as after torchrun's restarts
        assert meet([process(rank, size, monkeypatch) for rank in range(size)], store) == {}
        names.append(store.get("start"))
    assert len(set(names)) == 3


def test_who_comes_early_does_not_join_the_older_start(monkeypatch):
    store = dist.HashStore()
    members = [process(rank, 2, monkeypatch) for rank in range(2)]
    assert meet(members, store) == {}
    older = store.get("start")
    early = threading.Thread(target=meet, args=([members[1]], store))
    early.start()
    early.join(0.3)
    assert early.is_alive()  # the first process of its start is not there yet
    members[0]._meet(store).set("of 0", "here")
    early.join(20)
    assert not early.is_alive() and store.get("start") != older


def test_who_waits_in_vain_is_told_so(monkeypatch):
    monkeypatch.setattr(Processes, "PATIENCE", 0.2)
    store = dist.HashStore()
    for rank, others in ((0, "1, 2"), (1, "0")):
        errors = meet([process(rank, 3, monkeypatch)], store)
        assert isinstance(errors[rank], UserError) and f"process {rank} has waited 0.2 s for {others}" in str(
            errors[rank]
        )
