"""Mutated files: whatever is done to a router, an .npz, a model's config or a graph, it is used or refused in one line.

    python tests/test_fuzz.py routers 2000
    python tests/test_fuzz.py npz 2000
    python tests/test_fuzz.py configs 500
    python tests/test_fuzz.py graphs 300

does what `make test` does, and prints what came of it; every file follows its number alone. The mutations run in one
process that may take 1 GB of memory, what PyTorch takes itself included.
"""

import io
import json
import pickle
import resource
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
MEMORY, SECONDS = 1 << 30, 20  # bytes of the process; what one file may take, many times more than any does
HUGE = [0, 1, 2, -1, 3, 7, 255, 65536, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, 10**30]


def flipped(random, content):
    """`content` with up to eight of its bits changed."""
    content = bytearray(content)
    for _ in range(random.integers(1, 9)):
        content[random.integers(len(content))] ^= 1 << int(random.integers(8))
    return bytes(content)


def damaged(random, content):
    """`content` with bits changed, cut off, with a part taken out, repeated, or replaced by other bytes."""
    kind, at = random.integers(5), int(random.integers(len(content)))
    end = at + int(random.integers(1, 200))
    if kind == 0:
        return flipped(random, content)
    other = [b"", b"", content[at:end] * 2, random.bytes(end - at)][kind - 1]
    return content[:at] + other + (b"" if kind == 1 else content[end:])


def members(content):
    """The members of a zip archive, name to bytes."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(parts, compression=zipfile.ZIP_STORED):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", compression) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return made.getvalue()


def rezipped(random, content, wanted):
    """A zip archive with one member, named like `wanted` where there is one, damaged, renamed, taken away or packed."""
    parts = members(content)
    names = [name for name in parts if wanted in name] or list(parts)
    name, kind = names[random.integers(len(names))], random.integers(5)
    part = parts[name]
    if kind == 0:
        del parts[name]
    elif kind == 1:
        parts[name + "x"] = parts.pop(name)
    else:
        parts[name] = damaged(random, part) if part else random.bytes(9)
    return zipped(parts, zipfile.ZIP_DEFLATED if kind == 4 else zipfile.ZIP_STORED)


def lying(random, content):
    """A zip archive whose directory says other sizes, places or checksums of a member."""
    content = bytearray(content)
    entry = content.find(b"PK\1\2", random.integers(len(content) // 2, len(content)))
    local = content.find(b"PK\3\4", random.integers(len(content)))
    at = entry + random.choice([10, 16, 20, 24, 28, 30, 42]) if random.random() < 0.7 else local + 18
    number = int(random.choice([0, 1, 100, 2**20, 2**31, 2**32 - 2, 2**32 - 1]))
    if entry >= 0 and 0 <= at < len(content) - 4:
        content[at : at + 4] = number.to_bytes(4, "little")
    return bytes(content)


def strange_tensor(random):
    """What a router file should not hold in place of a row."""
    import torch

    kinds = [
        lambda: torch.zeros(1).expand(int(random.choice([2**20, 2**32, 2**40, 2**60]))),
        lambda: torch.zeros(6, dtype=random.choice([torch.int64, torch.bool, torch.complex64, torch.float64])),
        lambda: torch.zeros(6).to(random.choice([torch.bfloat16, torch.float8_e4m3fn, torch.float16])),
        lambda: torch.full((6,), random.choice([np.nan, np.inf, -np.inf])),
        lambda: torch.zeros(tuple(random.integers(0, 4, random.integers(4)))),
        lambda: torch.zeros(6).to_sparse(),
        lambda: torch.zeros(6, device="meta"),
        lambda: torch.quantize_per_tensor(torch.zeros(6), 0.1, 0, torch.qint8),
        lambda: torch.nn.Parameter(torch.zeros(6)),
        lambda: [0.0] * 6,
        lambda: None,
    ]
    return kinds[random.integers(len(kinds))]()


def strange_state(random):
    """A router file that torch writes without complaint, in either of its formats."""
    import torch

    rows = {f"{i}.prob": torch.zeros(6) for i in range(4)}
    name = random.choice([*rows, "4.prob", "-1.prob", "0", "x" * 10000])
    strange = strange_tensor(random)
    rows = dict.fromkeys(rows, strange) if random.random() < 0.5 else rows | {str(name): strange}
    if random.random() < 0.2:
        rows[int(random.integers(9))] = torch.zeros(6)
    state = {"routers": rows}
    for _ in range(int(random.choice([0, 0, 0, 3, 100]))):
        state = {"routers": state} if random.random() < 0.5 else [state]
    made = io.BytesIO()
    torch.save(state, made, _use_new_zipfile_serialization=random.random() < 0.8)
    return made.getvalue()


def lying_pickle(random, content):
    """A router file whose pickle says other sizes, strides or offsets of its tensors."""
    parts = members(content)
    (name,) = (name for name in parts if name.endswith("data.pkl"))
    number = HUGE[random.integers(len(HUGE))]
    # Six values a row: BININT1 6 wherever it occurs, or one of them, becomes another number.
    written = pickle.dumps(number, 2)[2:-1]
    pieces = parts[name].split(b"K\x06")
    at = random.integers(1, len(pieces))
    parts[name] = b"K\x06".join(pieces[:at]) + written + b"K\x06".join(pieces[at:])
    if random.random() < 0.3:
        parts[name] = parts[name].replace(b"FloatStorage", random.choice([b"ByteStorage", b"DoubleStorage", b"X"]))
    return zipped(parts)


def routers(folder):
    """A function that damages a router file by a random generator, and one that reads it as the programs do."""
    import torch

    from router import Router

    torch.manual_seed(0)
    path = folder / "router.pt"
    Router(4, 3).save(path)
    whole = path.read_bytes()
    old = io.BytesIO()
    torch.save(torch.load(path, weights_only=True), old, _use_new_zipfile_serialization=False)
    ways = [
        lambda random: damaged(random, whole),
        lambda random: rezipped(random, whole, random.choice(["data.pkl", "data/"])),
        lambda random: lying(random, whole),
        lambda random: lying_pickle(random, whole),
        lambda random: damaged(random, old.getvalue()),
        strange_state,
    ]

    def read():
        router = Router.load(path)
        router.schedule(0.1)
        router.check_fits(path, 4, 3)

    return ways, path.write_bytes, read


def header(random, array):
    """The .npy of `array` under a header that is not its own."""
    shape, descr = list(array.shape), array.dtype.str
    if shape and random.random() < 0.6:
        shape[random.integers(len(shape))] = HUGE[random.integers(len(HUGE))]
    elif random.random() < 0.5:
        shape = [HUGE[k] for k in random.integers(len(HUGE), size=random.integers(6))]
    if random.random() < 0.4:
        descr = random.choice(["|O", "|u1", "<f8", ">i4", "<U1000000000", "|V0", "|S0", "<M8[s]", "xyz", "", "<f16"])
    text = f"{{'descr': '{descr}', 'fortran_order': {random.choice(['False', 'True', '0', 'None'])}, "
    text += f"'shape': ({''.join(f'{n}, ' for n in shape)}), }}"
    kind = random.integers(12)
    if kind == 0:
        text = damaged(random, text.encode()).decode("latin1")
    elif kind == 1:
        text = "(" * 5000 + text
    elif kind == 2:
        text = text.replace("'descr'", random.choice(["'desc'", "descr", "__import__('os').mkdir('ran')"]))
    elif kind == 3:
        text = text.replace(f"'{descr}'", random.choice(["[('a', '<f8'), ('b', '|O')]", "[]", "5", "None", "{}"]))
    text = text.encode("latin1")
    length = len(text) if random.random() < 0.8 else int(random.integers(2**16))
    version = bytes(random.choice([0, 1, 1, 1, 2, 3, 9], 2) if random.random() < 0.2 else [1, 0])
    start = (b"\x93NUMPY" if random.random() < 0.95 else random.bytes(6)) + version
    return start + length.to_bytes(2 if version[0] != 2 else 4, "little") + text + array.tobytes()


def npz(folder):
    """As `routers`, for sets to evaluate, finished sets and shards."""
    from evaluation.evaluation_set import open_evaluation_set
    from evaluation.npz import write_npz
    from evaluation.sample_set import SampleSet

    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    manifest = {"images": 4, "image_size": 8}
    samples = SampleSet(folder, "set", manifest)
    samples.shards.mkdir(parents=True)
    arrays = {"arr_0": pixels, "images": pixels, "labels": np.arange(4)}
    arrays |= {"manifest": np.array(json.dumps(manifest)), "about": np.array('{"graph": "f00"}')}
    arrays |= {"mu": np.zeros(3), "sigma": np.eye(3), "pool": np.zeros((4, 3), np.float32)}
    made = io.BytesIO()
    write_npz(made, **arrays)
    whole = made.getvalue()
    parts = members(whole)

    def other_header(random):
        name = list(arrays)[random.integers(len(arrays))]
        packed = zipfile.ZIP_DEFLATED if random.random() < 0.3 else zipfile.ZIP_STORED
        changed = zipped(parts | {f"{name}.npy": header(random, arrays[name])}, packed)
        return lying(random, changed) if random.random() < 0.2 else changed

    # Three of four are headers.
    ways = [other_header] * 9 + [
        lambda random: damaged(random, whole),
        lambda random: lying(random, whole),
        lambda random: rezipped(random, whole, ".npy"),
    ]

    def write(content):
        samples.npz.write_bytes(content)
        (samples.shards / "0000000-0000004.npz").write_bytes(content)

    def read():
        samples.damaged([(0, 4)])  # a shard is sound or not, and nothing else
        refused = None
        for reads in (lambda: [*open_evaluation_set(samples.npz).batches(3)], samples._is_complete):
            try:
                reads()
            except ValueError as error:
                refused = error
        if refused:
            raise refused

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
    names = [*sizes, "in_channels", "mlp_ratio", "class_dropout_prob", "learn_sigma", "no_such"]
    names += ["frequency_shift", "mlp_norm_eps"]

    def change(random):
        config = json.loads(json.dumps(whole))
        for _ in range(random.integers(1, 4)):
            value = values[random.integers(len(values))]
            if random.random() < 0.65:
                config["model"][names[random.integers(len(names))]] = value
            elif random.random() < 0.8:
                config[random.choice([*whole, "horizontal_flip", "no_such"])] = value
            else:
                config.pop(random.choice(list(whole)), None)
            if not isinstance(config.get("model"), dict):
                break
        return json.dumps(config).encode()

    others = [b"[" * 10**6, b"5", b"[]", b'""', b"null", b"", b'{"model": ' * 5000, b"\xff\xfe"]
    ways = [change] * 7 + [
        lambda random: damaged(random, json.dumps(whole).encode()),
        lambda random: others[random.integers(len(others))],
    ]

    def read():
        spec = model_spec(ckpt=str(folder))
        check_labels(spec.default_labels, spec.num_classes)
        spec.guidance(None, 4.0) + 0.0
        dit = load_dit(spec, "cpu")
        [spec.class_names[label].upper() for label in spec.default_labels if spec.class_names]
        dit.multiply_adds()
        x = torch.zeros(1, dit.in_channels, dit.input_size, dit.input_size)
        dit(x, torch.tensor([5]), torch.tensor([dit.num_classes - 1]))

    return ways, (folder / "config.json").write_bytes, read


def graphs(folder):
    """As `routers`, for the graph file of the evaluator's network."""
    from evaluation.features import Network
    from evaluation.graph_file import message_classes

    path = folder / "graph.pb"
    whole = (ROOT / "ckpt" / "fashion_mnist" / "classifier.pb").read_bytes()
    graph = message_classes()["GraphDef"].FromString(whole)

    def other_node(random):
        """One node differs: in the bytes around its weights, if it has any, which say what it is."""
        from google.protobuf.message import DecodeError

        while True:
            k = int(random.integers(len(graph.node)))
            content = graph.node[k].SerializeToString()
            start, end = content[:100], content[100:]
            changed = (
                flipped(random, start) + end if random.random() < 0.7 else start + flipped(random, end[-100:] or b"x")
            )
            other = type(graph)()
            other.CopyFrom(graph)
            try:
                other.node[k].CopyFrom(type(graph.node[k]).FromString(changed))
                return other.SerializeToString()
            except (DecodeError, UnicodeDecodeError, ValueError):
                continue

    ways = [other_node, other_node, lambda random: damaged(random, whole)]
    return ways, path.write_bytes, lambda: Network(path)


KINDS = {"routers": (routers, 2000), "npz": (npz, 2000), "configs": (configs, 500), "graphs": (graphs, 300)}


def limit_memory():
    """This process may take `MEMORY` bytes, with what it has now."""

    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    data, resident = (int(status[name].split()[0]) * 1024 for name in ("VmData", "VmRSS"))
    resource.setrlimit(resource.RLIMIT_DATA, (data + MEMORY - resident,) * 2)


def fuzz(kind, count, folder):
    """What came of `count` mutations, a dict; "faults": the tracebacks of those that were neither used nor refused."""
    from runtime.errors import UserError
    from runtime.memory import peak_resident

    ways, write, read = KINDS[kind][0](folder)
    limit_memory()
    used, refused, slowest, faults, since = 0, 0, 0.0, [], time.perf_counter()

    def too_long(*_):
        raise BaseException(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    for number in range(count):
        random = np.random.default_rng([list(KINDS).index(kind), number])
        write(ways[random.integers(len(ways))](random))
        start = time.perf_counter()
        signal.alarm(SECONDS)
        try:
            read()
            used += 1
        except UserError:  # which `cli.run` says in one line, whatever names from the file are in it
            refused += 1
        except BaseException:
            faults.append(f"{number}: {traceback.format_exc()}")
        signal.alarm(0)
        slowest = max(slowest, time.perf_counter() - start)
    return {
        "kind": kind,
        "count": count,
        "used": used,
        "refused": refused,
        "seconds": round(time.perf_counter() - since, 1),
        "slowest": round(slowest, 2),
        "peak_bytes": peak_resident(),
        "faults": faults,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_file_is_used_or_refused_in_one_line(kind, tmp_path):
    command = [sys.executable, __file__, kind, str(KINDS[kind][1]), tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["faults"] == [] and told["used"] + told["refused"] == told["count"]
    assert told["used"] > 0 and told["refused"] > told["count"] / 3  # or nothing was mutated, or nothing was read
    assert told["peak_bytes"] < MEMORY and not list(tmp_path.rglob("ran"))


if __name__ == "__main__":
    import os
    import tempfile
    import warnings

    warnings.simplefilter("ignore")  # NumPy's, about old headers
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    kind, count, *place = sys.argv[1:]
    with tempfile.TemporaryDirectory() as own:
        folder = Path(place[0] if place else own).resolve()
        os.chdir(folder)  # where code that ran would leave its traces
        print(json.dumps(fuzz(kind, int(count), folder), indent=2))
