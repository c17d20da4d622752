"""Writes a set of phantom films: cases -> pixels -> PNG files -> CSV and lists.

Promises: the same (images, seed, size) gives the same bytes whatever the number of workers (with one version of the
packages and of zlib); a run that was killed goes on when it is repeated; nothing that somebody else put into the folder
is overwritten. The CSV and the lists are written last: a folder that has them is complete.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

import cxrfast
from cxrfast.errors import InputError, ResourceError
from cxrfast.files import holds_other_files, write_atomic, write_json
from cxrfast.nih import CLASSES, TEST_LIST, TRAIN_LIST
from cxrfast.phantoms import png
from cxrfast.phantoms.cases import Cases, make_cases
from cxrfast.phantoms.draw import Case
from cxrfast.phantoms.film import Job, is_rgba, start_worker, write_film

CSV_NAME = "Data_Entry_2017_v2020.csv"
RECORD_NAME = "phantoms.json"  # which set the folder holds or is to hold
MIN_SIZE, MAX_SIZE = 64, 4096
MAX_IMAGES = 1_000_000


def generate(out: Path, images: int, seed: int, size: int = 1024, workers: int | None = None) -> dict[str, Any]:
    """Write, or finish, a set of phantom films.

    Args:
        out: the folder; made if absent. It may hold an unfinished or finished set of the same images, seed and size.
        images: N films, in ``out/images``.
        seed: >= 0; everything about the set follows from it.
        size: side of a film in pixels; NIH's are 1024.
        workers: processes; as many as there are cores if None.
    Returns:
        counts for the command's last line: films, patients, how many were there already, bytes.
    Raises:
        InputError: an option out of range, or a folder that holds something else.
        ResourceError: a worker process was killed; the same call goes on.
    """
    _check(images, seed, size, workers)
    _claim(out, {"images": images, "seed": seed, "size": size, "cxrfast": cxrfast.__version__})
    cases = make_cases(images, seed)
    folder = out / "images"
    folder.mkdir(exist_ok=True)
    paths = [folder / name for name in cases.table["file"]]
    missing = [index for index, path in enumerate(paths) if not _is_complete(path)]
    jobs = [(paths[index], _case(cases, index, seed), size, seed, index) for index in missing]
    with tqdm(total=images, initial=images - len(jobs), desc="phantoms", unit="film") as bar:
        for _ in _each(jobs, workers or _num_cores()):
            bar.update()
    train, test = cases.lists()
    write_atomic(out / TRAIN_LIST, train)
    write_atomic(out / TEST_LIST, test)
    write_atomic(out / CSV_NAME, cases.csv())
    return {
        "out": str(out),
        "images": images,
        "patients": int(cases.table["patient"].iloc[-1]),
        "already_there": images - len(jobs),
        "rgba": sum(is_rgba(seed, index) for index in range(images)),
        "nbytes": sum(path.stat().st_size for path in paths),
        "positives": dict(zip(CLASSES, cases.labels.sum(axis=0).tolist(), strict=True)),
    }


def _case(cases: Cases, index: int, seed: int) -> Case:
    row = cases.table.iloc[index]  # its columns by [], for a Series of pandas 2 has a method called view
    signs = frozenset(name for name, there in zip(CLASSES, cases.signs[index], strict=True) if there)
    return Case((seed, 1, int(row["patient"])), (seed, 2, index), float(row["age"]), row["sex"], row["view"], signs)


def _check(images: int, seed: int, size: int, workers: int | None) -> None:
    if not 1 <= images <= MAX_IMAGES:
        raise InputError(f"--images is {images}; choose 1 to {MAX_IMAGES:,}")
    if seed < 0:
        raise InputError(f"--seed is {seed}; choose 0 or more")
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise InputError(f"--size is {size} pixels; choose {MIN_SIZE} to {MAX_SIZE}")
    if workers is not None and workers < 1:
        raise InputError(f"--workers is {workers}; choose 1 or more")


def _claim(out: Path, record: dict[str, Any]) -> None:
    """Make the folder ours by writing the record, or see that it is ours already."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder for the films")
    record_path = out / RECORD_NAME
    if record_path.is_file():
        try:
            found = json.loads(record_path.read_text())
        except ValueError:
            found = None
        if (out / CSV_NAME).is_file() and isinstance(found, dict):
            found = {**found, "cxrfast": record["cxrfast"]}  # finished: whichever version drew it, it stays as it is
        if found != record:
            raise InputError(
                f"{out} holds another set of phantoms ({found}, asked for {record}); choose another folder"
            )
        return
    if holds_other_files(out, record_path):
        raise InputError(f"{out} is not empty and holds no set of phantoms; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(record_path, record)


def _is_complete(path: Path) -> bool:
    """Films get their name when they are whole; the end is looked at in case somebody cut one since."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(png.END), os.SEEK_END)
            return file.read() == png.END
    except OSError:  # absent, or shorter than that
        return False


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _each(jobs: list[Job], workers: int) -> Iterator[None]:
    """Do every job, in this process or in several; yields as each is done."""
    workers = min(workers, len(jobs))
    if workers <= 1:
        yield from map(write_film, jobs)
        return
    # Processes start afresh: a fork of a process that runs threads (torch, a test) may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=start_worker)
    try:
        yield from pool.map(write_film, jobs, chunksize=4)
    except BrokenProcessPool as error:
        raise ResourceError(
            "a process that draws was killed (memory?); repeat the command to go on, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
