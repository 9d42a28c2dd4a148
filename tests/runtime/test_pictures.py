import numpy as np
import pytest
import torch
from PIL import Image

from runtime.pictures import psnr, save_picture


def test_psnr_of_a_known_error():
    a = torch.zeros(4, 4, dtype=torch.uint8)
    assert psnr(a, a + 1, 255) == pytest.approx(48.1308, abs=1e-3)  # 20 log10(255)
    assert psnr(a, a, 255) == float("inf")


def test_each_group_of_a_picture_starts_a_new_row(tmp_path):
    dark, grey = torch.zeros(3, 96, 96, 3, dtype=torch.uint8), torch.full((1, 96, 96, 3), 100, dtype=torch.uint8)
    save_picture([dark, grey], tmp_path / "x.png", columns=2)
    cells = np.asarray(Image.open(tmp_path / "x.png"))[50::98, 50::98, 0]
    assert cells.tolist() == [[0, 0], [0, 255], [100, 255]]
