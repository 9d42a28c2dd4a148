"""Mutated routers, .npz files, model configs and graph files are used or refused, in little memory.

    python tests/test_fuzz.py 1 routers

makes all mutations of routers and prints what came of them (4: every fourth; no name: all kinds). Each mutation follows
from its number alone. They run in a process that may take 1 GB of memory, PyTorch included.
"""

import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import traceback
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
MEMORY = 1 << 30  # bytes of the process
HUGE = [0, 1, 2, -1, 3, 7, 255, 65536, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, 10**30]


def pick(random, values):
    return values[random.integers(len(values))]


def flipped(random, content):
    """`content` with up to eight bits changed."""
    content = bytearray(content)
    for at in random.integers(len(content), size=random.integers(1, 9)):
        content[at] ^= 1 << int(random.integers(8))
    return bytes(content)


def damaged(random, content):
    """`content` with bits changed, or cut off, or with a part removed, repeated or overwritten."""
    start = int(random.integers(len(content)))
    end = start + int(random.integers(1, 200))
    before, part, after = content[:start], content[start:end], content[end:]
    kinds = [flipped(random, content), before, before + after, before + part * 2 + after]
    return pick(random, [*kinds, before + random.bytes(len(part)) + after])


def members(content):
    """The members of a zip archive, name to bytes."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(parts, packed=False):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return made.getvalue()


def other_member(random, content):
    """A zip archive with one member damaged, renamed, removed or compressed."""
    parts, kind = members(content), random.integers(5)
    name = pick(random, list(parts))
    part = parts.pop(name)
    if kind:
        parts[name + "x" * (kind == 1)] = damaged(random, part) if part and kind > 1 else part
    return zipped(parts, packed=kind == 4)


def lying(random, content):
    """A zip archive whose directory gives other sizes, places or checksums of a member."""
    entry = content.find(b"PK\1\2", random.integers(len(content) // 2, len(content)))
    at = entry + pick(random, [10, 16, 20, 24, 28, 30, 42])
    number = pick(random, [0, 1, 100, 2**20, 2**31, 2**32 - 2, 2**32 - 1]).to_bytes(4, "little")
    return content[:at] + number + content[at + 4 :] if entry >= 0 else content


def strange_state(random):
    """A router file that torch writes without complaint, in either of its formats, with something else in its rows."""
    import torch

    zeros = torch.zeros(6)
    strange = [torch.zeros(1).expand(size) for size in (2**20, 2**32, 2**40, 2**60)]
    strange += [
        zeros.to(getattr(torch, name)) for name in "int64 bool complex64 float64 bfloat16 float8_e4m3fn".split()
    ]
    strange += [torch.full((6,), value) for value in (np.nan, np.inf, -np.inf)]
    strange += [torch.zeros(tuple(random.integers(0, 4, random.integers(4)))), zeros.to("meta"), zeros.to_sparse()]
    strange += [torch.nn.Parameter(zeros), [0.0] * 6, None]
    rows = {f"{i}.prob": zeros for i in range(4)}
    name = pick(random, [*rows, "4.prob", "-1.prob", "0", "x" * 10000, 7])
    every = random.random() < 0.5
    state = {"routers": dict.fromkeys(rows, pick(random, strange)) if every else rows | {name: pick(random, strange)}}
    for _ in range(pick(random, [0, 0, 0, 3, 100])):
        state = {"routers": state} if random.random() < 0.5 else [state]
    made = io.BytesIO()
    torch.save(state, made, _use_new_zipfile_serialization=random.random() < 0.8)
    return made.getvalue()


def routers(folder):
    """The ways to mutate a router file, a function that writes it, and one that reads it as the programs do."""
    import torch

    from router import Router

    torch.manual_seed(0)
    path, old = folder / "router.pt", io.BytesIO()
    Router(4, 3).save(path)
    whole = path.read_bytes()
    torch.save(torch.load(path, weights_only=True), old, _use_new_zipfile_serialization=False)
    ways = [lambda random, way=way: way(random, whole) for way in (damaged, lying, other_member)]
    ways += [lambda random: damaged(random, old.getvalue()), strange_state]

    def read():
        router = Router.load(path)
        router.schedule(0.1)
        router.check_fits(path, 4, 3)

    return ways, path.write_bytes, read


def other_header(random, array):
    """The .npy of `array` under another header."""
    shape = [HUGE[k] for k in random.integers(len(HUGE), size=random.integers(6))]
    if random.random() < 0.7 and array.ndim:
        shape = list(array.shape)
        shape[random.integers(len(shape))] = pick(random, HUGE)
    types = ["|O", "|u1", "<f8", ">i4", "<U1000000000", "|V0", "|S0", "<M8[s]", "xyz", "", "<f16"]
    descr = repr(pick(random, types) if random.random() < 0.4 else array.dtype.str)
    if random.random() < 0.1:
        descr = pick(random, ["[('a', '<f8'), ('b', '|O')]", "[]", "5", "None", "__import__('os').mkdir('ran')"])
    order, name = pick(random, ["False", "True", "0", "None"]), pick(random, ["descr"] * 9 + ["desc"])
    text = f"{{'{name}': {descr}, 'fortran_order': {order}, 'shape': {tuple(shape)}}}"
    text = pick(random, [text] * 9 + ["(" * 5000 + text, damaged(random, text.encode()).decode("latin1")])
    length = len(text) if random.random() < 0.8 else int(random.integers(2**16))
    version = bytes(random.choice([0, 1, 1, 1, 2, 3, 9], 2) if random.random() < 0.2 else [1, 0])
    start = b"\x93NUMPY" + version + length.to_bytes(2 if version[0] != 2 else 4, "little")
    return start + text.encode("latin1") + array.tobytes()


def npz(folder):
    """As `routers`, for evaluation sets, finished sample sets and shards; three of four mutations are headers."""
    from evaluation.evaluation_set import open_evaluation_set
    from evaluation.npz import write_npz
    from evaluation.sample_set import SampleSet

    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    manifest = {"images": 4, "image_size": 8}
    samples, made = SampleSet(folder, "set", manifest), io.BytesIO()
    samples.shards.mkdir(parents=True)
    arrays = {"arr_0": pixels, "images": pixels, "labels": np.arange(4)}
    arrays |= {"manifest": np.array(json.dumps(manifest)), "about": np.array('{"graph": "f00"}')}
    arrays |= {"mu": np.zeros(3), "sigma": np.eye(3), "pool": np.zeros((4, 3), np.float32)}
    write_npz(made, **arrays)
    whole = made.getvalue()
    parts = members(whole)

    def header(random):
        name = pick(random, list(arrays))
        changed = zipped(parts | {f"{name}.npy": other_header(random, arrays[name])}, packed=random.random() < 0.3)
        return lying(random, changed) if random.random() < 0.2 else changed

    ways = [header] * 9 + [lambda random, way=way: way(random, whole) for way in (damaged, lying, other_member)]

    def write(content):
        samples.npz.write_bytes(content)
        (samples.shards / "0000000-0000004.npz").write_bytes(content)

    def read():
        samples.damaged([(0, 4)])  # a shard is sound or not, and nothing is raised
        try:
            samples._is_complete()
        finally:
            [*open_evaluation_set(samples.npz).batches(3)]

    return ways, write, read


def configs(folder):
    """As `routers`, for the config.json of a model folder."""
    import torch
    from conftest import random_dit
    from safetensors.torch import save_file

    from pretrained.loading import load_dit
    from pretrained.spec import check_labels, model_spec

    sizes = dict(input_size=4, patch_size=2, hidden_size=24, depth=3, num_heads=2, num_classes=5)
    whole = {"model": sizes, "image_size": 8, "class_names": list("abcde"), "vae": "vae", "cfg_scale": 2.0}
    save_file(random_dit().state_dict(), folder / "dit.safetensors")
    values = [*HUGE, None, True, False, "", "4", "x" * 10000, "\0", [], {}, [4], {"a": 1}, 2.5, -2.0, 1e308]
    values += [float("nan"), float("inf"), [[]] * 3, ["a"] * 5, [1] * 5, 8, 24, 1000, 10**6, 10**9]
    names = [*sizes, "in_channels", "mlp_ratio", "class_dropout_prob", "learn_sigma", "no_such", "frequency_shift"]
    others = [b"[" * 10**6, b"5", b"[]", b'""', b"null", b"", b'{"model": ' * 5000, b"\xff\xfe"]

    def change(random):
        config, model = whole.copy(), sizes.copy()
        config["model"] = model
        for _ in range(random.integers(1, 4)):
            if random.random() < 0.65:
                model[pick(random, names)] = pick(random, values)
            else:
                config[pick(random, [*whole, "horizontal_flip", "no_such"])] = pick(random, values)
        if random.random() < 0.1:
            del config[pick(random, list(whole))]
        return json.dumps(config).encode()

    text = json.dumps(whole).encode()
    ways = [change] * 7 + [lambda random: damaged(random, text), lambda random: pick(random, others)]

    def read():
        spec = model_spec(ckpt=str(folder))
        check_labels(spec.default_labels, spec.num_classes)
        dit = load_dit(spec, "cpu")
        [spec.class_names[label].upper() for label in spec.default_labels if spec.class_names]
        x = torch.zeros(1, dit.in_channels, dit.input_size, dit.input_size)
        dit(x, torch.tensor([5]), torch.tensor([dit.num_classes - 1])) * spec.guidance(None, 4.0)

    return ways, (folder / "config.json").write_bytes, read


def graphs(folder):
    """As `routers`, for the graph file of the evaluator's network; mostly one node differs."""
    from google.protobuf.message import DecodeError

    from evaluation.features import Network
    from evaluation.graph_file import message_classes

    path, whole = folder / "graph.pb", (ROOT / "ckpt" / "fashion_mnist" / "classifier.pb").read_bytes()
    graph = message_classes()["GraphDef"].FromString(whole)

    def other_node(random):
        while True:
            other = type(graph)()
            other.CopyFrom(graph)
            node = pick(random, other.node)
            content = node.SerializeToString()
            start, end = content[:100], content[100:]  # the weights are in the middle
            content = flipped(random, start) + end if random.random() < 0.7 else start + flipped(random, end or b"x")
            try:
                node.ParseFromString(content)
                return other.SerializeToString()
            except (DecodeError, UnicodeDecodeError, ValueError):
                continue

    return [other_node, other_node, lambda random: damaged(random, whole)], path.write_bytes, lambda: Network(path)


KINDS = {"routers": (routers, 2000), "npz": (npz, 2000), "configs": (configs, 500), "graphs": (graphs, 300)}


def limit_memory():
    """Let this process take `MEMORY` bytes at most."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    data, resident = (int(status[name].split()[0]) * 1024 for name in ("VmData", "VmRSS"))
    resource.setrlimit(resource.RLIMIT_DATA, (data + MEMORY - resident, resource.RLIM_INFINITY))


def fuzz(kind, every, folder):
    """Read every `every`-th mutation of a kind. A dict; "faults" are tracebacks of files neither used nor refused."""
    from runtime.errors import UserError
    from runtime.memory import peak_resident

    make, count = KINDS[kind]
    ways, write, read = make(folder)
    limit_memory()
    figures = {"kind": kind, "used": 0, "refused": 0, "faults": []}
    for number in range(0, count, every):
        random = np.random.default_rng([list(KINDS).index(kind), number])
        write(pick(random, ways)(random))
        try:
            read()
            figures["used"] += 1
        except UserError:
            figures["refused"] += 1
        except BaseException:
            figures["faults"] = [f"{number}: {traceback.format_exc()}"]
    return figures | {"peak_bytes": peak_resident()}


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_a_mutated_file_is_used_or_refused(every):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, __file__, str(every)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr
    for line in result.stdout.splitlines():
        figures = json.loads(line)
        used, refused = figures["used"], figures["refused"]
        assert figures["faults"] == []
        assert used > 0 and refused > used / 2, "nothing was mutated, or nothing was read"
        assert figures["peak_bytes"] < MEMORY and not figures["ran"]


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # NumPy's, about old headers
    every, *kinds = sys.argv[1:]
    for kind in kinds or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # code that runs leaves its traces here
            print(json.dumps(fuzz(kind, int(every), Path(folder)) | {"ran": os.path.exists("ran")}))
