"""csrc/png without Python: the one-line build of its command, and the thread pool under ThreadSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import pillow_resized
from PIL import Image
from png_files import KINDS, random_png

from cxrfast.decode import pillow

ROOT = Path(__file__).parents[1]
SOURCES = [str(path) for path in sorted((ROOT / "csrc/png").glob("*.cpp")) if path.name != "bind.cpp"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A few films of every kind, a broken one and one that is no PNG."""
    rng = np.random.default_rng(0)
    for i, (color, depth) in enumerate(KINDS):
        (tmp_path / f"{i}.png").write_bytes(random_png(rng, 90 + i, 70, color, depth, i % 2, noise=30))
    (tmp_path / "cut.png").write_bytes((tmp_path / "1.png").read_bytes()[:-20])
    (tmp_path / "empty.png").write_bytes(b"")
    return tmp_path


def compile_line(target: Path, source: str, *flags: str) -> None:
    """The line at the head of tools/decode_png.cpp, with its warnings as errors."""
    command = ["c++", "-std=c++20", "-pthread", f"-I{ROOT / 'csrc'}", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow"]
    subprocess.run([*command, "-Werror", *flags, str(ROOT / source), *SOURCES, "-o", str(target)], check=True)


def test_decode_png_command(folder: Path) -> None:
    command = folder / "decode_png"
    compile_line(command, "tools/decode_png.cpp", "-O1")
    for i in range(len(KINDS)):
        film = folder / f"{i}.png"
        grey = pillow.decode(film)[1]
        assert grey is not None
        subprocess.run([command, film, folder / "own.pgm"], check=True)
        assert np.array_equal(np.asarray(Image.open(folder / "own.pgm")), grey)
        subprocess.run([command, film, folder / "small.pgm", "32"], check=True)
        expected = pillow_resized(Image.fromarray(grey), 32)
        assert np.array_equal(np.asarray(Image.open(folder / "small.pgm")), expected)
    failed = subprocess.run([command, folder / "cut.png", folder / "no.pgm"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert "cut.png: corrupt: truncated chunk at byte" in failed.stderr
    assert not (folder / "no.pgm").exists()
    assert subprocess.run([command, folder / "0.png"], capture_output=True).returncode == 2


def test_pool_has_no_race(folder: Path) -> None:
    command = folder / "pool_race"
    compile_line(command, "tests/pool_race.cpp", "-O1", "-g", "-fsanitize=thread", "-Wno-error")
    films = [*sorted(folder.glob("*.png")), folder / "absent.png"]
    ran = subprocess.run([command, *films], capture_output=True, text=True)
    assert "ThreadSanitizer" not in ran.stderr, ran.stderr
    assert ran.returncode == 0, ran.stderr
