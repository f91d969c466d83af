# SPDX-License-Identifier: Apache-2.0
"""Pictures to patches, pixel for pixel as in transformers' Pillow processor.

A picture is resized (bicubic, antialiased, on bytes; small ones are enlarged) to the largest multiple of 48 pixels a
side that keeps its shape and uses no more than the budget of soft tokens, 48 x 48 pixels each. The towers read
16 x 16 patches and pool 3 x 3 of them; the unified model reads 48 x 48 patches.

Ref: transformers models/gemma4/image_processing_pil_gemma4.py, models/gemma4_unified/image_processing_gemma4_unified.py
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemma4.errors import FormatError
from gemma4.media.source import FileLike, is_file, name_of, open_source, reason, require

if TYPE_CHECKING:
    from PIL import Image

BUDGETS = (70, 140, 280, 560, 1120)  # soft tokens per picture that the models were trained with
PATCH, POOL = 16, 3
SIDE = PATCH * POOL  # pixels of a soft token's square

# Decoding takes 4 bytes a pixel. Photographs of 50 megapixels are common and have 0.1 to 0.5 bytes per pixel; a file
# made to exhaust memory has a thousandth.
MAX_PIXELS, FREE_PIXELS, MIN_BYTES_PER_PIXEL = 100_000_000, 32_000_000, 1 / 64
# ISO files whose pictures are HEVC; "mif1" and "msf1" mark a picture and a sequence of any coding
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_PREMULTIPLIED = {"RGBa": "RGBA", "La": "LA"}
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")  # no EPS: runs a program

ImageLike: TypeAlias = "str | os.PathLike[str] | bytes | NDArray[np.generic] | Image.Image"
U8: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class ImagePatches:
    """A vision encoder's input for one picture.

    patches:      float32 [n, 768] in 0..1, row after row; each is (row, column, channel) of its 16 x 16 pixels.
                  For the unified model [n, 6912] of 48 x 48 pixels.
    positions:    int32 [n, 2]: x (column), y (row) of each patch
    n_soft_tokens: positions it takes in the text; row after row of the grid of 48 x 48 squares
    grid:         rows and columns of soft tokens
    source_size:  height, width of the original picture (upright)
    """

    patches: NDArray[np.float32]
    positions: NDArray[np.int32]
    n_soft_tokens: int
    grid: tuple[int, int]
    source_size: tuple[int, int]

    def boxes(self) -> NDArray[np.float32]:
        """float32 [n_soft_tokens, 4]: top, left, bottom, right of each soft token in pixels of the original picture."""
        (rows, cols), (height, width) = self.grid, self.source_size
        y, x = np.divmod(np.arange(rows * cols), cols)
        corners = np.stack([y / rows, x / cols, (y + 1) / rows, (x + 1) / cols], axis=1)
        return (corners * [height, width, height, width]).astype(np.float32)


def preprocess(image: ImageLike, image_tokens: int = 280) -> ImagePatches:
    """Patches and positions for the vision towers.

    image: path, bytes of a file, PIL image, or array [height, width(, 1|3|4)] (uint8, uint16, or float in 0..1).
    image_tokens: budget of soft tokens, one of 70, 140, 280, 560, 1120.
    Raises ValueError (budget, array), FormatError (damaged file, not a picture, too many pixels), OSError, ImportError.
    """
    pixels, source_size = _resized(image, image_tokens)
    return _patches(pixels, source_size, PATCH)


def preprocess_unified(image: ImageLike, image_tokens: int = 280) -> ImagePatches:
    """The same for the unified model, which reads a whole 48 x 48 square per soft token: patches [n, 6912]."""
    pixels, source_size = _resized(image, image_tokens)
    return _patches(pixels, source_size, SIDE)


def target_size(height: int, width: int, image_tokens: int) -> tuple[int, int]:
    """Height and width in pixels that a picture is resized to, both multiples of 48.

    If a side would round to nothing, it becomes 48, and the other min(long // short, image_tokens) squares of 48.
    """
    check_budget(image_tokens)
    if height < 1 or width < 1:
        raise ValueError(f"a picture of {width} x {height} pixels has nothing in it")
    factor = math.sqrt(image_tokens * SIDE**2 / (height * width))
    rows, cols = int(factor * height // SIDE), int(factor * width // SIDE)
    if rows == 0:
        rows, cols = 1, min(width // height, image_tokens)
    elif cols == 0:
        rows, cols = min(height // width, image_tokens), 1
    return rows * SIDE, cols * SIDE


def check_budget(image_tokens: int) -> None:
    """Raise ValueError if the models have no such budget."""
    if image_tokens not in BUDGETS:
        raise ValueError(f"image_tokens must be one of {', '.join(map(str, BUDGETS))}, got {image_tokens!r}")


def load_image(image: ImageLike) -> U8:
    """uint8 [height, width, 3], upright (EXIF), transparency on white, 16 bits reduced to 8, the first frame of
    an animation. Colour profiles are not applied. Raises as `preprocess`.
    """
    if isinstance(image, np.ndarray):
        if image.dtype.kind == "u" and image.dtype.itemsize == 2 and 1 <= image.max(initial=0) <= 255:
            raise ValueError(f"a uint16 image of values up to {image.max()} is black (full scale: 65535): give uint8")
        return from_array(image)
    if is_file(image):
        return _read_file(image, name_of(image, "image"))
    return _from_pillow(image)


def _from_pillow(image: Any) -> U8:
    if not isinstance(image, require("PIL.Image").Image):
        raise ValueError(f"an image must be a path, bytes, a PIL image or an array, got {type(image).__name__}")
    check_pixels(image.height, image.width, None, "the image")
    return _decode(lambda: image, "the image")


def _read_file(source: FileLike, name: str) -> U8:
    with open_source(source, "image") as file:
        n_bytes = file.seek(0, os.SEEK_END)
        for width, height in _icon_sizes(file):
            check_pixels(height, width, n_bytes, name)
        file.seek(0)
        opener = _open_heif if _is_heif(file) else _open_pillow
        try:
            (width, height), load = opener(file)
        except ImportError:
            raise
        except Exception as error:  # a plugin may raise anything for a damaged header
            raise FormatError(f"{name}: not an image that can be read ({_short(error)})") from error
        check_pixels(height, width, n_bytes, name)
        return _decode(load, name)


def _open_pillow(file: BinaryIO) -> tuple[tuple[int, int], Callable[[], Any]]:
    """Width and height, and a function that decodes the picture."""
    opened = require("PIL.Image").open(file, formats=_FORMATS)
    return opened.size, lambda: opened


def _icon_sizes(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Width and height of each picture in an ICO file: Pillow decodes one of them when it opens the file, and they may
    be larger than the directory says.
    """
    file.seek(0)
    head = file.read(6)
    entries = file.read(16 * int.from_bytes(head[4:], "little")) if head[:4] == b"\0\0\1\0" else b""
    for at in range(12, len(entries), 16):
        file.seek(int.from_bytes(entries[at : at + 4], "little"))
        picture = file.read(24)
        if picture.startswith(b"\x89PNG"):
            yield int.from_bytes(picture[16:20], "big"), int.from_bytes(picture[20:], "big")
        else:  # a bitmap, followed by a mask of the same height
            yield int.from_bytes(picture[4:8], "little"), int.from_bytes(picture[8:12], "little") // 2


def _open_heif(file: BinaryIO) -> tuple[tuple[int, int], Callable[[], Any]]:
    opened = require("pillow_heif").open_heif(file)
    return opened.size, opened.to_pillow


def _is_heif(file: BinaryIO) -> bool:
    """Whether pillow-heif reads the file and Pillow does not: phones' HEIC."""
    head = file.read(64)
    file.seek(0)
    size = min(len(head), int.from_bytes(head[:4], "big"))
    brands = {head[8:12], *(head[at : at + 4] for at in range(16, size, 4))}
    return head[4:8] == b"ftyp" and bool(brands & _HEIF_BRANDS) and not brands & {b"avif", b"avis"}


def check_pixels(height: int, width: int, n_bytes: int | None, name: str) -> None:
    """Raises FormatError for a picture too large to decode. n_bytes: of the file, None if there is none."""
    pixels, size = height * width, f"{width} x {height} = {height * width / 1e6:.0f} megapixels"
    if pixels > MAX_PIXELS:
        raise FormatError(f"{name}: {size}; the limit is {MAX_PIXELS / 1e6:.0f}. Scale it down first.")
    if n_bytes is not None and pixels > FREE_PIXELS and n_bytes < pixels * MIN_BYTES_PER_PIXEL:
        raise FormatError(
            f"{name}: {size} out of {n_bytes} bytes looks like a decompression bomb (expected at least one byte for "
            f"{1 / MIN_BYTES_PER_PIXEL:.0f} pixels above {FREE_PIXELS / 1e6:.0f} megapixels). Scale it down first."
        )


def _short(error: BaseException) -> str:
    # Pillow's message names the file object with its address in memory
    return "unknown format" if type(error).__name__ == "UnidentifiedImageError" else reason(error)


def _decode(load: Callable[[], Any], name: str) -> U8:
    ops = require("PIL.ImageOps")
    try:
        image = load()
        image.load()
        signed = _is_signed(image)
        return np.asarray(_rgb(ops.exif_transpose(image), signed))
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # truncated or damaged: OSError, SyntaxError, struct.error, …, depending on the plugin
        raise FormatError(f"{name}: the image is damaged ({reason(error)})") from error


def _is_signed(image: Any) -> bool:
    """Whether integers of 32 bits are signed: as in Pillow, unless a TIFF file says otherwise."""
    sample_format = 339
    return image.format != "TIFF" or image.tag_v2.get(sample_format, (1,))[0] != 1


def _rgb(image: Any, signed: bool) -> Any:
    pillow = require("PIL.Image")
    if image.mode.startswith("I") or image.mode == "F":  # convert() would clip these at 255
        return pillow.fromarray(from_array(_narrowed(image, signed)))
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        return pillow.alpha_composite(pillow.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image.convert("RGB")


def _narrowed(image: Any, signed: bool) -> U8:
    """uint8 [height, width] of one channel of 16 or 32 bits, or of floats.

    16 bits have a fixed range. 32 bits and floats have none, so their values determine it: to 1 (floats), to 255, to
    65535, or of 32 bits where they use the upper four.
    """
    values = np.asarray(image)
    if values.dtype.itemsize == 4 and values.dtype.kind == "i" and not signed:
        values = values.view(np.uint32)
    low, high, kind = values.min(), values.max(), values.dtype.kind
    bits = 31 if signed else 32
    if low >= 0:  # false for NaN
        if kind == "f" and high <= 1:
            return _as_bytes(values)
        if values.dtype.itemsize > 2 and high <= 255:
            return np.round(values).astype(np.uint8)
        if high <= 65535:
            return _as_bytes(values.astype(np.uint16))
        if kind != "f" and high >> (bits - 4):
            return (values >> (bits - 8)).astype(np.uint8)
    raise ValueError(
        f"pixels of mode {image.mode} from {low} to {high}; expected 0 to 1, 255, 65535 or 2**{bits}: bring them there"
    )


def from_array(array: NDArray[np.generic]) -> U8:
    """uint8 [height, width, 3] of an array of pixels."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"an image array must be [height, width], or [height, width, 1, 3 or 4], got {array.shape}")
    check_pixels(array.shape[0], array.shape[1], None, "the image")
    pixels = _as_bytes(array)
    if pixels.shape[2] == 4:
        alpha = pixels[:, :, 3:].astype(np.float64) / 255
        pixels = np.round(alpha * pixels[:, :, :3] + (1 - alpha) * 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _as_bytes(array: NDArray[Any]) -> U8:
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return (array >> 8).astype(np.uint8)  # as PNG decoders do with 48-bit colour
    if array.dtype.kind != "f":
        raise ValueError(f"an image array must be uint8, uint16, or float in 0..1, got {array.dtype}")
    if not (array.min() >= 0 and array.max() <= 1):  # false for NaN too
        raise ValueError(f"a float image array must be in 0..1, got {array.min()} to {array.max()}")
    return np.round(array * 255).astype(np.uint8)


def _resized(image: ImageLike, image_tokens: int) -> tuple[U8, tuple[int, int]]:
    check_budget(image_tokens)
    pixels = load_image(image)
    height, width = pixels.shape[:2]
    return resize(pixels, *target_size(height, width, image_tokens)), (height, width)


def resize(pixels: U8, height: int, width: int) -> U8:
    """uint8 [height, width, 3], bicubic with antialiasing."""
    if pixels.shape[:2] == (height, width):
        return pixels
    pillow = require("PIL.Image")
    return np.asarray(pillow.fromarray(pixels).resize((width, height), pillow.Resampling.BICUBIC))


_UNIT = (np.arange(256) * (1 / 255)).astype(np.float32)  # rounded once, from float64, as the reference does


def _patches(pixels: U8, source_size: tuple[int, int], patch: int) -> ImagePatches:
    rows, cols = pixels.shape[0] // patch, pixels.shape[1] // patch
    tiles = pixels.reshape(rows, patch, cols, patch, 3).swapaxes(1, 2).reshape(rows * cols, -1)
    y, x = np.divmod(np.arange(rows * cols, dtype=np.int32), np.int32(cols))
    grid = (pixels.shape[0] // SIDE, pixels.shape[1] // SIDE)
    return ImagePatches(_UNIT[tiles], np.stack([x, y], axis=1), grid[0] * grid[1], grid, source_size)
