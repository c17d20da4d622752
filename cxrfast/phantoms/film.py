"""One phantom film as a job for a worker process. Imports little, because every worker imports it when it starts."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

from cxrfast.files import write_atomic
from cxrfast.phantoms import png
from cxrfast.phantoms.draw import Case, draw_film

Job = tuple[Path, Case, int, int, int]
"""Where to write, what to draw, size in pixels, seed and index of the film in the set."""

RGBA_EVERY = 100  # films; NIH has about 1 % of them


def is_rgba(seed: int, index: int) -> bool:
    """Whether film ``index`` is encoded as RGBA: one of every hundred in a row, which one the seed says."""
    return (index - seed) % RGBA_EVERY == RGBA_EVERY // 2


def film_bytes(case: Case, size: int, seed: int, index: int) -> bytes:
    """The PNG file of film ``index``."""
    encode = png.encode_rgba if is_rgba(seed, index) else png.encode_grey
    minutes, second = divmod(index, 60)
    hours, minute = divmod(minutes, 60)
    # NIH's films carry times of September 2016; here they count the films
    return encode(draw_film(case, size), (2016, 9, 1 + hours // 24 % 30, hours % 24, minute, second))


def start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it: a worker of a killed parent would wait for jobs for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def write_film(job: Job) -> None:
    path, case, size, seed, index = job
    write_atomic(path, film_bytes(case, size, seed, index))
