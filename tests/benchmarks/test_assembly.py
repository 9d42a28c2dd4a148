"""The benchmark of assembling: what it records, what it leaves behind, and that its processes stay small."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_refused, call, run

from benchmarks import assembly, common
from evaluation.sample_set import SampleSet
from runtime.errors import UserError
from runtime.files import check_writable

PROGRAM = "benchmarks/assembly.py"
SMALL = ["--images", 96, "--original-images", 40, "--image-size", 16, "--shard", 7]


def alone_here(function, *args):
    """In place of `assembly.alone`: in this process."""
    return function(*args)


def test_a_record_holds_what_was_measured_and_the_table_reads_it(tmp_path, monkeypatch, capsys):
    result = run(PROGRAM, *SMALL, "--record", "assembly-small.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert os.listdir(tmp_path) == ["assembly-small.json"]  # no folder is left
    saved = json.loads((tmp_path / "assembly-small.json").read_text())
    measured = saved["measurements"]
    counts = {"original": 40, "ours_as_many": 40, "ours": 96}
    assert {name: figures["images"] for name, figures in measured.items()} == counts
    for figures in measured.values():
        pixels = figures["images"] * 16 * 16 * 3
        assert pixels < figures["npz_bytes"] < pixels + figures["images"] * 8 + 2000
        assert 0 < figures["base_bytes"] <= figures["peak_bytes"]
        # Python and NumPy take 40 MB, torch alone would add 150.
        assert figures["peak_bytes"] < 120e6
        assert 0 < figures["seconds"] < 60
    assert saved["flags"] == {"images": 96, "original_images": 40, "image_size": 16, "shard": 7}
    assert saved["device"] and saved["torch"] == torch.__version__

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    (tmp_path / "train-other.json").write_text("{}")
    assembly.main(assembly.parse_args(["--table"]))
    printed = capsys.readouterr().out
    assert printed.strip() == "\n".join(line for line in result.stdout.splitlines() if line.startswith("|"))
    assert [line.split(" | ")[1:3] for line in printed.splitlines()[2:]] == [
        [assembly.MEASUREMENTS["original"], "40"],
        ["ours", "40"],
        ["ours", "96"],
    ]


def test_the_table_has_the_figures_of_a_record():
    figures = {"images": 5000, "seconds": 2.5, "base_bytes": 40_000_000, "peak_bytes": 2_040_400_000}
    record = {
        "flags": {"image_size": 256},
        "device": "a processor",
        "measurements": {"ours": figures | {"npz_bytes": 983_000_000}},
    }
    rows = assembly.table([record, record]).splitlines()
    assert rows[2] == "| 256, a processor | ours | 5,000 | 2.5 | 2,000 | 2,040 | 2,000 | 983 |" == rows[3]
    assert len({line.count("|") for line in rows}) == 1


def test_the_original_holds_all_images_twice_and_ours_a_few(tmp_path):
    # 9,000 images of 64 pixels are 111 MB. Without the import of torch that names the device at the end.
    flags = ["--images", "1", "--original-images", "9000", "--image-size", "64", "--shard", "500"]
    program = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import assembly, json, pathlib; "
    program += f"print(json.dumps(assembly.measure_all(assembly.parse_args({flags}), pathlib.Path('.'))))"
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    original, ours = (
        measured[name]["peak_bytes"] - measured[name]["base_bytes"] for name in ("original", "ours_as_many")
    )
    array = 9000 * 64 * 64 * 3
    assert 1.8 * array < original < 3 * array
    assert ours < array / 4
    # A process starts with the highest memory of the one that started it: that must not be the original's.
    assert measured["ours"]["peak_bytes"] < 120e6


def test_both_ways_write_the_images_of_the_shards(tmp_path):
    assembly.write_shards(tmp_path, 23, 8, 5)
    shards = [np.load(path) for path in sorted((tmp_path / "set" / "shards").glob("*.npz"))]
    assert [len(shard["images"]) for shard in shards] == [5, 5, 5, 5, 3]
    images, labels = (np.concatenate([shard[name] for shard in shards]) for name in ("images", "labels"))
    assert images.shape == (23, 8, 8, 3) and images.dtype == np.uint8 and labels.tolist() == list(range(23))
    assert len({image.tobytes() for image in images}) == 23
    original, ours = (assembly.measure(way, tmp_path, 23, 8) for way in (True, False))
    assert not (tmp_path / "set").exists()
    for name, figures in (("original.npz", original), ("set.npz", ours)):
        arrays = np.load(tmp_path / name)
        assert np.array_equal(arrays["arr_0"], images) and np.array_equal(arrays["labels"], labels)
        assert figures["npz_bytes"] == os.path.getsize(tmp_path / name)
    assert assembly.contents(tmp_path / "original.npz") == assembly.contents(tmp_path / "set.npz")


@pytest.mark.parametrize("name", ["images", "labels"])
def test_ways_that_differ_in_a_value_are_an_error_and_nothing_is_left(name, tmp_path, monkeypatch, capsys):
    plain = assembly.original_assembly

    def wrong(shards, npz):
        plain(shards, npz)
        arrays = dict(np.load(npz))
        arrays["arr_0" if name == "images" else name].reshape(-1)[-1] ^= 1
        np.savez(npz, **arrays)

    monkeypatch.setattr(assembly, "original_assembly", wrong)
    monkeypatch.setattr(assembly, "alone", alone_here)
    monkeypatch.chdir(tmp_path)
    args = assembly.parse_args([str(flag) for flag in [*SMALL, "--record", "r.json"]])
    with pytest.raises(RuntimeError, match="the original's way wrote"):
        assembly.main(args)
    assert os.listdir(tmp_path) == [] and "|" not in capsys.readouterr().out


def test_what_the_measured_processes_run_imports_no_torch(tmp_path):
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import assembly; from pathlib import Path; "
    )
    program += "place = Path('.'), 9, 8; assembly.write_shards(*place, 4); "
    program += "assembly.measure(True, *place); assembly.measure(False, *place); assembly.contents(Path('set.npz')); "
    program += "assembly.alone(assembly.contents, Path('set.npz')); "
    program += "print([name for name in ('torch', 'sampling', 'numpy') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.stdout == "['numpy']\n", result.stderr


def test_the_process_that_starts_the_others_imports_neither_numpy_nor_torch_before_they_ended(tmp_path):
    program = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import assembly\n"
    program += "def stop(*args): sys.exit(str([name for name in ('torch', 'numpy') if name in sys.modules]))\n"
    program += "assembly.alone = stop; assembly.main(assembly.parse_args(['--images', '1', '--original-images', '1']))"
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (1, "[]\n")
    assert os.listdir(tmp_path) == []


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path, capfd):
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.txt").write_text("mine")
    assert_refused(call("assembly.py", *SMALL, "--work", work, capfd=capfd), work, "not empty")
    assert (work / "thesis.txt").read_text() == "mine" and os.listdir(work) == ["thesis.txt"]
    assert_refused(call("assembly.py", *SMALL, "--work", work / "thesis.txt", capfd=capfd), "Not a directory")
    assert_refused(call("assembly.py", *SMALL, "--work", tmp_path / "no" / "work", capfd=capfd), "No such file")
    assert os.listdir(tmp_path) == ["work"]


@pytest.mark.parametrize(
    "flags, gigabytes",
    # Two of everything for the large set; the small one is there as shards and as two files.
    [(["--images", 50000], "19.7"), (["--images", 1, "--original-images", 40000], "23.6")],
)
def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(flags, gigabytes, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(assembly.shutil, "disk_usage", lambda folder: SimpleNamespace(free=19_000_000_000))
    monkeypatch.chdir(tmp_path)
    result = call("assembly.py", *flags, "--record", tmp_path / "a" / "r.json", capfd=capfd)
    assert_refused(result, "19.0 GB free", f"{gigabytes} GB")
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(assembly.shutil, "disk_usage", lambda folder: SimpleNamespace(free=24_000_000_000))
    assembly.check_place(assembly.parse_args([str(flag) for flag in flags]))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_what_interrupts_it_leaves_no_folder(sent, tmp_path):
    work = tmp_path / "work"
    command = [sys.executable, ROOT / PROGRAM, "--images", "1", "--original-images", "100000", "--image-size", "64"]
    process = subprocess.Popen(
        [*command, "--work", work], stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True
    )
    # Until the process that writes the shards, which a terminal's Ctrl-C reaches too, is at work.
    deadline = time.monotonic() + 60
    while not list(work.glob("few/set/shards/*.npz")) and time.monotonic() < deadline:
        time.sleep(0.01)
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)
    else:
        process.send_signal(sent)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and told.split("\n") == ["", "assembly.py: interrupted", ""]
    assert os.listdir(tmp_path) == []


def test_a_process_that_cannot_go_on_is_told_in_one_line_but_a_bug_keeps_its_traceback(tmp_path, capfd):
    # Functions that the new process has without importing this file, and torch with it.
    assert assembly.alone(os.getpid) != os.getpid()
    (tmp_path / "file").touch()
    for told, *command in (
        ("killed.*memory", signal.raise_signal, signal.SIGKILL),
        ("too little memory", bytearray, 2**62),
        ("cannot write.*file", check_writable, tmp_path / "file" / "below"),
        ("No such file", os.stat, tmp_path / "missing"),
    ):
        with pytest.raises(UserError, match=told):
            assembly.alone(*command)
    assert capfd.readouterr().err == ""
    with pytest.raises(RuntimeError, match="int failed, exit code 1"):
        assembly.alone(int, "x")
    assert "ValueError: invalid literal" in capfd.readouterr().err


def test_a_shard_that_is_damaged_stops_it_in_one_line(tmp_path, monkeypatch, capfd):
    plain = SampleSet.write

    def short(self, start, images, labels):
        plain(self, start, images, labels)
        path = self._shard(start, start + len(images))
        path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"PK\x01\x03"))

    monkeypatch.setattr(SampleSet, "write", short)
    monkeypatch.setattr(assembly, "original_assembly", lambda shards, npz: npz.touch())
    monkeypatch.setattr(assembly, "alone", alone_here)
    assert_refused(call("assembly.py", *SMALL, "--work", tmp_path / "work", capfd=capfd), "is damaged")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "flags, words",
    [(["--record", "r.txt"], ".json"), (["--images", 0], "0"), (["--shard", "x"], "x"), (["--image-size", -1], "-1")],
)
def test_what_cannot_be_measured_is_refused(flags, words, capfd):
    assert_refused(call("assembly.py", *flags, capfd=capfd), words)
