"""Does prep keep the decoder busy, and is a film as cheap among 50,000 as among 1,000?

The whole command, start-up, planning and checksums included, on all cores, against a loop over Pillow on one core and
against the decoder alone, which takes the same films from memory and writes nothing. The films are the real ones,
repeated as hard links, from a warm page cache; every row of the store is checked. The two others are timed on both
sides of the command, so that a machine whose speed drifts does less harm.

    python -m pytest --benchmark-only benchmarks/bench_prep.py -s
    CXRFAST_BENCH_LONG=1 python -m pytest --benchmark-only benchmarks/bench_prep.py -s     (50,000 and 112,120 too)
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import file_name, pillow_prepared, write_csv

from cxrfast.decode.backends import available_cores
from cxrfast.decode.native import NativeDecoder
from cxrfast.store import open_store

SIZE = 224
LONG = pytest.mark.skipif(not os.environ.get("CXRFAST_BENCH_LONG"), reason="set CXRFAST_BENCH_LONG=1")

# The command, and what its memory came to at most. (A child's ru_maxrss begins with its parent's memory.)
COMMAND = """
import re, sys
from cxrfast.cli.prep import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1], file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)  # 112,120 films are 5.6 GB, which pytest would keep


def link_films(folder: Path, originals: list[bytes], count: int) -> None:
    images = folder / "images"
    images.mkdir(parents=True)
    for index in range(count):
        if index < len(originals):
            (images / file_name(index)).write_bytes(originals[index])
        else:
            os.link(images / file_name(index % len(originals)), images / file_name(index))
    write_csv(folder / "Data_Entry_2017_v2020.csv", count)
    os.sync()  # otherwise prep's first sync waits until all of these are on the disk, too


@pytest.mark.films
@pytest.mark.parametrize("count", [1_000, 10_000, *(pytest.param(count, marks=LONG) for count in (50_000, 112_120))])
def test_prep(benchmark: Any, data: Path, folder: Path, count: int) -> None:
    originals = [path.read_bytes() for path in sorted((data / "nih" / "images").glob("*.png"))]
    link_films(folder / "films", originals, count)
    command = [sys.executable, "-c", COMMAND, str(folder / "films"), str(folder / "store")]
    decoder = NativeDecoder(available_cores())
    seconds: dict[str, list[float]] = {"pillow": [], "decoder": [], "decoder_cpu": []}
    decoder.decode_resize(originals, SIZE)  # not timed: threads begin, memory is allocated

    def others() -> np.ndarray:
        begin = time.perf_counter()
        images = [pillow_prepared(film, SIZE) for film in originals]
        seconds["pillow"].append((time.perf_counter() - begin) / len(originals))
        begin, cpu = time.perf_counter(), time.process_time()
        for _ in range(5):
            decoder.decode_resize(originals, SIZE)
        seconds["decoder"].append((time.perf_counter() - begin) / (5 * len(originals)))
        seconds["decoder_cpu"].append((time.process_time() - cpu) / (5 * len(originals)))
        return np.array(images)

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, check=True)

    expected = others()
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = benchmark.pedantic(run, rounds=1)
    whole, after = (time.perf_counter() - begin) / count, resource.getrusage(resource.RUSAGE_CHILDREN)
    others()

    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["images"] == count
    rows = open_store(folder / "store").images
    for first in range(0, count, len(expected)):
        assert np.array_equal(rows[first : first + len(expected)], expected[: count - first])

    pillow, alone, alone_cpu = (sum(both) / 2 for both in seconds.values())
    whole_cpu = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / count
    figures = {
        "films": count,
        "pillow_per_s": round(1 / pillow),
        "decoder_per_s": round(1 / alone),
        "command_per_s": round(1 / whole),
        "command_to_pillow": round(pillow / whole, 1),
        "command_to_decoder": round(alone / whole, 2),
        "prep_to_decoder": round(printed["images_per_second"] * alone, 2),  # without start-up and planning
        "ms_per_film": round(whole * 1e3, 3),
        "prep_ms_per_film": round(1e3 / printed["images_per_second"], 3),
        "cpu_ms_per_film": round(whole_cpu * 1e3, 3),
        "decoder_cpu_ms_per_film": round(alone_cpu * 1e3, 3),
        "resident_mb": round(int(done.stderr.splitlines()[-1]) / 1024),
    }
    benchmark.extra_info.update(figures)
    print(f"\n  {figures}")
