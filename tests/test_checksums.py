"""CRC-32 and Adler-32 against zlib: the same sums at every level, from any start, of any length.

Dangers: a tail that is left out, a step that reads past an end, a sum that overflows, a first value that is lost, a
copy that writes too much. All bytes end at a page that cannot be read.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import random
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = ("portable", "avx2", "avx512")
LARGEST = 3 << 20
# Around the multiples of a step (16, 32, 64, 256 bytes) and of a chunk of the AVX2 sum (5376).
LENGTHS = [*range(301), *range(505, 600), 767, 768, 769, 1023, 1024, 1025, 5375, 5376, 5377, 5552, 8196, 65524, 70001]
MEGABYTES = [(1 << 20) + extra for extra in (-65, -64, -1, 0, 1, 63, 64, 65)] + [2 << 20, LARGEST - 64]
STARTS = (0, 1, 3, 4, 31, 32, 63)  # behind a multiple of 64


class Checksums:
    def __init__(self, library: ctypes.CDLL, level: int) -> None:
        self.library = library
        self.level = level
        for name in ("run_crc32", "run_crc32_and_copy", "run_adler32"):
            getattr(library, name).restype = ctypes.c_uint32
        self.area = mmap.mmap(-1, LARGEST + mmap.PAGESIZE)
        self.end = ctypes.addressof(ctypes.c_char.from_buffer(self.area)) + LARGEST
        assert library.forbid(ctypes.c_void_p(self.end), ctypes.c_size_t(mmap.PAGESIZE)) == 0

    def _placed(self, data: bytes, start: int | None) -> tuple[ctypes.c_void_p, ctypes.c_size_t]:
        """The bytes ``start`` behind a multiple of 64, or right before the end."""
        at = LARGEST - len(data)
        if start is not None:
            at = at // 64 * 64 + start - (64 if start > at % 64 else 0)
        self.area[at : at + len(data)] = data
        return ctypes.c_void_p(self.end - LARGEST + at), ctypes.c_size_t(len(data))

    def crc32(self, data: bytes, crc: int = 0, start: int | None = None) -> int:
        pointer, nbytes = self._placed(data, start)
        alone = self.library.run_crc32(ctypes.c_uint32(crc), pointer, nbytes, self.level)
        out = ctypes.create_string_buffer(b"\x5a" * (len(data) + 64), len(data) + 64)
        assert self.library.run_crc32_and_copy(ctypes.c_uint32(crc), pointer, nbytes, out, self.level) == alone
        assert out.raw == data + b"\x5a" * 64
        return alone

    def crc32_and_move(self, data: bytes, nbytes_back: int) -> int:
        """The same, copied to a place that begins before the bytes and may reach into them."""
        pointer, nbytes = self._placed(data, None)
        assert pointer.value is not None
        out = pointer.value - nbytes_back
        moved = self.library.run_crc32_and_copy(ctypes.c_uint32(0), pointer, nbytes, ctypes.c_void_p(out), self.level)
        assert ctypes.string_at(out, len(data)) == data
        return moved

    def adler32(self, data: bytes, adler: int = 1, start: int | None = None) -> int:
        return self.library.run_adler32(ctypes.c_uint32(adler), *self._placed(data, start), self.level)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("checksums") / "checksums_driver.so"
    sources = [
        ROOT / "tests/checksums_driver.cpp",
        *(ROOT / f"csrc/png/{name}.cpp" for name in ("adler32", "crc32", "isa")),
    ]
    flags = ["-std=c++20", "-O3", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror", "-fPIC", "-shared"]
    subprocess.run([compiler, *flags, f"-I{ROOT / 'csrc'}", *sources, "-o", target], check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="module", params=range(3), ids=LEVELS)
def checksums(request: pytest.FixtureRequest, library: ctypes.CDLL) -> Checksums:
    if request.param > library.cpu_level():
        pytest.skip(f"this CPU has no {LEVELS[request.param]}")
    return Checksums(library, request.param)


@pytest.mark.parametrize("start", [None, *STARTS])
def test_every_length_and_start(checksums: Checksums, start: int | None) -> None:
    rng = random.Random(0)
    for nbytes in LENGTHS:
        data = rng.randbytes(nbytes)
        crc, adler = rng.getrandbits(32), rng.randrange(65521) << 16 | rng.randrange(65521)
        for first in (0, crc, 0xFFFFFFFF):
            assert checksums.crc32(data, first, start) == zlib.crc32(data, first), nbytes
        for first in (1, adler, 65520 << 16 | 65520):
            assert checksums.adler32(data, first, start) == zlib.adler32(data, first), nbytes


@pytest.mark.parametrize("nbytes_back", [8, 20, 32, 56, 63, 64, 65, 300])
def test_copies_to_a_place_before(checksums: Checksums, nbytes_back: int) -> None:
    """A payload is joined to the one before it where both are: what is read must not have been written over."""
    rng = random.Random(2)
    for nbytes in LENGTHS:
        data = rng.randbytes(nbytes)
        assert checksums.crc32_and_move(data, nbytes_back) == zlib.crc32(data), nbytes


@pytest.mark.parametrize("fill", [0, 255, None], ids=["zeros", "largest", "random"])
def test_megabytes(checksums: Checksums, fill: int | None) -> None:
    """With 255 and the largest first value, no sum can be larger."""
    for nbytes in MEGABYTES:
        data = random.Random(nbytes).randbytes(nbytes) if fill is None else bytes([fill]) * nbytes
        for start in (None, 0, 1, 63):
            assert checksums.crc32(data, 0xFFFFFFFF, start) == zlib.crc32(data, 0xFFFFFFFF)
            assert checksums.adler32(data, 65520 << 16 | 65520, start) == zlib.adler32(data, 65520 << 16 | 65520)


def test_in_parts(checksums: Checksums) -> None:
    """The sum of the whole from any cutting of it."""
    rng = random.Random(1)
    data = rng.randbytes(20_000)
    for _ in range(20):
        cuts = [0, *sorted(rng.choices(range(len(data)), k=rng.randrange(12))), len(data)]
        crc, adler = 0, 1
        for begin, end in itertools.pairwise(cuts):
            crc, adler = checksums.crc32(data[begin:end], crc), checksums.adler32(data[begin:end], adler)
        assert (crc, adler) == (zlib.crc32(data), zlib.adler32(data))
