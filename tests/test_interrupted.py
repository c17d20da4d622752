"""Each command that writes, killed or refused at every change it makes in its folder, and repeated until it is done.

The random kills of the commands' own tests seldom meet the moments between two changes; here each of them is met.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from helpers import content, write_films
from safetensors import safe_open
from training import make_store, without_speeds

Check = Callable[..., tuple[int, Path]]


def _end_before_change(folder: Path, number: int, end: str) -> None:
    """When this process is about to create, rename or remove something there for the ``number``-th time, end it.

    ``end``: "killed" by SIGKILL, or "disk full": the operation fails with ENOSPC.
    """
    seen = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in ("os.mkdir", "os.rename", "os.remove", "open") or not isinstance(args[0], str | os.PathLike):
            return
        changes = bool(args[2] & os.O_CREAT) if event == "open" else event != "os.mkdir" or not os.path.isdir(args[0])
        if changes and str(folder) in os.fspath(args[0]):
            seen += 1
            if seen == number and end == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if seen == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(args[0]))

    sys.addaudithook(watch)


def _command(name: str, arguments: list[str], folder: Path, number: int, end: str) -> None:
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        _end_before_change(folder, number, end)
        sys.exit(import_module(f"cxrfast.cli.{name}").main(arguments))


def files(folder: Path) -> dict[str, Any]:
    """Content of all files, but for a run's speeds and where it lies (a header's order differs from save to save)."""
    found: dict[str, Any] = {}
    for name, data in content(folder).items():
        found[name] = data.replace(str(folder).encode(), b"FOLDER")
        if name.endswith(".safetensors"):
            with safe_open(folder / name, "np") as file:
                found[name] = {
                    **{key: file.get_tensor(key).tobytes() for key in file.keys()},  # noqa: SIM118 (no mapping)
                    **file.metadata(),
                }
        elif name == "metrics.jsonl":
            found[name] = without_speeds([json.loads(line) for line in data.splitlines()])
    return found


@pytest.fixture(params=["killed", "disk full"])
def check(request: pytest.FixtureRequest, children: ForkServerContext, tmp_path: Path) -> Check:
    """End and repeat ``cxrfast-NAME BEFORE FOLDER OPTIONS``.

    Returns how often it was ended, and the folder of one that was not.
    """
    end = request.param

    def ended_and_repeated(name: str, before: list[str], *options: str) -> tuple[int, Path]:
        def run(folder: Path, number: int) -> int | None:
            arguments = [*before, str(folder), *options]
            child = children.Process(target=_command, args=(name, arguments, folder, number, end))
            child.start()
            child.join(120)
            return child.exitcode

        undisturbed, disturbed = (tmp_path / f"{name} {how}" for how in ("undisturbed", "disturbed"))
        assert run(undisturbed, 0) == 0
        times = 0
        while (code := run(disturbed, times + 1)) != 0:  # always one change further than the time before
            assert code == (-signal.SIGKILL if end == "killed" else 3), f"after {times} times"
            assert end == "killed" or not list(disturbed.rglob("*.tmp"))
            times += 1
        assert files(disturbed) == files(undisturbed)
        return times, undisturbed

    return ended_and_repeated


def test_phantoms(check: Check) -> None:
    small = ("--images", "4", "--seed", "3", "--size", "128", "--workers", "1")
    assert check("phantoms", [], *small)[0] >= 6


@pytest.mark.parametrize("backend", ["native", "pillow"])
def test_prep(check: Check, tmp_path: Path, backend: str) -> None:
    if backend == "native":
        pytest.importorskip("cxrfast._png", reason="the compiled decoder is not installed")
    films = write_films(tmp_path / "films", 20)
    options = ("--size", "32", "--backend", backend, "--workers", "1")
    assert check("prep", [str(films)], *options)[0] >= 6


@pytest.mark.slow
def test_train_and_eval(check: Check, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store").path
    options = ("--resume", "--epochs", "2", "--batch-size", "40", "--head", "gap", "--checkpoint-steps", "1")
    times, run = check("train", [str(store)], *options)
    assert times >= 6
    assert check("eval", [str(run), "--out"], "--no-figures", "--bootstrap", "0")[0] >= 6
