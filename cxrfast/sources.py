"""Where film bytes come from: a folder tree in any of the layouts in which ChestX-ray14 circulates.

Kaggle's ``images_001/images/*.png … images_012/images/``, NIH's unpacked tars and one flat ``images/`` differ only in
depth, so films are found recursively and known by their file name alone. Left out: reading inside archives.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cxrfast.errors import InputError

FILM_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".dcm", ".dicom"})
"""What counts as a film found. What cannot be decoded among them stands in the ledger."""

_ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip")


@dataclass(frozen=True)
class Source:
    """A folder of films.

    Attributes:
        root: the folder that was searched.
        films: file name → path, sorted by file name (text: a hundred thousand Path objects take seconds).
        csvs: every CSV file found beside them, sorted.
        digest: SHA-256 over the films' names and sizes in bytes: the same films give the same digest.
    """

    root: Path
    films: dict[str, str]
    csvs: list[Path]
    digest: str


def find_films(root: Path) -> Source:
    """Search a folder tree for films and CSVs; links are followed, hidden files (``._*`` of macOS) are not films.

    Raises:
        InputError: no such folder, no film in it, or two films of the same name.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder; give the folder that holds the films")
    films: dict[str, str] = {}
    sizes: dict[str, int] = {}
    csvs: list[Path] = []
    archives: list[Path] = []
    for entry in _files(root):
        suffix = os.path.splitext(entry.name)[1].lower()
        if suffix in FILM_SUFFIXES:
            if entry.name in films:
                raise InputError(
                    f"two films have the name {entry.name} ({films[entry.name]} and {entry.path}); "
                    "films are known by their file name: remove one, or give the folder of one copy"
                )
            films[entry.name] = entry.path
            sizes[entry.name] = _nbytes(entry)
        elif suffix == ".csv":
            csvs.append(Path(entry.path))
        elif entry.name.lower().endswith(_ARCHIVE_SUFFIXES):
            archives.append(Path(entry.path))
    if not films:
        hint = f"; extract {archives[0].name} first" if archives else ""
        raise InputError(f"{root} holds no film (no {', '.join(sorted(FILM_SUFFIXES))} file){hint}")
    ordered = dict(sorted(films.items()))
    digest = hashlib.sha256("".join(f"{name}\t{sizes[name]}\n" for name in ordered).encode()).hexdigest()
    return Source(root, ordered, sorted(csvs), digest)


def _nbytes(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a dangling link is a film that was found and cannot be read: its place is the ledger
        return -1


def _files(root: Path) -> Iterator[os.DirEntry[str]]:
    """What is not a folder and not hidden, below ``root``, in a fixed order; a cycle of links is entered once."""
    waiting, visited = [str(root)], set[str]()
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in visited:
            continue
        visited.add(real)
        with os.scandir(folder) as entries:
            ordered = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
        subfolders = []
        for entry in ordered:
            if entry.is_dir():
                subfolders.append(entry.path)
            else:
                yield entry
        waiting += reversed(subfolders)
