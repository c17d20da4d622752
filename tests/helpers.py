"""Small inputs that several test files make: films, their CSV, and a finished store."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from PIL import __version__ as pillow_version

from cxrfast.nih import CLASSES

CSV_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)


def film(seed: int, side: int = 64) -> np.ndarray:
    """A smooth noisy grey image, uint8 (side, side)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 200, (6, 6), np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(np.clip(np.asarray(coarse, np.int16) + rng.integers(0, 30, (side, side)), 0, 255), np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """PNG bytes of a uint8 image (H, W), (H, W, 3) or (H, W, 4)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def file_name(index: int) -> str:
    """NIH's naming: three films a patient."""
    return f"{index // 3 + 1:08d}_{index % 3:03d}.png"


def csv_row(index: int) -> str:
    """One row of the v2020 CSV: every class occurs among any 15 consecutive films."""
    label = ("No Finding", *CLASSES)[index % 15]
    sex, view = "MF"[index // 3 % 2], ("PA", "AP")[index % 2]
    age = 20 + index // 3 % 60
    return f"{file_name(index)},{label},{index % 3},{index // 3 + 1},{age},{sex},{view},2500,2048,0.168,0.168"


def write_films(folder: Path, count: int, side: int = 64) -> Path:
    """``folder`` with ``count`` films in NIH's layout and their CSV; returns the folder."""
    images = folder / "images"
    images.mkdir(parents=True)
    for index in range(count):
        (images / file_name(index)).write_bytes(png(film(index, side)))
    write_csv(folder / "Data_Entry_2017_v2020.csv", count)
    return folder


def write_csv(path: Path, count: int) -> Path:
    path.write_text("\n".join([CSV_HEADER, *(csv_row(index) for index in range(count))]) + "\n")
    return path


def pillow_prepared(data: bytes, size: int) -> np.ndarray:
    """The pixel rule, as its definition has it (8-bit films)."""
    return pillow_resized(Image.open(io.BytesIO(data)).convert("L"), size)


def pillow_resized(grey: Image.Image, size: int) -> np.ndarray:
    """Pillow's resize, in the order of passes that Pillow 13.0 has, whichever version is installed."""
    first = (size, size)
    if int(pillow_version.split(".")[0]) < 13:
        shrink_w, shrink_h = grey.width - size, grey.height - size
        first = (grey.width, size) if shrink_h > max(0, 2 * shrink_w) else (size, grey.height)
    once = grey.resize(first, Image.Resampling.BILINEAR)
    return np.asarray(once.resize((size, size), Image.Resampling.BILINEAR))


def content(folder: Path) -> dict[str, bytes]:
    """Bytes of every file in and below ``folder``, sorted by its path there; folders are named, too, with a slash."""
    paths = sorted(folder.rglob("*"))
    return {
        f"{path.relative_to(folder)}{'/' * path.is_dir()}": b"" if path.is_dir() else path.read_bytes()
        for path in paths
    }
