import os

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from schedule import Schedule
from training.plots import ages, draw_plan, draw_scores, save_animation, save_heatmap, save_plans


def test_a_heatmap_shows_trained_steps_in_running_order_and_marks_reused_layers(tmp_path):
    scores = torch.linspace(0, 1, 7 * 3 * 2).reshape(7, 3, 2)
    image, crosses = draw_scores(Figure().subplots(), scores, 0.5)
    shown = np.asarray(image.get_array())
    assert np.array_equal(shown, scores[[4, 2, 0]].flatten(1))
    assert [text.get_text() for text in image.axes.get_yticklabels()] == ["4", "2", "0"]
    marked = {(int(row), int(column)) for column, row in crosses.get_offsets()}
    assert marked == {(row, column) for row in range(3) for column in range(6) if shown[row, column] <= 0.5}
    save_heatmap({"one": scores, "two": scores}, 0.5, tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").format == "PNG"


def test_an_animation_runs_from_the_first_frame_to_the_last_in_at_most_so_many(tmp_path):
    frames = [(f"update {k}", torch.full((4, 2, 2), k / 9)) for k in range(10)]
    for most, count in ((100, 10), (4, 4)):
        save_animation(frames, 0.1, tmp_path / "x.gif", most)
        with Image.open(tmp_path / "x.gif") as gif:
            assert gif.n_frames == count
            gif.seek(count - 1)
            colour = np.asarray(gif.convert("RGB"), float)[gif.height // 2 - 40, gif.width // 2 - 30]
            assert colour[0] > colour[2]  # the last frame: viridis ends with yellow


@pytest.mark.parametrize("name", [os.fsdecode(b"caf\xe9"), "\u8def\u7531", "a$_$b", "caf\xe9"])
def test_a_title_may_hold_any_characters(name, tmp_path, recwarn):
    scores = torch.rand(4, 2, 2)
    save_heatmap({name: scores}, 0.5, tmp_path / "x.png")
    save_animation([(name, scores)], 0.5, tmp_path / "x.gif")
    assert not recwarn.list


def test_a_plan_shows_the_age_of_each_output_and_marks_the_layers_that_run(tmp_path):
    compute = torch.zeros(5, 2, 2, dtype=torch.bool)
    compute[[4, 1]] = True
    compute[2, 0, 1] = True
    schedule = Schedule(compute, order=1)
    assert ages(schedule)[:, 0].tolist() == [[1, 1], [0, 0], [2, 0], [1, 1], [0, 0]]
    image, dots = draw_plan(Figure().subplots(), schedule, 2)
    shown = np.asarray(image.get_array())
    assert shown.tolist() == [[0] * 4, [1] * 4, [2, 0, 2, 2], [0] * 4, [1] * 4]  # step 4 runs first
    marked = {(int(row), int(column)) for column, row in dots.get_offsets()}
    assert marked == {(row, column) for row in range(5) for column in range(4) if shown[row, column] == 0}
    save_plans({"one": schedule, "two": schedule}, tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").format == "PNG"
