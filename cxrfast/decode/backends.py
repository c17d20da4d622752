"""Which backends are installed, and which one a command takes."""

from __future__ import annotations

import json
import os
from pathlib import Path

from cxrfast.decode import Decoder
from cxrfast.errors import InputError

BACKENDS = ("native", "pillow", "dali", "dali-native")


def missing(backend: str) -> str:
    """Why a backend cannot be used here; empty if it can."""
    if backend in ("native", "dali", "dali-native"):
        try:
            import cxrfast._png  # noqa: F401
        except ImportError as error:
            return f"the compiled decoder is not installed ({error}); reinstall cxrfast where a C++ compiler is"
    if backend in ("dali", "dali-native") and not dali_version():
        return "NVIDIA DALI is not installed; pip install 'cxrfast[dali]' (Linux only)"
    if backend == "dali-native":
        return _operator_missing()
    return ""


def choose_decoder(backend: str, workers: int = 0, require_gpu: bool = False) -> tuple[Decoder, str]:
    """The decoder for ``auto`` or one of ``BACKENDS``, and one clause that says why it was chosen.

    Args:
        workers: threads or processes; 0 = one for each core this process may use.
        require_gpu: a GPU must resize; ``auto`` then takes a DALI backend.
    Raises:
        InputError: a backend was asked for by name that is not installed or does not exist, or a GPU that is not there.
    """
    workers = workers or available_cores()
    if backend == "auto":
        if require_gpu:
            backend = "dali" if missing("dali-native") else "dali-native"
        elif reason := missing("native"):
            return _pillow(workers), f"{workers} processes; {reason}"
        else:
            return _native(workers), f"{workers} threads, the fastest that is installed (no GPU decodes PNG)"
    if backend not in BACKENDS:
        raise InputError(
            f"--backend {backend} does not exist; choose auto, {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}"
        )
    if reason := missing(backend):
        raise InputError(f"--backend {backend} cannot be used: {reason}")
    if require_gpu and not backend.startswith("dali"):
        raise InputError(f"--backend {backend} uses no GPU; give dali or dali-native, or leave --require-gpu out")
    if backend == "native":
        return _native(workers), f"{workers} threads, as asked"
    if backend == "pillow":
        return _pillow(workers), f"{workers} processes, as asked"
    return _dali(backend, workers, require_gpu)


def dali_version() -> str:
    """The version of the NVIDIA DALI that is installed, or nothing. Does not import it, which takes seconds."""
    from importlib.metadata import PackageNotFoundError, version

    for cuda in ("130", "120", "110"):
        try:
            return version(f"nvidia-dali-cuda{cuda}")
        except PackageNotFoundError:
            continue
    return ""


def operator_path() -> Path:
    """Where the compiled DALI operators are, when they are."""
    return Path(__file__).parents[1] / "_dali_operator.so"


def available_cores() -> int:
    """Cores that this process may run on (a container may have fewer than the machine)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _native(workers: int) -> Decoder:
    from cxrfast.decode.native import NativeDecoder

    return NativeDecoder(workers)


def _pillow(workers: int) -> Decoder:
    from cxrfast.decode.pillow import PillowDecoder

    return PillowDecoder(workers)


def _dali(backend: str, workers: int, require_gpu: bool) -> tuple[Decoder, str]:
    from cxrfast.decode import dali

    if require_gpu and not dali.gpu_count():
        raise InputError("--require-gpu, but DALI finds no CUDA device; leave it out to prepare on the CPU")
    if backend == "dali":
        gpu = dali.gpu_count() > 0
        where = "the resize on the GPU" if gpu else "all on the CPU, for want of a CUDA device"
        return dali.DaliDecoder(workers, gpu=gpu), f"{workers} threads, {where}"
    where = "the resize on the GPU, as required" if require_gpu else "the resize on the CPU, where it costs least"
    return dali.DaliNativeDecoder(workers, gpu=require_gpu), f"{workers} threads, {where}"


def _operator_missing() -> str:
    """Why the DALI operators cannot be loaded, from what setup.py noted beside them."""
    again = "reinstall cxrfast with --no-build-isolation"
    try:
        note = json.loads(operator_path().with_name("_dali_build.json").read_text())
    except (OSError, ValueError):
        return f"its DALI operator was not built; {again}"
    if note["reason"]:
        return f"its DALI operator was not built ({note['reason']}); {again}"
    if not operator_path().is_file():
        return f"its DALI operator is not there; {again}"
    if note["dali"] != dali_version():
        return f"its operator was built for DALI {note['dali']}, and {dali_version()} is installed; {again}"
    return ""
