"""The prepared data set on disk (DESIGN: Store).

    images.npy     uint8 (N, S, S), C order; ``np.load(mmap_mode="r")`` is all that is needed to read it
    index.csv      one row per image, in the order of images.npy
    ledger.csv     one row per film named or found: ok, repaired or rejected, each exactly once
    manifest.json  written last: a store without one is unfinished

While a store is unfinished its pixels lie in ``images.npy.part`` and what became of each film in ``journal.jsonl``.
A batch's pixels are synced to disk before the journal says so, therefore the journal never claims a row that is not
there, and whatever lies beyond its last whole line is cut off when the writer is opened again.
"""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import pandas as pd

from cxrfast.errors import InputError
from cxrfast.files import sha256_of, sync_folder, write_atomic, write_json
from cxrfast.nih import CLASSES

FORMAT = 1
INDEX_COLUMNS = (
    "file",  # film's file name
    "patient",  # integer id
    "age",  # years; empty = unknown
    "sex",  # M, F or empty = unknown
    "view",  # PA, AP or empty = unknown
    "follow_up",  # number of the visit; empty = unknown
    *CLASSES,  # 1, 0, empty = unknown
    "pixel_sum",  # sum of the image's pixels
    "pixel_sumsq",  # sum of their squares
    "crc32",  # of the image's S*S bytes, 8 hex digits
)
LEDGER_COLUMNS = ("file", "outcome", "reason")
OUTCOMES = ("ok", "repaired", "rejected")

_HEADER_NBYTES = 128  # a version 1.0 header, padded; the shape always fits


@dataclass(frozen=True)
class Store:
    """A finished store, open for reading.

    Attributes:
        path: the store's folder.
        images: uint8 (N, S, S), memory-mapped, read-only.
        index: N rows, columns ``INDEX_COLUMNS``: file str; patient int64; age float64 (NaN = unknown); sex and view str
            ("" = unknown); follow_up float64; the 14 classes float32 (1, 0, NaN = unknown); sums int64; crc32 str.
        manifest: what manifest.json holds.
    """

    path: Path
    images: np.ndarray
    index: pd.DataFrame
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def size(self) -> int:
        """S, the side of an image in pixels."""
        return int(self.images.shape[1])

    @property
    def pixel_rule(self) -> str:
        return str(self.manifest["pixel_rule"])

    @property
    def digest(self) -> str:
        """SHA-256 over the manifest's checksums: names the content of this store in a run's configuration."""
        return str(self.manifest["digest"])

    @property
    def targets(self) -> np.ndarray:
        """float32 (N, 14) in ``CLASSES`` order: 1, 0 or NaN = unknown."""
        return self.index[list(CLASSES)].to_numpy(np.float32)

    def ledger(self) -> pd.DataFrame:
        """The ledger, read anew: columns ``LEDGER_COLUMNS``."""
        return pd.read_csv(self.path / "ledger.csv", dtype=str, keep_default_na=False)


def is_store(path: Path) -> bool:
    """Whether the folder is a store, finished or not."""
    return (path / "manifest.json").is_file() or (path / "journal.jsonl").is_file()
