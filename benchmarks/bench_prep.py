"""Does prep keep the decoder busy? The whole command on all cores, against a loop over Pillow on one.

10,000 films, the real ones repeated as hard links, from a warm page cache; start-up, planning and checksums included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import file_name, pillow_prepared, write_csv

from cxrfast.decode.backends import available_cores
from cxrfast.decode.native import NativeDecoder
from cxrfast.store import open_store

COUNT, SIZE = 10_000, 224


@pytest.mark.films
def test_prep(benchmark: Any, data: Path, tmp_path: Path) -> None:
    originals = [path.read_bytes() for path in sorted((data / "nih" / "images").glob("*.png"))]
    images = tmp_path / "films" / "images"
    images.mkdir(parents=True)
    for index in range(COUNT):
        if index < len(originals):
            (images / file_name(index)).write_bytes(originals[index])
        else:
            os.link(images / file_name(index % len(originals)), images / file_name(index))
    write_csv(tmp_path / "films" / "Data_Entry_2017_v2020.csv", COUNT)
    command = [sys.executable, "-m", "cxrfast.cli.prep", str(tmp_path / "films"), str(tmp_path / "store")]

    begin = time.perf_counter()
    expected = [pillow_prepared(film, SIZE) for film in originals]
    pillow = len(originals) / (time.perf_counter() - begin)
    decoder = NativeDecoder(available_cores())
    begin = time.perf_counter()
    for _ in range(5):
        decoder.decode_resize(originals, SIZE)
    alone = 5 * len(originals) / (time.perf_counter() - begin)

    def run() -> dict[str, Any]:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return dict(json.loads(done.stdout.splitlines()[-1]))

    begin = time.perf_counter()
    printed = benchmark.pedantic(run, rounds=1)
    whole = COUNT / (time.perf_counter() - begin)
    assert printed["images"] == COUNT
    assert np.array_equal(open_store(tmp_path / "store").images[: len(expected)], expected)
    figures = {
        "pillow_per_s": round(pillow),
        "decoder_per_s": round(alone),
        "command_per_s": round(whole),
        "command_to_pillow": round(whole / pillow, 1),
        "command_to_decoder": round(whole / alone, 2),
        "prep_to_decoder": round(printed["images_per_second"] / alone, 2),
    }
    benchmark.extra_info.update(figures)
    print(f"\n  {figures}")
