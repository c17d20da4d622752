"""The fast backend: csrc/png on its own threads, without the GIL.

Same pixels as Pillow, bit for bit, and never an image where the file is broken. Left out: everything that is not PNG
(``UNSUPPORTED``: JPEG goes to the Pillow backend, DICOM has none).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cxrfast.decode import MAX_PIXELS, MAX_SIZE, MIN_SIZE, PIXEL_RULE, Code, Decoded, Film, Status
from cxrfast.decode.backends import available_cores
from cxrfast.errors import InputError

try:
    from cxrfast import _png
except ImportError as error:
    raise ImportError(
        f"the compiled decoder is not installed ({error}); reinstall cxrfast where a C++20 compiler is, "
        "or use the Pillow backend"
    ) from error

MAX_MEMORY_NBYTES = 1 << 28
"""Working memory of one film, and of the three that one thread decodes together; beyond, the film is too large."""

_OK = Status()


class NativeDecoder:
    """Decoder over a pool of ``threads`` threads (default: one for each core this process may use).

    The files are read by the threads that decode them. They share the films of all calls that are under way, so a call
    that follows at once, from another thread, keeps them busy while the last films of the one before are decoded.
    ``CXRFAST_ISA=portable|avx2|avx512`` lowers the instruction set; the pixels are the same at every level.
    """

    name = "native"
    pixel_rule = PIXEL_RULE

    def __init__(
        self,
        threads: int | None = None,
        *,
        max_pixels: int = MAX_PIXELS,
        max_memory_nbytes: int = MAX_MEMORY_NBYTES,
    ) -> None:
        threads = available_cores() if threads is None else threads
        if threads < 1:
            raise InputError(f"threads={threads}: a decoder needs at least one")
        self.calls = 3  # one under way, one that follows at once, and one whose caller is about to come back
        self.batch_films = 16 * threads
        self._pool = _png.Pool(threads, max_pixels, max_memory_nbytes)

    def __enter__(self) -> NativeDecoder:
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing to do: the threads sleep between calls and end with the object."""

    def decode_resize(self, films: Sequence[Film], size: int, out: np.ndarray | None = None) -> Decoded:
        """Decode N films to grey and resize them to (size, size). A bad film never raises: its status says why.

        Args:
            films: N PNG files, as bytes or as paths.
            size: S, the side of the prepared image in pixels; 8 to 1024.
            out: uint8 (N, S, S), C-contiguous, written in place and returned as ``images``; made when absent.
        Raises:
            InputError: a size out of range, an ``out`` of another shape, an unknown CXRFAST_ISA.
            TypeError: a film that is neither bytes nor a path.
        """
        check_isa()
        out = prepared_array(len(films), size, out)
        data, paths = zip(*map(split_film, films), strict=True) if films else ((), ())
        failures, pixel_sum, pixel_sumsq = self._pool.decode_resize(list(data), list(paths), out)
        statuses = [_OK] * len(films)
        for row, status in failures.items():
            statuses[row] = _status(status)
        return Decoded(out, statuses, pixel_sum, pixel_sumsq)

    def decode(self, film: Film) -> tuple[Status, np.ndarray | None]:
        """One film's grey image at its own size: (ok, uint8 (H, W)), or the reason and None."""
        check_isa()
        status, image = self._pool.decode(*split_film(film))
        return _status(status), image


def decode_resize(
    films: Sequence[Film], size: int, out: np.ndarray | None = None, threads: int | None = None
) -> Decoded:
    """Decode N PNG films to grey and resize them to (size, size), bit for bit as Pillow does, on several threads.

    A bad film never raises: its row is all zeros and its status says why (``corrupt`` with the reason and the byte,
    ``unsupported`` when another decoder may know it, ``too_large`` when a limit was reached).

    Args:
        films: N PNG files, as bytes or as paths (read by the decoding threads).
        size: S, the side of the prepared image in pixels; 8 to 1024.
        out: uint8 (N, S, S), C-contiguous, written in place and returned as ``images``; made when absent.
        threads: threads of the pool, which is kept for the next call. Default: one for each core.
    Returns:
        Decoded(images uint8 (N, S, S), statuses list of N, pixel_sum int64 (N,), pixel_sumsq int64 (N,)).
    Raises:
        InputError: a size out of range, an ``out`` of another shape, threads below 1, an unknown CXRFAST_ISA.
        TypeError: a film that is neither bytes nor a path.
    Source: Pillow's ``convert("L")`` and ``resize((S, S), Image.Resampling.BILINEAR)`` define the pixels.
    """
    return _shared_decoder(threads).decode_resize(films, size, out)


def decode_or_raise(film: Film) -> np.ndarray:
    """``cxrfast.decode``: the grey image, uint8 (H, W), or InputError with the reason."""
    status, image = _shared_decoder(1).decode(film)
    if image is None:
        name = f"{film}: " if isinstance(film, (str, Path)) else ""
        raise InputError(f"{name}{status}")
    return image


def prepared_array(count: int, size: int, out: np.ndarray | None) -> np.ndarray:
    """``out`` if a batch of ``count`` films can be written to it, uint8 (count, size, size); made when it is None."""
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise InputError(f"size={size} is out of range; it must be {MIN_SIZE} to {MAX_SIZE} pixels")
    shape = (count, size, size)
    if out is None:
        return np.empty(shape, np.uint8)
    if out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous or not out.flags.writeable:
        raise InputError(
            f"out must be writeable C-contiguous uint8 {shape}, got {out.dtype} {out.shape}"
            f"{'' if out.flags.c_contiguous else ', not contiguous'}{'' if out.flags.writeable else ', read-only'}"
        )
    return out


def check_isa() -> None:
    """Refuse a CXRFAST_ISA that would silently change nothing."""
    wanted = os.environ.get("CXRFAST_ISA")
    if wanted is not None and wanted not in ("portable", "avx2", "avx512"):
        raise InputError(f"CXRFAST_ISA={wanted} is not known; use portable, avx2 or avx512, or unset it")


_decoders: dict[int | None, NativeDecoder] = {}
_decoders_lock = threading.Lock()


def _shared_decoder(threads: int | None) -> NativeDecoder:
    with _decoders_lock:
        if threads not in _decoders:
            _decoders[threads] = NativeDecoder(threads)
        return _decoders[threads]


def _after_fork() -> None:
    """A child has none of its parent's threads, and a lock that was held stays held: start anew."""
    global _decoders_lock
    _decoders.clear()
    _decoders_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def split_film(film: Film) -> tuple[bytes | None, bytes | None]:
    """(the file's bytes, None) or (None, its path as the system has it)."""
    if isinstance(film, (str, Path)):
        path = os.fsencode(film)
        if b"\0" in path:  # would end the name early
            raise InputError(f"{film!r} is no path: it contains a null character")
        return None, path
    if isinstance(film, (bytes, bytearray, memoryview)):
        return film, None
    raise TypeError(f"a film is bytes or a path, got {type(film).__name__}")


def _status(status: tuple[int, str, int]) -> Status:
    code, message, offset = status
    return Status(Code(code), message, offset)
