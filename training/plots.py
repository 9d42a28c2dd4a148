"""Plots of a router's scores, of their training, and of any plan."""

import torch

from router import Router
from runtime.files import atomic_write


def draw_scores(axis, scores, threshold):
    """Draw scores [steps, depth, 2] on a matplotlib axis: trained steps in the order they run, layers across.

    A cross marks each layer that is reused at `threshold`. Returns the image and the crosses, for `_update`.
    """
    steps, depth, _ = scores.shape
    rows = list(reversed(Router.trained_steps(steps)))
    image = axis.imshow(
        scores[rows].flatten(1).numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest"
    )
    crosses = axis.scatter([], [], marker="x", s=9, c="white", linewidths=0.7)
    axis.set_yticks(range(len(rows)), rows, fontsize=7)
    axis.set_xticks(range(0, 2 * depth, 2), range(depth), fontsize=7 if depth > 16 else None)
    axis.set(xlabel="block (attention, MLP)", ylabel="step i; the odd ones run in full")
    _update(image, crosses, scores, threshold)
    return image, crosses


def _update(image, crosses, scores, threshold):
    shown = scores[list(reversed(Router.trained_steps(len(scores))))].flatten(1)
    image.set_data(shown.numpy())
    crosses.set_offsets((shown <= threshold).nonzero().flip(1).numpy())


def _new_figure(count=1):
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(1 + 5 * count, 5), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.subplots(1, count, squeeze=False)[0]


def _set_title(axis, text):
    """Set a title that may hold the name of a folder: any characters, of which the font has few, and no mathematics."""
    axis.set_title(text.encode("latin-1", "backslashreplace").decode("latin-1"), parse_math=False)


def save_heatmap(named_scores, threshold, path):
    """Write a PNG of `named_scores`, a dict of title: scores [steps, depth, 2], side by side."""
    figure, axes = _new_figure(len(named_scores))
    for axis, (title, scores) in zip(axes, named_scores.items()):
        image, _ = draw_scores(axis, scores, threshold)
        _set_title(axis, title)
    figure.colorbar(image, ax=list(axes), label=f"score; x: reused at threshold {threshold:g}")
    with atomic_write(path) as part:
        figure.savefig(part, format="png", metadata={"Software": None})


def ages(schedule):
    """Return int [steps, depth, 2]: steps since the layer last ran, 0 if it runs."""
    rows, age = [], torch.zeros(schedule.depth, 2, dtype=torch.long)
    for compute in reversed(schedule.compute):
        age = torch.where(compute, 0, age + 1)
        rows.insert(0, age)
    return torch.stack(rows)


def draw_plan(axis, schedule, oldest):
    """Draw a `Schedule` on a matplotlib axis: steps in the order they run, layers across, darker the older the output.

    A dot marks each layer that runs. oldest: the age of the darkest shade. Returns the image and the dots.
    """
    shown = ages(schedule).flatten(1).flip(0)
    image = axis.imshow(shown.numpy(), vmin=0, vmax=oldest, cmap="Blues", aspect="auto", interpolation="nearest")
    row, column = (shown == 0).nonzero(as_tuple=True)
    dots = axis.scatter(column.numpy(), row.numpy(), marker=".", s=6, c="black", linewidths=0)
    steps = range(0, schedule.steps, max(1, schedule.steps // 10))
    axis.set_yticks(list(steps), [schedule.steps - 1 - e for e in steps], fontsize=7)
    axis.set_xticks(range(0, 2 * schedule.depth, 2), range(schedule.depth), fontsize=7 if schedule.depth > 16 else None)
    axis.set(xlabel="block (attention, MLP)", ylabel="step i")
    return image, dots


def save_plans(named_schedules, path):
    """Write a PNG of `named_schedules`, a dict of title: `Schedule`, side by side."""
    oldest = max(1, *(int(ages(schedule).max()) for schedule in named_schedules.values()))
    figure, axes = _new_figure(len(named_schedules))
    for axis, (title, schedule) in zip(axes, named_schedules.items()):
        image, _ = draw_plan(axis, schedule, oldest)
        _set_title(axis, title)
    figure.colorbar(image, ax=list(axes), label="steps since the layer ran; a dot: it runs")
    with atomic_write(path) as part:
        figure.savefig(part, format="png", metadata={"Software": None})


def save_animation(frames, threshold, path, most=100):
    """Write a GIF of `frames`, pairs of a title and scores [steps, depth, 2]: at most `most`, evenly chosen.

    It runs for 8 s, holds the last frame, and starts again.
    """
    import numpy as np
    from PIL import Image

    frames = list(frames)
    if len(frames) > most:
        frames = [frames[round(k * (len(frames) - 1) / (most - 1))] for k in range(most)]
    figure, (axis,) = _new_figure()
    figure.set_dpi(80)
    image, crosses = draw_scores(axis, frames[0][1], threshold)
    figure.colorbar(image, ax=axis, label=f"score; x: reused at threshold {threshold:g}")
    _set_title(axis, frames[0][0])
    for _ in range(2):  # the second drawing settles the layout, which then stays the same for all frames
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    pictures = []
    for title, scores in frames:
        _set_title(axis, title)
        _update(image, crosses, scores, threshold)
        figure.canvas.draw()
        pixels = Image.fromarray(np.asarray(figure.canvas.buffer_rgba()))
        pictures.append(pixels.convert("RGB").quantize(64, dither=Image.Dither.NONE))
    durations = [max(20, 8000 // len(pictures))] * (len(pictures) - 1) + [3000]
    with atomic_write(path) as part:
        pictures[0].save(
            part, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=True
        )
