"""Mutated routers, schedules, .npz files, model configs and graph files are used or refused, in little memory.

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

ROOT = Path(__file__).resolve().parent.parent
MEMORY = 1 << 30  # bytes of the process
HUGE = [0, 1, 2, -1, 3, 7, 255, 65536, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, 10**30]


def pick(random, values):
    return values[random.integers(len(values))]


def damaged(random, content):
    """`content` with up to eight bits changed, or cut off, or with a part removed or overwritten."""
    flipped = bytearray(content)
    for at in random.integers(len(content), size=random.integers(1, 9)):
        flipped[at] ^= 1 << int(random.integers(8))
    start, length = random.integers(len(content)), random.integers(1, 200)
    before, after = content[:start], content[start + length :]
    return pick(random, [bytes(flipped), before, before + after, before + random.bytes(length) + after])


def members(content):
    """The members of a zip archive, name to bytes."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(random, parts):
    """A zip archive, compressed or not."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", pick(random, [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return made.getvalue()


def other_member(random, content):
    """A zip archive with one member damaged, whose checksum is right."""
    parts = members(content)
    name = pick(random, [name for name in parts if parts[name]])
    return zipped(random, parts | {name: damaged(random, parts[name])})


def lying(random, content):
    """A zip archive whose directory gives other sizes, places or checksums of a member."""
    entry = content.find(b"PK\1\2", random.integers(len(content) // 2, len(content)))
    at = entry + pick(random, [10, 16, 20, 24, 28, 30, 42])
    number = pick(random, [0, 1, 100, 2**20, 2**31, 2**32 - 2, 2**32 - 1]).to_bytes(4, "little")
    return content[:at] + number + content[at + 4 :] if entry >= 0 else content


def routers(folder):
    """The ways to mutate a router file, a function that writes it, and one that reads it as the programs do."""
    import torch

    from router import Router

    path, rows = folder / "router.pt", {f"{i}.prob": torch.zeros(6) for i in range(4)}
    strange = [torch.zeros(1).expand(size) for size in (2**20, 2**32, 2**40, 2**60)]
    strange += [torch.zeros(6, dtype=dtype) for dtype in (torch.int64, torch.complex64, torch.float64, torch.bfloat16)]
    strange += [torch.full((6,), np.nan), torch.zeros(6, device="meta"), torch.zeros(6).to_sparse(), [0.0] * 6, None]
    strange += [torch.zeros(shape) for shape in ((), 3, (2, 3), (0, 6))]

    def saved(random, rows):
        made = io.BytesIO()
        torch.save({"routers": rows}, made, _use_new_zipfile_serialization=random.random() < 0.7)
        return made.getvalue()

    def other_rows(random):
        """A file that torch writes without complaint, with something strange in a row."""
        name = pick(random, [*rows, "4.prob", "-1.prob", "0", "x" * 10000, 7])
        return saved(random, rows | {name: pick(random, strange)})

    def read():
        router = Router.load(path)
        router.schedule(0.1).check_fits(path, 4, 3)

    Router(4, 3).save(path)
    whole = path.read_bytes()
    ways = [lambda random, way=way: way(random, whole) for way in (damaged, lying, other_member)]
    return [*ways, other_rows, lambda random: damaged(random, saved(random, rows))], path.write_bytes, read


def other_header(random, array):
    """The .npy of `array` under another header."""
    descr, shape = array.dtype.str, list(array.shape) or [1]
    if random.random() < 0.4:
        descr = pick(random, ["|O", "|u1", "<f8", ">i4", "<U1000000000", "|V0", "|S0", "<M8[s]", "xyz", "", "<f16"])
    else:
        shape[random.integers(len(shape))] = pick(random, HUGE)
    descr = pick(random, [repr(descr)] * 9 + ["[('a', '<f8'), ('b', '|O')]", "__import__('os').mkdir('ran')"])
    text = f"{{'descr': {descr}, 'fortran_order': {random.random() < 0.3}, 'shape': {tuple(shape)}}}".encode()
    text = pick(random, [text] * 9 + [b"(" * 5000 + text, damaged(random, text)])
    length = len(text) if random.random() < 0.8 else int(random.integers(2**16))
    return b"\x93NUMPY\1\0" + length.to_bytes(2, "little") + text + array.tobytes()


def npz(folder):
    """As `routers`, for evaluation sets, finished sample sets and shards; three of four mutations are headers."""
    from evaluation.evaluation_set import open_evaluation_set
    from evaluation.npz import write_npz
    from evaluation.sample_set import SampleSet

    pixels, manifest = np.zeros((4, 8, 8, 3), np.uint8), {"images": 4, "image_size": 8}
    samples, made = SampleSet(folder, "set", manifest), io.BytesIO()
    samples.shards.mkdir(parents=True)
    arrays = {"arr_0": pixels, "images": pixels, "labels": np.arange(4)}
    arrays |= {"manifest": np.array(json.dumps(manifest)), "about": np.array('{"graph": "f00"}')}
    arrays |= {"mu": np.zeros(3), "sigma": np.eye(3), "pool": np.zeros((4, 3), np.float32)}
    write_npz(made, **arrays)
    whole = made.getvalue()

    def header(random):
        name = pick(random, list(arrays))
        return zipped(random, members(whole) | {f"{name}.npy": other_header(random, arrays[name])})

    ways = [lambda random, way=way: way(random, whole) for way in (damaged, lying, other_member)]

    def write(content):
        samples.npz.write_bytes(content)
        (samples.shards / "0000000-0000004.npz").write_bytes(content)

    def read():
        samples.damaged([(0, 4)])  # a shard is sound or not, and nothing is raised
        try:
            samples._is_complete()
        finally:
            [*open_evaluation_set(samples.npz).batches(3)]

    return [header] * 9 + ways, write, read


def configs(folder):
    """As `routers`, for the config.json of a model folder."""
    import torch
    from conftest import SIZES, random_dit
    from safetensors.torch import save_file

    from pretrained.loading import load_dit
    from pretrained.spec import check_labels, model_spec

    whole = {"model": SIZES, "image_size": 8, "class_names": list("abcde"), "vae": "vae", "cfg_scale": 2.0}
    save_file(random_dit().state_dict(), folder / "dit.safetensors")
    values = [*HUGE, None, True, "", "4", "x" * 10000, "\0", [], {}, [4], {"a": 1}, 2.5, 1e308, float("nan"), 8, 24]
    names = [*SIZES, "in_channels", "mlp_ratio", "class_dropout_prob", "learn_sigma", "no_such", "frequency_shift"]
    others = [b"[" * 10**6, b"5", b"[]", b"null", b"", b'{"model": ' * 5000, b"\xff\xfe"]

    def change(random):
        config = whole | {"model": SIZES | {pick(random, names): pick(random, values)}}
        if random.random() < 0.5:
            config[pick(random, [*whole, "horizontal_flip", "no_such"])] = pick(random, values)
        return json.dumps(config).encode()

    ways = [change] * 7 + [lambda random: damaged(random, json.dumps(whole).encode())]

    def read():
        spec = model_spec(ckpt=str(folder))
        check_labels(spec.default_labels, spec.num_classes)
        dit = load_dit(spec, "cpu")
        [spec.class_names[label].upper() for label in spec.default_labels if spec.class_names]
        x = torch.zeros(1, dit.in_channels, dit.input_size, dit.input_size)
        dit(x, torch.tensor([5]), torch.tensor([dit.num_classes - 1])) * spec.guidance(None, 4.0)

    return [*ways, lambda random: pick(random, others)], (folder / "config.json").write_bytes, read


def graphs(folder):
    """As `routers`, for the graph file of the evaluator's network; mostly one node differs."""
    from google.protobuf.message import DecodeError

    from evaluation.features import Network
    from evaluation.graph_file import message_classes

    path, whole = folder / "graph.pb", (ROOT / "ckpt" / "fashion_mnist" / "classifier.pb").read_bytes()

    def other_node(random):
        graph = message_classes()["GraphDef"].FromString(whole)
        node = pick(random, graph.node)
        content = node.SerializeToString()
        while True:
            try:
                node.ParseFromString(damaged(random, content[:100]) + content[100:])  # the weights are in the middle
                return graph.SerializeToString()
            except (DecodeError, UnicodeDecodeError, ValueError):
                continue

    return [other_node, other_node, lambda random: damaged(random, whole)], path.write_bytes, lambda: Network(path)


def schedules(folder):
    """As `routers`, for schedule files: our JSON, and SmoothCache's."""
    from schedule import Schedule

    path, row = folder / "plan.json", "10 01 11"
    ours = {"steps": 4, "depth": 3, "order": 1, "rows": ["1", row, "0", row]}
    theirs = {"attn": [1, 0, 1, 0], "mlp": [1, 1, 0, 0]}
    values = [*HUGE, None, True, "", "1", "0", "11 0x 10", row * 999, "\0", [], {}, ["1"], [1, 0], [[1]], 2.5, "1" * 6]

    def change(random):
        whole = pick(random, [ours, ours, theirs])
        name = pick(random, [*whole, "no_such"] if random.random() < 0.8 else list(ours))
        content = whole | {name: pick(random, values)}
        if whole is ours and random.random() < 0.5:
            content = ours | {"rows": [pick(random, ["1", "0", row, pick(random, values)]) for _ in ours["rows"]]}
        return json.dumps(content).encode()

    def read():
        schedule = Schedule.load(path, depth=3)
        schedule.rows()
        schedule.check_fits(path, 4, 3)

    ways = [change] * 6 + [lambda random: damaged(random, json.dumps(ours).encode())]
    return ways, path.write_bytes, read


KINDS = {"routers": (routers, 2000), "npz": (npz, 2000), "configs": (configs, 500), "graphs": (graphs, 300)}
KINDS |= {"schedules": (schedules, 1000)}


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


def test_a_mutated_file_is_used_or_refused():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, __file__, "1"]
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
