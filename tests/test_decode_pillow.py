"""The reference backend's danger: to accept what is broken, as Pillow alone does, or to refuse what is not."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import film, pillow_resized, png
from PIL import Image

from cxrfast.decode import Code
from cxrfast.decode.pillow import PillowDecoder, check_png, decode, decode_one


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def header(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


ROWS = b"".join(b"\0" + bytes([16 * row + 1] * 8) for row in range(8))
END = chunk(b"IEND", b"")

BROKEN = {
    "empty file": b"",
    "truncated chunk": png(film(0))[:-20],
    "no IDAT chunk": header(8, 8) + END,
    "no IEND chunk": header(8, 8) + chunk(b"IDAT", zlib.compress(ROWS)),
    "invalid IHDR": header(8, 8, depth=3) + chunk(b"IDAT", zlib.compress(ROWS)) + END,
    "image data ends early": header(8, 8) + chunk(b"IDAT", zlib.compress(ROWS)[:-10]) + END,
    "invalid deflate block": header(8, 8) + chunk(b"IDAT", b"\x78\x9c\xff\xff\xff\xff") + END,
    "CRC-32 mismatch in IDAT": png(film(0))[:-13] + bytes([png(film(0))[-13] ^ 1]) + png(film(0))[-12:],
}


@pytest.mark.parametrize("said", BROKEN)
def test_broken_files_are_corrupt_and_say_how(said: str) -> None:
    status, image = decode(BROKEN[said])
    assert (status.code, status.message, image) == (Code.CORRUPT, said, None)


@pytest.mark.parametrize(
    ("width", "height", "said"),
    [(60_000, 60_000, "more than the pixel limit"), (70_000, 1, "a side longer than the side limit")],
)
def test_limits_are_checked_before_anything_is_inflated(width: int, height: int, said: str) -> None:
    bomb = header(width, height) + chunk(b"IDAT", zlib.compress(bytes(1000))) + END
    status, image = decode(bomb)
    assert (status.code, status.message, image) == (Code.TOO_LARGE, said, None)


@pytest.mark.parametrize("data", [b"BM not a film", b"GIF89a", b"\0" * 128 + b"DICM"])
def test_what_is_not_png_or_jpeg_is_unsupported(data: bytes) -> None:
    assert decode(data)[0].code == Code.UNSUPPORTED


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    status, image = decode(tmp_path / "nowhere.png")
    assert status.code == Code.CORRUPT and "cannot be read" in status.message and image is None


def test_sixteen_bits_keep_their_high_byte() -> None:
    wide = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "PNG")
    assert np.array_equal(decode(buffer.getvalue())[1], wide >> 8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_modes_are_those_of_convert(mode: str) -> None:
    image = Image.fromarray(np.dstack([film(seed) for seed in range(3)])).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    status, grey = decode(buffer.getvalue())
    assert status.ok and np.array_equal(grey, np.asarray(image.convert("L")))


@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (150, 100), (100, 150), (16, 90), (90, 16), (16, 16), (3, 200)]
)
def test_the_order_of_the_passes_is_that_of_pillow_13(height: int, width: int) -> None:
    grey = np.random.default_rng(height).integers(0, 256, (height, width), np.uint8)
    assert np.array_equal(decode_one(png(grey), 16)[1], pillow_resized(Image.fromarray(grey), 16))


def test_a_batch_keeps_its_order_and_its_failures_apart() -> None:
    films = [png(film(0)), BROKEN["truncated chunk"], png(film(1))]
    out = np.full((3, 16, 16), 77, np.uint8)
    with PillowDecoder(workers=2) as decoder:
        decoded = decoder.decode_resize(films, 16, out)
    assert decoded.images is out and [status.ok for status in decoded.statuses] == [True, False, True]
    assert not out[1].any() and decoded.pixel_sum[1] == decoded.pixel_sumsq[1] == 0
    for row in (0, 2):
        assert np.array_equal(out[row], decode_one(films[row], 16)[1])
        assert decoded.pixel_sum[row] == out[row].astype(int).sum()
        assert decoded.pixel_sumsq[row] == (out[row].astype(int) ** 2).sum()


@pytest.mark.films
def test_every_real_film_is_sound(films: list[Path]) -> None:
    for path in films:
        assert check_png(path.read_bytes()).ok, path.name
