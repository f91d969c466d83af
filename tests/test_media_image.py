# SPDX-License-Identifier: Apache-2.0
"""Pictures: sizes, pixels and positions of transformers' processor, odd and refused files."""

from __future__ import annotations

import ast
import inspect
import io
import math
import struct
import zlib
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from media_files import encoded, picture

from gemma4.errors import FormatError
from gemma4.media import image
from gemma4.media.image import BUDGETS, load_image, preprocess, preprocess_unified, target_size
from gemma4.media.video import load_video

Image = pytest.importorskip("PIL.Image")

SIZES = [
    (1, 1), (1, 4000), (4000, 1), (3, 3000), (48, 48), (100, 100), (480, 640), (640, 480), (33, 57), (768, 768),
    (1000, 1500), (97, 1003), (572, 1024), (2000, 31),
]  # fmt: skip


def oracle(pixels, image_tokens: int) -> dict[str, np.ndarray]:
    """What transformers' Pillow processor makes of an image, padding cut off."""
    module = pytest.importorskip("transformers.models.gemma4.image_processing_pil_gemma4")
    out = module.Gemma4ImageProcessorPil(max_soft_tokens=image_tokens)(pixels, return_tensors="np")
    n = int(out["num_soft_tokens_per_image"][0])
    assert (out["image_position_ids"][0, 9 * n :] == -1).all()
    return {"patches": out["pixel_values"][0, : 9 * n], "positions": out["image_position_ids"][0, : 9 * n], "n": n}


# -- against transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_tokens", BUDGETS)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_patches_are_transformers(size, image_tokens):
    pixels = picture(*size)
    expected, ours = oracle(Image.fromarray(pixels), image_tokens), preprocess(pixels, image_tokens)
    assert ours.n_soft_tokens == expected["n"] == math.prod(ours.grid) <= image_tokens
    assert ours.patches.dtype == np.float32 and ours.positions.dtype == np.int32
    assert np.array_equal(ours.patches, expected["patches"])
    assert np.array_equal(ours.positions, expected["positions"])
    assert ours.source_size == size


def test_sizes_are_transformers():
    module = pytest.importorskip("transformers.models.gemma4.image_processing_pil_gemma4")
    rng = np.random.default_rng(0)
    for height, width in np.exp(rng.uniform(0, np.log(9000), (3000, 2))).astype(int).tolist():
        for tokens in BUDGETS:
            expected = module.get_aspect_ratio_preserving_size(height, width, 16, tokens * 9, 3)
            assert target_size(height, width, tokens) == expected, (height, width, tokens)


@pytest.mark.parametrize(
    ("size", "tokens", "n"), [((480, 640), 280, 266), ((100, 100), 280, 256), ((1, 4000), 70, 70), ((1, 40), 280, 210)]
)
def test_known_token_counts(size, tokens, n):
    assert preprocess(picture(*size), tokens).n_soft_tokens == n


def reference_merge():
    """patches_merge of the unified processor. Its module needs torchvision; the function only torch."""
    torch = pytest.importorskip("torch")
    pil = pytest.importorskip("transformers.models.gemma4.image_processing_pil_gemma4")
    file = Path(inspect.getfile(pil)).parents[1] / "gemma4_unified" / "image_processing_gemma4_unified.py"
    nodes = [node for node in ast.parse(file.read_text()).body if getattr(node, "name", "") == "patches_merge"]
    scope = {"torch": torch, "math": math}
    exec(compile(ast.Module(nodes, []), str(file), "exec"), scope)
    return torch, scope["patches_merge"]


@pytest.mark.parametrize("size", [(480, 640), (1, 4000), (4000, 1), (211, 97)])
def test_unified_patches_are_transformers(size):
    torch, merge = reference_merge()
    expected = oracle(Image.fromarray(picture(*size)), 140)
    patches, positions = (torch.from_numpy(expected[key])[None] for key in ("patches", "positions"))
    patches, positions = merge(patches, positions, expected["n"])
    ours = preprocess_unified(picture(*size), 140)
    assert ours.n_soft_tokens == len(ours.patches) == expected["n"]
    assert np.array_equal(ours.patches, patches[0].numpy())
    assert np.array_equal(ours.positions, positions[0].numpy())


def modes() -> dict:
    rgb = Image.fromarray(picture(90, 120))
    rgba = Image.fromarray(picture(90, 120, channels=4), "RGBA")
    palette = rgb.quantize(17)
    see_through = palette.copy()
    see_through.info["transparency"] = 3
    return {
        "RGB": rgb, "L": rgb.convert("L"), "1": rgb.convert("1"), "CMYK": rgb.convert("CMYK"), "P": palette,
        "P+alpha": see_through, "RGBA": rgba, "LA": rgba.convert("LA"), "YCbCr": rgb.convert("YCbCr"),
        "LAB": rgb.convert("LAB"), "HSV": rgb.convert("HSV"),
    }  # fmt: skip


@pytest.mark.parametrize("mode", modes())
def test_colour_modes_are_transformers(mode):
    made = modes()[mode]
    assert np.array_equal(preprocess(made, 70).patches, oracle(made, 70)["patches"])


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "mode"),
    [("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "LA"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L"),
     ("WEBP", "RGBA"), ("BMP", "RGB"), ("TIFF", "CMYK"), ("GIF", "P"), ("PPM", "RGB")],
)  # fmt: skip
def test_files_bytes_and_objects_agree(tmp_path, form, mode):
    data = encoded(modes()[mode], form)
    path = tmp_path / "picture.bin"  # the content decides, not the name
    path.write_bytes(data)
    from_path = preprocess(path, 70)
    with Image.open(path) as opened:
        assert np.array_equal(from_path.patches, oracle(opened, 70)["patches"])
    for other in (str(path), data, bytearray(data)):
        assert np.array_equal(preprocess(other, 70).patches, from_path.patches)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = picture(60, 90)
    flips = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    stored = flips.get(orientation, lambda a: a)(upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert np.array_equal(load_image(data), upright)
    assert preprocess(data, 70).source_size == (60, 90)


def test_sixteen_bits_keep_their_range():
    grey = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    for made in (encoded(Image.fromarray(grey), "PNG"), encoded(Image.fromarray(grey), "TIFF"), Image.fromarray(grey)):
        assert np.array_equal(load_image(made)[:, :, 1], (grey >> 8).astype(np.uint8))
    assert np.array_equal(load_image(grey)[:, :, 2], (grey >> 8).astype(np.uint8))


def tiff(values: np.ndarray) -> bytes:
    """A TIFF file of one channel of 32 bits, uint32 or int32 [height, width], as its SampleFormat says."""
    height, width = values.shape
    data, sample_format = values.tobytes(), 1 if values.dtype.kind == "u" else 2
    tags = {256: width, 257: height, 258: 32, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in (tags | {339: sample_format}).items()]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


RAMP = np.arange(64 * 64).reshape(64, 64) % 256
WIDE = {
    "8 bits in 32": Image.fromarray(RAMP.astype(np.int32)),
    "16 bits in 32": Image.fromarray((RAMP * 256 + 255 - RAMP).astype(np.int32)),
    "31 bits": Image.fromarray((RAMP << 23).astype(np.int32)),
    "8 bits in 32, TIFF": tiff(RAMP.astype(np.int32)),
    "31 bits, TIFF": tiff((RAMP << 23).astype(np.int32)),
    "32 bits, TIFF": tiff((RAMP << 24).astype(np.uint32)),
    "8 bits in 32 unsigned, TIFF": tiff(RAMP.astype(np.uint32)),
    "floats to 1": Image.fromarray((RAMP / 255).astype(np.float32)),
    "floats to 255": Image.fromarray(RAMP.astype(np.float32)),
    "floats to 65535": Image.fromarray((RAMP * 257).astype(np.float32)),
    "floats to 1, TIFF": encoded(Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF"),
    "floats to 1, PFM": b"Pf\n64 64\n-1.0\n" + (RAMP[::-1] / 255).astype("<f4").tobytes(),
    "10 bits, PGM": b"P5 64 64 1023\n" + (RAMP * 1023 // 255).astype(">u2").tobytes(),
    "16 bits, big-endian": Image.frombytes("I;16B", (64, 64), (RAMP * 257).astype(">u2").tobytes()),
}


@pytest.mark.parametrize("name", WIDE)
def test_wide_pixels_keep_their_range(name):
    found = load_image(WIDE[name])
    assert found.shape == (64, 64, 3) and (found == found[:, :, :1]).all()
    assert np.abs(found[:, :, 0].astype(int) - RAMP).max() <= (2 if "10 bits" in name else 0)


def test_bytes_in_uint16_are_no_black_picture():
    """Full scale is 65535, so all of it would be 0; a video may have such frames."""
    for dtype in (np.uint16, ">u2"):
        pixels = np.full((48, 48, 3), 200, dtype)
        with pytest.raises(ValueError, match="a uint16 image of values up to 200 is black"):
            load_image(pixels)
        assert load_image(pixels * 256).min() == load_image(pixels * 256).max() == 200
        assert not load_video(np.stack([pixels, pixels * 0])).frames[0].any()


def test_black_stays_black():
    for dtype in (np.int32, np.float32, np.uint16):
        assert not load_image(Image.fromarray(np.zeros((40, 50), dtype))).any()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.full((9, 9), -1, np.int32), "from -1 to -1"),
        (np.full((9, 9), 1 << 20, np.int32), "to 1048576"),
        (np.full((9, 9), np.nan, np.float32), "from nan to nan"),
        (np.full((9, 9), 1e6, np.float32), "to 1000000"),
    ],
)
def test_wide_pixels_of_no_known_range_are_refused(values, words):
    with pytest.raises(FormatError, match=rf"pixels of mode [IF] .*{words}"):
        load_image(Image.fromarray(values))


def test_rgb_of_16_bits():
    """Pillow reads them to their upper 8."""
    rows = np.zeros((64, 1 + 64 * 6), np.uint8)
    rows[:, 1:] = np.repeat(RAMP * 257, 3).astype(">u2").view(np.uint8).reshape(64, -1)
    data = png(struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0), zlib.compress(rows.tobytes()))
    assert np.array_equal(load_image(data), np.repeat(RAMP[:, :, None], 3, axis=2))


def test_premultiplied_alpha():
    rgba = modes()["RGBA"]
    assert np.abs(load_image(rgba.convert("RGBa")).astype(int) - load_image(rgba)).max() <= 8


# -- HEIC ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_heic(orientation):
    heif = pytest.importorskip("pillow_heif")
    upright = np.zeros((64, 96, 3), np.uint8)
    upright[:20, :30] = 250
    stored = {1: upright, 3: upright[::-1, ::-1], 6: np.rot90(upright, 1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    heif.from_pillow(Image.fromarray(np.ascontiguousarray(stored))).save(buffer, quality=95, exif=exif.tobytes())
    found = load_image(buffer.getvalue())
    assert found.shape == (64, 96, 3) and found[:15, :25].min() > 200 and found[30:].max() < 60
    damaged = buffer.getvalue()[:-300]
    with pytest.raises(FormatError, match=r"not an image|damaged"):
        load_image(damaged)


HEIC_HEAD = struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(100)


def test_heic_without_its_package(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImportError, match=r'pillow-heif.*pip install "gemma4\[heic\]"'):
        load_image(HEIC_HEAD)


def test_heic_is_measured_before_it_is_decoded(monkeypatch):
    import sys

    made = SimpleNamespace(size=(20_000, 20_000), to_pillow=None)
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(open_heif=lambda file: made))
    with pytest.raises(FormatError, match="400 megapixels"):
        load_image(HEIC_HEAD)
    made.size, made.to_pillow = (30, 20), lambda: Image.new("RGB", (30, 20), (9, 8, 7))
    assert load_image(HEIC_HEAD)[0, 0].tolist() == [9, 8, 7]


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (50, 40), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for form in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        assert np.abs(load_image(data).astype(int) - [255, 0, 0]).max() <= 2, form


def test_arrays():
    pixels = picture(30, 40, channels=4)
    assert np.array_equal(load_image(pixels[:, :, :3] / np.float32(255)), pixels[:, :, :3])
    assert np.array_equal(load_image(pixels[:, :, 0]), load_image(np.repeat(pixels[:, :, :1], 3, axis=2)))
    over_white = load_image(Image.fromarray(pixels, "RGBA"))
    assert np.abs(load_image(pixels).astype(int) - over_white).max() <= 1
    clear = pixels.copy()
    clear[:, :, 3] = 0
    assert (load_image(clear) == 255).all()


def test_boxes_tile_the_picture():
    patches = preprocess(picture(480, 640), 280)
    boxes = patches.boxes()
    assert boxes.shape == (patches.n_soft_tokens, 4)
    assert boxes[0, :2].tolist() == [0, 0] and boxes[-1, 2:].tolist() == [480, 640]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert areas.sum() == pytest.approx(480 * 640, rel=1e-5)
    # the square that holds patch (x, y) is soft token (y // 3) * columns + x // 3
    x, y = patches.positions[1234]
    token = y // 3 * patches.grid[1] + x // 3
    top, left, bottom, right = boxes[token] / np.tile([480 / 42, 640 / 57], 2)
    assert top - 1e-3 <= y <= bottom and left - 1e-3 <= x <= right


# -- refused ---------------------------------------------------------------------------------------------------------


def png(header: bytes, body: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def png_header(width: int, height: int) -> bytes:
    """A PNG that says this size and holds a few bytes."""
    return png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), zlib.compress(bytes(100)))


def icon(picture: bytes) -> bytes:
    """An ICO file whose directory says 256 x 256."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(picture), 22) + picture


@lru_cache
def bad_files() -> dict[str, tuple[bytes, str]]:
    jpeg = encoded(Image.fromarray(picture(200, 300)), "JPEG")
    png = encoded(Image.fromarray(picture(200, 300)), "PNG")
    bomb = encoded(Image.new("RGB", (8000, 5000)), "PNG", compress_level=1)
    return {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated.png": (png[: len(png) // 2], "truncated|damaged"),
        "header only.jpg": (jpeg[:30], "damaged|not an image"),
        "flipped.png": (png[:60] + bytes(50) + png[110:], "damaged|not an image"),
        "empty.png": (b"", "empty"),
        "text.png": (b"This is not a picture at all.\n" * 20, "not an image"),
        "bomb.png": (bomb, "40 megapixels.*bomb"),
        "huge.png": (png_header(60000, 60000), "megapixels|pixels"),
        "wide.png": (png_header(15000, 10000), "150 megapixels"),
        "bitmap.ico": (icon(struct.pack("<Iii", 40, 20_000, 20_000) + bytes(100)), "200 megapixels"),
        "icon.ico": (
            struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, 200, 22) + png_header(12000, 12000),
            "144 mega",
        ),
        "postscript.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n", "not an image"),
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", bad_files())
def test_bad_files_are_refused_by_name(tmp_path, name):
    data, words = bad_files()[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(FormatError, match=words) as info:
        preprocess(path)
    assert name in str(info.value) and "0x" not in str(info.value)
    with pytest.raises(FormatError, match=words):
        preprocess(data)


def test_large_photographs_are_not_bombs(monkeypatch):
    monkeypatch.setattr(image, "FREE_PIXELS", 200 * 300 - 1)
    assert load_image(encoded(Image.fromarray(picture(200, 300)), "JPEG")).shape == (200, 300, 3)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("https://example.org/a.png", "nothing is fetched"),
        ("data:image/png;base64,AAAA", "nothing is fetched"),
        (np.zeros((3, 20, 30), np.uint8), r"\(3, 20, 30\)"),
        (np.zeros((0, 20, 3), np.uint8), r"\(0, 20, 3\)"),
        (np.zeros((20, 30, 3), np.int64), "int64"),
        (np.full((20, 30, 3), 1.5), r"0\.\.1"),
        (np.full((20, 30, 3), np.nan), "nan"),
        (42, "int"),
    ],
    ids=lambda v: str(v)[:20] if isinstance(v, str) else "",
)
def test_bad_values_are_refused(value, words):
    with pytest.raises(ValueError, match=words):
        preprocess(value)


def test_missing_file_and_budget(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        preprocess(tmp_path / "nowhere.png")
    with pytest.raises(IsADirectoryError):
        preprocess(tmp_path)
    with pytest.raises(ValueError, match="70, 140, 280, 560, 1120, got 300"):
        preprocess(picture(20, 20), 300)


def test_missing_pillow_names_the_extra(monkeypatch):
    import sys

    for name in [name for name in sys.modules if name == "PIL" or name.startswith("PIL.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'pip install "gemma4\[media\]"'):
        preprocess(b"x")
