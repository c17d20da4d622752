"""PNG files of every kind for the decoder's tests, made from random filtered rows: any bytes are some image."""

from __future__ import annotations

import struct
import zlib

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # samples per pixel of each colour type
KINDS = [  # (colour type, bit depth), all that PNG has
    *((0, depth) for depth in (1, 2, 4, 8, 16)),
    *((3, depth) for depth in (1, 2, 4, 8)),
    *((color, depth) for color in (2, 4, 6) for depth in (8, 16)),
]
ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]


def chunk(name: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def chunks_of(file: bytes) -> list[tuple[bytes, bytes]]:
    """(name, data) of each chunk, in order."""
    found, at = [], len(SIGNATURE)
    while at < len(file):
        (nbytes,) = struct.unpack_from(">I", file, at)
        found.append((file[at + 4 : at + 8], file[at + 8 : at + 8 + nbytes]))
        at += 12 + nbytes
    return found


def join(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """A file of these chunks, with right CRCs."""
    return SIGNATURE + b"".join(chunk(*one) for one in chunks)


def ihdr(width: int, height: int, color: int = 0, depth: int = 8, interlace: int = 0) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace)


def idats(stream: bytes, nbytes: int = 8192) -> list[tuple[bytes, bytes]]:
    """The zlib stream cut into IDAT chunks."""
    return [(b"IDAT", stream[at : at + nbytes]) for at in range(0, max(len(stream), 1), nbytes)]


def filtered_rows(
    rng: np.random.Generator,
    width: int,
    height: int,
    color: int,
    depth: int,
    interlace: int,
    *,
    filters: tuple[int, ...] = (0, 1, 2, 3, 4),
    noise: int = 256,
    equal_channels: bool = False,
) -> bytes:
    """Random filtered rows of an image: filter bytes out of ``filters``, residuals in [-noise / 2, noise / 2).

    equal_channels: R = G = B in every pixel, though the file is RGB or RGBA; alpha stays random.
    """
    channels = CHANNELS[color]
    passes = ADAM7 if interlace else [(0, 0, 1, 1)]
    rows = []
    for x0, y0, dx, dy in passes:
        columns, lines = -(-(width - x0) // dx), -(-(height - y0) // dy)
        if columns <= 0 or lines <= 0:
            continue
        residuals = rng.integers(-(noise // 2), (noise + 1) // 2, (lines, -(-columns * channels * depth // 8)))
        residuals = residuals.astype(np.uint8)
        if equal_channels:
            pixels = residuals.reshape(lines, columns, channels, depth // 8)
            pixels[:, :, 1:3] = pixels[:, :, :1]
        rows.append(np.hstack([rng.choice(filters, (lines, 1)).astype(np.uint8), residuals]).tobytes())
    return b"".join(rows)


def random_png(
    rng: np.random.Generator,
    width: int,
    height: int,
    color: int = 0,
    depth: int = 8,
    interlace: int = 0,
    *,
    level: int = 6,
    idat_nbytes: int = 8192,
    **rows: object,
) -> bytes:
    """A valid PNG file; see filtered_rows for the rest of the options."""
    data = filtered_rows(rng, width, height, color, depth, interlace, **rows)  # type: ignore[arg-type]
    palette = [(b"PLTE", rng.bytes(3 << depth))] if color == 3 else []
    head = [ihdr(width, height, color, depth, interlace), *palette]
    return join([*head, *idats(zlib.compress(data, level), idat_nbytes), (b"IEND", b"")])
