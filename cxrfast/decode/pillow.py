"""The reference backend: Pillow, one film at a time, in processes on all cores.

It defines the pixel rule that the others must meet. Pillow alone lets some broken files pass (a wrong CRC inside the
image data, a stream cut after the last row that it needed), therefore every PNG's chunks are checked before it sees
them; which files are accepted then depends on the file, not on the backend.
"""

from __future__ import annotations

import io
import os
import signal
import struct
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from PIL import Image

from cxrfast.decode import MAX_PIXELS, MAX_SIDE, PIXEL_RULE, Code, Decoded, Film, Status
from cxrfast.errors import ResourceError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # samples per pixel of each PNG colour type
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


class _Bad(Exception):
    def __init__(self, code: Code, message: str, offset: int = -1) -> None:
        self.status = Status(code, message, offset)


def check_png(data: bytes) -> Status:
    """Whether the file's structure is sound: signature, chunk lengths, CRCs of critical chunks, limits, one image.

    The compressed data itself is left to the decoder.
    """
    try:
        _check_png(data)
    except _Bad as bad:
        return bad.status
    return Status()


def decode(film: Film) -> tuple[Status, np.ndarray | None]:
    """One film's grey image: (ok, uint8 (H, W)), or the reason and None. Never raises for a bad film."""
    try:
        data = film if isinstance(film, bytes) else Path(film).read_bytes()
    except OSError as error:
        return Status(Code.CORRUPT, f"cannot be read ({error.strerror or error})"), None
    is_jpeg = data.startswith(b"\xff\xd8\xff")
    if not is_jpeg and not (status := check_png(data)).ok:
        return status, None
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",) if is_jpeg else ("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:  # a JPEG; a PNG's size was checked
                return Status(Code.TOO_LARGE, "more than the pixel limit"), None
            image.load()
            if image.mode.startswith("I"):  # 16-bit grey
                return Status(), (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
            return Status(), np.asarray(image.convert("L"))
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        return Status(Code.CORRUPT, _image_data_message(data) if not is_jpeg else f"JPEG: {error}"), None


def decode_one(film: Film, size: int) -> tuple[Status, np.ndarray | None]:
    """One film, prepared: (ok, uint8 (size, size)), or the reason and None. Never raises for a bad film."""
    status, grey = decode(film)
    if grey is None:
        return status, None
    height, width = grey.shape
    # Which pass comes first shows in the last bit. Pillow 13 takes the vertical one where the height shrinks more than
    # twice as far as the width, earlier ones never do: one axis at a time, so that every Pillow gives the same pixels.
    vertical_first = height > size and height - size > 2 * (width - size)
    between = (width, size) if vertical_first else (size, height)
    image = Image.fromarray(grey)
    for shape in (between, (size, size)):
        image = image.resize(shape, Image.Resampling.BILINEAR)
    return status, np.asarray(image)


def pixel_sums(image: np.ndarray) -> tuple[int, int]:
    """Sum of a uint8 image's pixels, and sum of their squares."""
    wide = image.astype(np.int64)
    return int(wide.sum()), int((wide * wide).sum())


class PillowDecoder:
    """Decoder over ``workers`` processes (default: one a core)."""

    name = "pillow"
    pixel_rule = PIXEL_RULE

    def __init__(self, workers: int | None = None) -> None:
        workers = workers or os.cpu_count() or 1
        self.calls = 2  # so that no process waits between two batches
        self.batch_films = 24 * workers
        # spawn: a fork of a process with threads (tqdm's, a writer's) can deadlock
        self._pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker)

    def __enter__(self) -> PillowDecoder:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def decode_resize(self, films: Sequence[Film], size: int, out: np.ndarray | None = None) -> Decoded:
        images = np.empty((len(films), size, size), np.uint8) if out is None else out
        sums, sums_sq = np.zeros(len(films), np.int64), np.zeros(len(films), np.int64)
        statuses: list[Status] = []
        try:
            for row, (status, image) in enumerate(self._pool.map(partial(decode_one, size=size), films, chunksize=4)):
                statuses.append(status)
                images[row] = 0 if image is None else image
                sums[row], sums_sq[row] = pixel_sums(images[row])
        except BrokenProcessPool as error:
            raise ResourceError(
                "a decoding process was killed, probably for memory; repeat the command with fewer --workers to go on"
            ) from error
        return Decoded(images, statuses, sums, sums_sq)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    # A worker holds both ends of its queue, so it never sees that its parent was killed: it would wait forever.
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _check_png(data: bytes) -> None:
    if not data:
        raise _Bad(Code.CORRUPT, "empty file", 0)
    if not data.startswith(PNG_SIGNATURE):
        raise _Bad(Code.UNSUPPORTED, "not a PNG file", 0)
    position, seen = 8, set[bytes]()
    while b"IEND" not in seen:
        if position + 12 > len(data):
            if position == len(data) and b"IHDR" in seen:
                raise _Bad(Code.CORRUPT, "no IEND chunk" if b"IDAT" in seen else "no IDAT chunk", position)
            raise _Bad(Code.CORRUPT, "truncated chunk", position)
        length, kind = struct.unpack_from(">I4s", data, position)
        if position + 12 + length > len(data):
            raise _Bad(Code.CORRUPT, "truncated chunk", position)
        (stored,) = struct.unpack_from(">I", data, position + 8 + length)
        sound = zlib.crc32(data[position + 4 : position + 8 + length]) == stored
        if not sound and kind in _CRITICAL:
            raise _Bad(Code.CORRUPT, f"CRC-32 mismatch in {kind.decode()}", position)
        if (kind == b"IHDR") != (not seen):
            raise _Bad(Code.CORRUPT, "invalid IHDR", position)
        if kind == b"IHDR":
            _check_header(data[position + 8 : position + 8 + length], position)
        if kind == b"IEND" and b"IDAT" not in seen:
            raise _Bad(Code.CORRUPT, "no IDAT chunk", position)
        seen.add(kind)
        position += 12 + length


def _check_header(header: bytes, position: int) -> None:
    if len(header) != 13:
        raise _Bad(Code.CORRUPT, "invalid IHDR", position)
    width, height, depth, colour, compression, filtering, interlace = struct.unpack(">IIBBBBB", header)
    sane = 0 < width < 2**31 and 0 < height < 2**31 and depth in _DEPTHS.get(colour, ())
    if not sane or compression or filtering or interlace > 1:
        raise _Bad(Code.CORRUPT, "invalid IHDR", position)
    if max(width, height) > MAX_SIDE:
        raise _Bad(Code.TOO_LARGE, "a side longer than the side limit", position)
    if width * height > MAX_PIXELS:
        raise _Bad(Code.TOO_LARGE, "more than the pixel limit", position)


def _image_data_message(data: bytes) -> str:
    """Why a PNG with sound chunks could not be decoded: inflate its image data and see."""
    stream, position = b"", 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IDAT":
            stream += data[position + 8 : position + 8 + length]
        position += 12 + length
    inflater = zlib.decompressobj()
    try:
        inflater.decompress(stream)
    except zlib.error as error:
        return "Adler-32 mismatch" if "incorrect data check" in str(error) else "invalid deflate block"
    return "image data ends early" if not inflater.eof else "bad row filter"
