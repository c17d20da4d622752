"""Pixels to PNG files as NIH's are encoded, so that a phantom costs a decoder what a real film costs it.

Promises: the grey encoder, given the pixels of a real grey film, gives back that film's IDAT stream bit for bit
(zlib itself, not a rewrite of it such as zlib-ng); the RGBA encoder makes the row filters, chunks and IDAT sizes of the
real RGBA films, and a file within two percent of theirs in size. Left out: every other kind of PNG.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
END = b"\x00\x00\x00\x00IEND\xaeB`\x82"  # the last twelve bytes of every PNG file

NONE, SUB, UP, AVERAGE, PAETH = range(5)
GREY_IDAT_NBYTES = 8192  # libpng's default buffer
RGBA_IDAT_NBYTES = 65524
RGBA_FIRST_IDAT_NBYTES = 65426  # a 64 KiB file buffer, less the chunks before it


def filter_rows(image: np.ndarray, filters: tuple[int, ...] = (NONE, SUB, UP, AVERAGE, PAETH)) -> np.ndarray:
    """The filtered scanlines of an image: per row the filter whose bytes, taken as signed, have the least absolute sum.

    Args:
        image: uint8 (H, W) grey or (H, W, 4) RGBA.
        filters: the filters to choose from, in order of preference among equals.
    Returns:
        uint8 (H, 1 + W * channels): filter byte, then the filtered row.
    Source: PNG specification, sections 9 and 12.8, and libpng's way of breaking ties.
    """
    height = image.shape[0]
    nbytes = image[0].size
    bpp = nbytes // image.shape[1]
    rows = image.reshape(height, nbytes)
    up = np.zeros_like(rows)
    up[1:] = rows[:-1]
    left = np.zeros_like(rows)
    left[:, bpp:] = rows[:, :-bpp]
    candidates = np.empty((len(filters), height, nbytes), np.uint8)
    for slot, kind in zip(candidates, filters, strict=True):
        np.subtract(rows, _predict(kind, left, up, bpp), out=slot)
    # the two's complement of a byte is its other absolute value, so no wider type is needed before the sum
    cost = np.minimum(candidates, np.negative(candidates)).sum(axis=2, dtype=np.uint32)
    best = cost.argmin(axis=0)
    lines = np.empty((height, 1 + nbytes), np.uint8)
    lines[:, 0] = np.asarray(filters, np.uint8)[best]
    lines[:, 1:] = candidates[best, np.arange(height)]
    return lines


def _predict(kind: int, left: np.ndarray, up: np.ndarray, bpp: int) -> np.ndarray:
    """What a filter subtracts from each byte; all arrays uint8 (H, bytes per row)."""
    if kind == NONE:
        return np.zeros_like(left)
    if kind == SUB:
        return left
    if kind == UP:
        return up
    if kind == AVERAGE:
        return (left & up) + ((left ^ up) >> 1)  # (left + up) // 2 without leaving uint8
    corner = np.zeros_like(up)
    corner[:, bpp:] = up[:, :-bpp]
    wide_corner = corner.astype(np.int16)
    to_left = up - wide_corner
    to_up = left - wide_corner
    to_corner = np.abs(to_left + to_up)
    np.abs(to_left, out=to_left)
    np.abs(to_up, out=to_up)
    nearest = np.where(to_up <= to_corner, up, corner)
    return np.where((to_left <= to_up) & (to_left <= to_corner), left, nearest)


def encode_grey(image: np.ndarray, time: tuple[int, int, int, int, int, int]) -> bytes:
    """A PNG file of uint8 (H, W) pixels, as libpng wrote NIH's: IHDR, tIME, IDATs of 8,192 bytes, IEND.

    ``time``: year, month, day, hour, minute, second for the tIME chunk.
    """
    deflate = zlib.compressobj(6, zlib.DEFLATED, 15, 8, zlib.Z_FILTERED)
    stream = deflate.compress(filter_rows(image).tobytes()) + deflate.flush()
    idats = [stream[at : at + GREY_IDAT_NBYTES] for at in range(0, len(stream), GREY_IDAT_NBYTES)]
    return _file(image, 0, [_time_chunk(time)], idats)


def encode_rgba(image: np.ndarray, time: tuple[int, int, int, int, int, int]) -> bytes:
    """A PNG file of uint8 (H, W) grey levels as RGBA with alpha 255, laid out as NIH's RGBA films are."""
    pixels = np.repeat(image[:, :, None], 4, axis=2)
    pixels[:, :, 3] = 255
    # The deflate of those files is not zlib's; level 3 has its header bytes and comes nearest to its size.
    deflate = zlib.compressobj(3, zlib.DEFLATED, 15, 9)
    stream = deflate.compress(filter_rows(pixels, (SUB, UP, AVERAGE)).tobytes()) + deflate.flush()
    starts = [0, *range(RGBA_FIRST_IDAT_NBYTES, len(stream), RGBA_IDAT_NBYTES)]
    idats = [stream[a:b] for a, b in zip(starts, [*starts[1:], len(stream)], strict=True)]
    before = [
        (b"sRGB", b"\x00"),
        (b"gAMA", struct.pack(">I", 45455)),
        (b"pHYs", struct.pack(">IIB", 3780, 3780, 1)),
        _time_chunk(time),
    ]
    return _file(image, 6, before, idats)


def _time_chunk(time: tuple[int, int, int, int, int, int]) -> tuple[bytes, bytes]:
    return b"tIME", struct.pack(">HBBBBB", *time)


def _file(image: np.ndarray, colour_type: int, before: list[tuple[bytes, bytes]], idats: list[bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 8, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *before, *((b"IDAT", data) for data in idats)]
    return b"".join([SIGNATURE, *(_chunk(kind, data) for kind, data in chunks), END])


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
