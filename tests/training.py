"""A small prepared store whose classes can be learned, for the tests of training; no film is decoded."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxrfast.decode import PIXEL_RULE
from cxrfast.nih import CLASSES
from cxrfast.store import Entry, Store, StoreWriter, open_store


def make_store(path: Path, count: int = 90, size: int = 16, seed: int = 0, unknown: bool = False) -> Store:
    """``count`` films of ``size`` pixels, three a patient; class c brightens the c-th of 14 patches.

    With ``unknown``, some ages, sexes, views and labels are missing.
    """
    rng = np.random.default_rng(seed)
    labels = (rng.random((count, len(CLASSES))) < 0.3).astype(np.float32)
    images = rng.integers(60, 140, (count, size, size)).astype(np.uint8)
    side = size // 4
    for c in range(len(CLASSES)):
        row, column = divmod(c, 4)
        patch = images[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
        patch += (labels[:, c] * 90).astype(np.uint8)[:, None, None]
    patient = np.arange(count) // 3 + 1
    table = pd.DataFrame(
        {
            "file": [f"{patient[i]:08d}_{i % 3:03d}.png" for i in range(count)],
            "patient": patient,
            "age": (20 + patient % 60).astype(float),
            "sex": np.where(patient % 2, "M", "F"),
            "view": np.where(np.arange(count) % 3 == 0, "AP", "PA"),
            "follow_up": (np.arange(count) % 3).astype(float),
            **{name: labels[:, c] for c, name in enumerate(CLASSES)},
        }
    )
    if unknown:
        table.loc[::7, "age"] = np.nan
        table.loc[::5, "sex"] = ""
        table.loc[::11, "view"] = ""
        table.loc[::4, CLASSES[0]] = np.nan
        table.loc[1::3, CLASSES[13]] = np.nan
    entries = [
        Entry(
            name,
            "ok",
            pixel_sum=int(image.sum(dtype=np.int64)),
            pixel_sumsq=int((image.astype(np.int64) ** 2).sum()),
            crc32=f"{zlib.crc32(image.tobytes()):08x}",
        )
        for name, image in zip(table["file"], images, strict=True)
    ]
    with StoreWriter(path, size, {"size": size, "pixel_rule": PIXEL_RULE}, "test") as writer:
        writer.append(entries, images)
        writer.finish(table, [], {})
    return open_store(path)


def without_speeds(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what differs from one run to the same run again."""
    speeds = ("images_per_second", "input_share", "flops_share")
    return [{name: value for name, value in line.items() if name not in speeds} for line in metrics]
