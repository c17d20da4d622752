"""CUDA kernels on the CPU: compiles the programs that run them on threads (cuda_host.h), under ThreadSanitizer too."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def compile_host(source: str, target: Path, *flags: str) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    warnings = ("-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror")
    command = [compiler, "-std=c++20", "-O1", "-ffp-contract=off", *warnings, *flags]
    done = subprocess.run([*command, str(HERE / source), "-o", str(target), "-pthread"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def sanitised(source: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The source as a program, run under ThreadSanitizer: exit code 66 where it finds a race."""
    program = compile_host(source, folder / "program", "-g", "-fsanitize=thread", "-DCXRFAST_MAIN", *flags)
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([str(program)], env=environment, capture_output=True, text=True, timeout=300)
