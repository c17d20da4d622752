"""Durable files: written beside their final name, synced, then renamed, so that a reader never sees half of one."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def make_durable(path: Path) -> None:
    """Sync the bytes of a file that somebody else wrote, or a folder's own entries (renames, new names)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def holds_other_files(folder: Path, first: Path) -> bool:
    """Whether a folder to be claimed by its ``first`` file holds anything but what a kill left of that file."""
    return folder.is_dir() and any(path != _temporary(first) for path in folder.iterdir())


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace ``path`` in one step: temporary name in the same folder, fsync, rename, fsync of the folder."""
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    make_durable(path.parent)


def write_json(path: Path, value: Any) -> None:
    """``write_atomic`` of indented JSON; NaN is refused, because JSON has none."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
