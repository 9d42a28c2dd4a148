"""The benchmark of the two backends: what it measures, records and prints, with a narrow network."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import assert_refused, call, run

from benchmarks import common, extraction
from benchmarks.inception_graph import inception_v3, needs_tensorflow
from evaluation import inception

PROGRAM = "benchmarks/extraction.py"
SMALL = ["--image-size", 16, "--batch-size", 3, "--batches", 2, "--device", "cpu"]


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    return inception_v3(tmp_path_factory.mktemp("graph") / "narrow.pb", narrower=16)


@needs_tensorflow
def test_a_record_holds_what_was_measured_and_the_table_reads_it(graph, tmp_path, monkeypatch, capsys):
    flags = [*SMALL, "--graph", graph, "--repeats", 1, "--record", "extraction-small.json"]
    result = run(PROGRAM, *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert os.listdir(tmp_path) == ["extraction-small.json"]
    saved = json.loads((tmp_path / "extraction-small.json").read_text())
    assert list(saved["measurements"]) == ["tensorflow", "torch"]
    for rounds in saved["measurements"].values():
        assert len(rounds) == 1
        assert all(0 < figures["seconds"] < 60 and 1e8 < figures["peak_bytes"] < 1e10 for figures in rounds)
    assert saved["measurements"]["torch"][0]["version"] == saved["torch"] == torch.__version__
    assert 0 < saved["distance"] < 1e-5
    sizes = {"image_size": 16, "batch_size": 3, "batches": 2, "repeats": 1, "device": "cpu"}
    assert saved["flags"] == sizes | {"graph": "narrow.pb", "backends": ["tensorflow", "torch"]}

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    (tmp_path / "assembly-other.json").write_text("{}")
    extraction.main(extraction.parse_args(["--table"]))
    printed = capsys.readouterr().out
    assert printed.strip() == "\n".join(line for line in result.stdout.splitlines() if line.startswith("|"))


def test_without_a_graph_one_of_random_weights_is_measured(tmp_path):
    result = run(PROGRAM, *SMALL, "--backends", "torch", "--repeats", 1, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()[2:]
    assert f"| PyTorch {torch.__version__} | random | 16 | 3 |" in line
    assert os.listdir(tmp_path) == []


def test_the_table_has_the_figures_of_a_record():
    def rounds(version, peak, *seconds):
        return [{"seconds": each, "peak_bytes": peak + each, "version": version} for each in seconds]

    record = {
        "flags": {"graph": None, "image_size": 256, "batch_size": 64, "batches": 4},
        "device": "a processor",
        "measurements": {
            "tensorflow": rounds("2.0", 3_500_000_000, 20, 40, 22),
            "torch": rounds("3.0", 1_000_000_000, 16, 20, 20),
        },
    }
    rows = extraction.table([record, record | {"flags": record["flags"] | {"graph": "a.pb"}}]).splitlines()
    assert rows[2] == "| a processor | TensorFlow 2.0 | random | 256 | 64 | 11.64 | 1.000 | 3,500 |"
    assert rows[3] == "| a processor | PyTorch 3.0 | random | 256 | 64 | 12.8 | 1.250 | 1,000 |"
    assert " | a.pb | " in rows[4]
    assert len({line.count("|") for line in rows}) == 1


def test_the_first_batch_is_not_counted_and_a_few_features_are_kept(graph, monkeypatch):
    network, sizes = inception.load_graph(graph), []

    def features(images):
        sizes.append(images.shape)
        return inception.Graph.features(network, images)

    monkeypatch.setattr(inception, "load_graph", lambda path, device: network)
    monkeypatch.setattr(network, "features", features, raising=False)
    args = extraction.parse_args(list(map(str, [*SMALL, "--batch-size", 5])))
    figures, (pool, spatial) = extraction.measure("torch", graph, args)
    assert sizes == [(5, 16, 16, 3)] * 3 and figures["seconds"] > 0
    assert len(pool) == len(spatial) == 4


def test_backends_run_in_turn_and_an_error_says_that_they_disagree(monkeypatch, capsys):
    started = []
    answers = {"tensorflow": np.ones((4, 9)), "torch": np.full((4, 9), 1.0001)}

    def alone(function, backend, *args):
        started.append(backend)
        return {"seconds": 1.0, "peak_bytes": 1, "version": "1"}, [np.ones((4, 3)), answers[backend]]

    monkeypatch.setattr(extraction, "alone", alone)
    args = extraction.parse_args(["--graph", "x.pb"])
    with pytest.raises(RuntimeError, match="tensorflow and torch are 1.0e-04 apart"):
        extraction.main(args)
    assert started == ["tensorflow", "torch"] * 3
    answers["torch"] = np.full((4, 9), np.nan)
    with pytest.raises(RuntimeError, match="are nan apart"):
        extraction.main(args)
    answers["torch"] = np.full((4, 9), 1.000001)
    assert extraction.measure_all(args, "x.pb")["distance"] == pytest.approx(1e-6, rel=1e-3)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--record", "r.txt"], ".json"),
        (["--batches", 0], "0"),
        (["--backends", "jax"], "jax"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags, words, capfd):
    assert_refused(call("extraction.py", *flags, capfd=capfd), words)


def test_a_file_that_is_no_graph_is_refused_in_one_line(tmp_path):
    (tmp_path / "page.pb").write_text("<html>Not found</html>")
    assert_refused(run(PROGRAM, "--graph", "page.pb", cwd=tmp_path), "page.pb is not a TensorFlow graph")
