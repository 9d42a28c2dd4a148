import importlib
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from conftest import DATA
from PIL import Image

from runtime import pictures
from runtime.errors import UserError
from runtime.pictures import find_pictures, load_image, picture_format, psnr, save_picture


def test_psnr_of_a_known_error():
    a = torch.zeros(4, 4, dtype=torch.uint8)
    assert psnr(a, a + 1, 255) == pytest.approx(48.1308, abs=1e-3)  # 20 log10(255)
    assert psnr(a, a, 255) == float("inf")


def test_each_group_of_a_picture_starts_a_new_row(tmp_path):
    dark, grey = torch.zeros(3, 96, 96, 3, dtype=torch.uint8), torch.full((1, 96, 96, 3), 100, dtype=torch.uint8)
    save_picture([dark, grey], tmp_path / "x.png", columns=2)
    cells = np.asarray(Image.open(tmp_path / "x.png"))[50::98, 50::98, 0]
    assert cells.tolist() == [[0, 0], [0, 255], [100, 255]]


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def grey(values, mode=None):
    return Image.fromarray(values, mode)


def sixteen_bits(path):
    """Write a PNG of three channels with 16 bits each, which Pillow only reads."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + np.repeat(row * 257, 3).astype(">u2").tobytes() for row in RAMP.astype(int))
    header, content = (
        chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)),
        chunk(b"IDAT", zlib.compress(rows)),
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + content + chunk(b"IEND", b""))


def test_a_ramp_of_any_mode_depth_and_format_is_the_same_ramp(tmp_path):
    wide, turned = RAMP.astype(np.int32), Image.Exif()
    turned[0x112] = 6
    rgb, inverse = np.dstack([RAMP] * 3), grey(255 - RAMP)
    several = {"save_all": True, "append_images": [inverse]}
    written = {
        "16-bit.png": (grey((wide * 257).astype(np.uint16)), {}),
        "16-bit.tif": (grey((wide * 257).astype("<u2")), {}),
        "16-bit-big-endian.tif": (grey((wide * 257).astype(">u2")), {}),
        "16-bit.jp2": (grey((wide * 257).astype(np.uint16)), {}),
        "16-bit.pgm": (grey((wide * 257).astype(np.uint16)), {}),
        "16-in-32-bit.tif": (grey(wide * 257), {}),
        "8-in-32-bit.tif": (grey(wide), {}),
        "float-to-1.tif": (grey((wide / 255).astype(np.float32)), {}),
        "float-to-1.pfm": (grey((wide / 255).astype(np.float32)), {}),
        "float-to-255.tif": (grey(wide.astype(np.float32)), {}),
        "grey-alpha.png": (grey(np.dstack([RAMP, RAMP]), "LA"), {}),
        "alpha.webp": (grey(np.dstack([RAMP] * 4)), {"lossless": True, "exact": True}),
        "palette.png": (grey(RAMP).convert("P"), {"transparency": bytes(range(256))}),
        "transparent-grey.png": (grey(RAMP), {"transparency": 7}),
        "transparent.png": (grey(rgb), {"transparency": (7, 7, 7)}),
        "cmyk.tif": (grey(np.dstack([255 - rgb, 0 * RAMP]), "CMYK"), {}),
        "turned.png": (grey(RAMP), {"exif": turned}),
        "animated.gif": (grey(RAMP), several),
        "animated.png": (grey(RAMP), several),
        "animated.webp": (grey(rgb), several | {"lossless": True}),
        "pages.tif": (grey(RAMP), several),
    } | {f"rgb.{ending}": (grey(rgb), {}) for ending in "bmp dds dib gif ico jp2 pcx ppm qoi sgi tga tiff".split()}
    for name, (image, settings) in written.items():
        image.save(tmp_path / name, **settings)
    sixteen_bits(tmp_path / "rgb-16-bit.png")
    for name in (*written, "rgb-16-bit.png"):
        loaded = load_image(tmp_path / name)
        assert loaded.mode == "RGB" and np.array_equal(np.asarray(loaded), rgb), name
    grey(RAMP > 100).save(tmp_path / "1-bit.png")
    assert np.array_equal(np.asarray(load_image(tmp_path / "1-bit.png"))[..., 0], (RAMP > 100) * 255)


def test_values_of_an_unknown_range_are_refused(tmp_path):
    wide = RAMP.astype(np.float32)
    wrong = [wide / 127.5 - 1, wide * 257, wide / 200, np.where(wide, wide, np.nan), RAMP.astype(np.int32) - 5]
    for values in (*wrong, RAMP.astype(np.int32) << 23):
        grey(values).save(tmp_path / "x.tif")
        with pytest.raises(ValueError, match=r"x.tif: its values are .* not 0 to"):
            load_image(tmp_path / "x.tif")


@pytest.mark.parametrize(
    "kind",
    [OSError, SyntaxError, ValueError, RuntimeError, NotImplementedError, MemoryError, EOFError, IndexError, KeyError]
    + [TypeError, OverflowError, AttributeError, struct.error, zlib.error, Image.DecompressionBombError],
)
def test_whatever_a_decoder_raises_names_the_picture(kind, tmp_path, monkeypatch):
    def fail(self):
        raise kind("text")

    grey(RAMP).save(tmp_path / "x.bmp")
    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(ValueError, match="x.bmp: .*(text|memory)"):
        load_image(tmp_path / "x.bmp")


def test_too_little_memory_for_any_picture_is_no_fault_of_one(tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    monkeypatch.setattr(pictures, "bytearray", fail, raising=False)
    with pytest.raises(MemoryError):
        load_image(tmp_path / "x.png")


def test_damaged_and_enormous_pictures_are_refused_and_large_ones_loaded_without_a_warning(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="damaged.avif: "):
        load_image(DATA / "damaged.avif")
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="bomb.png: .*400000000 pixels"):
        load_image(tmp_path / "bomb.png")
    grey(RAMP).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        importlib.reload(pictures)  # pytest forgets its filter
        assert np.array_equal(np.asarray(load_image(tmp_path / "large.png"))[..., 0], RAMP)
    assert not warned


def test_pictures_are_found_as_a_user_counts_them(tmp_path):
    folder, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    for path in ("a.png", "b.PNG", "c.Jpeg", "sub/d.webp", "sub/deeper/e.tif"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    elsewhere.mkdir()
    (elsewhere / "f.gif").touch()
    (folder / "linked").symlink_to("../elsewhere")
    (folder / "g.png").symlink_to("../elsewhere/f.gif")
    (folder / "gone.png").symlink_to("nowhere")  # to be named when it is read
    seen = ["a.png", "b.PNG", "c.Jpeg", "g.png", "gone.png", "linked/f.gif", "sub/d.webp", "sub/deeper/e.tif"]
    found, left_out = find_pictures(folder)
    assert sorted(found) == [str(folder / name) for name in seen] and left_out == ""

    (folder / ".DS_Store").touch()
    assert find_pictures(folder)[1] == ""
    for path in ("._a.png", ".ipynb_checkpoints/a.png", "sub/labels.json", "z.txt"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).touch()
    (folder / "sub" / "loop").symlink_to("..")
    (elsewhere / "back").symlink_to(folder)
    (folder / "root").symlink_to("/")
    (folder / "itself").symlink_to("itself")
    again, left_out = find_pictures(folder)
    assert sorted(again) == sorted(found) and left_out == (
        f"{folder}: left out hidden entries: 2, the first is ._a.png; "
        "other files: 3, the first is itself; links to a folder around them: 3, the first is linked/back"
    )


def test_formats_that_cannot_hold_a_picture_are_refused_before_there_is_one(tmp_path):
    image = torch.randint(0, 256, (1, 96, 96, 3), dtype=torch.uint8)
    for name in ("x.png", "x.PNG", "x.JPG", "x.webp", "x.bmp", "x.tiff", "x.gif", "x.pdf"):
        assert picture_format(tmp_path / name)
        save_picture([image], tmp_path / name, 1)
        assert (tmp_path / name).stat().st_size > 500
    # Without an ending, not for pictures, without a writer, not for colours, icons, read only.
    for name in (
        "x",
        "x.txt",
        "x.h5",
        "x.grib",
        "x.wmf",
        "x.xbm",
        "x.msp",
        "x.palm",
        "x.blp",
        "x.ico",
        "x.icns",
        "x.psd",
    ):
        with pytest.raises(UserError, match=f"{name} does not end in a picture format"):
            picture_format(tmp_path / name)


def test_a_picture_too_large_for_its_format_is_refused_in_one_line(tmp_path):
    images = torch.zeros(200, 96, 96, 3, dtype=torch.uint8)  # 19,602 pixels high
    with pytest.raises(UserError, match="WEBP cannot hold 100x19602 pixels .*: use .png"):
        save_picture([images], tmp_path / "x.webp", 1)
    save_picture([images], tmp_path / "x.png", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
