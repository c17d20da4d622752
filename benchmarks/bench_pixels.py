"""What do un-filter and resample to 224 cost a film at each level, against plain rows and against Pillow's resize?

Real grey films, their rows in memory as inflate leaves them, one thread, CPU time. All methods take turns on each film,
several rounds of it; the figures are medians. The program compares the fused path with the plain un-filter and resample
at every level before it goes on; tests/test_pixels.py holds both against Pillow.
"""

from __future__ import annotations

import io
import shutil
import statistics
import struct
import subprocess
import time
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
SOURCES = ["unfilter", "resample", "pixels_portable", "pixels_avx2", "pixels_avx512", "isa"]
FILMS, SIZE, ROUNDS = 40, 224, 25


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++") or pytest.skip("no C++ compiler")
    binary = tmp_path_factory.mktemp("bench") / "pixel_levels"
    sources = [ROOT / "benchmarks/pixel_levels.cpp", *(ROOT / f"csrc/png/{name}.cpp" for name in SOURCES)]
    subprocess.run([compiler, "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", *sources, "-o", binary], check=True)
    return binary


def grey_rows(file: bytes) -> bytes | None:
    """Width, height and the filtered rows of an 8-bit grey PNG file; None of any other."""
    width, height, depth, color = struct.unpack_from(">IIBB", file, 16)
    if (depth, color) != (8, 0):
        return None
    parts, at = [], 8
    while at < len(file):
        (nbytes,) = struct.unpack_from(">I", file, at)
        if file[at + 4 : at + 8] == b"IDAT":
            parts.append(file[at + 8 : at + 8 + nbytes])
        at += 12 + nbytes
    return struct.pack("<II", width, height) + zlib.decompress(b"".join(parts))


def pillow_resize_ms(file: bytes) -> float:
    image = Image.open(io.BytesIO(file))
    image.load()
    start = time.thread_time()
    image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return (time.thread_time() - start) * 1e3


@pytest.mark.films
def test_pixels(benchmark: Any, levels: Path, films: list[Path]) -> None:
    files = [path.read_bytes() for path in films if path.parent.name == "images"]
    chosen = [(file, rows) for file in files if (rows := grey_rows(file)) is not None][:FILMS]

    def run() -> str:
        given = b"".join(rows for _, rows in chosen)
        done = subprocess.run([levels, str(SIZE), str(ROUNDS)], input=given, capture_output=True)
        assert done.returncode == 0, "the levels disagree"
        return done.stdout.decode()

    times: dict[str, list[float]] = defaultdict(list)
    for line in benchmark.pedantic(run, rounds=1).splitlines():
        method, _, ms = line.split("\t")
        times[method].append(float(ms))
    times["Pillow resize"] = [pillow_resize_ms(file) for file, _ in chosen for _ in range(3)]
    print()
    for method, ms in times.items():
        benchmark.extra_info[method] = {"ms": statistics.median(ms), "tenth_ms": sorted(ms)[len(ms) // 10]}
        print(f"  {method:20} {statistics.median(ms):.3f} ms a film (fastest tenth {sorted(ms)[len(ms) // 10]:.3f})")
