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

import csv
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from cxrfast.errors import InputError
from cxrfast.files import make_durable, sha256_of, write_atomic, write_json
from cxrfast.nih import CLASSES

try:
    from cxrfast._png import crc32  # the same sum, many times as fast
except ImportError:
    from zlib import crc32

if TYPE_CHECKING:  # loaded by those who read a store; writing one does without
    import pandas as pd

FORMAT = 1
_IMAGE_COLUMNS = (
    "pixel_sum",  # sum of the image's pixels
    "pixel_sumsq",  # sum of their squares
    "crc32",  # of the image's S*S bytes, 8 hex digits
)
INDEX_COLUMNS = (
    "file",  # film's file name
    "patient",  # integer id
    "age",  # years; empty = unknown
    "sex",  # M, F or empty = unknown
    "view",  # PA, AP or empty = unknown
    "follow_up",  # number of the visit; empty = unknown
    *CLASSES,  # 1, 0, empty = unknown
    *_IMAGE_COLUMNS,
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
        import pandas as pd

        return pd.read_csv(self.path / "ledger.csv", dtype=str, keep_default_na=False)


def is_store(path: Path) -> bool:
    """Whether the folder is a store, finished or not."""
    return (path / "manifest.json").is_file() or (path / "journal.jsonl").is_file()


def open_store(path: Path | str) -> Store:
    """Open a finished store for reading; the pixels stay on disk until they are touched.

    Index, ledger and manifest are checked against the manifest's checksums, the pixels by their number only
    (``verify_pixels`` reads them all).

    Raises:
        InputError: not a store, unfinished, of another format, or its files do not fit together.
    """
    path = Path(path)
    if not (path / "manifest.json").is_file():
        if is_store(path):
            raise InputError(f"{path} is an unfinished store; repeat the cxrfast-prep command that began it")
        raise InputError(f"{path} is not a store (it has no manifest.json); make one with cxrfast-prep")
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            raise InputError(
                f"{path} has store format {manifest['format']}, this cxrfast reads format {FORMAT}; prepare it anew"
            )
        for name in ("index.csv", "ledger.csv"):
            if sha256_of(path / name) != manifest["sha256"][name]:
                raise InputError(f"{path / name} was changed after the store was finished; prepare it anew")
        images = np.load(path / "images.npy", mmap_mode="r", allow_pickle=False)
        index = _read_index(path / "index.csv")
        size, count = manifest["size"], manifest["counts"]["images"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read as a store ({error}); prepare it anew") from error
    if images.dtype != np.uint8 or images.shape != (count, size, size) or len(index) != count:
        raise InputError(
            f"{path} is damaged: the manifest says {count} images of {size} x {size}, images.npy holds {images.dtype} "
            f"{images.shape} and index.csv {len(index)} rows; prepare it anew"
        )
    if manifest["classes"] != list(CLASSES):
        raise InputError(f"{path} has another class order than this cxrfast; prepare it anew")
    return Store(path, images, index, manifest)


def verify_pixels(store: Store) -> None:
    """Read every image and compare it with the checksum in the index.

    Raises:
        InputError: names the first image whose bytes changed.
    """
    for row, (name, expected) in enumerate(zip(store.index["file"], store.index["crc32"], strict=True)):
        if checksum(store.images[row]) != expected:
            raise InputError(f"{store.path}: the pixels of {name} (row {row}) do not match their checksum")


def checksum(image: np.ndarray) -> str:
    """CRC-32 of an image's bytes (uint8, C-contiguous), as 8 hex digits: the index's column crc32."""
    return f"{crc32(image.data):08x}"


@dataclass(frozen=True)
class Entry:
    """What became of one film, as the journal keeps it.

    ``outcome`` and ``reason`` go to the ledger; sums and checksum are those of the image, 0 for a rejected film.
    """

    file: str
    outcome: str
    reason: str = ""
    pixel_sum: int = 0
    pixel_sumsq: int = 0
    crc32: str = ""

    @property
    def accepted(self) -> bool:
        return self.outcome != "rejected"


class StoreWriter:
    """Creates a store, or goes on with an unfinished one.

    ``append`` batches of entries with their images in the plan's order, ``sync`` now and then, ``finish`` once.
    Used as a context manager it holds a lock, so that two commands never write one store.

    Args:
        path: the store's folder; made when absent.
        size: S.
        identity: what must be equal for a store to be continued (pixel rule, size, sources' digest, …); JSON values.
        backend: the decoder in use; the manifest names every one that took part.
        expected: images that there will be if no film is rejected; then their checksum is known when the last one is
            written, and ``finish`` need not read them all again.

    Raises:
        InputError: the folder holds something else, or a store that was begun with another identity.
    """

    def __init__(self, path: Path, size: int, identity: dict[str, Any], backend: str, expected: int = 0) -> None:
        self.path = path
        self.entries: list[Entry] = []
        self.backends: list[str] = []
        self._size = size
        self._row_nbytes = size * size
        self._pending: list[Entry] = []
        self._identity = identity
        self._expected = expected
        self._sha256 = hashlib.sha256(_npy_header((expected, size, size)))  # of images.npy, when nothing is missing
        self._appended = 0  # images that it covers
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; the store must be a folder")
        if is_store(path):
            self._check_identity()
        elif path.is_dir() and any(path.iterdir()):
            raise InputError(f"{path} holds other files; choose an empty or new folder for the store")
        self.finished = (path / "manifest.json").is_file()
        if self.finished:
            (path / "journal.jsonl").unlink(missing_ok=True)
            return
        path.mkdir(parents=True, exist_ok=True)
        self._journal = open(path / "journal.jsonl", "a+b")  # noqa: SIM115 (closed by __exit__)
        _lock(self._journal, path)
        self._resume(backend)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.finished:
            return
        try:
            if kind is None or issubclass(kind, KeyboardInterrupt):
                self.sync()
        finally:
            self._journal.close()
            self._images.close()

    def append(self, entries: list[Entry], images: np.ndarray) -> None:
        """Add films in the plan's order: N entries, and uint8 (M, S, S) for the M accepted ones among them."""
        if len(images) != sum(entry.accepted for entry in entries) or images.dtype != np.uint8:
            raise ValueError(f"images must be uint8, one for each accepted entry, got {images.dtype} {images.shape}")
        pixels = np.ascontiguousarray(images).data
        self._images.write(pixels)
        self._sha256.update(pixels)
        self._appended += len(images)
        self._pending += entries

    def sync(self) -> None:
        """Make everything appended so far durable: the pixels first, then the journal that vouches for them."""
        if not self._pending:
            return
        self._images.flush()
        os.fsync(self._images.fileno())
        lines = "".join(json.dumps(list(vars(entry).values())) + "\n" for entry in self._pending)
        self._journal.write(lines.encode())
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self.entries += self._pending
        self._pending = []

    def finish(self, table: Mapping[str, Any] | pd.DataFrame, others: list[Entry], manifest: dict[str, Any]) -> None:
        """Write index, ledger and, last, the manifest.

        Args:
            table: metadata: the first 20 of ``INDEX_COLUMNS``, each with one value per accepted entry, in order.
            others: entries for films that were never decoded (absent from the disk or from the CSV).
            manifest: what prep knows and the store does not: source, CSV generation, repairs.
        """
        self.sync()
        accepted = [entry for entry in self.entries if entry.accepted]
        if list(table["file"]) != [entry.file for entry in accepted]:
            raise ValueError("table must have one row per accepted film, in the store's order")
        of_images = {name: [getattr(entry, name) for entry in accepted] for name in _IMAGE_COLUMNS}
        index = {name: of_images[name] if name in of_images else table[name] for name in INDEX_COLUMNS}
        ledger = sorted([*self.entries, *others], key=lambda entry: entry.file)
        self._finish_images(len(accepted))
        known = self._appended == self._expected == len(accepted)  # not so after a resumption, or with a film rejected
        images_sha256 = self._sha256.hexdigest() if known else sha256_of(self.path / "images.npy")
        write_atomic(self.path / "index.csv", _index_csv(index))
        write_atomic(self.path / "ledger.csv", _ledger_csv(ledger))
        checksums = {
            "images.npy": images_sha256,
            **{name: sha256_of(self.path / name) for name in ("index.csv", "ledger.csv")},
        }
        outcomes = Counter(entry.outcome for entry in ledger)
        content = {
            "format": FORMAT,
            **self._identity,
            "backend": "+".join(self.backends),
            **manifest,
            "counts": {
                "films": len(ledger),
                "images": len(accepted),
                **{outcome: outcomes[outcome] for outcome in OUTCOMES},
            },
            "rejected": _count_reasons(ledger),
            "classes": list(CLASSES),
            "sha256": checksums,
            "digest": _digest(checksums),
        }
        write_json(self.path / "manifest.json", content)
        self.finished = True
        self._journal.close()
        (self.path / "journal.jsonl").unlink()
        make_durable(self.path)

    def _check_identity(self) -> None:
        manifest, journal = self.path / "manifest.json", self.path / "journal.jsonl"
        try:
            if manifest.is_file():
                begun = json.loads(manifest.read_text())
            else:
                with open(journal) as file:
                    first = file.readline()
                if not first.endswith("\n"):  # killed before the first line was whole: nothing was begun
                    return
                begun = json.loads(first)["identity"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path} cannot be read as a store ({error}); choose another folder") from error
        for key, value in self._identity.items():
            if begun.get(key) != value:
                raise InputError(
                    f"{self.path} was begun with another {key.replace('_', ' ')} ({begun.get(key)}, now {value}); "
                    "repeat the command that began it, or choose another folder"
                )

    def _resume(self, backend: str) -> None:
        """Read the journal's whole lines, cut off what lies behind them, and place the writer there."""
        self._journal.seek(0)
        valid_nbytes = 0
        sessions: list[dict[str, Any]] = []
        for line in self._journal:
            if not line.endswith(b"\n"):
                break
            record = json.loads(line)
            if isinstance(record, dict):
                sessions.append(record)
            else:
                self.entries.append(Entry(*record))
            valid_nbytes += len(line)
        self._journal.truncate(valid_nbytes)
        self._journal.seek(0, os.SEEK_END)
        self.backends = list(dict.fromkeys([*(session["backend"] for session in sessions), backend]))
        if not sessions or sessions[-1]["backend"] != backend:
            self._journal.write(json.dumps({"identity": self._identity, "backend": backend}).encode() + b"\n")
            self._journal.flush()
            os.fsync(self._journal.fileno())
            make_durable(self.path)
        self._images = self._open_images()

    def _open_images(self) -> BinaryIO:
        part, final = self.path / "images.npy.part", self.path / "images.npy"
        if final.is_file():  # killed between the renaming of the images and the manifest
            os.replace(final, part)
        rows = sum(entry.accepted for entry in self.entries)
        nbytes = _HEADER_NBYTES + rows * self._row_nbytes
        if part.is_file() and part.stat().st_size < nbytes and rows:
            raise InputError(f"{part} is shorter than its journal says; remove {self.path} and start again")
        file = open(part, "r+b" if part.is_file() else "w+b")  # noqa: SIM115 (closed by __exit__)
        file.truncate(nbytes)
        file.seek(nbytes)
        return file

    def _finish_images(self, count: int) -> None:
        self._images.seek(0)
        self._images.write(_npy_header((count, self._size, self._size)))
        self._images.flush()
        os.fsync(self._images.fileno())
        self._images.close()
        os.replace(self.path / "images.npy.part", self.path / "images.npy")
        make_durable(self.path)


def _lock(journal: BinaryIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows; a second writer is then the user's to avoid
        return
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        journal.close()
        raise InputError(f"{path} is being written by another cxrfast-prep; wait for it, or stop it") from None


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """An .npy header of fixed length, so that it can be replaced when the number of rows is known."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer,
        {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape},
    )
    header = buffer.getvalue()
    if len(header) != _HEADER_NBYTES:
        raise ValueError(f"an .npy header of {len(header)} bytes for shape {shape}, expected {_HEADER_NBYTES}")
    return header


def _index_csv(index: Mapping[str, Any]) -> str:
    """Whole numbers without a decimal point, NaN empty, every float with the digits that give it back."""
    return _csv(tuple(index), zip(*(_cells(values) for values in index.values()), strict=True))


def _cells(values: Any) -> list[Any]:
    """A column as the CSV has it."""
    column = np.asarray(values)
    cells: list[Any] = column.tolist()
    if column.dtype.kind != "f":
        return cells
    written = {value: _number(value) for value in set(cells)}  # few values in many rows
    return [written[value] for value in cells]


def _number(value: float) -> str:
    if np.isnan(value):
        return ""
    return str(int(value)) if value == int(value) else repr(value)


def _ledger_csv(ledger: list[Entry]) -> str:
    return _csv(LEDGER_COLUMNS, ((entry.file, entry.outcome, entry.reason) for entry in ledger))


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _read_index(path: Path) -> pd.DataFrame:
    import pandas as pd

    text = {name: str for name in ("file", "age", "sex", "view", "follow_up", "crc32")}
    whole = {name: np.int64 for name in ("patient", "pixel_sum", "pixel_sumsq")}
    labels = {name: np.float32 for name in CLASSES}
    dtypes: Any = {**text, **whole, **labels}  # stubs of pandas 2 want less than pandas takes
    index = pd.read_csv(path, dtype=dtypes, keep_default_na=False, na_values={name: [""] for name in labels})
    if list(index.columns) != list(INDEX_COLUMNS):
        raise ValueError(f"{path.name} has the columns {list(index.columns)}")
    for name in ("age", "follow_up"):  # exact, which pandas 2 is not by default, and how to ask differs among versions
        index[name] = np.array([float(number or "nan") for number in index[name]])
    return index


def _count_reasons(ledger: list[Entry]) -> dict[str, int]:
    """How many films were rejected for each typed reason (the words before the colon), in alphabetical order."""
    return dict(sorted(Counter(entry.reason.split(":")[0] for entry in ledger if not entry.accepted).items()))


def _digest(checksums: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()
