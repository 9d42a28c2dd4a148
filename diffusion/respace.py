"""Noise schedules and the choice of the steps that a sampler runs."""

import numpy as np


def linear_betas(steps: int) -> np.ndarray:
    """Linear betas, float64 (steps,): 1e-4 to 0.02 for 1000 steps, scaled so that other counts end equally noisy.

    Source: Ho et al. 2020, sec. 4.
    """
    scale = 1000 / steps
    return np.linspace(scale * 1e-4, scale * 0.02, steps)


def space_timesteps(num_timesteps: int, sections: int | str | None) -> np.ndarray:
    """The sorted timesteps of the original process that the respaced one keeps, int64 (n,).

    sections: an int or a decimal string n: n steps with the fractional stride (T-1)/(n-1);
              "a,b,c": equal sections of the process, with a, b, c steps spread over them;
              "ddimN": N steps with an integer stride (Song et al. 2021); "" or None: every step.
    Raises ValueError if a section has too few steps, or the text is none of these.
    Source: Nichol and Dhariwal 2021, sec. 4.
    """
    if sections in ("", None):
        return np.arange(num_timesteps)
    text = str(sections)
    if text.startswith("ddim"):
        return _integer_stride(num_timesteps, _count(text[len("ddim") :], sections))
    counts = [_count(part, sections) for part in text.split(",")]
    size, extra = divmod(num_timesteps, len(counts))
    kept, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if count > length:
            raise ValueError(f"{count} sampling steps asked of {length}: at most {length} exist")
        position, stride = 0.0, (length - 1) / (count - 1) if count > 1 else 1.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride  # added up, not multiplied: the rounding of the published timesteps
        start += length
    return np.array(kept)


def _integer_stride(num_timesteps: int, count: int) -> np.ndarray:
    for stride in range(1, num_timesteps + 1):
        kept = np.arange(0, num_timesteps, stride)
        if len(kept) == count:
            return kept
    raise ValueError(f"no integer stride takes exactly {count} of {num_timesteps} steps: pass {count} without 'ddim'")


def _count(text: str, sections: int | str | None) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"steps {sections!r}: expected a positive count such as 20, sections such as 10,10, or ddim20")
    return int(text)
