"""Which backends are installed, and which one a command takes."""

from __future__ import annotations

import os

from cxrfast.decode import Decoder
from cxrfast.decode.pillow import PillowDecoder
from cxrfast.errors import InputError


def missing(backend: str) -> str:
    """Why a backend cannot be used here; empty if it can."""
    if backend == "native":
        try:
            import cxrfast._png  # noqa: F401
        except ImportError as error:
            return f"the compiled decoder is not installed ({error}); reinstall cxrfast where a C++ compiler is"
    return ""


def choose_decoder(backend: str, workers: int = 0) -> tuple[Decoder, str]:
    """The decoder for ``auto``, ``native`` or ``pillow``, and one clause that says why it was chosen.

    Args:
        workers: threads or processes; 0 = one for each core this process may use.
    Raises:
        InputError: a backend was asked for by name that is not installed, or does not exist.
    """
    workers = workers or available_cores()
    if backend == "auto":
        reason = missing("native")
        if reason:
            return PillowDecoder(workers), f"{workers} processes; {reason}"
        return _native(workers), f"{workers} threads, the fastest that is installed"
    if reason := missing(backend):
        raise InputError(f"--backend {backend} cannot be used: {reason}")
    if backend == "native":
        return _native(workers), f"{workers} threads, as asked"
    if backend == "pillow":
        return PillowDecoder(workers), f"{workers} processes, as asked"
    raise InputError(f"--backend {backend} does not exist; choose auto, native or pillow")


def available_cores() -> int:
    """Cores that this process may run on (a container may have fewer than the machine)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _native(workers: int) -> Decoder:
    from cxrfast.decode.native import NativeDecoder

    return NativeDecoder(workers)
