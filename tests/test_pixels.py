"""Un-filter and resample against Pillow and cxrfast.reference: the same bits at every level.

Dangers: a lane that begins too early or takes a neighbour's pixel, a group of rows that ends in the middle, the seam
between two groups, a read past the end of the rows, a tile of columns that ends inside an output pixel's reach,
weights that round another way, an order of passes that is not Pillow's. AVX-512's code runs here by emulation wherever
SIMDe is, the code for other CPUs by the compiler's own vectors.
"""

from __future__ import annotations

import binascii
import ctypes
import io
import itertools
import os
import shutil
import struct
import subprocess
import weakref
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from helpers import pillow_resized
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cxrfast.reference import resize_ref, unfilter_ref

ROOT = Path(__file__).parents[1]
EMULATED_HEADERS = ROOT / "tests/emulated"
HAS_SIMDE = Path("/usr/include/simde/x86/avx512.h").exists()
PORTABLE, AVX2, AVX512 = range(3)
CORRUPT = 1
EDGES = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
FILM_SIZES = (32, 64, 128, 224, 256, 320, 512, 1024)

# The builds: their flags, whether AVX-512 is emulated, and the levels that they are for.
BUILDS = {
    "shipped": (["-O3", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror"], False, [PORTABLE, AVX2, AVX512]),
    "emulated": (["-O1"], True, [AVX512]),
    "generic": (["-O2", "-DCXRFAST_GENERIC_LANES"], False, [PORTABLE]),
}
LEVELS = [(build, level) for build, (_, _, levels) in BUILDS.items() for level in levels]


class Ending(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_int32),
        ("offset", ctypes.c_int64),
        ("sum", ctypes.c_int64),
        ("sumsq", ctypes.c_int64),
    ]


def compile_driver(folder: Path, flags: Sequence[str], emulated: bool) -> Path:
    """The driver with the kernels; skips where the compiler, or what emulates AVX-512, is missing."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    if emulated and not HAS_SIMDE:
        pytest.skip("SIMDe (libsimde-dev), which emulates AVX-512, is not installed")
    base = [compiler, "-std=c++20", "-fPIC", *flags, f"-I{ROOT / 'csrc'}"]
    wide = folder / "avx512.o"
    extra = ["-DCXRFAST_EMULATE_AVX512", "-isystem", EMULATED_HEADERS] if emulated else []
    subprocess.run([*base, *extra, "-c", ROOT / "csrc/png/pixels_avx512.cpp", "-o", wide], check=True)
    names = ["unfilter", "resample", "isa", "pixels_portable", "pixels_avx2"]
    sources = [ROOT / "tests/pixels_driver.cpp", *(ROOT / f"csrc/png/{name}.cpp" for name in names)]
    target = folder / "pixels_driver"
    shared = [] if any("sanitize" in flag for flag in flags) else ["-shared"]
    subprocess.run([*base, *shared, *sources, wide, "-o", target], check=True)
    return target


class Driver:
    """One build of the kernels at one level."""

    def __init__(self, library: ctypes.CDLL, level: int) -> None:
        self.library = library
        self.level = level
        library.pixel_pad.restype = ctypes.c_size_t
        library.guarded.restype = ctypes.c_size_t

    def _guarded(self, film: np.ndarray) -> np.ndarray:
        """The film's rows and their padding; the byte after that cannot be read."""
        nbytes = film.size + self.library.pixel_pad()
        start = self.library.guarded(ctypes.c_size_t(nbytes))
        rows = np.frombuffer((ctypes.c_uint8 * nbytes).from_address(start), np.uint8)
        weakref.finalize(rows, self.library.unguard, ctypes.c_void_p(start), ctypes.c_size_t(nbytes))
        rows[: film.size] = film.ravel()
        rows[film.size :] = 0xA5
        return rows

    def films(self, films: Sequence[np.ndarray], size: int) -> tuple[np.ndarray, list[Ending]]:
        """uint8 (H, 1 + W) filtered rows each; uint8 (N, size, size) and how each film ended."""
        rows = [self._guarded(film) for film in films]
        outs = np.full((len(films), size, size), 0x5A, np.uint8)
        endings = (Ending * len(films))()
        sides = ctypes.c_uint32 * len(films)
        pointers = ctypes.c_void_p * len(films)
        self.library.run_films(
            pointers(*(row.ctypes.data for row in rows)),
            sides(*(film.shape[1] - 1 for film in films)),
            sides(*(film.shape[0] for film in films)),
            ctypes.c_uint32(size),
            pointers(*(out.ctypes.data for out in outs)),
            ctypes.c_size_t(len(films)),
            self.level,
            endings,
        )
        return outs, list(endings)

    def wavefront(self, film: np.ndarray) -> np.ndarray:
        """uint8 (H, 1 + W) filtered rows to uint8 (H, W)."""
        height, width = film.shape[0], film.shape[1] - 1
        rows = self._guarded(film)
        grey = np.empty((height, width), np.uint8)
        self.library.run_wavefront(_at(rows), height, ctypes.c_size_t(width), _at(grey), self.level)
        return grey

    def resample(self, grey: np.ndarray, size: int) -> np.ndarray:
        """uint8 (H, W) to uint8 (size, size)."""
        height, width = grey.shape
        out = np.empty((size, size), np.uint8)
        stride = ctypes.c_size_t(grey.strides[0])
        self.library.run_resample(_at(grey), width, height, stride, size, _at(out), self.level)
        return out


def _at(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


Builder = Callable[[tuple[str, int]], Driver]


@pytest.fixture(scope="session")
def driver_of(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """Makes the driver of a build and level; skips where that cannot be built or run here."""

    @cache
    def library_of(build: str) -> ctypes.CDLL:
        flags, emulated, _ = BUILDS[build]
        return ctypes.CDLL(str(compile_driver(tmp_path_factory.mktemp(build), flags, emulated)))

    def driver_of(build_and_level: tuple[str, int]) -> Driver:
        build, level = build_and_level
        library = library_of(build)
        if level > library.cpu_level() and build != "emulated":
            pytest.skip("this CPU has not that level")
        return Driver(library, level)

    return driver_of


@pytest.fixture(scope="session", params=LEVELS, ids=[f"{build}-{level}" for build, level in LEVELS])
def driver(request: pytest.FixtureRequest, driver_of: Builder) -> Driver:
    return driver_of(request.param)


# ---- films ----


def random_film(seed: int, width: int, height: int, filters: Sequence[int] = (0, 1, 2, 3, 4)) -> np.ndarray:
    """uint8 (H, 1 + W): rows of noise, of small residuals or of extremes, with mixed filters."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (height, 1 + width), np.uint8)
    kind = rng.integers(0, 3)
    if kind == 1:
        rows = np.round(rng.normal(0, 3, rows.shape)).astype(np.int64).astype(np.uint8)
    elif kind == 2:
        rows = rng.choice(np.array([0, 1, 127, 128, 255], np.uint8), rows.shape)
    rows[:, 0] = rng.choice(np.array(filters, np.uint8), height)
    return rows


def png_of(rows: np.ndarray) -> bytes:
    """An 8-bit grey PNG whose rows are these, filters and all."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", binascii.crc32(kind + data))

    header = struct.pack(">IIBBBBB", rows.shape[1] - 1, rows.shape[0], 8, 0, 0, 0, 0)
    data = zlib.compress(rows.tobytes(), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def by_pillow(rows: np.ndarray) -> Image.Image:
    return Image.open(io.BytesIO(png_of(rows)))


def film_rows(path: Path) -> np.ndarray:
    """The filtered rows of a real film; of an RGBA film, whose channels are equal, those of its first channel."""
    data = path.read_bytes()
    width, height, _, color_type = struct.unpack(">IIBB", data[16:26])
    channels = {0: 1, 6: 4}[color_type]
    parts, at = [], 8
    while at < len(data):
        (nbytes,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            parts.append(data[at + 8 : at + 8 + nbytes])
        at += 12 + nbytes
    rows = np.frombuffer(zlib.decompress(b"".join(parts)), np.uint8).reshape(height, 1 + width * channels)
    return np.ascontiguousarray(np.concatenate([rows[:, :1], rows[:, 1::channels]], axis=1))


# ---- the reference ----


@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_the_reference_unfilters_as_pillow(seed: int, width: int, height: int) -> None:
    rows = random_film(seed, width, height)
    assert (unfilter_ref(rows, 1) == np.asarray(by_pillow(rows))).all()


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 90), st.integers(8, 50))
@settings(max_examples=60, deadline=None)
def test_the_reference_resizes_as_pillow(seed: int, width: int, height: int, size: int) -> None:
    grey = np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)
    assert (resize_ref(grey, size) == pillow_resized(Image.fromarray(grey), size)).all()


# ---- un-filter ----


@pytest.mark.parametrize("bpp", [1, 2, 3, 4, 6, 8])
def test_plain_unfilter_knows_every_pixel_size(driver: Driver, bpp: int) -> None:
    for seed, nbytes in enumerate((1, bpp - 1, bpp, bpp + 1, 5 * bpp, 41)):
        rows = random_film(seed, max(nbytes, 1), 12)
        expected, ending = unfilter_ref(rows, bpp), Ending()
        nbytes_per_row = ctypes.c_size_t(rows.shape[1] - 1)
        driver.library.run_unfilter(_at(rows), 12, nbytes_per_row, bpp, ctypes.byref(ending))
        assert ending.code == 0 and (rows[:, 1:] == expected).all()


def test_the_wavefront_at_every_edge(driver: Driver) -> None:
    for seed, (width, height) in enumerate(itertools.product(EDGES, (*EDGES, 255, 257))):
        rows = random_film(seed, width, height)
        assert (driver.wavefront(rows) == np.asarray(by_pillow(rows))).all(), (width, height)


@pytest.mark.parametrize("filters", [[0], [1], [2], [3], [4], [3, 4], [0, 2]])
def test_the_wavefront_with_few_filters(driver: Driver, filters: list[int]) -> None:
    for seed in range(3):
        rows = random_film(seed, 150, 200, filters)
        assert (driver.wavefront(rows) == np.asarray(by_pillow(rows))).all()


def test_paeth_of_all_triples(driver: Driver) -> None:
    """Above are c and b in turn; the filtered bytes are such that the left neighbour is a, and then zero."""
    c, a = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    for b in range(256):
        rows = np.zeros((512, 513), np.int64)
        rows[1::2, 0] = 4
        above = np.empty((256, 512), np.int64)
        above[:, 0::2], above[:, 1::2] = c, b
        expected = np.empty_like(above)
        expected[:, 0::2], expected[:, 1::2] = a, _paeth(a, b, c)
        left, above_left = np.zeros_like(a), np.zeros_like(a)
        left[:, 1:], above_left[:, 1:] = expected[:, 1:-1:2], b
        rows[0::2, 1:] = above
        rows[1::2, 1::2] = a - _paeth(left, c, above_left)
        result = driver.wavefront(rows.astype(np.uint8))
        assert (result[0::2] == above).all() and (result[1::2] == expected).all(), b


def _paeth(a: np.ndarray, b: np.ndarray | int, c: np.ndarray) -> np.ndarray:
    to_a, to_b, to_c = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
    return np.where((to_a <= to_b) & (to_a <= to_c), a, np.where(to_b <= to_c, b, c))


def test_a_bad_filter_byte_is_corrupt_where_it_stands(driver: Driver) -> None:
    for height, bad_row, value in ((1, 0, 5), (7, 6, 255), (64, 63, 5), (65, 64, 128), (200, 0, 6), (200, 131, 5)):
        good, bad = random_film(1, 40, height), random_film(2, 40, height)
        bad[bad_row, 0] = value
        outs, endings = driver.films([good, bad, good], 16)
        assert (endings[1].code, endings[1].offset) == (CORRUPT, bad_row * 41)
        assert (endings[1].sum, endings[1].sumsq) == (0, 0)
        expected = pillow_resized(by_pillow(good), 16)
        assert endings[0].code == endings[2].code == 0
        assert (outs[0] == expected).all() and (outs[2] == expected).all()
        ending = Ending()
        driver.library.run_unfilter(_at(bad), height, ctypes.c_size_t(40), 1, ctypes.byref(ending))
        assert (ending.code, ending.offset) == (CORRUPT, bad_row * 41)


# ---- resample ----


@given(st.integers(0, 2**32), st.integers(1, 300), st.integers(1, 300), st.integers(8, 140), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_resample_is_pillows(driver: Driver, seed: int, width: int, height: int, size: int, gap: int) -> None:
    rng = np.random.default_rng(seed)
    grey = rng.integers(0, 256, (height, width + gap), np.uint8)[:, :width]  # rows with a gap between them
    if seed % 3 == 0:
        grey[:] = 255  # sums at their largest
    assert (driver.resample(grey, size) == pillow_resized(Image.fromarray(grey), size)).all()


@pytest.mark.parametrize("width, height", [(1, 5000), (5000, 1), (3000, 3001), (1, 1), (4097, 40)])
def test_resample_of_extreme_sizes(driver: Driver, width: int, height: int) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (height, width), np.uint8)
    for size in (8, 33, 600):
        assert (driver.resample(grey, size) == pillow_resized(Image.fromarray(grey), size)).all(), size


def test_the_sizes_of_a_film(driver: Driver) -> None:
    """A pixel more or less than 1024, and sizes up to four times the source, through the fused path."""
    for seed, (width, height) in enumerate(itertools.product((1023, 1024, 1025), repeat=2)):
        rows = random_film(seed, width, height)
        outs, endings = driver.films([rows], 224)
        expected = pillow_resized(by_pillow(rows), 224)
        assert endings[0].code == 0 and (outs[0] == expected).all()
    rows = random_film(9, 256, 250)
    for size in (250, 255, 256, 257, 512, 1000, 1024):
        outs, endings = driver.films([rows], size)
        assert endings[0].code == 0 and (outs[0] == pillow_resized(by_pillow(rows), size)).all(), size


# ---- both ----


@given(st.integers(0, 2**32), st.lists(st.tuples(st.integers(1, 150), st.integers(1, 220)), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_films_in_any_grouping(driver: Driver, seed: int, sides: list[tuple[int, int]]) -> None:
    size = 8 + seed % 90
    films = [random_film(seed + i, *side) for i, side in enumerate(sides)]
    outs, endings = driver.films(films, size)
    for film, out, ending in zip(films, outs, endings, strict=True):
        expected = pillow_resized(by_pillow(film), size)
        assert ending.code == 0 and (out == expected).all(), film.shape
        assert ending.sum == expected.sum(dtype=np.int64)
        assert ending.sumsq == (expected.astype(np.int64) ** 2).sum()


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ["-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    return compile_driver(tmp_path_factory.mktemp("sanitized"), flags, emulated=False)


@pytest.mark.parametrize("level", [PORTABLE, AVX2, AVX512])
def test_no_byte_outside_the_buffers(sanitized: Path, level: int) -> None:
    """Rows, images and scratch of exactly the promised sizes under AddressSanitizer and UBSan."""
    if level > int(subprocess.run([sanitized, "level"], check=True, capture_output=True).stdout):
        pytest.skip("this CPU has not that level")
    cases = [
        (random_film(seed, width, height), size)
        for seed, (width, height, size) in enumerate(itertools.product((1, 2, 17, 63, 64, 65, 130), EDGES, (8, 33, 65)))
    ]
    cases += [(random_film(1, 1024, 140), 224), (random_film(2, 40, 900), 16)]
    parts = [struct.pack("<4I", level, rows.shape[1] - 1, rows.shape[0], size) + rows.tobytes() for rows, size in cases]
    done = subprocess.run([sanitized], input=b"".join(parts), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    at = 0
    for rows, size in cases:
        ending = Ending.from_buffer_copy(done.stdout, at)
        at += ctypes.sizeof(Ending)
        assert ending.code == 0
        expected = pillow_resized(by_pillow(rows), size).tobytes()
        for _ in range(2):
            assert done.stdout[at : at + size * size] == expected, (rows.shape, size)
            at += size * size
    assert at == len(done.stdout)


@pytest.mark.films
@pytest.mark.slow
def test_real_films(driver_of: Builder, films: list[Path]) -> None:
    drivers, stand_ins = [], []
    for build, level in LEVELS:
        with suppress(pytest.skip.Exception):
            (drivers if build == "shipped" else stand_ins).append(driver_of((build, level)))
    assert drivers
    for i, path in enumerate(films):
        rows = film_rows(path)
        image = by_pillow(rows)
        with Image.open(path) as original:
            assert (np.asarray(original.convert("L")) == np.asarray(image)).all(), path
        for size in FILM_SIZES:
            expected = pillow_resized(image, size)
            for driver in drivers + (stand_ins if size == FILM_SIZES[i % len(FILM_SIZES)] else []):
                outs, endings = driver.films([rows], size)
                assert endings[0].code == 0 and (outs[0] == expected).all(), (path, size, driver.level)
