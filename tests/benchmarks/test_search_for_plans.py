from benchmarks import plan_search


def test_the_search_is_measured_in_full_runs_and_a_record_makes_a_row(monkeypatch):
    monkeypatch.setattr(plan_search.common, "run_alone", lambda function, *args: function(*args))
    args = plan_search.parse_args(["--model", "DiT-S/8", "--num-sampling-steps", "3", "--device", "cpu"])
    figures = plan_search.measure(args)
    seconds, memory = figures["seconds"], figures["memory_bytes"]
    assert figures["seconds_a_step_and_sample"] * 3 == seconds["table"] > 0
    assert figures["full_runs_a_sample"] == seconds["table"] / seconds["full"]
    assert 0 < memory["base"] <= memory["sampling"] <= memory["peak"]
    assert figures["outputs_bytes_a_sample"] == 3 * 24 * 2 * 16 * 384 * 4  # steps, layers, rows, tokens, width, float32
    (row,) = plan_search.rows({"flags": vars(args), "device": "a CPU"} | figures)
    assert row["model, steps, samples, device"] == "DiT-S/8, 3, 1, a CPU"
