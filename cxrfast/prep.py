"""Films and their CSV to a store: plan, decode, write, and one ledger row for every film named or found.

The films are decoded in the order of their names, as far ahead of the writing as ``_AHEAD_NBYTES`` allows, so that the
decoder waits neither for the disk nor for Python. Batches are written in their order, so a run that was killed goes on
with the first film that the journal does not hold.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
import tyro
from tqdm import tqdm

from cxrfast.decode import MAX_SIZE, MIN_SIZE, Code, Decoded, Decoder, Status
from cxrfast.decode.backends import choose_decoder
from cxrfast.errors import InputError
from cxrfast.files import sha256_of
from cxrfast.nih import Metadata, read_metadata
from cxrfast.sources import Source, find_films
from cxrfast.store import Entry, StoreWriter, checksum, is_store

_SYNC_SECONDS = 0.5  # between two syncs of what was written; a power cut costs that and the films decoded ahead
_AHEAD_NBYTES = 128 << 20  # of images decoded ahead: a second of work for a disk that makes the writing wait


@dataclass(frozen=True)
class PrepConfig:
    """What a store is made from, and how. All of it but ``workers`` and ``strict`` decides its content."""

    src: tyro.conf.Positional[Path]
    """Folder with the films, in any of NIH's or Kaggle's layouts; searched recursively."""
    store: tyro.conf.Positional[Path]
    """Folder for the store; made when absent. An unfinished store of the same command is gone on with."""
    csv: Optional[Path] = None  # noqa: UP045 (tyro understands "|" through typeguard, which takes 30 ms to load)
    """Metadata CSV of any generation (Data_Entry_2017*.csv, sample_labels.csv). Default: the one in SRC."""
    size: int = 224
    """Side of the prepared image in pixels."""
    backend: Literal["auto", "native", "pillow", "dali", "dali-native"] = "auto"
    """What decodes the films. auto takes the fastest that is installed. All give the same pixels, except where DALI
    resizes: dali, and dali-native with --require-gpu, are within one level of the others."""
    require_gpu: bool = False
    """Fail where no GPU can take part (in the resize: no GPU decodes PNG) instead of preparing on the CPU alone."""
    workers: int = 0
    """Threads, or processes of the Pillow backend. 0: one for each core."""
    strict: bool = False
    """End with exit code 1 when a film was rejected."""


@dataclass(frozen=True)
class Plan:
    """What is to be done: the films to decode, and the films that cannot be."""

    source: Source
    metadata: Metadata
    csv: Path
    names: list[str]  # films to decode, sorted: on the disk and in the CSV
    others: list[Entry]  # rejected unseen: on the disk only, or in the CSV only


def prepare(config: PrepConfig) -> dict[str, Any]:
    """Make the store, or go on with it; repeated on a finished store it changes nothing.

    Returns:
        What the command prints: store, counts by outcome, rejected films by reason, images per second.

    Raises:
        InputError: wrong options or input; what is wrong and what to do.
        ResourceError, OSError: disk or memory ran out; the same command goes on.
    """
    plan = make_plan(config)
    began = time.monotonic()
    decoder, why = choose_decoder(config.backend, config.workers, config.require_gpu)
    identity = {
        "size": config.size,
        "pixel_rule": decoder.pixel_rule,
        "sources_digest": plan.source.digest,
        "csv_digest": sha256_of(plan.csv),
    }
    with StoreWriter(config.store, config.size, identity, decoder.name, expected=len(plan.names)) as writer:
        done = len(writer.entries)
        if writer.finished:
            tqdm.write(f"{config.store} is finished already; nothing was changed", file=sys.stderr)
            return _result(config.store, 0, 0.0)
        tqdm.write(f"decoding with {decoder.name}: {why}", file=sys.stderr)
        with decoder:
            _decode_all(plan, config.size, decoder, writer)
        writer.finish(
            plan.metadata.columns_of([entry.file for entry in writer.entries if entry.accepted]),
            plan.others,
            {
                "source": str(config.src.resolve()),
                "csv": str(plan.csv.resolve()),
                "csv_generation": plan.metadata.generation,
                "csv_repairs": plan.metadata.repairs,
            },
        )
    return _result(config.store, len(plan.names) - done, time.monotonic() - began)


def make_plan(config: PrepConfig) -> Plan:
    """Find films and metadata, and check everything that can be wrong before a byte is written."""
    if not MIN_SIZE <= config.size <= MAX_SIZE:
        raise InputError(f"--size {config.size} is out of range; it must be {MIN_SIZE} to {MAX_SIZE} pixels")
    if config.workers < 0:
        raise InputError(f"--workers {config.workers} is negative; give 0 for one a core")
    if is_store(config.src):
        raise InputError(f"{config.src} is a store, not a folder of films; a store is what cxrfast-train reads")
    if config.src.resolve() == config.store.resolve():
        raise InputError(f"{config.store} holds the films; choose another folder for the store")
    source = find_films(config.src)
    csv = config.csv or _find_csv(source)
    metadata = read_metadata(csv)
    named = set(metadata.columns["file"].tolist())
    names = [name for name in source.films if name in named]
    if not names:
        raise InputError(
            f"none of the {len(source.films)} films in {config.src} is named in {csv}; give the CSV of these films"
        )
    others = [Entry(name, "rejected", "not in the CSV") for name in source.films if name not in named]
    others += [Entry(name, "rejected", "not on the disk") for name in sorted(named - source.films.keys())]
    return Plan(source, metadata, csv, names, others)


def _find_csv(source: Source) -> Path:
    """The metadata CSV beside the films: the only one there whose header has NIH's two essential columns."""
    beside = [path for path in source.root.resolve().parent.glob("*.csv") if path.is_file()]
    for where in (source.csvs, beside):
        found = [path for path in where if _is_metadata(path)]
        if len(found) > 1:
            raise InputError(f"{found[0]} and {found[1]} are both metadata; choose one with --csv")
        if found:
            return found[0]
    raise InputError(f"no metadata CSV in {source.root}; give one with --csv (NIH: Data_Entry_2017_v2020.csv)")


def _is_metadata(path: Path) -> bool:
    with open(path, encoding="utf-8", errors="replace") as file:
        header = file.readline()
    return "Image Index" in header and "Finding Labels" in header


def _decode_all(plan: Plan, size: int, decoder: Decoder, writer: StoreWriter) -> None:
    """Decode and write what the journal does not hold yet."""
    names = plan.names[len(writer.entries) :]
    synced = time.monotonic()
    with (
        tqdm(total=len(plan.names), initial=len(writer.entries), unit=" images", smoothing=0.05) as bar,
        closing(_decode_ahead(plan.source, names, size, decoder)) as batches,
    ):
        for batch, decoded in batches:
            _write(plan, batch, decoded, size, writer)
            bar.update(len(batch))
            if time.monotonic() - synced > _SYNC_SECONDS:
                writer.sync()
                synced = time.monotonic()
    writer.sync()


def _decode_ahead(
    source: Source, names: list[str], size: int, decoder: Decoder
) -> Generator[tuple[list[str], Decoded], None, None]:
    """The films in batches, in order; the batches that follow are decoded meanwhile.

    Yields:
        The batch's names, and its images, which are overwritten after the next step. Closed early, it drops what is
        waiting and ends with the calls under way.
    """
    films = max(1, min(decoder.batch_films, _AHEAD_NBYTES // (decoder.calls + 1) // size**2))
    ahead = max(decoder.calls, _AHEAD_NBYTES // (films * size**2))
    batches = _batches(names, films, decoder.calls)
    free: list[np.ndarray] = []  # the last one written is the next one used: it is still in the cache
    waiting: deque[tuple[list[str], Future[tuple[np.ndarray, Decoded]]]] = deque()
    pool = ThreadPoolExecutor(decoder.calls)

    def decode(batch: list[str]) -> tuple[np.ndarray, Decoded]:
        rows = free.pop() if free else np.empty((films, size, size), np.uint8)
        return rows, decoder.decode_resize([source.films[name] for name in batch], size, rows[: len(batch)])

    try:
        while True:
            for batch in islice(batches, ahead - len(waiting)):
                waiting.append((batch, pool.submit(decode, batch)))
            if not waiting:
                return
            batch, decoding = waiting.popleft()
            rows, decoded = decoding.result()
            yield batch, decoded
            free.append(rows)
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(names: list[str], films: int, calls: int) -> Generator[list[str], None, None]:
    """Cut into batches of at most ``films``: towards the end smaller ones, so that all calls end at about one time."""
    first = 0
    while first < len(names):
        count = max(1, films // 8, min(films, (len(names) - first) // calls))
        yield names[first : first + count]
        first += count


def _write(plan: Plan, names: list[str], decoded: Decoded, size: int, writer: StoreWriter) -> None:
    """Turn a decoded batch into entries and rows; what the backend leaves to Pillow is decoded here."""
    entries = []
    for row, name in enumerate(names):
        status = decoded.statuses[row]
        if status.code == Code.UNSUPPORTED:
            status = _fall_back(plan.source.films[name], size, decoded, row)
        if not status.ok:
            entries.append(Entry(name, "rejected", str(status)))
            continue
        repair = plan.metadata.film_repairs.get(name, "")
        sums = int(decoded.pixel_sum[row]), int(decoded.pixel_sumsq[row])
        entries.append(Entry(name, "repaired" if repair else "ok", repair, *sums, checksum(decoded.images[row])))
    accepted = np.array([entry.accepted for entry in entries])
    writer.append(entries, decoded.images if accepted.all() else decoded.images[accepted])


def _fall_back(path: str, size: int, decoded: Decoded, row: int) -> Status:
    from cxrfast.decode import pillow  # takes a while to load, and NIH's films do without

    status, image = pillow.decode_one(path, size)
    if image is not None:
        decoded.images[row] = image
        decoded.pixel_sum[row], decoded.pixel_sumsq[row] = pillow.pixel_sums(image)
    return status


def _result(store: Path, decoded: int, seconds: float) -> dict[str, Any]:
    manifest = json.loads((store / "manifest.json").read_text())
    return {
        "store": str(store),
        "size": manifest["size"],
        "backend": manifest["backend"],
        **manifest["counts"],
        "rejected_by_reason": manifest["rejected"],
        "decoded_now": decoded,
        "images_per_second": round(decoded / seconds, 1) if seconds else None,
    }
