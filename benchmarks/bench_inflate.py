"""How fast are the zlib streams of real films inflated, against libdeflate, ISA-L and zlib, one thread, in memory?

Ours takes the films through one call, as the decoder does, three of them interleaved; a rival takes one after the
other. Every output is compared with zlib's before anything is timed. Times are CPU time of the thread; groups of twenty
films go through all methods in turn, several rounds of it, and the figures are medians over groups and rounds. ISA-L is
timed without the checksum, which the others verify.
"""

from __future__ import annotations

import shutil
import statistics
import struct
import subprocess
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ["inflate", "inflate_careful", "inflate_portable", "inflate_avx2", "inflate_tables_avx512", "adler32", "isa"]
ROUNDS = 7


@pytest.fixture(scope="module")
def rivals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++") or pytest.skip("no C++ compiler")
    binary = tmp_path_factory.mktemp("bench") / "inflate_rivals"
    sources = [ROOT / "benchmarks/inflate_rivals.cpp", *(ROOT / f"csrc/png/{name}.cpp" for name in SOURCES)]
    subprocess.run([compiler, "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", *sources, "-ldl", "-o", binary], check=True)
    return binary


def stream_of(file: bytes) -> tuple[int, bytes]:
    """(colour type, the joined IDAT payloads) of a PNG file."""
    parts, at = [], 8
    while at < len(file):
        (nbytes,) = struct.unpack_from(">I", file, at)
        if file[at + 4 : at + 8] == b"IDAT":
            parts.append(file[at + 8 : at + 8 + nbytes])
        at += 12 + nbytes
    return file[25], b"".join(parts)


@pytest.mark.films
@pytest.mark.parametrize("kind", ["grey", "reencoded"])
def test_inflate(benchmark: Any, rivals: Path, films: list[Path], kind: str) -> None:
    """grey: NIH's own grey files, the 99 %. reencoded: the copies with row filter Sub throughout."""
    parts = []
    for path in films:
        color, stream = stream_of(path.read_bytes())
        if color == 0 and (path.parent.name == "images_reencoded") == (kind == "reencoded"):
            truth = zlib.decompress(stream)
            parts += [struct.pack("<QQ", len(stream), len(truth)), stream, truth]

    def run() -> str:
        done = subprocess.run([rivals, str(ROUNDS)], input=b"".join(parts), capture_output=True, check=True)
        return done.stdout.decode()

    times: dict[str, list[float]] = defaultdict(list)
    for line in benchmark.pedantic(run, rounds=1).splitlines():
        method, _, ms = line.split("\t")
        times[method].append(float(ms))
    base = times.get("libdeflate") or times["zlib"]
    print(f"\n{kind}: {'libdeflate' if 'libdeflate' in times else 'zlib'} = 1")
    for method, ms in times.items():
        ratios = sorted(b / m for b, m in zip(base, ms, strict=True))
        figures = {"ms": statistics.median(ms), "least_ms": min(ms), "ratio": statistics.median(ratios)}
        low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
        benchmark.extra_info[method] = figures
        print(f"  {method:22} {figures['ms']:.2f} ms a film, {figures['ratio']:.2f} x faster ({low:.2f} to {high:.2f})")
