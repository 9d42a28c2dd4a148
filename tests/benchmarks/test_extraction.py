"""The benchmark of the two backends, with a narrow network."""

import json

import numpy as np
import pytest
import torch
from backends import needs_tensorflow
from conftest import run

from benchmarks import common, extraction
from benchmarks.inception_graph import inception_v3


@pytest.mark.slow
@needs_tensorflow
def test_a_record_holds_what_was_measured(tmp_path):
    graph = inception_v3(tmp_path / "narrow.pb", narrower=16)
    flags = ["--image-size", 16, "--batch-size", 3, "--batches", 2, "--device", "cpu", "--graph", graph]
    result = run("benchmarks/extraction.py", *flags, "--repeats", 1, "--record", "r.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "r.json").read_text())
    assert list(saved["measurements"]) == ["tensorflow", "torch"]
    for (figures,) in saved["measurements"].values():
        assert figures["seconds"] > 0 and 1e8 < figures["peak_bytes"] < 1e10
    assert saved["measurements"]["torch"][0]["version"] == saved["torch"] == torch.__version__
    assert 0 < saved["distance"] < 1e-5
    assert "| narrow.pb | 16 | 3 |" in result.stdout


@pytest.mark.parametrize("value, agree", [(1.000001, True), (1.0001, False), (np.nan, False)])
def test_backends_run_in_turn_and_must_agree(value, agree, tmp_path, monkeypatch, capsys):
    launched = []
    features = {"tensorflow": np.ones((4, 9)), "torch": np.full((4, 9), value)}

    def run_alone(function, backend, *args):
        launched.append(backend)
        seconds = len(launched) * (2 if backend == "tensorflow" else 1)  # 2, 2, 6, 4, 10, 6
        return {"seconds": seconds, "peak_bytes": 5e6, "version": "1"}, [np.ones((4, 3)), features[backend]]

    monkeypatch.setattr(common, "run_alone", run_alone)
    args = extraction.parse_args(["--graph", "x.pb", "--device", "cpu", "--record", str(tmp_path / "r.json")])
    if agree:
        extraction.main(args)
        assert json.loads((tmp_path / "r.json").read_text())["distance"] == pytest.approx(1e-6, rel=1e-3)
        # The median of 2/2, 6/4 and 10/6; 256 images in the median of 2, 4 and 6 seconds.
        assert "| PyTorch 1 | x.pb | 256 | 64 | 64 | 1.500 | 5 |" in capsys.readouterr().out
    else:
        with pytest.raises(RuntimeError, match="apart"):
            extraction.main(args)
        assert not (tmp_path / "r.json").exists()
    assert launched == ["tensorflow", "torch"] * 3
